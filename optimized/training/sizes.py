"""Sizes that cannot be are refused before anything is built: a configuration may come from a stranger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from arbitor.optimized.distributed.owners import MEDIA
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.machine_memory import total_bytes
from arbitor.reference.audit import area_of
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import TRITS_PER_BYTE
from arbitor.reference.graph import ArbModel, TernaryEmbedding
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.voting import gradient_dtype

REPEATS = {"num_layers": 1024, "num_hops": 64, "video_steps": 1024}
"""The most of what a model is built of one by one. Each takes milliseconds to build, however small it is."""

NO_SPREADS: Mapping[str, Any] = MappingProxyType({})
"""Nothing that is spread over ranks."""

FEW = 2
"""How many of each are built to see what one more costs."""


def config_of(document: Mapping[str, Any]) -> ArbConfig:
    """Return a configuration from JSON data, of a size that can be built.

    Raises:
        TypeError, ValueError: it is no configuration, or `check_size` refuses it.
    """
    config = ArbConfig.from_json(json.dumps(document))
    check_size(config)
    return config


def check_size(config: ArbConfig) -> None:
    """Refuse a model that no machine can hold, within a second and without memory.

    Raises:
        ValueError: a number of layers, hops or steps is above `REPEATS`, or a weight is larger than a weight can be.
    """
    for name, most in REPEATS.items():
        value = getattr(config, name)
        if value > most:
            raise ValueError(f"{name} is {value}, but must be at most {most}")
    _meta(config, config.num_layers)


def check_memory(
    config: ArbConfig,
    device: str,
    *,
    num_ranks: int = 1,
    spreads: Mapping[str, Any] = NO_SPREADS,
    sums: int = 0,
) -> None:
    """Refuse to build a model whose state alone is larger than the memory of the machine, of its container or of the GPU.

    Args:
        config: of a size that `check_size` lets pass.
        device: where it would be built.
        num_ranks: ranks that train it together. Each keeps a part of the accumulators and means.
        spreads: what is spread over ranks, as `ArbModel` takes it.
        sums: bytes of the sums of gradients over micro-batches, which are needed too (`sum_bytes`).

    Raises:
        TrainingError: it is larger; the sentence has all sizes.
    """
    state = int(least_state_bytes(config, spreads) * (1 - _most_owned(config) * (1 - 1 / num_ranks)))
    if device == "cuda":
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        there = total_bytes()
    if state + sums > there:
        gib = 2**30
        with_sums, instead = "", ""
        if sums:
            with_sums = f" and sums of gradients of {sums / gib:,.1f} GiB"
            instead = ": a new run with --accum-votes needs no memory for sums" if state <= there else ""
        raise TrainingError(
            f"the model {config.name!r} has a state of {state / gib:,.1f} GiB{with_sums}, but {device} has {there / gib:,.1f} GiB "
            f"of memory{instead}"
        )


def least_state_bytes(config: ArbConfig, spreads: Mapping[str, Any] = NO_SPREADS) -> int:
    """Return the bytes of the canonical state of a model: weights and tables. The layers between first and last are multiplied.

    With something spread over ranks, these are the bytes of the rank that `spreads` names.
    """
    return _of_all_layers(_state_bytes, config, spreads)


def sum_bytes(
    config: ArbConfig,
    dtype: torch.dtype,
    *,
    positions: int,
    of_media: bool = True,
    spreads: Mapping[str, Any] = NO_SPREADS,
) -> int:
    """Return the bytes of the sums of gradients over the micro-batches of a step.

    Args:
        config, spreads: as for `least_state_bytes`.
        dtype: of activations.
        positions: of a micro-batch. Where these have fewer slots than there are experts, experts are chosen and have no sums.
        of_media: whether some micro-batches are of media. Those of text have no gradients of heads and sequencers of media.
    """
    slots = positions * config.top_k
    measure = partial(_sum_bytes, dtype=gradient_dtype(dtype), slots=slots, of_media=of_media)
    return _of_all_layers(measure, config, spreads)


def _of_all_layers(measure: Callable[[ArbModel], int], config: ArbConfig, spreads: Mapping[str, Any]) -> int:
    """Return a size of a model of all layers, from those of models of few."""
    few = measure(_meta(config, config.num_layers, spreads))
    if config.num_layers <= FEW:
        return few
    return few + (config.num_layers - FEW) * (few - measure(_meta(config, FEW - 1, spreads)))


def _most_owned(config: ArbConfig) -> float:
    """Return the most of the state of a weight that its owner alone keeps: one or two bytes a trit beside a fifth."""
    owned = 1 + config.average_gradients
    return owned / (owned + 1 / TRITS_PER_BYTE)


def _meta(config: ArbConfig, num_layers: int, spreads: Mapping[str, Any] = NO_SPREADS) -> ArbModel:
    """Return the model with few layers, without memory.

    Raises:
        ValueError: a weight or a table is larger than one can be.
    """
    try:
        few = replace(config, num_layers=min(num_layers, FEW))
        return ArbModel(few, device="meta", **spreads)
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the model {config.name!r} has sizes that cannot be built: {reason}") from None


def _sum_bytes(model: ArbModel, *, dtype: torch.dtype, slots: int, of_media: bool) -> int:
    """Return the bytes of the sums of gradients. Tables have none, nor have weights that were built frozen, or chosen experts."""
    size = 0
    for name, module in model.ternary_modules().items():
        is_chosen = isinstance(module, TernaryGroupedLinear) and slots < module.num_groups
        is_silent = not of_media and area_of(name) in MEDIA
        if module.built_frozen or is_chosen or is_silent or isinstance(module, TernaryEmbedding):
            continue
        is_orthogonal = model.voting.makes_orthogonal(int(getattr(module, "orthogonal", False)))
        size += math.prod(module.weight.shape) * (dtype if is_orthogonal else torch.float32).itemsize
    return size


def _state_bytes(model: ArbModel) -> int:
    weights = sum(
        module.ops.to_spec(module.weight).state_bytes for module in model.ternary_modules().values()
    )
    return weights + sum(table.nbytes for table in model.tables().values())
