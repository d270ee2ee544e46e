"""A run that begins with the weights of another: what it takes over, and what begins anew.

A part is a weight or a table of integers. The run takes over every part that has the same name and the same layout in both models,
in every byte of its trits and scales. Votes are not taken over: those that were gathered at another rate, on other bytes, decide
nothing here. A table goes with its module: where a weight of the module begins anew, so does the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.training.checkpoint import Checkpoint, layout
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.model_folder import read_model
from arbitor.optimized.training.shown import shown
from arbitor.reference.graph import ArbModel
from arbitor.reference.types import TernaryWeight

NAMED = 20
"""Parts of a kind that a sentence names at most; ``config.json`` of the run names all."""


@dataclass(frozen=True)
class Beginning:
    """What a run began with.

    Attributes:
        source: what was asked for.
        step: steps that the source was trained for.
        state_sha256: of the source.
        kept: parts that were taken over, by name.
        fresh: parts of the model that the source does not have, or has with another layout. They begin anew.
        left_out: parts of the source that the model does not have.
        warnings: a sentence for each checkpoint of the source that was refused.
        is_base: whether the model stays as it was loaded, below adapters.
    """

    source: str
    step: int
    state_sha256: str
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    is_base: bool = False

    def description(self) -> str:
        """Return what was taken over, in a sentence."""
        parts = len(self.kept) + len(self.fresh)
        if self.is_base:
            return f"base: {parts:,} parts of {shown(self.source)} after {self.step:,} steps, which stay as they are"
        return (
            f"weights: {len(self.kept):,} of {parts:,} parts are those of {shown(self.source)} after {self.step:,} steps; "
            "no votes are gathered yet"
        )

    def all_warnings(self) -> tuple[str, ...]:
        """Return the warnings, a sentence for the parts that begin anew, and one for the parts that are left out."""
        source = shown(self.source)
        found = list(self.warnings)
        if self.fresh:
            found.append(f"begin anew, as {source} has no such parts of that size: {_names(self.fresh)}")
        if self.left_out:
            found.append(f"left out of {source}, as the model has no such parts: {_names(self.left_out)}")
        return tuple(found)


def begin_with(model: ArbModel, source: str, *, as_base: bool = False) -> Beginning:
    """Load into a new model what fits it of another one.

    Args:
        model: newly made; what does not fit stays as it is.
        source: a run, of which the best checkpoint is taken; a folder of `model_folder.write_folder`; or a checkpoint.
        as_base: whether the model is to stay as it is loaded. Then every part of it must be the source's, and keeps its votes.

    Raises:
        TrainingError: there is no such model, it cannot be trusted, it has adapters, or no weight of it fits.
    """
    warnings: list[str] = []
    try:
        _, checkpoint = read_model(Path(source), warnings.append)
    except FileNotFoundError as error:
        raise TrainingError(str(error)) from error
    if checkpoint.adapter is not None:
        raise TrainingError(
            f"{source!r} has adapters, but a run must begin with ternary weights alone: arb export --merge ternary makes them"
        )
    modules, tables = model.ternary_modules(), model.tables()
    kept = [name for name, module in modules.items() if _fits(checkpoint, name, module.weight)]
    if not kept:
        raise TrainingError(f"no weight of {source!r} fits the model {model.config.name!r}")
    fresh = [name for name in modules if name not in kept]
    for name in kept:
        weight = checkpoint.state[name]
        assert isinstance(weight, TernaryWeight)
        modules[name].load(weight if as_base else _without_votes(weight))
    ranges = model.table_ranges()
    for name, table in tables.items():
        owner = name.rpartition(".")[0]
        is_whole = not any(f"{weight}.".startswith(f"{owner}.") for weight in fresh)
        there = checkpoint.state.get(name)
        if (
            is_whole
            and isinstance(there, Tensor)
            and _fits(checkpoint, name, table)
            and _within(there, ranges[name])
        ):
            table.copy_(there)
            kept.append(name)
        else:
            fresh.append(name)
    if as_base and fresh:
        raise TrainingError(
            f"{source!r} cannot be the base of this model, as it has no such parts of that size: {_names(fresh)}"
        )
    return Beginning(
        source=source,
        step=checkpoint.step,
        state_sha256=checkpoint.state_sha256,
        kept=tuple(kept),
        fresh=tuple(fresh),
        left_out=tuple(name for name in checkpoint.state if name not in modules and name not in tables),
        warnings=tuple(warnings),
        is_base=as_base,
    )


def _without_votes(weight: TernaryWeight) -> TernaryWeight:
    return replace(
        weight,
        trit_accum=torch.zeros_like(weight.trit_accum),
        exponent_accum=torch.zeros_like(weight.exponent_accum),
    )


def same_beginning(
    source: str, beginning: Beginning | None, recorded: Mapping[str, Any] | None
) -> str | None:
    """Return the ``state_sha256`` of what a run began with. A run that starts again at step 0 begins with the same.

    Args:
        source: what was asked for.
        beginning: what the run begins with now, or None where it goes on from a checkpoint of its own.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the run began with other weights than are there now.
    """
    before = (recorded or {}).get("init_sha256")
    now = before if beginning is None else beginning.state_sha256
    if before not in (None, now):
        raise TrainingError(
            f"the run was started with the weights of {source!r} of state {str(before)[:12]}... and cannot begin with "
            f"{str(now)[:12]}..., which are there now"
        )
    return now


def _fits(checkpoint: Checkpoint, name: str, here: object) -> bool:
    """Whether a checkpoint has a part of this name that is laid out as it is here."""
    return name in checkpoint.state and layout(checkpoint.state[name]) == layout(here)  # type: ignore[arg-type]


def _within(table: Tensor, bounds: tuple[int, int]) -> bool:
    return table.numel() == 0 or (bounds[0] <= int(table.min()) and int(table.max()) <= bounds[1])


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
