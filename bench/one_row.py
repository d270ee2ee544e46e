"""The picture of how a row learns: votes, accumulators, moves of trits and of a scale. Made by the ops of the specification.

`python -m bench.report` writes it to docs/how-it-learns.svg. Every number in it comes from `stochastic_votes`, `accumulate` and
`apply_step`, at the settings that a model trains by. Floats are computed one by one in Python, so the picture is the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from arbitor.reference import ops
from arbitor.reference.constants import DEFAULT_MANTISSA_BITS, DEFAULT_THETA, DEFAULT_THETA_E
from arbitor.reference.convert import loss_of, ternarize
from arbitor.reference.types import TernaryWeight

TARGET = (0.42, -0.37, 0.05, 0.45, -0.02, 0.36, -0.44, 0.06, 0.41, -0.39, 0.03, -0.36)
"""The row that the twelve weights should become. Four of its numbers are near 0, and the others are near 0.4 in size."""

SHOWN = 5
"""Place of the weight whose votes are drawn."""

STEPS, RATE, NOISE, SEED = 400, 6.0, 0.5, 0
"""Steps, the rate of the flat phase, the noise of a gradient against its root mean square at the start, and the seed."""

FLAT = 0.4
"""Share of the steps before the rate falls. From there it falls to 0."""


@dataclass
class Course:
    """What happened, step by step.

    Fields:
        values, votes, counts: of the weight SHOWN: T * S after the step, the vote of the step, and T_accum with that vote counted.
        scale_counts:          E_accum of the group, with the vote of the step counted.
        errors:                norm of the difference to the target over the norm of the target, after the step.
        best:                  the same for the nearest row that the format has.
        flips, moves:          trits and scales that the steps moved.
    """

    values: list[float] = field(default_factory=list)
    votes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    scale_counts: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    best: float = 0.0
    flips: int = 0
    moves: int = 0


def course() -> Course:
    """Return the course of a row that learns TARGET from noisy gradients of the squared distance."""
    target_1K = torch.tensor([TARGET], dtype=torch.float64)
    weight = ops.initial_weight((1, len(TARGET)), std=0.2, seed=SEED, tensor_id=0)
    weight = weight.with_mantissa(DEFAULT_MANTISSA_BITS)
    found = Course(best=loss_of(target_1K, ternarize(target_1K)).error)
    spread = NOISE * rms(a - b for a, b in zip(row_of(weight), TARGET, strict=True))
    for step in range(STEPS):
        row = row_of(weight)
        gradient = [a - b + spread * z for a, b, z in zip(row, TARGET, noise(step), strict=True)]
        grad_1K = torch.tensor([gradient], dtype=torch.float32)
        clock = {"seed": SEED, "step": step, "tensor_id": 0}
        votes_1K = ops.stochastic_votes(grad_1K, rate_of(step), **clock)
        counted = ops.accumulate(weight, votes_1K, **clock)
        stepped = ops.apply_step(counted)
        found.votes.append(int(votes_1K[0, SHOWN]))
        found.counts.append(int(counted.trit_accum[0, SHOWN]))
        found.scale_counts.append(int(counted.exponent_accum[0, 0]))
        found.flips += int(ops.count_changed_trits(weight, stepped))
        found.moves += int((weight.exponents != stepped.exponents).sum())
        weight = stepped
        found.values.append(row_of(weight)[SHOWN])
        found.errors.append(distance(row_of(weight)))
    return found


def rate_of(step: int) -> float:
    """Return the rate of a step: flat at first, then falling to 0."""
    return RATE * min(1.0, (1 - step / STEPS) / (1 - FLAT))


def noise(step: int) -> list[float]:
    """Return a nearly normal number for each weight: the sum of twelve random bytes."""
    groups_K = torch.arange(len(TARGET))
    bytes_KG = ops.dither_bytes(groups_K, group_size=12, seed=SEED + 1, step=step, tensor_id=0)
    return [(sum(row[:12]) - 1530) / 256 for row in bytes_KG.tolist()]


def row_of(weight: TernaryWeight) -> list[float]:
    """Return the row of a weight as floats."""
    row: list[float] = ops.dequantize(weight, dtype=torch.float64)[0].tolist()
    return row


def rms(values: Iterable[float]) -> float:
    """Return the root mean square."""
    found = list(values)
    return math.sqrt(sum(value * value for value in found) / len(found))


def distance(row: Sequence[float]) -> float:
    """Return the norm of the difference to TARGET over the norm of TARGET."""
    return rms([a - b for a, b in zip(row, TARGET, strict=True)]) / rms(TARGET)


# --- the picture -----------------------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, HEIGHT, GAP = 64, 856, 30, 96, 44
"""Edges of the panels in pixels, the height of a panel, and the room between two of them."""

STYLE = (
    "text{font-family:-apple-system,'Segoe UI','DejaVu Sans',Helvetica,Arial,sans-serif;fill:#1f2933;font-size:12px}"
    ".t{font-size:13px;font-weight:600}.s{fill:#52606d}.f{fill:none;stroke:#cbd2d9}"
    ".l{fill:none;stroke:#2b6cb0;stroke-width:1.5}.v{fill:none;stroke:#7b8794;stroke-width:1}"
    ".d{fill:none;stroke:#c05621;stroke-width:1.2;stroke-dasharray:5 4}"
)


@dataclass(frozen=True)
class Panel:
    """A curve over the steps.

    Fields:
        title:  what the curve is.
        values: a value for each step.
        lines:  values that a dashed line marks, each with its name.
        bars:   whether each value is a bar from 0. Otherwise the curve is a staircase.
    """

    title: str
    values: Sequence[float]
    lines: Sequence[tuple[float, str]]
    bars: bool = False


def picture() -> str:
    """Return the picture as SVG."""
    found = course()
    panels = (
        Panel(f"a weight, T times S: {found.flips} moves of trits and {found.moves} of the scale in its row", found.values,
              [(TARGET[SHOWN], "target"), (0.0, "0")]),
        Panel("its votes", found.votes, [(0.0, "0")], bars=True),
        Panel("T_accum: a full count moves the trit, and starts again at 0", found.counts,
              [(DEFAULT_THETA, "theta"), (-DEFAULT_THETA, "-theta")]),
        Panel("E_accum of its group: a full count moves the scale of all twelve weights", found.scale_counts,
              [(DEFAULT_THETA_E, "theta_E"), (-DEFAULT_THETA_E, "-theta_E")]),
        Panel("distance of the row to its target, over the norm of the target", found.errors,
              [(found.best, "nearest")]),
    )  # fmt: skip
    bottom = TOP + len(panels) * (HEIGHT + GAP) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {bottom}" width="940" height="{bottom}" role="img" '
        'aria-labelledby="title">',
        '<title id="title">How a row of twelve weights learns: the value of a weight, its votes, the two accumulators, and the '
        "distance of the row to its target, over the steps</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="940" height="{bottom}" rx="10" fill="#ffffff"/>',
    ]
    for place, panel in enumerate(panels):
        parts += drawn(panel, TOP + place * (HEIGHT + GAP))
    ticks = range(0, STEPS + 1, 100)
    parts += [
        f'<text class="s" x="{across(step):.1f}" y="{bottom - 16}" text-anchor="middle">{step}</text>'
        for step in ticks
    ]
    parts.append(f'<text class="s" x="{RIGHT + 24}" y="{bottom - 16}">steps</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn(panel: Panel, top: int) -> list[str]:
    """Return the lines of SVG of a panel."""
    marks = [value for value, _ in panel.lines]
    low, high = min([*panel.values, *marks]), max([*panel.values, *marks])

    def down(value: float) -> float:
        return top + 8 + (HEIGHT - 16) * (high - value) / (high - low)

    found = [
        f'<text class="t" x="{LEFT}" y="{top - 8}">{panel.title}</text>',
        f'<rect class="f" x="{LEFT}" y="{top}" width="{RIGHT - LEFT}" height="{HEIGHT}"/>',
    ]
    for value, name in panel.lines:
        found.append(f'<path class="d" d="M{LEFT} {down(value):.1f}H{RIGHT}"/>')
        found.append(f'<text class="s" x="{RIGHT + 8}" y="{down(value) + 4:.1f}">{name}</text>')
    for value in (low, high):
        found.append(
            f'<text class="s" x="{LEFT - 8}" y="{down(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    if panel.bars:
        path = "".join(
            f"M{across(step + 0.5):.1f} {down(0):.1f}V{down(value):.1f}"
            for step, value in enumerate(panel.values)
        )
    else:
        path = f"M{LEFT} {down(panel.values[0]):.1f}" + "".join(
            f"V{down(value):.1f}H{across(step + 1):.1f}" for step, value in enumerate(panel.values)
        )
    return [*found, f'<path class="{"v" if panel.bars else "l"}" d="{path}"/>']


def across(step: float) -> float:
    """Return the place of a step from the left."""
    return LEFT + (RIGHT - LEFT) * step / STEPS
