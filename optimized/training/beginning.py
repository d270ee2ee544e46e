"""A run that begins with the weights of another: what it takes over, and what begins anew.

What it takes over is the rule of growth (`arbitor.reference.graph.growth`). Votes are taken over on request alone: those that were
gathered at another rate, on other bytes, decide little here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.model_folder import read_model
from arbitor.optimized.training.shown import nearby, shown
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.changed_rules import names_within
from arbitor.reference.graph.growth import grow

HALTING = ("halt", "halt_norm", "leak_shifts")
"""How the names of the parts end that decide how often the last layer turns."""

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
        moved: edge tables, of which the rows of codes that both models have were taken over.
        fresh: parts of the model that the source does not have, or has with another layout, of other codes or by other rules. They
            begin anew.
        left_out: parts of the source that the model does not have.
        warnings: a sentence for each checkpoint of the source that was refused.
        is_base: whether the model stays as it was loaded, below adapters.
        has_votes: whether the votes of the source were taken over.
    """

    source: str
    step: int
    state_sha256: str
    kept: tuple[str, ...]
    moved: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    is_base: bool = False
    has_votes: bool = False

    def first_lines(self) -> list[str]:
        """Return what was taken over, a sentence each."""
        lines = [self._description()]
        if self._turns_once():
            lines.append(
                "base: the last layer turns once (--max-moe-iters 1), so its halting weights are not used"
            )
        return lines

    def _turns_once(self) -> bool:
        """Whether all that a base has and the model lacks is what decides how often the last layer turns."""
        return self.is_base and bool(self.left_out) and all(name.endswith(HALTING) for name in self.left_out)

    def _description(self) -> str:
        parts = len(self.kept) + len(self.moved) + len(self.fresh)
        if self.is_base:
            return f"base: {parts:,} parts of {shown(nearby(self.source))} after {self.step:,} steps, which stay as they are"
        return (
            f"weights: {len(self.kept):,} of {parts:,} parts are those of {shown(nearby(self.source))} after {self.step:,} steps; "
            f"{'with their votes' if self.has_votes else 'no votes are gathered yet'}"
        )

    def all_warnings(self) -> tuple[str, ...]:
        """Return the warnings, a sentence for the parts that begin anew, and one for the parts that are left out."""
        source = shown(nearby(self.source))
        found = list(self.warnings)
        if self.moved:
            found.append(
                f"keep the rows of codes that {source} has too, and begin anew elsewhere: {_names(self.moved)}"
            )
        if self.fresh:
            found.append(f"begin anew, as {source} has no such parts that fit: {_names(self.fresh)}")
        if self.left_out and not self._turns_once():
            found.append(f"left out of {source}, as the model has no such parts: {_names(self.left_out)}")
        return tuple(found)


def begin_with(model: ArbModel, source: str, *, keep_votes: bool = False, as_base: bool = False) -> Beginning:
    """Load into a new model what fits it of another one.

    Args:
        model: newly made; what does not fit stays as it is.
        source: a run, of which the best checkpoint is taken; a folder of `model_folder.write_folder`; or a checkpoint.
        keep_votes: whether the votes that the weights of the source have gathered are taken over too.
        as_base: whether the model is to stay as it is loaded. Then every part of it must be the source's, and keeps its votes.

    Raises:
        TrainingError: there is no such model, it cannot be trusted, it has adapters, or no weight of it fits.
    """
    warnings: list[str] = []
    config, checkpoint = read_model(Path(source), warnings.append, any_rules=not as_base)
    if checkpoint.adapter is not None:
        raise TrainingError(
            f"{source!r} has adapters, but a run must begin with ternary weights alone: arb export --merge ternary makes them"
        )
    modules = model.ternary_modules()
    state = dict(checkpoint.state)
    for part, reason in checkpoint.other_rules.items():
        if names_within(part, modules):
            warnings.append(f"not taken over from {shown(nearby(source))}: {reason}")
            for name in names_within(part, checkpoint.state):
                del state[name]
    growth = grow(model, config, state, votes=keep_votes or as_base)
    if not any(name in modules for name in growth.kept):
        raise TrainingError(f"no weight of {source!r} fits the model {model.config.name!r}")
    if as_base and (growth.fresh or growth.moved):
        names = _names((*growth.moved, *growth.fresh))
        raise TrainingError(
            f"{source!r} cannot be the base of this model, as it has no such parts that fit: {names}"
        )
    return Beginning(
        source=source,
        step=checkpoint.step,
        state_sha256=checkpoint.state_sha256,
        **{field.name: getattr(growth, field.name) for field in fields(growth)},
        warnings=tuple(warnings),
        is_base=as_base,
        has_votes=keep_votes or as_base,
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


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
