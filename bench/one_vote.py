"""The picture of how a gradient becomes votes: votes of 256 steps for gradients of many sizes, by the op `stochastic_votes`.

`python -m bench.report` writes it to docs/votes.svg. The row of gradients is the same in every step, and only the dither differs.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from arbitor.reference import ops
from bench.one_row import STYLE

MOST, PARTS, STEPS, SEED = 3, 8, 256, 0
"""The largest gradient of the row in units of a vote, gradients a unit, steps, and the seed of the dither."""

LEFT, TOP, UNIT_X, UNIT_Y, RADIUS = 64, 40, 128, 44, 7.5
"""Edges of the picture in pixels, the width and height of a unit, and the radius of a dot that stands for every step."""


def asked() -> list[float]:
    """Return what each gradient of the row asks for, r * g / 2^V, from -MOST to MOST."""
    return [place / PARTS for place in range(-MOST * PARTS, MOST * PARTS + 1)]


def votes_of_steps() -> list[Counter[int]]:
    """Return how often each gradient of the row cast which vote."""
    row_1K = torch.tensor([asked()], dtype=torch.float32)
    # Times the scale of its row, a gradient in units of a vote is the gradient itself.
    rate = 2.0 ** int(ops.row_exponents(row_1K)[0])
    counts: list[Counter[int]] = [Counter() for _ in asked()]
    for step in range(STEPS):
        votes_1K = ops.stochastic_votes(row_1K, rate, seed=SEED, step=step, tensor_id=0)
        for counter, vote in zip(counts, votes_1K[0].tolist(), strict=True):
            counter[vote] += 1
    return counts


def picture() -> str:
    """Return the picture as SVG."""
    counts = votes_of_steps()
    width, height = 2 * LEFT + 2 * MOST * UNIT_X, 2 * TOP + 2 * MOST * UNIT_Y + 24

    def across(value: float) -> float:
        return LEFT + (value + MOST) * UNIT_X

    def down(value: float) -> float:
        return TOP + (MOST - value) * UNIT_Y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-labelledby="title">',
        f'<title id="title">Votes of {STEPS} steps for gradients from -{MOST} to {MOST}, and their means</title>',
        f"<style>{STYLE}.o{{fill:#2b6cb0;fill-opacity:.55}}</style>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        f'<text class="t" x="{LEFT}" y="{TOP - 16}">votes of {STEPS} steps: the area of a dot is their share; the line '
        "is their mean</text>",
    ]
    for vote in range(-MOST, MOST + 1):
        parts.append(f'<path class="f" d="M{across(-MOST)} {down(vote)}H{across(MOST)}"/>')
        parts.append(f'<text class="s" x="{LEFT - 20}" y="{down(vote) + 4}" text-anchor="end">{vote}</text>')
        parts.append(
            f'<text class="s" x="{across(vote)}" y="{height - 30}" text-anchor="middle">{vote}</text>'
        )
    parts.append(
        f'<text class="s" x="{width // 2}" y="{height - 10}" text-anchor="middle">what the gradient asks for, r * g / 2^V</text>'
    )
    means = []
    for value, counter in zip(asked(), counts, strict=True):
        means.append(
            f"{across(value):.1f} {down(sum(vote * count for vote, count in counter.items()) / STEPS):.1f}"
        )
        for vote, count in sorted(counter.items()):
            radius = RADIUS * math.sqrt(count / STEPS)
            parts.append(f'<circle class="o" cx="{across(value):.1f}" cy="{down(vote)}" r="{radius:.2f}"/>')
    parts.append(f'<path class="d" d="M{"L".join(means)}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
