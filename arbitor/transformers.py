"""Models as the library transformers meets them: its Auto classes and pipelines load them once this module is imported.

    import arbitor.transformers
    from transformers import pipeline

    write = pipeline("text-generation", model="my-model")

`my-model` is a folder of `ArbModel.save_pretrained` or `arb export`. Models run and are measured here. Weights are integers, and a
backward pass must vote: the library's `Trainer` trains them where its `training_step` calls `ArbOptimizer.backward`.

Legend: B sequences, T ids of each, V ids of the vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Generator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.asked import or_why_none
from arbitor.from_file import load_tensors
from arbitor.model import ArbModel
from arbitor.optimized.training.generate import PIECE, first_window
from arbitor.optimized.training.model_folder import CONFIG_FILE, MODEL_TYPE
from arbitor.optimized.training.regular import json_object
from arbitor.optimized.training.whole_file import told, write_whole
from arbitor.reference.config import NGRAM, NUM_BYTES, SPECIAL_IDS, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.uncompiled import out_of_graphs
from arbitor.sidecars import SidecarError
from arbitor.sidecars.libraries import library
from arbitor.unread import (
    IGNORED_LABEL,
    LOADING,
    OF_A_HUB,
    SAVING,
    check_ids,
    check_labels,
    check_mask,
    refuse_unread,
)
from arbitor.wrapped import HELD, inner_model

try:
    _library: Any = library("transformers")
except SidecarError as error:
    raise ImportError(
        "arbitor.transformers needs the package 'transformers', which is not installed: pip install 'arbitor[transformers]'"
    ) from error

# It needs the library too.
from arbitor.byte_tokenizer import ByteTokenizer

__all__ = ["ArbForCausalLM", "ArbTransformersConfig", "ByteTokenizer", "LedgerCache"]

SPREAD = ("balanced", "balanced_low_0", "sequential")
"""What the library takes for `device_map` to spread a model over devices."""

OF_A_RUN = ("run", "baselines", "beginning")
"""The fields of the `config.json` of a run that are about the run, and not about its model."""

GENERATION_FILE = "generation_config.json"
"""The file of a folder that says how the library's `generate` draws, where somebody said so."""


class ArbTransformersConfig(_library.PretrainedConfig):
    """The `config.json` of a model, as the library reads it.

    Args:
        model: an `ArbConfig` as JSON data. None: of no model; the library makes such configurations to compare with.
        more:  fields that every configuration of the library has. What `config.json` says of a run beside is left out.
    """

    model_type = MODEL_TYPE

    def __init__(self, model: dict[str, Any] | None = None, **more: Any) -> None:
        self.model = model
        self.vocab_size = VOCABULARY_SIZE
        for field, name in (("hidden_size", "width"), ("num_hidden_layers", "num_layers")):
            setattr(self, field, (model or {}).get(name))
        ids = {f"{name.lower()}_token_id": SPECIAL_IDS[name] for name in ("PAD", "BOS", "EOS")}
        known = {name: value for name, value in more.items() if name not in OF_A_RUN}
        # The library keeps it for no configuration that does not name it, and its Trainer sets it.
        self.use_cache = known.pop("use_cache", True)
        super().__init__(**{**ids, "tie_word_embeddings": False, **known})

    def arb(self) -> ArbConfig:
        """Return the configuration of the model. Raises ValueError or TypeError where there is none, or it is not one."""
        if self.model is None:
            raise ValueError(
                "config has no model, but must have an ArbConfig as JSON data in its field model"
            )
        return ArbConfig.from_json(json.dumps(self.model))


class LedgerCache:
    """What a model has read, between the steps of `generate`: its ledger, and how many ids of each row are in it.

    Attributes:
        ledger:  of all sequences.
        columns: ids of each row of `input_ids` that it has, padding among them.
    """

    is_compileable = False

    def __init__(self, ledger: KVLedger, columns: int) -> None:
        self.ledger, self.columns = ledger, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many ids of each row were read, padding among them."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> Self:
        """Put the sequences in another order, as beam search asks for."""
        self.ledger = self.ledger.select(beam_idx.tolist())
        return self


class ArbForCausalLM(_library.PreTrainedModel, _library.GenerationMixin):
    """A model with the interface that the library expects of a causal language model.

    Args:
        config: with the model's own configuration in its field `model`, whose weights are drawn by seed 0; None: that of `arb`.
        arb:    the model to wrap, in place of a new one.

    Raises TypeError where neither is given, or `arb` is of another type.

    Attributes:
        arb: the model itself. It trains, saves, and generates faster where its steps are recorded.
    """

    config_class = ArbTransformersConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = cast(bool, property(lambda self: self.votes))
    _is_stateful = True

    def __init__(self, config: ArbTransformersConfig | None = None, *, arb: ArbModel | None = None) -> None:
        if not isinstance(arb, ArbModel | None) or (arb is None and config is None):
            raise TypeError(
                f"arb is a {type(arb).__name__}, but must be an ArbModel, or config a configuration{inner_model(arb)}"
            )
        if config is None:
            config = ArbTransformersConfig(json.loads(cast(ArbModel, arb).config.to_json()))
        super().__init__(config)
        self.arb = ArbModel(config.arb(), device="cpu") if arb is None else arb
        # Only bytes are drawn, as by `ArbModel.generate`.
        self.generation_config = _library.GenerationConfig(
            suppress_tokens=list(range(NUM_BYTES, VOCABULARY_SIZE)), pad_token_id=SPECIAL_IDS["PAD"]
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *args: Any,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        **more: Any,
    ) -> Self:
        """Return the model of a folder, a run, a checkpoint or a hub, see `ArbModel.from_pretrained`.

        Args:
            pretrained_model_name_or_path: the source.
            args: none.
            config: of the same model as the checkpoint's; its other fields are kept.
            dtype, torch_dtype: of activations; None or `auto`: as `ArbModel` has it.
            device_map: a device, or None for the CPU; a model is on one device.
            revision: of a model on a hub.
            more: options of the library that change nothing here.

        Raises:
            TypeError: a source that is no path and no name; or as `ArbModel.from_pretrained`.
            ValueError: an option that the model does not read; a configuration of another model; or as `ArbModel.from_pretrained`.
        """
        if not isinstance(pretrained_model_name_or_path, str | PathLike):
            raise TypeError(
                f"pretrained_model_name_or_path is a {type(pretrained_model_name_or_path).__name__}, but must be a path, or "
                "OWNER/NAME on a hub"
            )
        if args:
            raise ValueError(f"{type(args[0]).__name__} is given by place, but options must be given by name")
        known = LOADING | (OF_A_HUB if Path(pretrained_model_name_or_path).exists() else {})
        refuse_unread({"attn_implementation": getattr(config, "_attn_implementation", None), **more}, known)
        wanted = dtype if dtype is not None else torch_dtype
        device = device_map if device_map is not None else "cpu"
        if isinstance(device, dict):
            places = set(device.values())
            if len(places) != 1:
                raise ValueError(
                    f"device_map is {device_map!r}, but must name one device for the whole model"
                )
            [device] = places
        if device in SPREAD:
            raise ValueError(
                f"device_map is {device_map!r}, but must be auto or one device, as a model is on one device"
            )
        revision = None if revision == "main" else revision
        arb = ArbModel.from_pretrained(
            pretrained_model_name_or_path,
            device=f"cuda:{device}" if isinstance(device, int) else device,
            dtype=None if wanted == "auto" else wanted,
            revision=revision,
        )
        own = json.loads(arb.config.to_json())
        if config is None:
            config = ArbTransformersConfig(own)
        if config.model != own:
            raise ValueError("config describes another model than the checkpoint, but must describe the same")
        config = copy.deepcopy(config)
        config._name_or_path = str(pretrained_model_name_or_path)
        model = cls(config, arb=arb)
        model._read_generation(pretrained_model_name_or_path, revision)
        return cast(Self, model.eval())

    def _read_generation(self, source: str | PathLike[str], revision: str | None) -> None:
        """Take over how the library draws from the file beside a model, where there is one. A run and a checkpoint have none."""
        path = Path(source)
        if path.exists() and not (path / GENERATION_FILE).is_file():
            return
        known = {} if revision is None else {"revision": revision}
        try:
            self.generation_config = _library.GenerationConfig.from_pretrained(str(source), **known)
        # A model on a hub may have none.
        except OSError:
            if path.exists():
                raise

    def save_pretrained(
        self, save_directory: str | PathLike[str], is_main_process: bool = True, **more: Any
    ) -> None:
        """Write the folder of `ArbModel.save_pretrained`, which every loader here and there reads, and the library's settings.

        `config.json` has the fields of the library's configuration too, and `generation_config.json` says how `generate` draws.

        Args:
            save_directory: the folder.
            is_main_process: whether this process is the one of several that writes.
            more: options of the library that change nothing for a model of one file.

        Raises:
            ValueError: an option that would change something; or as `ArbModel.save_pretrained`.
        """
        refuse_unread(more, SAVING)
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.arb.save_pretrained(folder)
        document = json_object(folder / CONFIG_FILE)
        # What the checkpoint says of the model stands, whatever somebody has made of its copy.
        document = {**json.loads(self.config.to_json_string(use_diff=True)), **document}
        texts = {
            CONFIG_FILE: json.dumps(document, indent=2) + "\n",
            GENERATION_FILE: self.generation_config.to_json_string(use_diff=True),
        }
        for name, text in texts.items():
            with told(repr(str(folder / name))):
                write_whole(folder / name, text.encode())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load tensors by the names of `state_dict`, or by those of `model.safetensors`, as the library's Trainer does.

        A file has the names of the `ArbModel`, and canonical weights. It holds all of a model, and its values are copied, so
        `strict` and `assign` say nothing of it. The seed of the dither stays that of this model, and `steps_taken` until an
        `ArbOptimizer` loads its state.

        Raises TypeError or ValueError for a file of another model, RuntimeError as torch does.
        """
        if not state_dict or any(name.startswith(HELD) for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        load_tensors(self.arb, state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    @property
    def votes(self) -> bool:
        """Whether a weight of the model would vote in a backward pass now: not so where all are frozen, as under adapters."""
        return any(not module.frozen for module in self.arb.ternary_modules().values())

    def add_adapter(self, *args: Any, **more: Any) -> None:
        """Refuse an adapter of peft, which knows float linears alone, by a ValueError."""
        raise ValueError(PEFT)

    def load_adapter(self, *args: Any, **more: Any) -> None:
        """Refuse an adapter of peft, as `add_adapter` does."""
        raise ValueError(PEFT)

    def resize_token_embeddings(self, *args: Any, **more: Any) -> None:
        """Refuse another number of ids, by a ValueError."""
        raise ValueError(
            f"another number of ids was asked for, but the model has {VOCABULARY_SIZE}: bytes and specials"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.arb.context.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.arb.dtype

    def parameters(self, recurse: bool = True) -> Generator[torch.nn.Parameter, None, str | None]:
        """Yield the float parameters, as `ArbModel.parameters` does."""
        return (yield from or_why_none(super().parameters(recurse)))

    def num_parameters(self, *args: Any, **more: Any) -> int:
        """Return the number of ternary weights. There are no parameters in torch's sense."""
        return self.arb.num_weights

    def can_generate(self) -> bool:
        """Return True."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes the cache."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: LedgerCache | None = None,
        attention_mask: Tensor | None = None,
        cache: LedgerCache | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next step: all ids, or those that the cache does not have.

        Newer versions of the library say `cache` where older ones say `past_key_values`, here and in `forward`.

        Raises ValueError for `use_cache=False`: a prompt of fewer than three bytes would be read in another way at every step. Also
        for what the model does not make, and for padding behind a prompt, as bytes follow its last place.
        """
        if more.get("use_cache") is False:
            raise ValueError("use_cache is False, but generate must keep what it has read")
        refuse_unread({name: more.get(name) for name in ("output_attentions", "output_hidden_states")})
        cache = _one_cache(past_key_values, cache)
        if cache is None:
            check_mask(attention_mask, *input_ids.shape)
            if attention_mask is not None and not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "attention_mask has padding behind a prompt, but must have it before: set padding_side to left"
                )
            return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True}
        return {
            "input_ids": input_ids[:, cache.columns :],
            "past_key_values": cache,
            "use_cache": True,
        }

    @out_of_graphs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: LedgerCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: LedgerCache | None = None,
        **more: Any,
    ) -> Any:
        """Return the logits after every id, and the loss of labels.

        A model predicts nothing from fewer than three bytes. The logits after the first two ids of a sequence of at least three
        are all 0, and add nothing to a loss. A shorter sequence is led by PAD and BOS, as a prompt of `ArbModel.generate` is.

        Args:
            input_ids: int64 [B, T], T >= 1.
            attention_mask: [B, T], 1 for ids and 0 for padding, which stands before or after them. A sequence sees no padding. With
                `past_key_values`, of what was read and of the ids, which have no padding.
            labels: int64 [B, T], as `input_ids`; -100 where no loss is wanted. The library's habit: it is shifted here.
            past_key_values: what earlier calls have read; the ids follow it.
            use_cache: whether to return what was read.
            return_dict: None or True; False is refused.
            cache: another name of `past_key_values`, one of which is None.
            more: nothing; what is named and not None is refused. The Trainer's `num_items_in_batch` is read where no weight would
                vote: with gradients the loss is the sum over labels divided by it, and without them it changes nothing.

        Returns:
            The library's `CausalLMOutputWithPast`, with logits float32 [B, T, V], or float64 of a model in float64. The loss is a
            mean over labels, that of `ArbModel.loss` where the labels are the ids.

        Raises:
            TypeError or ValueError: an argument of another shape, dtype or value, or one that the model does not read.
        """
        items = more.pop("num_items_in_batch", None)
        refuse_unread(more)
        if torch.is_grad_enabled() and self.votes:
            refuse_unread({"num_items_in_batch": items})
        if return_dict is False:
            raise ValueError("return_dict is False, but must be True or None")
        check_ids(input_ids)
        cache, (batch, length) = _one_cache(past_key_values, cache), input_ids.shape
        if cache is not None:
            check_mask(attention_mask, batch, cache.columns + length)
            if attention_mask is not None and not bool(attention_mask[:, -length:].all()):
                raise ValueError(
                    "attention_mask has padding among ids that follow what was read, but must have none there"
                )
        else:
            check_mask(attention_mask, batch, length)
        if labels is not None:
            check_labels(labels, input_ids)
        if cache is not None:
            logits_BTV = self._read_on(input_ids, cache)
            said_BT = torch.ones(batch, length, dtype=torch.bool, device=self.device)
        else:
            logits_BTV, said_BT, cache = self._read(input_ids, attention_mask, keep=bool(use_cache))
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].to(logits_BTV.device)
            wanted = (shifted != IGNORED_LABEL) & said_BT[:, :-1]
            summed = items is not None and torch.is_grad_enabled()
            # Of the wanted places alone: zeros between them would change the order of the sum, and so its last bits.
            loss = F.cross_entropy(
                logits_BTV[:, :-1][wanted], shifted[wanted], reduction="sum" if summed else "mean"
            )
            loss = loss / items if summed else loss
        output = library("transformers.modeling_outputs").CausalLMOutputWithPast
        return output(loss=loss, logits=logits_BTV, past_key_values=cache if use_cache else None)

    def _read(
        self, ids_BT: Tensor, mask_BT: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, Tensor, LedgerCache | None]:
        """Return what the model says of sequences that begin here.

        Returns:
            Logits [B, T, V]; where it says something, bool [B, T]; and what was read where that is wanted.
        """
        batch, length = ids_BT.shape
        spans = (
            [(0, length)] * batch if mask_BT is None else [_span(row, mask_BT[row]) for row in range(batch)]
        )
        alike = len(set(spans)) == 1 and not keep
        groups = [list(range(batch))] if alike else [[row] for row in range(batch)]
        wide = torch.promote_types(self.dtype, torch.float32)
        logits_BTV = torch.zeros(batch, length, VOCABULARY_SIZE, device=self.device, dtype=wide)
        said_BT = torch.zeros(batch, length, dtype=torch.bool, device=self.device)
        rows, ledgers = [], []
        for group in groups:
            first, end = spans[group[0]]
            window_BT = _led(ids_BT[group, first:end].to(self.device))
            found, ledger = self._logits(window_BT, keep=keep)
            # The last of the window is after the last id.
            places = torch.arange(end - min(end - first, found.shape[1]), end, device=self.device)
            rows.append((group, places, found[:, -len(places) :]))
            ledgers.append(ledger)
        for group, places, found in rows:
            where = torch.tensor(group, device=self.device)[:, None], places[None]
            logits_BTV = logits_BTV.index_put(where, found.to(wide))
            said_BT[where] = True
        cache = (
            LedgerCache(KVLedger.stack([ledger for ledger in ledgers if ledger]), length) if keep else None
        )
        return logits_BTV, said_BT, cache

    def _logits(self, window_BT: Tensor, *, keep: bool) -> tuple[Tensor, KVLedger | None]:
        """Return the logits of a window, two fewer than its ids, and its ledger where that is wanted."""
        if not keep:
            return self.arb(window_BT), None
        ledger = self.arb.new_ledger()
        pieces = []
        for start in range(0, window_BT.shape[1], PIECE):
            ledger.retract()
            pieces.append(self.arb(window_BT[:, start : start + PIECE], ledger=ledger))
        return torch.cat(pieces, dim=1), ledger

    def _read_on(self, ids_BT: Tensor, cache: LedgerCache) -> Tensor:
        """Return the logits after ids that follow what a cache has, and let it have them."""
        # What the model would have said itself is not what comes.
        cache.ledger.retract()
        logits_BTV = self.arb(ids_BT.to(self.device), ledger=cache.ledger)
        cache.columns += ids_BT.shape[1]
        return logits_BTV.to(torch.promote_types(self.dtype, torch.float32))


PEFT = (
    "an adapter of peft was given, but must be for float linears: use attach or load_adapter of arbitor.adapters on the "
    "attribute arb, or its use_float_linears first"
)
"""Why peft cannot put an adapter over ternary linears, and what can."""


def _one_cache(past_key_values: Any, cache: Any) -> LedgerCache | None:
    """Return what was read before, of the two names for it. Raises TypeError for something else, ValueError for both names."""
    given = {"past_key_values": past_key_values, "cache": cache}
    named = [name for name, value in given.items() if value is not None]
    if len(named) == 2:
        raise ValueError("cache and past_key_values are both given, but they are two names of one argument")
    for name in named:
        if not isinstance(given[name], LedgerCache):
            raise TypeError(
                f"{name} is a {type(given[name]).__name__}, but must be what an earlier call returned with use_cache=True"
            )
    return cast("LedgerCache | None", given[named[0]] if named else None)


def _span(row: int, mask_T: Tensor) -> tuple[int, int]:
    """Return where the ids of a sequence begin and end. Raises ValueError for padding between ids, or no ids."""
    places = mask_T.nonzero().flatten().tolist()
    if not places or places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            f"attention_mask has row {row} with no ids, or padding between ids, but ids must stand together"
        )
    return places[0], places[-1] + 1


def _led(ids_BT: Tensor) -> Tensor:
    """Return ids that a model can read: at least three, a shorter sequence led as a prompt is."""
    if ids_BT.shape[1] >= NGRAM:
        return ids_BT
    lead = first_window(bytes(ids_BT.shape[1]))[: NGRAM - ids_BT.shape[1]]
    return torch.cat([ids_BT.new_tensor(lead).expand(ids_BT.shape[0], -1), ids_BT], dim=1)


_library.AutoConfig.register(MODEL_TYPE, ArbTransformersConfig)
_library.AutoModelForCausalLM.register(ArbTransformersConfig, ArbForCausalLM)
_library.AutoTokenizer.register(ArbTransformersConfig, slow_tokenizer_class=ByteTokenizer)
