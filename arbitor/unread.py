"""Arguments of the library transformers that a model here does not read: each is refused by name, unless it would change nothing.

Legend: B sequences, T ids of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import VOCABULARY_SIZE

IGNORED_LABEL = -100
"""The label of a place that adds nothing to a loss, as the library has it."""

ANYTHING = object()
"""Stands for every value."""

LOADING = {
    "adapter_kwargs": ANYTHING,
    "trust_remote_code": ANYTHING,
    "low_cpu_mem_usage": ANYTHING,
    "use_safetensors": True,
    "weights_only": True,
    **dict.fromkeys(("_commit_hash", "_from_auto", "_from_pipeline"), ANYTHING),
}
"""Options of the library's `from_pretrained` that change nothing here, with the value for which that holds."""

OF_A_HUB = dict.fromkeys(("cache_dir", "force_download", "local_files_only", "proxies", "token"), ANYTHING)
"""Options that change nothing for a model which is not on a hub."""

SAVING = {
    "commit_message": ANYTHING,
    "max_shard_size": ANYTHING,
    "safe_serialization": True,
    "save_original_format": ANYTHING,
    "save_peft_format": ANYTHING,
    "token": ANYTHING,
}
"""Options of the library's `save_pretrained` that change nothing here: a model is one file, written by `safetensors`."""

HINTS = {
    "push_to_hub": "call push_to_hub of its attribute arb",
    "repo_id": "call push_to_hub of its attribute arb",
    "state_dict": "load it by load_state_dict of its attribute arb",
    "quantization_config": "its weights are ternary already",
    "load_in_8bit": "its weights are ternary already",
    "load_in_4bit": "its weights are ternary already",
    "attn_implementation": "it has an attention of its own",
    "num_items_in_batch": "to train weights that vote, call ArbOptimizer.backward in training_step of the trainer (docs/python.md)",
    "position_ids": "it counts positions itself, and an attention_mask says where ids are",
    "cache_dir": "set the environment variable HF_HOME",
    "token": "set the environment variable HF_TOKEN",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE",
}
"""What helps where an argument is refused."""


def refuse_unread(given: Mapping[str, Any], without_effect: Mapping[str, Any] | None = None) -> None:
    """Refuse arguments that are not read, by a ValueError with the first name. None, False and what has no effect pass.

    Args:
        given: arguments by name.
        without_effect: the value by which an argument would change nothing, or ANYTHING, by name.
    """
    for name, value in sorted(given.items()):
        idle = (without_effect or {}).get(name)
        if value is None or value is False or idle is ANYTHING or (value is True and idle is True):
            continue
        hint = f": {HINTS[name]}" if name in HINTS else ""
        raise ValueError(f"{name} is given, but the model does not read it{hint}")


def check_ids(ids_BT: Tensor) -> None:
    """Refuse ids that are no int64 [B, T] with B and T of at least 1, by a TypeError or ValueError."""
    checks.is_tensor("input_ids", ids_BT)
    if ids_BT.ndim != 2 or not ids_BT.numel():
        raise ValueError(
            f"input_ids has shape {tuple(ids_BT.shape)}, but must be [batch, ids] with at least one id of one sequence"
        )


def check_mask(mask_BT: Tensor | None, batch: int, length: int) -> None:
    """Refuse an attention mask that is no [batch, length] of zeros and ones, by a TypeError or ValueError."""
    if mask_BT is None:
        return
    checks.is_tensor("attention_mask", mask_BT)
    if mask_BT.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BT.shape)}, but must have that of the ids, {(batch, length)}"
        )
    if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
        raise ValueError(
            "attention_mask has an element other than 0 and 1, but must say which places are ids"
        )


def check_labels(labels_BT: Tensor, ids_BT: Tensor) -> None:
    """Refuse labels of another shape than the ids, or that are neither ids nor IGNORED_LABEL, by a TypeError or ValueError."""
    checks.tensor("labels", labels_BT, torch.int64, ids_BT.shape)
    fits_BT = (labels_BT == IGNORED_LABEL) | ((labels_BT >= 0) & (labels_BT < VOCABULARY_SIZE))
    if not bool(fits_BT.all()):
        raise ValueError(
            f"labels has {int(labels_BT[~fits_BT][0])}, but must have ids from 0 to {VOCABULARY_SIZE - 1}, or "
            f"{IGNORED_LABEL} where nothing is to be learned"
        )
