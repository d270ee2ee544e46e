"""Models as the library transformers meets them: its Auto classes and pipelines load them once this module is imported.

    import arbitor.transformers
    from transformers import pipeline

    write = pipeline("text-generation", model="my-model")

`my-model` is a folder of `ArbModel.save_pretrained` or `arb export`. Models run and are measured here. They are trained by
`ArbModel.backward`, and no trainer of the library can: weights are integers, and a backward pass must vote.

Legend: B sequences, T ids of each, V ids of the vocabulary.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.model import ArbModel
from arbitor.optimized.training.generate import PIECE, first_window
from arbitor.optimized.training.model_folder import MODEL_TYPE
from arbitor.reference.config import NGRAM, NUM_BYTES, SPECIAL_IDS, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.ledger import KVLedger
from arbitor.sidecars import SidecarError
from arbitor.sidecars.libraries import library

try:
    _library: Any = library("transformers")
except SidecarError as error:
    raise ImportError(
        "arbitor.transformers needs the package 'transformers', which is not installed: pip install 'arbitor[transformers]'"
    ) from error

__all__ = ["ArbForCausalLM", "ArbTransformersConfig", "ByteTokenizer", "LedgerCache"]

IGNORED_LABEL = -100
"""The label of a place that adds nothing to a loss, as the library has it."""


class ArbTransformersConfig(_library.PretrainedConfig):
    """The `config.json` of a model, as the library reads it.

    Args:
        model: an `ArbConfig` as JSON data. None: of no model; the library makes such configurations to compare with.
        more:  fields that every configuration of the library has.
    """

    model_type = MODEL_TYPE

    def __init__(self, model: dict[str, Any] | None = None, **more: Any) -> None:
        self.model = model
        self.vocab_size = VOCABULARY_SIZE
        for field, name in (("hidden_size", "width"), ("num_hidden_layers", "num_layers")):
            setattr(self, field, (model or {}).get(name))
        ids = {f"{name.lower()}_token_id": SPECIAL_IDS[name] for name in ("PAD", "BOS", "EOS")}
        super().__init__(**{**ids, "use_cache": True, "tie_word_embeddings": False, **more})

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
        config: with the model's own configuration in its field `model`. The weights are drawn by seed 0.
        arb:    the model to wrap, in place of a new one.

    Attributes:
        arb: the model itself. It trains, saves, and generates faster where its steps are recorded.
    """

    config_class = ArbTransformersConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: ArbTransformersConfig, *, arb: ArbModel | None = None) -> None:
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
            args, config, more: what the library passes along; the checkpoint has its configuration.
            dtype, torch_dtype: of activations; None or `auto`: as `ArbModel` has it.
            device_map: a device, or None for the CPU; a model is on one device.
            revision: of a model on a hub.
        """
        wanted = dtype if dtype is not None else torch_dtype
        device = device_map if device_map is not None else "cpu"
        if isinstance(device, dict):
            places = set(device.values())
            if len(places) != 1:
                raise ValueError(
                    f"device_map is {device_map!r}, but must name one device for the whole model"
                )
            [device] = places
        arb = ArbModel.from_pretrained(
            pretrained_model_name_or_path,
            device=f"cuda:{device}" if isinstance(device, int) else device,
            dtype=None if wanted == "auto" else wanted,
            revision=None if revision == "main" else revision,
        )
        known = {} if config is None else {"_name_or_path": str(pretrained_model_name_or_path)}
        model = cls(ArbTransformersConfig(json.loads(arb.config.to_json()), **known), arb=arb)
        return cast(Self, model.eval())

    def save_pretrained(self, save_directory: str | PathLike[str], **more: Any) -> None:
        """Write the folder of `ArbModel.save_pretrained`, which every loader here and there reads.

        Args:
            save_directory: the folder.
            more: options of the library about shards and formats, which a checkpoint does not have.
        """
        self.arb.save_pretrained(Path(save_directory))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.arb.context.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.arb.dtype

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
        **more: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next step: all ids, or those that the cache does not have.

        Raises ValueError for `use_cache=False`: a prompt of fewer than three bytes would be read in another way at every step.
        """
        if more.get("use_cache") is False:
            raise ValueError("use_cache is False, but generate must keep what it has read")
        if past_key_values is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True}
        return {
            "input_ids": input_ids[:, past_key_values.columns :],
            "past_key_values": past_key_values,
            "use_cache": True,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: LedgerCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> Any:
        """Return the logits after every id, and the loss of labels.

        A model predicts nothing from fewer than three bytes. The logits after the first two ids of a sequence of at least three
        are all 0. A shorter sequence is led by PAD and BOS, as a prompt of `ArbModel.generate` is.

        Args:
            input_ids: int64 [B, T], T >= 1.
            attention_mask: [B, T], 1 for ids and 0 for padding, which stands before or after them. A sequence sees no padding.
            labels: int64 [B, T], as `input_ids`; -100 where no loss is wanted. The library's habit: it is shifted here.
            past_key_values: what earlier calls have read; the ids follow it.
            use_cache: whether to return what was read.
            return_dict: None or True; False is refused.
            more: nothing; what is named and not None is refused.

        Returns:
            The library's `CausalLMOutputWithPast`, with logits float32 [B, T, V].
        """
        given = sorted(name for name, value in more.items() if value is not None and value is not False)
        unread = [name for name in given if name not in ("position_ids", "cache_position", "logits_to_keep")]
        if unread:
            # The library's Trainer gives it.
            by_trainer = (
                ": a trainer of the library cannot train weights that vote, use ArbModel.backward and step"
            )
            raise ValueError(
                f"{unread[0]} is given, but the model does not read it{by_trainer if unread[0] == 'num_items_in_batch' else ''}"
            )
        if return_dict is False:
            raise ValueError("return_dict is False, but must be True or None")
        cache = past_key_values
        if cache is not None:
            logits_BTV = self._read_on(input_ids, cache)
        else:
            logits_BTV, cache = self._read(input_ids, attention_mask, keep=bool(use_cache))
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].to(logits_BTV.device)
            wanted = shifted != IGNORED_LABEL
            # Of the wanted places alone: zeros between them would change the order of the sum, and so its last bits.
            loss = F.cross_entropy(logits_BTV[:, :-1][wanted], shifted[wanted])
        output = library("transformers.modeling_outputs").CausalLMOutputWithPast
        return output(loss=loss, logits=logits_BTV, past_key_values=cache if use_cache else None)

    def _read(
        self, ids_BT: Tensor, mask_BT: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, LedgerCache | None]:
        """Return logits [B, T, V] of sequences that begin here, and what was read where that is wanted."""
        batch, length = ids_BT.shape
        spans = (
            [(0, length)] * batch if mask_BT is None else [_span(row, mask_BT[row]) for row in range(batch)]
        )
        alike = len(set(spans)) == 1 and not keep
        groups = [list(range(batch))] if alike else [[row] for row in range(batch)]
        logits_BTV = torch.zeros(batch, length, VOCABULARY_SIZE, device=self.device)
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
            logits_BTV = logits_BTV.index_put(
                (torch.tensor(group, device=self.device)[:, None], places[None]), found.float()
            )
        cache = (
            LedgerCache(KVLedger.stack([ledger for ledger in ledgers if ledger]), length) if keep else None
        )
        return logits_BTV, cache

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
        return logits_BTV.float()


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


class ByteTokenizer(_library.PreTrainedTokenizer):
    """Text as its bytes in UTF-8: a byte is an id. It has no file, and any model of ours can be given it.

    Bytes that are no UTF-8 come back as �, as they do from `ArbModel.generate`. Text that looks like a special is bytes too.
    """

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **more: Any) -> None:
        specials = {f"{name.lower()}_token": f"<{name.lower()}>" for name in ("PAD", "BOS", "EOS")}
        more.setdefault("padding_side", "left")
        super().__init__(
            **{**specials, "split_special_tokens": True, "clean_up_tokenization_spaces": False, **more}
        )

    @property
    def vocab_size(self) -> int:
        """Ids without the specials."""
        return NUM_BYTES

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return {**{chr(byte): byte for byte in range(NUM_BYTES)}, **_special_tokens()}

    def _tokenize(self, text: str, **more: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8", errors="surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int:
        return _special_tokens().get(token, ord(token[:1] or "\0"))

    def _convert_id_to_token(self, index: int) -> str:
        names = {place: token for token, place in _special_tokens().items()}
        return names.get(index, chr(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; specials have none."""
        found = bytes(ord(token) for token in tokens if len(token) == 1 and ord(token) < NUM_BYTES)
        return found.decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the ids as they are: a prompt has no marks."""
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing: there is no file."""
        return ()


def _special_tokens() -> dict[str, int]:
    """Return the id of each special by the token that names it."""
    return {f"<{name.lower()}>": place for name, place in SPECIAL_IDS.items()}


_library.AutoConfig.register(MODEL_TYPE, ArbTransformersConfig)
_library.AutoModelForCausalLM.register(ArbTransformersConfig, ArbForCausalLM)
_library.AutoTokenizer.register(ArbTransformersConfig, slow_tokenizer_class=ByteTokenizer)
