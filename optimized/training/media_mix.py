"""A mix of text and media: which kind a micro-batch is of, its samples, what they teach, and how the model does on those held out.

Everything that is drawn is a pure function of the seed and the number of the micro-batch, so a resumed run needs no sampler state.

Legend: B samples of a batch, T ids, N vectors, F features.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arbitor.optimized.training.data import (
    Corpus,
    Split,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import NATS_PER_BIT, validation_bpb
from arbitor.optimized.training.generate import first_window
from arbitor.optimized.training.media import (
    CAPTION_END,
    FOLDERS,
    SIDECAR_OF,
    Features,
    check_width,
    data_of,
    encoders_of,
    lead_of,
    weights_of,
)
from arbitor.optimized.training.media_files import Item, MediaFolder, load_media
from arbitor.optimized.training.media_speech import (
    CODEC_FILE,
    load_codec,
    padded,
    save_codec,
    tokens_of,
    trained_codec,
)
from arbitor.reference.config import NGRAM, SPECIAL_IDS, ArbConfig
from arbitor.reference.graph import Targets
from arbitor.reference.graph.audio import AUDIO_CODES
from arbitor.reference.graph.codec import AudioCodec
from arbitor.reference.graph.router import MODALITIES
from arbitor.reference.graph.talker import spoken_marks
from arbitor.reference.graph.targets import NO_TOKEN
from arbitor.reference.graph.video import latent_shape
from arbitor.sidecars import FeatureCache, SidecarError, read_audio, read_image, read_video
from arbitor.sidecars.audio import SAMPLE_RATE, refuse_clip
from arbitor.sidecars.encoders import whole_seconds

if TYPE_CHECKING:
    from arbitor.optimized.training.options import Settings
    from arbitor.optimized.training.runtime import Runtime
    from arbitor.reference.graph import ArbModel

MAX_CLIP_SECONDS = 30
"""Longest sound that is learned from, in seconds. Attention is over all of its frames, 41 and two thirds a second."""

CACHE_FOLDER = "features"
"""Folder of features in the folder of a run."""

ANSWERED_BY = {"video": "video", "speech": "audio"}
"""Head that answers the samples of a kind, where it is not the byte head."""

COMPONENTS = ("bytes", "route", "latent", "tokens")
"""Components of the loss that lines of metrics have."""

Say = Callable[[str], None]
"""What is told a sentence."""


@dataclass(frozen=True)
class Batch:
    """The samples of a micro-batch, all of one kind, on the CPU.

    Attributes:
        kind: one of KINDS.
        ids_BT: int64 [B, T]. Texts of samples of media have PAD behind them, where no position of the text sees it.
        media: features before the ids, by their names in `ArbModel.trunk`.
        targets: what the heads are taught; None: every byte.
    """

    kind: str
    ids_BT: Tensor
    media: Features = field(default_factory=dict)
    targets: Targets | None = None

    def taught_bytes(self) -> int:
        """Return the number of bytes that are predicted."""
        mask = None if self.targets is None else self.targets.taught_BT
        return self.ids_BT[:, 3:].numel() if mask is None else int(mask[:, 3:].sum())

    def on(self, device: torch.device | str) -> dict[str, Any]:
        """Return the arguments of `ArbModel.losses` on a device."""
        media = {name: value.to(device) for name, value in self.media.items()}
        arguments: dict[str, Any] = {"ids_BT": self.ids_BT.to(device), **media}
        if self.targets is not None:
            moved = {
                name: None if value is None else value.to(device)
                for name, value in vars(self.targets).items()
            }
            arguments["targets"] = Targets(**moved)
        return arguments


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
    ) -> None:
        """Read what the data are, and load the sidecars that they need. Nothing is written.

        Args:
            settings: of the run.
            config: of the model.
            runtime: where the run is.
            corpus, split: the text, read.
            run: folder of the run, or None where nothing is written.

        Raises:
            TrainingError, SidecarError: data or a sidecar that cannot be read.
            ValueError: data that the model has no use for.
        """
        self.settings, self.config = settings, config
        self.kinds = {kind: weight for kind, weight in weights_of(settings).items() if weight}
        self.run = run
        sources = data_of(settings)
        _refuse_unread(sources, config)
        self._corpora: dict[str, tuple[Corpus, Split]] = {"text": (corpus, split)}
        if "code" in sources:
            code = load_corpus(sources["code"], run)
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
        # By kind, since one file may be asked for as several media.
        self._unreadable: set[tuple[str, Path]] = set()
        self._decoded: set[tuple[str, bytes]] = set()
        self._seconds: dict[bytes, int] = {}
        self._warn: Say = lambda sentence: None
        self._runtime = runtime
        self._codec: AudioCodec | None = None
        self._tokens: dict[bytes, Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._sums: dict[str, dict[str, list[float]]] = {}
        self.ids_taken = 0
        self.validated: dict[str, dict[str, float | None]] = {}

    def begin(self, warn: Say) -> None:
        """Open the cache of features, which is the first thing that is written, and train the codec of speech.

        Args:
            warn: is told one sentence for each file that cannot be decoded.

        Raises:
            TrainingError: the folder of the cache cannot be made, or the codec of the run folder is refused.
        """
        self._warn = warn
        if "speech" in self._folders:
            self._codec = self._opened_codec()
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

    @property
    def codec(self) -> AudioCodec:
        """The codec of a run that learns to speak, once `begin` was called."""
        if self._codec is None:
            raise RuntimeError("codec was read, but the run must learn from speech, and have begun")
        return self._codec

    def _opened_codec(self) -> AudioCodec:
        """Return the codec of the run folder; or train it, and write it where the run has a folder."""
        folder = self._folders["speech"]
        path = None if self.run is None else self.run / CODEC_FILE
        if path is not None and path.exists():
            return load_codec(path, self._runtime, sha256=folder.sha256)
        items = folder.train

        def read(number: int) -> Tensor:
            item = self._readable("speech", items, number)
            return read_audio(item.path, max_seconds=MAX_CLIP_SECONDS)

        seed = self.settings.seed
        codec = trained_codec(read, len(items), self.config, self._runtime, seed=seed)
        if path is not None:
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
            if self._is_readable(kind, item):
                return item
        raise TrainingError(
            f"the folder {self._folders[kind].source!r} has no file of {kind} that can be decoded"
        )

    def feature(self, kind: str, item: Item, seconds: int | None = None) -> Tensor:
        """Return the features of an item, its latent, or its tokens; of a sound that is filled up to some seconds."""
        if kind == "speech":
            if item.content not in self._tokens:
                clip = read_audio(item.path, max_seconds=MAX_CLIP_SECONDS)
                self._tokens[item.content] = tokens_of(self.codec, clip).to(torch.int16)
            return self._tokens[item.content].long()
        if kind == "image":
            return self.encoders.features("vision", item.content, lambda: read_image(item.path))
        if kind == "video":
            side = latent_shape(self.config.video_latent)[-1]
            return self.encoders.features(
                "video", item.content, lambda: read_video(item.path, max_frames=1).frames, side=side
            )
        if item.content not in self._seconds:
            clip = whole_seconds(read_audio(item.path, max_seconds=MAX_CLIP_SECONDS))
            self._seconds[item.content] = len(clip) // SAMPLE_RATE
        seconds = seconds or self._seconds[item.content]
        filled = seconds * SAMPLE_RATE
        return self.encoders.features(
            "audio",
            item.content + seconds.to_bytes(4, "little"),
            lambda: whole_seconds(read_audio(item.path, max_seconds=MAX_CLIP_SECONDS), filled),
        )

    def _of_items(self, kind: str, items: Sequence[Item]) -> Batch:
        """Return the batch of some items that can be decoded."""
        texts = [item.text for item in items]
        if kind == "video":
            latent = torch.stack([self.feature(kind, item) for item in items])
            return self._captions(kind, texts, {}, latent=latent)
        if kind == "speech":
            return self._captions(
                kind, texts, {}, tokens_BN=padded([self.feature(kind, item) for item in items], NO_TOKEN)
            )
        seconds = None
        if kind == "audio":
            # Sounds of a batch have one length.
            seconds = max(self._seconds[item.content] for item in items)
        features_BNF = torch.stack([self.feature(kind, item, seconds) for item in items])
        return self._captions(kind, texts, {f"{kind}_BNF": features_BNF})

    def _captions(
        self,
        kind: str,
        texts: Sequence[bytes],
        media: Features,
        *,
        latent: Tensor | None = None,
        tokens_BN: Tensor | None = None,
    ) -> Batch:
        """Return a batch of texts after media, or of texts that a latent or tokens answer."""
        end = CAPTION_END if media else b""
        room = self.settings.context
        marks = [] if tokens_BN is None else spoken_marks(tokens_BN.shape[1])
        if media:
            lead = lead_of(media)
            leads_B1 = torch.full((len(texts), 1), len(lead))
            rows = [[*lead, *(text + end)[: room - len(lead)]] for text in texts]
        else:
            # As a prompt is read. Marks before it would tell the router that no text is asked for.
            rows = [first_window(text[:room]) for text in texts]
            leads_B1 = torch.tensor([[max(0, NGRAM - len(text))] for text in texts])
        longest = max(len(row) for row in rows) + len(marks)
        pad = SPECIAL_IDS["PAD"]
        # Filling before a text would tell how long the text is.
        ids_BT = torch.tensor([row + marks + [pad] * (longest - len(row) - len(marks)) for row in rows])
        place_T, ends_B1 = torch.arange(longest), torch.tensor([[len(row)] for row in rows])
        taught_BT = (place_T >= leads_B1) & (place_T < ends_B1)
        # The first id behind a text is no mark.
        spoken_BT = (place_T > ends_B1) & (place_T < ends_B1 + len(marks)) if marks else None
        answered = self._answered(kind, len(texts))
        modality_B = None if answered is None else answered.modality_B
        targets = Targets(modality_B, latent, tokens_BN, taught_BT=taught_BT, spoken_BT=spoken_BT)
        return Batch(kind, ids_BT, media, targets)

    def _answered(self, kind: str, batch: int) -> Targets | None:
        """Return the targets of the router for samples of a kind, or None where it learns nothing."""
        if not self._routed:
            return None
        return Targets(torch.full((batch,), MODALITIES.index(ANSWERED_BY.get(kind, "text"))))

    def take(self, model: ArbModel, *, rate: float, micro_step: int) -> float | None:
        """Run one pass, in which every weight behind the loss votes; see `Passes.take`."""
        batch = self.batch(micro_step)
        losses = model.losses(**batch.on(model.voting.faults.device))
        if not model.backward(losses, rate=rate, step=micro_step, undo=False):
            return None
        self.ids_taken += batch.ids_BT.numel()
        sums = self._sums.setdefault(batch.kind, {})
        for name in COMPONENTS:
            if name in losses:
                sums.setdefault(name, []).append(losses[name].item())
        return losses["bytes"].item()

    def metrics(self, *, validated: bool) -> dict[str, dict[str, float | None]]:
        """Return the mean losses of each kind since this was last asked, and what the newest validation found.

        Args:
            validated: whether the validation is of this step.
        """
        found: dict[str, dict[str, float | None]] = {}
        for kind, sums in self._sums.items():
            of_kind = found.setdefault(kind, {})
            for name, values in sums.items():
                of_kind[f"train_{_metric(name)}"] = _in_unit(name, sum(values) / len(values))
        self._sums = {}
        for kind, numbers in self.validated.items() if validated else ():
            found.setdefault(kind, {}).update(numbers)
        return found

    def validate(self, model: ArbModel, windows_WT: Tensor) -> float | None:
        """Measure a model on what is held out, and return the mean bits per byte of the kinds, weighted as they are mixed.

        Args:
            model: its weights are only read.
            windows_WT: the windows of the text, int64 [W, T].

        Returns:
            Bits per byte, or None where a loss is not finite.
        """
        settings = self.settings
        self.validated = {}
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
                self.validated[kind] = self._validated(model, self.held_out(kind))
        total, sum_ = Fraction(0), 0.0
        for kind, weight in self.kinds.items():
            bpb = self.validated[kind]["val_bpb"]
            if bpb is None:
                return None
            total += weight
            sum_ += float(weight) * bpb
        return sum_ / float(total)

    def held_out(self, kind: str) -> Iterator[Batch]:
        """Yield batches of `held_out_items`."""
        items = self.held_out_items(kind)
        for start in range(0, len(items), self.settings.batch):
            yield self._of_items(kind, items[start : start + self.settings.batch])

    def held_out_items(self, kind: str) -> list[Item]:
        """Return the items of media that are held out and can be decoded, `eval_windows` of them at most."""
        items = self._folders[kind].validation[: self.settings.eval_windows]
        return [item for item in items if self._is_readable(kind, item)]

    def training_items(self, kind: str) -> list[Item]:
        """Return the items of media that are learned from and can be decoded."""
        return [item for item in self._folders[kind].train if self._is_readable(kind, item)]

    def _is_readable(self, kind: str, item: Item) -> bool:
        """Return whether an item can be decoded. Features of what can are made, and kept; a sentence names what cannot."""
        decoded, unreadable = (kind, item.content), (kind, item.path)
        if decoded not in self._decoded and unreadable not in self._unreadable:
            try:
                # The codec is trained on what can be decoded, before there are tokens.
                if kind == "speech":
                    refuse_clip(repr(str(item.path)), read_audio(item.path, max_seconds=MAX_CLIP_SECONDS))
                else:
                    self.feature(kind, item)
                self._decoded.add(decoded)
            except (SidecarError, ValueError) as error:
                # A ValueError is about a medium that was decoded, such as a video of four pixels, and names no file.
                what = f"{str(item.path)!r}: " if isinstance(error, ValueError) else ""
                self._unreadable.add(unreadable)
                self._warn(f"{what}{error}; the file is left out")
        return unreadable not in self._unreadable

    @staticmethod
    def _validated(model: ArbModel, batches: Iterator[Batch]) -> dict[str, float | None]:
        """Return the mean losses of some batches. Bits per byte are a mean over bytes, the others over samples."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        with torch.no_grad():
            for batch in batches:
                losses = model.losses(**batch.on(model.voting.faults.device))
                for name in COMPONENTS:
                    if name in losses:
                        count = batch.taught_bytes() if name == "bytes" else len(batch.ids_BT)
                        sums[name] = sums.get(name, 0.0) + losses[name].item() * count
                        counts[name] = counts.get(name, 0) + count
        found = {f"val_{_metric(name)}": _in_unit(name, sums[name] / counts[name]) for name in sums}
        return found or {"val_bpb": None}


def _metric(name: str) -> str:
    return "bpb" if name == "bytes" else name


def _in_unit(name: str, value: float) -> float | None:
    """Return a loss as it is reported: bytes in bits, the others as they are, and None where it is not finite."""
    value = value / NATS_PER_BIT if name == "bytes" else value
    return value if math.isfinite(value) else None


def open_mix(
    settings: Settings,
    config: ArbConfig,
    runtime: Runtime,
    *,
    corpus: Corpus,
    split: Split,
    run: Path | None,
    recorded: Mapping[str, Any] | None,
    num_ranks: int = 1,
) -> Mix | None:
    """Return the mix of a run, or None where the run has one text and nothing else.

    Args:
        settings, config, runtime, corpus, split, run: as for `Mix`.
        recorded: settings of the run that is resumed, or None for a new one.
        num_ranks: ranks that train the model. A mix is trained by one.

    Raises:
        TrainingError, SidecarError, ValueError: as `Mix` and `Mix.refuse_other`; or there are several ranks; or passes are to be
            recorded, although those of a mix have no one shape.
    """
    if len(data_of(settings)) == 1:
        return None
    if num_ranks > 1:
        raise TrainingError(f"{num_ranks} ranks were started, but a mix with media is trained by one")
    if settings.cuda_graph:
        raise ValueError(
            "cuda_graph is True, but must be False or None for a mix: its passes have no one shape"
        )
    mix = Mix(settings, config, runtime, corpus=corpus, split=split, run=run)
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
