"""What each kind of work must reach, what it reached when the goal was set, and what the stored results of one device say now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

DEVICE = "nvidia-h200"
"""Device whose stored results count."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """What is stored of the device.

    results:  those of `pytest bench` by op, shape and implementation
    scripts:  the JSON of each script by the name of its file, without the suffix
    ratio_of: returns the ratio of a peer's time to ours for two results
    """

    results: Mapping[tuple[str, str, str], Row]
    scripts: Mapping[str, Any]
    ratio_of: Callable[[Row, Row], float]


@dataclass(frozen=True)
class Ratio:
    """The time of a peer over ours, for a case. More is better."""

    op: str
    shape: str
    peer: str
    unit: ClassVar[str] = "x"

    def now(self, stored: Stored) -> float | None:
        """Return the ratio, or None where one of the two is not stored."""
        ours, peer = (stored.results.get((self.op, self.shape, name)) for name in ("ours", self.peer))
        return None if ours is None or peer is None else stored.ratio_of(ours, peer)


@dataclass(frozen=True)
class Share:
    """The share of what the device can do at most, in percent, for a case of ours. More is better."""

    op: str
    shape: str
    unit: ClassVar[str] = " %"

    def now(self, stored: Stored) -> float | None:
        """Return the share, or None where it is not stored."""
        return stored.results.get((self.op, self.shape, "ours"), {}).get("percent_of_ceiling")


@dataclass(frozen=True)
class Figure:
    """A figure that a script has stored. Less is better.

    script: name of the file
    rows:   field of the report that holds the rows
    where:  what the row and its report say of themselves
    fields: of the row; their sum is the figure
    unit:   of the figure
    per:    what the stored sum is divided by for that unit

    A name with dots is a path.
    """

    script: str
    rows: str
    where: Mapping[str, Any]
    fields: tuple[str, ...]
    unit: str
    per: float

    def now(self, stored: Stored) -> float | None:
        """Return the figure of the first such row that has it, or None where all failed, or there is none."""
        report = stored.scripts.get(self.script, {})
        for row in report.get(self.rows, ()):
            if all(_at({**report, **row}, name) == value for name, value in self.where.items()):
                found = [_at(row, name) for name in self.fields]
                if None not in found:
                    return sum(found) / self.per
        return None


def _at(row: Any, path: str) -> Any:
    """Return what stands at a path of a row, or None."""
    return reduce(lambda of, name: of.get(name) if isinstance(of, Mapping) else None, path.split("."), row)


@dataclass(frozen=True)
class Goal:
    """A goal for some figures of one kind.

    work:    what is measured, for a reader
    figures: in one unit
    before:  figures when the goal was set; None where nothing was measured
    goals:   figures to reach; None where none was set
    wall:    what stands between now and the goal, as far as it is known
    """

    work: str
    figures: tuple[Ratio | Share | Figure, ...]
    before: tuple[float | None, ...]
    goals: tuple[float | None, ...]
    wall: str


CUBLAS, GROUPED, ADAMW = "cuBLAS bf16", "grouped_mm bf16", "AdamW fused float32"
COMPILED, MUON = "compiled float AdamW", "compiled float Muon"
TRUNK = "r12 core with experts, one turn"


def ratios(op: str, shapes: Iterable[str], peer: str) -> tuple[Ratio, ...]:
    """Return the ratios of an op to a peer, by shape."""
    return tuple(Ratio(op, shape, peer) for shape in shapes)


def of_r12(script: str, fields: tuple[str, ...], *models: str, **where: Any) -> tuple[Figure, ...]:
    """Return figures of `bench.large` for models of the size of r12: of memory in MiB, of time in seconds."""
    unit, per = (" MiB", 2**20) if fields[0].endswith("bytes") else (" s", 1)
    return tuple(Figure(script, "rows", {"model": model, **where}, fields, unit, per) for model in models)


GOALS: tuple[Goal, ...] = (
    Goal(
        "`linear` 16384 x 15360, 1 and 8 rows",
        ratios("linear", ("16384x15360_m1", "16384x15360_m8"), CUBLAS),
        (1.2, 1.2), (4.2, 4.2),
        "instructions that unpack: 59 % of issue slots and 72 % of the L1, where DRAM has 37 %",
    ),
    Goal(
        "`linear` 7168 x 7168 and 3072 x 3072, 1 row",
        ratios("linear", ("7168_decode", "3072_m1"), CUBLAS),
        (1.56, 1.49), (4.0, 3.0),
        "an empty graph takes 3 us of 17 and of 7",
    ),
    Goal(
        "`linear` 16384 x 15360, 16, 64, 256 and 512 rows",
        ratios("linear", ("16384x15360_m16", "16384x15360_m64", "16384x15360_m256", "16384x15360_m512"), CUBLAS),
        (1.2, 1.34, None, 0.6), (4.0, 2.5, 1.2, 0.95),
        "up to 16 rows instructions that unpack; at 64 these and the tensor cores wait for each other; above, the tensor cores",
    ),
    Goal(
        "`linear` 7168 x 7168, 4,096 rows", ratios("linear", ("7168",), CUBLAS),
        (0.94,), (0.98,),
        "the weight is unpacked first, which takes 45 us",
    ),
    Goal(
        "input gradient of `linear` 7168 x 7168, 4,096 rows", ratios("linear_input_grad", ("7168",), CUBLAS),
        (None,), (0.98,),
        "the weight is unpacked first, which takes 45 us",
    ),
    Goal(
        "weight gradient of `linear` 7168 x 7168, 4,096 rows", ratios("linear_weight_grad", ("7168",), CUBLAS),
        (None,), (0.98,),
        "it writes float32, where the peer writes bfloat16. Training asks for bfloat16 where a gradient is made orthogonal",
    ),
    Goal(
        "votes and step of 2^30 weights, float32 gradient", ratios("update_step", ("2^30",), ADAMW),
        (1.34,), (4.0,),
        "votes wait for the L2 and for instructions: 2.3 ms of 4.1. To read the gradient once gained nothing",
    ),
    Goal(
        "votes and step of 2^30 weights, bfloat16 gradient", ratios("update_step", ("2^30_bf16",), ADAMW),
        (None,), (5.0,),
        "as with float32 gradients; those of the peer are float32, as they have to be",
    ),
    Goal(
        "orthogonalizing a 7168 x 7168 gradient", ratios("orthogonalize", ("7168",), "Muon's iteration, bf16"),
        (0.99,), (1.56,),
        "nine products of a side, of which half is computed, at 0.8 of the library's rate",
    ),
    Goal(
        "orthogonalizing a 7168 x 21216 gradient, share of the product limit",
        (Share("orthogonalize", "7168x21216"),),
        (None,), (90.0,),
        "as for 7168 x 7168; the least work is half of what it was when the goal was set",
    ),
    Goal(
        "denoise loop of r9 and r14, one sample", ratios("denoise_loop", ("r9", "r14"), "torch dense float32"),
        (1.03, 0.77), (1.0, 1.0),
        "nothing. Recorded in a graph, seven launches a step are faster for r9 where nothing halts: 76 us in place of 88",
    ),
    Goal(
        "train step of `small`", ratios("train_step", ("small",), COMPILED),
        (0.45,), (1.2,),
        "orthogonal gradients and votes, where AdamW takes 0.2 ms; norms take 0.67, where the twin's take 0.55",
    ),
    Goal(
        "train step of the 28.9 M byte transformer", ratios("train_step_transformer", ("28.9M",), COMPILED),
        (None,), (1.1,),
        "orthogonal gradients and votes, where AdamW takes 0.2 ms",
    ),
    Goal(
        "train step of the 28.9 M byte transformer", ratios("train_step_transformer", ("28.9M",), MUON),
        (None,), (1.3,),
        "as against AdamW: forward and backward passes are no faster than the twin's",
    ),
    Goal(
        "train step of the 303.6 M byte transformer", ratios("train_step_transformer", ("303.6M",), COMPILED),
        (None,), (1.1,),
        "orthogonal gradients are a sixth of all operations, and AdamW has none",
    ),
    Goal(
        "train step of the 303.6 M byte transformer", ratios("train_step_transformer", ("303.6M",), MUON),
        (None,), (1.3,),
        "as against AdamW: forward and backward passes are no faster than the twin's",
    ),
    Goal(
        "train step of r12 and of its trunk alone, 8,192 bytes",
        of_r12("large-step", ("step_seconds",), "r12", TRUNK, windows=32, context=256),
        (0.45, 0.145), (0.15, 0.048),
        "experts of many slots multiply at 180 TFLOP/s, as each tile unpacks its weights: 25 ms of r12. Orthogonal gradients",
    ),
    Goal(
        "peaks of the step of r12 and of its trunk alone, 8,192 bytes",
        of_r12("large-step", ("step_peak_bytes",), "r12", TRUNK, windows=32, context=256),
        (None, None), (None, None),
        "activations; in r12 also 1.8 GiB of sums of the loop's gradients",
    ),
    Goal(
        "peaks of a step of 4 bytes, of r12 and without codes and graph",
        of_r12("large", ("peak_bytes",), "r12", TRUNK, windows=1, context=4),
        (2820, 2786), (1734.9, 1638.54),
        "gradients are made orthogonal, which takes products of whole matrices",
    ),
    Goal(
        "first step of r12, with no compiled kernel",
        of_r12("large-cold", ("cold_forward_seconds", "cold_update_seconds"), "r12", windows=1, context=4, cold=True),
        (22,), (10,),
        "nothing: sixteen processes compile. Before, one compiled one kernel after the other",
    ),
    Goal(
        "one byte of `small` with every module, one sequence, with a ledger",
        (
            Figure(
                "generation", "with_ledger",
                {"preset": "small", "model.composite_codes": 4096, "length": 1000, "batch": 1},
                ("steps.recorded.p50_seconds",), " ms", 1e-3,
            ),
        ),
        (2.1,), (0.25,),
        "some 440 kernels take all of it, most of them one after the other",
    ),
    Goal(
        "decode attention, 64 sequences of 8,192 slots, 128 heads",
        ratios("decode_attention", ("8192_h128",), "DeepseekV3 of transformers"),
        (None,), (50.0,),
        "arithmetic: sums of more than 32 heads need more registers than there are, so Hopper's larger products stay unused",
    ),
    Goal(
        "decode attention, 64 sequences of 8,192 slots, 16 heads, share of bandwidth", (Share("decode_attention", "8192_h16"),),
        (None,), (75.0,),
        "arithmetic: products of 16 rows, and each share is two numbers in bfloat16",
    ),
    Goal(
        "experts 32 x 21216 x 1024: 4, 256 and 2,048 slots",
        ratios("grouped_linear", ("21216_m4", "21216_m256", "21216_m2048"), GROUPED),
        (2.8, 2.0, 2.0), (5.0, 4.0, 3.0),
        "instructions that unpack, and 10 us of sorting slots",
    ),
    Goal(
        "their weight gradient",
        ratios("grouped_linear_weight_grad", ("21216_m4", "21216_m256", "21216_m2048"), GROUPED),
        (0.59, 0.61, 0.55), (1.0, 1.0, 1.0),
        "it writes float32, for votes, where the peer writes bfloat16: half of the peer's speed is the limit",
    ),
)  # fmt: skip
"""The goals, in the order of the page."""


def table(stored: Stored) -> list[str]:
    """Return the goals as Markdown."""
    lines = ["| work | when the goal was set | now | goal | in the way |", "|---|---|---|---|---|"]
    for goal in GOALS:
        first = goal.figures[0]
        work = f"{goal.work}, against {first.peer}" if isinstance(first, Ratio) else goal.work
        now = [figure.now(stored) for figure in goal.figures]
        cells = (
            work,
            _shown(goal.before, first.unit, "not measured"),
            _shown(now, first.unit, "not measured"),
            _shown(goal.goals, first.unit, "none"),
            goal.wall,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(values: Iterable[float | None], unit: str, missing: str) -> str:
    return ", ".join(missing if value is None else f"{_number(value)}{unit}" for value in values)


def _number(value: float) -> str:
    # From here on three digits are rounded to a power of ten.
    return f"{value:,.2f}".removesuffix(".00") if value >= 999.5 else f"{value:.3g}"
