"""What each kind of work must reach, what it reached when the goal was set, and what the stored results of one device say now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DEVICE = "nvidia-h200"
"""Device whose stored results count."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A goal for some cases of an op, each a ratio to a peer's time.

    work:   what is timed, for a reader
    op:     and shapes, the cases
    peer:   implementation that they are compared with
    before: ratios when the goal was set, one for each shape; None where nothing was measured
    goals:  ratios to reach, one for each shape
    wall:   what stands between now and the goal, as far as it is known
    """

    work: str
    op: str
    shapes: tuple[str, ...]
    peer: str
    before: tuple[float | None, ...]
    goals: tuple[float, ...]
    wall: str


CUBLAS, GROUPED, ADAMW = "cuBLAS bf16", "grouped_mm bf16", "AdamW fused float32"
COMPILED = "compiled float AdamW"

GOALS: tuple[Goal, ...] = (
    Goal(
        "`linear` 16384 x 15360, 1 and 8 rows", "linear", ("16384x15360_m1", "16384x15360_m8"), CUBLAS,
        (1.2, 1.2), (4.2, 4.2),
        "instructions that unpack: 59 % of issue slots and 72 % of the L1, where DRAM has 37 %",
    ),
    Goal(
        "`linear` 7168 x 7168 and 3072 x 3072, 1 row", "linear", ("7168_decode", "3072_m1"), CUBLAS,
        (1.56, 1.49), (4.0, 3.0),
        "an empty graph takes 3 us of 17 and of 7",
    ),
    Goal(
        "`linear` 16384 x 15360, 16, 64, 256 and 512 rows", "linear",
        ("16384x15360_m16", "16384x15360_m64", "16384x15360_m256", "16384x15360_m512"), CUBLAS,
        (1.2, 1.34, None, 0.6), (4.0, 2.5, 1.2, 0.95),
        "up to 16 rows instructions that unpack; at 64 these and the tensor cores wait for each other; above, the tensor cores",
    ),
    Goal(
        "`linear` and both gradients, 7168 x 7168, 4,096 rows", "linear", ("7168",), CUBLAS,
        (0.94,), (0.98,),
        "the weight is unpacked first, which takes 45 us",
    ),
    Goal(
        "votes and step of 2^30 weights, float32 gradient", "update_step", ("2^30",), ADAMW,
        (1.34,), (4.0,),
        "votes wait for the L2 and for instructions: 2.3 ms of 4.1. To read the gradient once gained nothing",
    ),
    Goal(
        "orthogonalizing a 7168 x 7168 gradient", "orthogonalize", ("7168",), "Muon's iteration, bf16",
        (0.99,), (1.56,),
        "sums beside the products. The goal is 90 % of the product limit, with each half of a symmetric product once",
    ),
    Goal(
        "denoise loop of r9 and r14, one sample", "denoise_loop", ("r9", "r14"), "torch dense float32",
        (1.03, 0.77), (1.0, 1.0),
        "nothing. Recorded in a graph, seven launches a step are faster for r9 where nothing halts: 76 us in place of 88",
    ),
    Goal(
        "train step of `small`", "train_step", ("small",), COMPILED,
        (0.45,), (1.2,),
        "orthogonal gradients take 1.2 of 9.1 ms, where AdamW takes 0.2; norms take 0.9, where the twin's take 0.55",
    ),
    Goal(
        "train step of the 28.9 M byte transformer", "train_step_transformer", ("28.9M",), COMPILED,
        (None,), (1.1,),
        "orthogonal gradients take 1 of 8.2 ms, where AdamW takes 0.2; float32 gradients of weights",
    ),
    Goal(
        "experts 32 x 21216 x 1024: 4, 256 and 2,048 slots", "grouped_linear",
        ("21216_m4", "21216_m256", "21216_m2048"), GROUPED,
        (2.8, 2.0, 2.0), (5.0, 4.0, 3.0),
        "instructions that unpack, and 10 us of sorting slots",
    ),
    Goal(
        "their weight gradient", "grouped_linear_weight_grad",
        ("21216_m4", "21216_m256", "21216_m2048"), GROUPED,
        (0.59, 0.61, 0.55), (1.0, 1.0, 1.0),
        "it writes float32, for votes, where the peer writes bfloat16: half of the peer's speed is the limit",
    ),
)  # fmt: skip
"""The goals, in the order of the page."""


def table(results: Iterable[Row], ratio_of: Callable[[Row, Row], float]) -> list[str]:
    """Return the goals as Markdown. `ratio_of` returns the ratio of a peer's time to ours for two results."""
    by_case = {(row["op"], row["shape"], row["implementation"]): row for row in results}
    lines = ["| work | when the goal was set | now | goal | in the way |", "|---|---|---|---|---|"]
    for goal in GOALS:
        now: list[float | None] = []
        for shape in goal.shapes:
            ours, peer = (by_case.get((goal.op, shape, name)) for name in ("ours", goal.peer))
            now.append(None if ours is None or peer is None else ratio_of(ours, peer))
        ratios = map(_ratios, (goal.before, now, goal.goals))
        cells = (f"{goal.work}, against {goal.peer}", *ratios, goal.wall)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratios(values: Iterable[float | None]) -> str:
    return ", ".join("not measured" if value is None else f"{value:.3g}x" for value in values)
