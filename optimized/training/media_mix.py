"""A mix of text and media: which kind a micro-batch is of, its samples, what they teach, and how the model does on those held out.

Everything that is drawn is a pure function of the seed and the number of the micro-batch, so a resumed run needs no sampler state.

Legend: B samples of a batch, T ids, N vectors, F features.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.world import World, other_facts
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.data import (
    Corpus,
    Split,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import validation_bpb
from arbitor.optimized.training.media import (
    FOLDERS,
    SIDECAR_OF,
    check_width,
    data_of,
    encoders_of,
    weights_of,
)
from arbitor.optimized.training.media_batch import Batch, captioned
from arbitor.optimized.training.media_files import Item, MediaFolder, load_media
from arbitor.optimized.training.media_losses import COMPONENTS, Means, mean_losses
from arbitor.optimized.training.media_reader import MediaReader, Say
from arbitor.optimized.training.media_speech import (
    load_codec,
    save_codec,
    trained_codec,
)
from arbitor.optimized.training.run_folder import CODEC_FILE
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import Targets
from arbitor.reference.graph.audio import AUDIO_CODES
from arbitor.reference.graph.codec import AudioCodec
from arbitor.reference.graph.router import MODALITIES
from arbitor.reference.graph.video import latent_shape
from arbitor.sidecars import FeatureCache

if TYPE_CHECKING:
    from arbitor.optimized.training.options import Settings
    from arbitor.optimized.training.runtime import Runtime
    from arbitor.reference.graph import ArbModel

CACHE_FOLDER = "features"
"""Folder of features in the folder of a run."""

ANSWERED_BY = {"video": "video", "speech": "audio"}
"""Head that answers the samples of a kind, where it is not the byte head."""


class Mix:
    """The data of a run that has more than one text.

    Attributes:
        kinds: weights by kind, those of weight 0 left out.
        ids_taken: ids of the micro-batches since the last line of metrics.
        validated: numbers of the newest validation by kind.
    """

    def __init__(
        self,
        settings: Settings,
        config: ArbConfig,
        runtime: Runtime,
        *,
        corpus: Corpus,
        split: Split,
        run: Path | None,
        world: World,
    ) -> None:
        """Read what the data are, and load the sidecars that they need. Nothing is written.

        Args:
            settings: of the run.
            config: of the model.
            runtime: where the run is.
            corpus, split: the text, read.
            run: folder of the run, or None where nothing is written.
            world: the processes of the run. Each reads whole micro-batches, and takes its share of their samples.

        Raises:
            TrainingError, SidecarError: data or a sidecar that cannot be read.
            ValueError: data that the model has no use for.
        """
        self.settings, self.config = settings, config
        self.kinds = {kind: weight for kind, weight in weights_of(settings).items() if weight}
        self.run, self.world = run, world
        sources = data_of(settings)
        _refuse_unread(sources, config)
        self._corpora: dict[str, tuple[Corpus, Split]] = {"text": (corpus, split)}
        if "code" in sources:
            code = load_corpus(sources["code"], run, stream_bytes=settings.stream_bytes)
            self._corpora["code"] = (code, split_corpus(code, settings.context))
        self._folders: dict[str, MediaFolder] = {
            kind: load_media(kind, sources[kind], run) for kind in sources if kind in FOLDERS
        }
        sidecars = {name: getattr(settings, name) for name in SIDECAR_OF.values()}
        self.encoders = encoders_of(sidecars, device=runtime.device)
        for kind in (kind for kind in self._folders if kind in SIDECAR_OF):
            sidecar = self.encoders.sidecar(SIDECAR_OF[kind])
            if kind != "video":
                check_width(SIDECAR_OF[kind], sidecar.num_features, config)
        # The router has nothing to learn where one head answers everything.
        self._routed = bool(config.router_inner and self.kinds.keys() & ANSWERED_BY.keys())
        self.reader = MediaReader(self.encoders, side=latent_shape(config.video_latent)[-1])
        self._runtime = runtime
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._seen: dict[str, Means] = {}
        self._without_bits: set[str] = set()
        self.ids_taken = 0
        self.validated: dict[str, dict[str, float | None]] = {}

    def begin(self, warn: Say) -> None:
        """Open the cache of features, which is the first thing that is written, and train the codec of speech.

        Args:
            warn: is told one sentence for each file that cannot be decoded, and for each kind that leaves the run without bits.

        Raises:
            TrainingError: the folder of the cache cannot be made, the codec of the run folder is refused, or the codecs of ranks
                differ.
        """
        # Rank 0 has emptied a folder that is to begin anew.
        self.world.wait()
        self.reader.warn = warn
        if "speech" in self._folders:
            self.reader.codec = codec = self._opened_codec()
            self.world.agree({"the codec of speech": state_sha256(codec.state())})
            self.reader.speech = (*self._folders["speech"].train, *self._folders["speech"].validation)
        if not self._folders.keys() & SIDECAR_OF.keys():
            return
        folder = self.settings.feature_cache or (None if self.run is None else self.run / CACHE_FOLDER)
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="arb-features-")
            folder = self._temporary.name
        try:
            self.encoders.cache = FeatureCache(folder)
        except OSError as error:
            raise TrainingError(
                f"cannot use the folder of features {str(folder)!r}: {error.strerror or error}"
            ) from error

    def _opened_codec(self) -> AudioCodec:
        """Return the codec of the run folder; or train it, on every rank the same, and let rank 0 write it to the folder."""
        folder = self._folders["speech"]
        path = None if self.run is None else self.run / CODEC_FILE
        if path is not None and path.exists():
            return load_codec(path, self._runtime, sha256=folder.sha256)
        items = folder.train

        def read(number: int) -> Tensor:
            return self.reader.clip(self._readable("speech", items, number))

        seed = self.settings.seed
        codec = trained_codec(read, len(items), self.config, self._runtime, seed=seed)
        if path is not None and self.world.is_first:
            save_codec(path, codec, seed=seed, sha256=folder.sha256)
        return codec

    def document(self) -> dict[str, Any]:
        """Return what a resumed run must agree with: digests of the data, and the identities of the sidecars."""
        digests = {kind: folder.sha256 for kind, folder in self._folders.items()}
        digests |= {kind: corpus.sha256 for kind, (corpus, _) in self._corpora.items() if kind != "text"}
        sidecars = {
            SIDECAR_OF[kind]: self.encoders.sidecar(SIDECAR_OF[kind]).identity
            for kind in self._folders
            if kind in SIDECAR_OF
        }
        return {"media_sha256": digests, "sidecars": sidecars}

    def refuse_other(self, recorded: Mapping[str, Any] | None) -> None:
        """Refuse to go on with other data or other sidecars than the run was started with.

        Args:
            recorded: settings of the run that is resumed, or None for a new one.

        Raises:
            TrainingError: they differ.
        """
        if recorded is None:
            return
        for name, now in self.document().items():
            before = recorded.get(name)
            before = before if isinstance(before, dict) else {}
            what = "data" if name == "media_sha256" else "a sidecar"
            for kind in sorted(now.keys() | before.keys()):
                if now.get(kind) != before.get(kind):
                    raise TrainingError(
                        f"the run was started with {what} for {kind} that is {before.get(kind, 'none')!r}, and cannot go on with "
                        f"{now.get(kind, 'none')!r}"
                    )

    def first_lines(self) -> list[str]:
        """Return what is mixed, how often, and what the folders hold."""
        total = sum(self.kinds.values())
        shares = ", ".join(f"{kind} {float(weight / total):.1%}" for kind, weight in self.kinds.items())
        lines = [f"mix: {shares} of the micro-batches"]
        lines += [f"{kind}: {folder.description()}" for kind, folder in self._folders.items()]
        if "code" in self._corpora:
            corpus, split = self._corpora["code"]
            lines.append(f"code: {corpus.description()}; validation: {split.description()}")
        return lines

    def batch(self, micro_step: int) -> Batch:
        """Return the samples of a micro-batch.

        Raises:
            TrainingError: no file of its kind can be decoded.
        """
        kind, draws = self._drawn(micro_step)
        settings = self.settings
        if kind in self._corpora:
            corpus, split = self._corpora[kind]
            ids_BT = training_batch(
                corpus,
                split,
                batch=settings.batch,
                context=settings.context,
                seed=settings.seed,
                micro_step=micro_step,
            )
            return Batch(kind, ids_BT, targets=self._answered(kind, len(ids_BT)))
        items = self._folders[kind].train
        return self._of_items(kind, [self._readable(kind, items, draw % len(items)) for draw in draws])

    def _drawn(self, micro_step: int) -> tuple[str, list[int]]:
        """Return the kind of a micro-batch, and a number below 2^63 for each of its samples."""
        key = f"arb media: seed {self.settings.seed}, micro-step {micro_step}".encode()
        digest = hashlib.shake_256(key).digest(8 * (1 + self.settings.batch))
        numbers = [int.from_bytes(digest[i : i + 8], "little") >> 1 for i in range(0, len(digest), 8)]
        share = Fraction(numbers[0], 2**63) * sum(self.kinds.values())
        for kind, weight in self.kinds.items():
            if share < weight:
                return kind, numbers[1:]
            share -= weight
        raise AssertionError("the draw is below the sum of the weights")

    def _readable(self, kind: str, items: Sequence[Item], place: int) -> Item:
        """Return the item at a place, or the next one that can be decoded."""
        for number in range(len(items)):
            item = items[(place + number) % len(items)]
            if self.reader.is_readable(kind, item):
                return item
        raise TrainingError(
            f"the folder {self._folders[kind].source!r} has no file of {kind} that can be decoded"
        )

    def _of_items(self, kind: str, items: Sequence[Item]) -> Batch:
        """Return the batch of some items that can be decoded."""
        texts, context = [item.text for item in items], self.settings.context
        answered = self._answered(kind, len(texts))
        modality_B = None if answered is None else answered.modality_B
        values = self.reader.of_batch(kind, items)
        answers: dict[str, dict[str, Any]] = {"video": {"latent": values}, "speech": {"tokens_BN": values}}
        given = answers.get(kind, {"media": {f"{kind}_BNF": values}})
        batch = captioned(kind, texts, context=context, modality_B=modality_B, **given)
        return replace(batch, items=tuple(items))

    def _answered(self, kind: str, batch: int) -> Targets | None:
        """Return the targets of the router for samples of a kind, or None where it learns nothing."""
        if not self._routed:
            return None
        return Targets(torch.full((batch,), MODALITIES.index(ANSWERED_BY.get(kind, "text"))))

    def take(self, model: ArbModel, *, rate: float, micro_step: int, accum: int = 1) -> float | None:
        """Run one pass of this rank's samples, in which every weight behind the loss votes; see `Passes.take`."""
        batch = self.batch(micro_step)
        self._refuse_other_files(f"micro-batch {micro_step}", batch.items)
        losses = model.losses(**batch.share(self.world).on(model.voting.faults.device))
        if not model.backward(losses, rate=rate, step=micro_step, accum=accum, undo=False):
            return None
        self.ids_taken += batch.ids_BT.numel()
        names = [name for name in COMPONENTS if name in losses]
        means = model.voting.ranks.mean(torch.stack([losses[name].detach() for name in names])).tolist()
        self._seen.setdefault(batch.kind, Means()).add(batch, dict(zip(names, means, strict=True)))
        return means[names.index("bytes")]

    def metrics(self, *, validated: bool) -> dict[str, dict[str, float | None]]:
        """Return the mean losses of each kind since this was last asked, and what the newest validation found.

        Args:
            validated: whether the validation is of this step.
        """
        found = {kind: means.named("train") for kind, means in self._seen.items()}
        self._seen = {}
        for kind, numbers in self.validated.items() if validated else ():
            found.setdefault(kind, {}).update(numbers)
        return found

    def validate(self, model: ArbModel, windows_WT: Tensor) -> float | None:
        """Measure a model on what is held out, and return the mean bits per byte of the kinds, weighted as they are mixed.

        Args:
            model: its weights are only read.
            windows_WT: the windows of the text, int64 [W, T].

        Returns:
            Bits per byte; None where a loss is not finite, and where no byte of a kind is predicted.
        """
        settings = self.settings
        for kind in self.kinds:
            if kind in self._corpora:
                windows = windows_WT
                if kind != "text":
                    corpus, split = self._corpora[kind]
                    windows = validation_windows(
                        corpus, split, count=settings.eval_windows, context=settings.context
                    )
                device = str(model.voting.faults.device)
                bpb = validation_bpb(model, windows, batch=settings.batch, device=device)
                self.validated[kind] = {"val_bpb": bpb}
            else:
                means = mean_losses(model, self.held_out(kind))
                self.validated[kind] = means.named("val")
                if not means.predicted_bytes():
                    self._warn_without_bits(kind)
        total, sum_ = Fraction(0), 0.0
        for kind, weight in self.kinds.items():
            bpb = self.validated[kind]["val_bpb"]
            if bpb is None:
                return None
            total += weight
            sum_ += float(weight) * bpb
        return sum_ / float(total)

    def _warn_without_bits(self, kind: str) -> None:
        """Say once that no byte of a kind is predicted, since nobody would look for what the run then lacks."""
        if kind not in self._without_bits:
            self._without_bits.add(kind)
            self.reader.warn(
                f"of {kind} that is held out no byte is predicted: the run has no val_bpb, and keeps no best model"
            )

    def _refuse_other_files(self, what: str, items: Sequence[Item]) -> None:
        """Refuse ranks that read other files than rank 0, as a rank does where one cannot be decoded. Every rank must call this.

        The shapes of a pass follow from its files, and ranks that exchange other shapes end without a word, or learn nonsense.

        Raises:
            TrainingError: they do; every rank raises the same sentence, which names the first such file.
        """
        digest = hashlib.sha256(b"".join(item.content for item in items)).digest()
        numbers = self.world.gathered(torch.tensor(int.from_bytes(digest[:8], "little", signed=True)))
        if all(int(number) == int(numbers[0]) for number in numbers):
            return
        # A file may have another name on each machine.
        theirs = self.world.told(
            [(item.content.hex(), f"{item} ({item.content.hex()[:8]})") for item in items]
        )
        for rank, other in enumerate(theirs):
            for place, (its, first) in enumerate(zip_longest(other, theirs[0], fillvalue=("", None))):
                if its[0] != first[0]:
                    name = f"file {place + 1} of {what} that can be decoded"
                    raise other_facts(rank, name, its[1], first[1])

    def held_out(self, kind: str) -> Iterator[Batch]:
        """Yield batches of `held_out_items`."""
        items = self.held_out_items(kind)
        self._refuse_other_files(f"{kind} held out", items)
        for start in range(0, len(items), self.settings.batch):
            yield self._of_items(kind, items[start : start + self.settings.batch])

    def held_out_items(self, kind: str) -> list[Item]:
        """Return the items of media that are held out and can be decoded, `eval_windows` of them at most."""
        items = self._folders[kind].validation[: self.settings.eval_windows]
        return [item for item in items if self.reader.is_readable(kind, item)]

    def training_items(self, kind: str) -> list[Item]:
        """Return the items of media that are learned from and can be decoded."""
        return [item for item in self._folders[kind].train if self.reader.is_readable(kind, item)]


def open_mix(
    settings: Settings,
    config: ArbConfig,
    runtime: Runtime,
    *,
    corpus: Corpus,
    split: Split,
    run: Path | None,
    recorded: Mapping[str, Any] | None,
    world: World,
) -> Mix | None:
    """Return the mix of a run, or None where the run has one text and nothing else.

    Args:
        settings, config, runtime, corpus, split, run, world: as for `Mix`.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError, SidecarError, ValueError: as `Mix` and `Mix.refuse_other`; or passes are to be recorded, although those of a
            mix have no one shape.
    """
    if len(data_of(settings)) == 1:
        return None
    if settings.cuda_graph:
        raise ValueError(
            "cuda_graph is True, but must be False or None for a mix: its passes have no one shape"
        )
    mix = Mix(settings, config, runtime, corpus=corpus, split=split, run=run, world=world)
    mix.refuse_other(recorded)
    return mix


def _refuse_unread(sources: Mapping[str, str], config: ArbConfig) -> None:
    """Refuse data that a model of this configuration has no use for."""
    for kind, field_name, switch in (
        ("image", "image_features", "--enable-image"),
        ("audio", "audio_features", "--enable-audio"),
        ("video", "video_latent", "--enable-video"),
    ):
        if kind in sources and not getattr(config, field_name):
            raise ValueError(
                f"data_{kind} is {sources[kind]!r}, but must be left out for the model {config.name!r}, whose {field_name} is 0: "
                f"{switch} switches it on"
            )
    if "speech" in sources and config.talker_tokens != AUDIO_CODES:
        raise ValueError(
            f"data_speech is {sources['speech']!r}, but must be left out for the model {config.name!r}, whose talker_tokens is "
            f"{config.talker_tokens} and not {AUDIO_CODES}: --enable-speech switches a talker head on"
        )
    if "video" in sources and len(latent_shape(config.video_latent)) == 1:
        raise ValueError(
            f"data_video is {sources['video']!r}, but must be left out for the model {config.name!r}: its video_latent, "
            f"{config.video_latent}, is no 16 s^2, the size of a frame's latent"
        )
