"""Integer search: widths of a model that give it an exact number of weights, as round and as near to a wish as can be.

Costs: a width that is a multiple of 64 costs 0. Each power of two that it lacks for that costs 1, and so does each factor of two
between the width and the wish. Among equal costs the first in the order of the lists wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from arbitor.reference.config import ArbConfig
from arbitor.reference.seeds.inventory import COUNTS, inventory

Choices = Mapping[str, Sequence[int]]
"""Alternatives for some fields of a configuration."""

Changes = dict[str, Any]
"""Widths by field."""


class Offer(NamedTuple):
    """Widths for one area, and their cost."""

    cost: float
    changes: Changes


def cost_of(wish: ArbConfig, changes: Mapping[str, Any]) -> float:
    """Return how far widths are from round numbers, and from the wish."""
    return sum(uneven(value) + abs(math.log2(value / getattr(wish, name))) for name, value in changes.items())


def uneven(value: int) -> int:
    """Return the powers of two that a number lacks to be a multiple of 64; small counts, such as heads, lack none."""
    return max(0, 6 - (value & -value).bit_length() + 1) if value >= 64 else 0


def combinations(choices: Choices) -> Iterable[Changes]:
    """Return every combination of the alternatives, the first field varying slowest."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def nearest(wish: ArbConfig, count: Callable[[ArbConfig], int], target: int, choices: Choices) -> ArbConfig:
    """Return the wish with the alternatives that come nearest to a number of weights, the cheapest of equal ones."""

    def rank(changes: Changes) -> tuple[int, float]:
        return abs(count(replace(wish, **changes)) - target), cost_of(wish, changes)

    return replace(wish, **min(combinations(choices), key=rank))


def offers(
    wish: ArbConfig, area: str, choices: Choices, within: tuple[float, float] = (0, math.inf)
) -> dict[int, Offer]:
    """Return the cheapest widths of an area for each number of weights that they can give it, least number first."""
    found: dict[int, Offer] = {}
    # A stand-in without the checks of a configuration, which would take ten times as long as counting.
    config = SimpleNamespace(**vars(wish))
    for changes in combinations(choices):
        vars(config).update(changes)
        weights = COUNTS[area](cast(ArbConfig, config))
        offer = Offer(cost_of(wish, changes), changes)
        if within[0] <= weights < within[1] and (weights not in found or offer.cost < found[weights].cost):
            found[weights] = offer
    return dict(sorted(found.items()))


def exactly(wish: ArbConfig, target: int, by_area: Mapping[str, dict[int, Offer]]) -> ArbConfig:
    """Return the wish with one offer for each area, the cheapest that give the model `target` weights in all.

    Raises ValueError when no combination does.
    """
    left = target - sum(count for area, count in inventory(wish).items() if area not in by_area)
    *first, last = by_area.values()
    best: tuple[float, list[Offer]] | None = None
    for picks in itertools.product(*(options.items() for options in first)):
        rest = last.get(left - sum(weights for weights, _ in picks))
        if rest is None:
            continue
        chosen = [offer for _, offer in picks] + [rest]
        cost = sum(offer.cost for offer in chosen)
        if best is None or cost < best[0]:
            best = cost, chosen
    if best is None:
        raise ValueError(f"target is {target}, but no combination of the offers has that many weights")
    changes: Changes = {}
    for offer in best[1]:
        changes |= offer.changes
    return replace(wish, **changes)


def with_rows(wish: ArbConfig, target: int, memory_dims: Iterable[int]) -> ArbConfig:
    """Return the wish with memory tables whose width is one of those given and whose rows make up `target` weights in all.

    Raises ValueError when no whole number of rows does.
    """
    found: list[Changes] = []
    for memory_dim in memory_dims:
        config = replace(wish, memory_dim=memory_dim, memory_rows=1)
        rows, rest = divmod(target - sum(inventory(config).values()), 2 * memory_dim)
        if rest == 0:
            found.append({"memory_dim": memory_dim, "memory_rows": rows + 1})
    if not found:
        raise ValueError(f"target is {target}, but no whole number of rows has that many weights")
    return replace(wish, **min(found, key=lambda changes: cost_of(wish, changes)))
