"""The model as users meet it: on the device that is there, loaded and saved as a folder, and made to write."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from arbitor import pretrained
from arbitor.alone import Alone
from arbitor.asked import Asked
from arbitor.generation import Text, added_text, refuse_unknown
from arbitor.optimized.training.adapter_state import AdapterState
from arbitor.optimized.training.media import encoders_of, media_features
from arbitor.optimized.training.model_folder import load_into, trained_context, write_folder
from arbitor.optimized.training.schedule import GAIN
from arbitor.placement import settled
from arbitor.reference import graph
from arbitor.reference.audit import APART, area_of
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.adapters import adapters_of
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.module import as_it_is
from arbitor.reference.graph.trunk import Trunk
from arbitor.reference.presets import preset
from arbitor.sidecars import Encoders


class ArbModel(Asked, graph.ArbModel):
    """Bytes in, logits of the next byte out; every weight ternary, trained in place by votes.

    A training loop of one's own is a forward pass, a backward pass that votes, and a step:

        model = ArbModel("tiny")
        for step, ids_BT in enumerate(batches):
            loss = model.losses(ids_BT)
            model.backward(loss, rate=6.0, step=step)
            model.step()

    Args:
        config: shape and rules, or the name of a preset.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `meta`, or a torch.device.
        dtype:  of activations, a torch.dtype or its name. None: bfloat16 with Triton on a GPU, else float32.
        ops:    op set that computes: `reference`, `triton`, or a module with the names of `arbitor.reference.ops`. None: Triton's
                on a GPU, else the reference's.
        seed:   64-bit seed of the starting weights and of the dither.

    Attributes:
        steps_taken:     steps that the weights were trained for.
        trained_context: bytes of the windows that it was trained on, or None where nobody said.
        encoders:        the sidecars that make features of raw media, or None; see `use_encoders`.

    Raises:
        TypeError or ValueError: an argument that is not allowed, or that the op set does not compute in.
        TrainingError: the device is not there, or the op set cannot run on it.
    """

    instead = "ArbForCausalLM(arb=model) of arbitor.transformers"

    def __init__(
        self,
        config: ArbConfig | str,
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
        ops: ModuleType | str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(config, ArbConfig | str):
            raise TypeError(
                f"config is a {type(config).__name__}, but must be an ArbConfig or the name of a preset"
            )
        place, number_format, op_set = settled(device, dtype, ops)
        super().__init__(
            preset(config) if isinstance(config, str) else config,
            ops=op_set,
            device=place,
            dtype=number_format,
            seed=seed,
        )
        self.voting.ranks = Alone()
        self.steps_taken = 0
        self.trained_context: int | None = None
        self.encoders: Encoders | None = None

    def use_encoders(self, encoders: Encoders | None) -> Self:
        """Return this model, which owns some frozen encoders from now on, so that it takes raw media.

        `losses`, `loss`, `respond` and calls of the model then take `images`, `sounds` and `clips`, as `trunk` does. The encoders
        follow the model to its device. They are in no `state_dict` and are not saved. Raises TypeError for what are no encoders.
        """
        if encoders is not None and not isinstance(encoders, Encoders):
            raise TypeError(f"encoders is a {type(encoders).__name__}, but must be Encoders or None")
        self.encoders = encoders
        return self

    @as_it_is
    def trunk(
        self,
        ids_BT: Tensor,
        *,
        images: Sequence[Tensor] | None = None,
        sounds: Sequence[Tensor] | None = None,
        clips: Sequence[Tensor] | None = None,
        image_BNF: Tensor | None = None,
        audio_BNF: Tensor | None = None,
        ledger: KVLedger | None = None,
    ) -> Trunk:
        """Return the stream of every position, as `graph.ArbModel.trunk` does, also for raw media before the ids.

        Args:
            ids_BT: bytes int64 [B, T], T >= 3.
            images: B pictures, uint8 [3, H, W] of any size.
            sounds: B sounds, float32 [T] at 16 kHz in [-1, 1], filled up with silence to the whole seconds of the longest.
            clips:  B clips, uint8 [T, 3, H, W], of which a few frames are read as pictures, in place of `images`.
            image_BNF, audio_BNF: features, in place of raw media of the same kind.
            ledger: as for `graph.ArbModel.trunk`.

        Raises:
            SidecarError: no encoder was named for a medium, or it cannot be loaded.
            TypeError or ValueError: media or features that do not fit.
        """
        features = {"image_BNF": image_BNF, "audio_BNF": audio_BNF}
        for name, made in self._features(images=images, sounds=sounds, clips=clips).items():
            if features[name] is not None:
                raise ValueError(f"{name} is given beside raw media of its kind, but only one of them may be")
            features[name] = made
        return super().trunk(ids_BT, ledger=ledger, **features)

    def _features(self, **media: Any) -> dict[str, Tensor]:
        """Return the features of raw media on the device of the model."""
        device = self.device
        encoders = None if self.encoders is None else self.encoders.to(device)
        return {
            name: value.to(device) for name, value in media_features(encoders, self.config, **media).items()
        }

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
        ops: ModuleType | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Return the model of a folder, a run, a checkpoint, or a hub.

        Args:
            source: a folder that `save_pretrained` wrote; a run of `arb train`, of which the best checkpoint is taken, or another
                where that is missing or refused; a checkpoint file; or OWNER/NAME on a hub, through `huggingface_hub`. A run
                that learned from media brings its encoders along (`use_encoders`).
            device, dtype, ops: as for `ArbModel`.
            revision: branch, tag or commit of a model on a hub.

        Raises:
            FileNotFoundError: there is no such model.
            CheckpointError: what is there is damaged, was tampered with, or holds what no model holds.
            ImportError: the model is on a hub, and huggingface_hub is not installed.
            TypeError, ValueError, TrainingError: as `ArbModel`.
        """
        place, number_format, op_set = settled(device, dtype, ops)
        config, checkpoint = pretrained.read_source(source, revision)
        model = cls(config, device=place, dtype=number_format, ops=op_set, seed=checkpoint.seed)
        load_into(model, checkpoint)
        model.steps_taken = checkpoint.step
        model.trained_context = trained_context(checkpoint)
        # Of a run that learned from media. They are loaded when the first picture or sound comes.
        sources = {kind: checkpoint.run.get(kind) for kind in ("vision", "audio", "video")}
        named = {kind: source for kind, source in sources.items() if isinstance(source, str) and source}
        if named:
            model.use_encoders(encoders_of(named, device=place))
        return model

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model into a folder, for `from_pretrained`: `config.json` and `model.safetensors`.

        A reader sees the files before or the files after, never a part of one. What votes have gathered is saved too, so that
        training can go on.

        Raises:
            ValueError: the folder is that of a run, or has a `config.json` of something else.
            RuntimeError: votes wait for a step; the model has float linears; or it is torn by a pass or a step that raised.
            TrainingError: the disk is full or cannot be written.
        """
        self.voting.check_whole()
        of_adapters = {id(each) for adapter in adapters_of(self).values() for each in adapter.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in of_adapters:
                raise RuntimeError(
                    f"save_pretrained was called, but {name!r} is a float weight, which its folder does not hold: "
                    "`arb export --merge float` writes float linears"
                )
        if self.voting.waits:
            raise RuntimeError(
                "backward was called without a step after it, but save_pretrained must follow model.step()"
            )
        run = {} if self.trained_context is None else {"context": self.trained_context}
        adapter = AdapterState.of(self)
        write_folder(
            folder, self.config, self.state(), step=self.steps_taken, seed=self.seed, run=run, adapter=adapter
        )

    def push_to_hub(
        self, name: str, *, private: bool | None = None, message: str = "Upload an ARB model"
    ) -> str:
        """Upload what `save_pretrained` writes to a hub, through `huggingface_hub`, and return the address of the commit.

        Args:
            name: OWNER/NAME; created where there is no model of that name.
            private: of a new one, whether others may not see it; None: as the owner has it by default.
            message: of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            TypeError, ValueError, RuntimeError, TrainingError: the name is no OWNER/NAME; or as `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            self.save_pretrained(path)
            return pretrained.send_folder(path, name, private=private, message=message)

    def generate(
        self,
        prompts: Text | Sequence[Text],
        *,
        max_new_bytes: int = 256,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Text | Sequence[Text] = (),
        seed: int | Sequence[int] = 0,
        context: int | None = None,
        images: Sequence[Tensor] | None = None,
        sounds: Sequence[Tensor] | None = None,
        clips: Sequence[Tensor] | None = None,
        stream: bool = False,
        **unknown: Any,
    ) -> Any:
        """Return what the model adds to a prompt, or to each of several. The same arguments give the same text.

        Bytes are drawn. A string is taken as UTF-8, and what is added to it is decoded as such, with � for bytes that are none.

        Args:
            prompts: a string or bytes; or a sequence of them, which go on together, each as it would alone. May be empty.
            max_new_bytes: bytes to add at most.
            temperature: 0 takes the likeliest byte; otherwise logits are divided by it.
            top_k: only so many of the likeliest bytes may be drawn, 1 .. 256.
            top_p: only the likeliest bytes may be drawn, as few as have this probability together, above 0 and at most 1.
            stop: a string or bytes, or several: a text ends before the first that would come.
            seed: of the draws, for the first prompt, 0 .. 2^64 - 1; the next has the next number, and so on. Or one number for
                each prompt.
            context: bytes at the end of a prompt that are read, at least 3. None: as many as the model was trained on, or all
                where nobody said.
            images, sounds, clips: raw media that stand before the prompts, one for each, as for `trunk`; None: none. A text after
                media ends as captions do in training, with a line end: give `stop` to end there.
            stream: return an iterator over pieces of the text instead, each as soon as it is there; for several prompts, over lists
                with a piece for each, which may be empty. The model must not be changed before the last piece was taken.

        Returns:
            A string for a string, bytes for bytes, and a list for a sequence; without the prompts.

        Raises:
            TypeError or ValueError: an argument of another name or type, or out of range.
        """
        refuse_unknown(unknown)
        return added_text(
            self,
            prompts,
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            context=self.trained_context if context is None else context,
            features=partial(self._features, images=images, sounds=sounds, clips=clips),
            stream=stream,
        )

    @property
    def num_weights(self) -> int:
        """Ternary weights of the model, as `arb audit` counts them. The sign of an edge of the graph is no weight."""
        return sum(
            math.prod(module.weight.shape)
            for name, module in self.ternary_modules().items()
            if area_of(name) not in APART
        )

    @property
    def state_bytes(self) -> int:
        """Bytes that weights and tables take where the model is: all that training keeps, beside activations."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def extra_repr(self) -> str:
        """Return the sizes, as the first line of what `repr` says."""
        return (
            f"{self.config.name}: {self.num_weights:,} ternary weights, {self.state_bytes:,} bytes of state, "
            f"device={self.context.device}, dtype={self.dtype}"
        )

    def _ternary_update_memory(
        self,
        *,
        loss_signal: Tensor | None = None,
        loss_components: Mapping[str, Tensor] | None = None,
        rate: float | None = None,
    ) -> bool:
        """Do as `backward` and `step` do: the name that the seed documents have for the two.

        It runs the backward pass itself, so that `loss.backward()` before it has to go.

        Args:
            loss_signal: a scalar loss of this model, with its graph.
            loss_components: losses by name, as `losses` returns them, in place of `loss_signal`.
            rate: size of the votes; None: that of the flat part of a run.

        Returns:
            Whether the loss was finite. If it was not, every byte stays as it was.

        Raises:
            TypeError or ValueError: none of the two losses is given, or both; or as `backward`.
        """
        if (loss_signal is None) == (loss_components is None):
            raise ValueError(
                "loss_signal and loss_components are both given or both missing, but one of them must say what is learned"
            )
        if loss_signal is not None and not isinstance(loss_signal, Tensor):
            raise TypeError(
                f"loss_signal is a {type(loss_signal).__name__}, but must be the loss as a tensor with its graph: votes are "
                "cast by the backward pass that this call runs, in place of loss.backward()"
            )
        loss: Any = loss_components if loss_signal is None else loss_signal
        size = GAIN * self.config.theta if rate is None else rate
        voted = self.backward(loss, rate=size, step=self.steps_taken)
        self.step()
        return voted

    def step(self) -> None:
        """Apply the step rule, as `Stateful.step` says, and count the step."""
        super().step()
        self.steps_taken += 1
