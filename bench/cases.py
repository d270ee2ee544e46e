"""What is timed: every op of the table at its bench shapes, by every implementation; the rest is said, not dropped.

A case id is `op-shape-implementation`: `linear-7168_m16-ours`. Shapes are those of `op_table`, and for linears M of 1, 16,
64, 512 and 4096 at each width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from arbitor.reference.op_table import OP_TABLE, Shape
from bench import machine
from bench.peers import peers_of

OURS, REFERENCE = "ours", "reference"

FAMILIES = (
    "orthogonal",
    "linear",
    "update",
    "train_step",
    "norm",
    "embedding",
    "codebook",
    "edges",
    "conv",
    "votes",
    "scale",
    "denoise",
    "memory",
    "experts",
    "attention",
    "packing",
    "dither",
    "layout",
)
"""Files of this suite in the order that they run: what matters most comes first, in case time runs out."""

TOKENS = (1, 16, 64, 512, 4096)
"""Activation rows M that a linear is timed at: decoding one sequence, a few, a batch; training."""

WIDTHS = ("3072", "7168")
"""Shapes of the table whose N and K the M above are combined with."""

LINEARS = ("linear", "linear_input_grad", "linear_weight_grad")

UPDATE_SHAPES: Mapping[str, Shape] = {
    "tiny": {"N": 256, "K": 256, "G": 12},
    "3072": {"N": 3072, "K": 3072, "G": 12},
    "7168": {"N": 7168, "K": 7168, "G": 12},
    "2^28": {"N": 16384, "K": 16384, "G": 12},
    "2^30": {"N": 32768, "K": 32768, "G": 12},
}
"""Weights of an update step: 65 thousand, 9.4, 51.4, 268 million and 1.07e9."""

TRAIN_SHAPES: Mapping[str, Shape] = {"tiny": {"B": 16, "T": 128}, "small": {"B": 64, "T": 256}}
"""Windows B of T bytes in a train step, by preset: what `arb train` uses."""

STEP_OPS = (
    *LINEARS,
    "choose_experts",
    "grouped_linear",
    "grouped_linear_input_grad",
    "grouped_linear_weight_grad",
    "expert_load",
    "rms_norm",
    "rms_norm_input_grad",
    "embedding",
    "embedding_row_grads",
    "orthogonalize",
    "accumulate_gradient",
    "apply_step",
)
"""Ops of a train step."""

MODULE_OPS = (
    "nearest_codes",
    "count_codes",
    "revive_codes",
    "age_codes",
    "edge_sum",
    "edge_sum_input_grad",
    "edge_sum_sign_grad",
    "update_neighbours",
    "ngram_rows",
    "touch_strengths",
)
"""What a train step uses besides if the model has every module."""

REFERENCE_MAX_WEIGHTS = 7168 * 7168
"""Largest weight that the reference is timed with; its temporaries are int64, some of them a dozen numbers a group."""

NOTES = {
    "from_spec": "only the trits change form; the other tensors are shared, so less moves than the floor counts",
    "to_spec": "only the trits change form; the other tensors are shared, so less moves than the floor counts",
    "initial_weight": "ours makes words first and packs them: once per weight, at the start of training",
    "step_from_loss": "host arithmetic: no device takes part",
}
"""What a reader of a number must know, by op."""


@dataclass(frozen=True)
class BenchRow:
    """An op as the benchmarks see it: a row of the op table, or a compound of ops.

    gates: ops that must agree with the reference before ours is timed.
    """

    name: str
    family: str
    shapes: Mapping[str, Shape]
    bytes_min: Callable[[Shape], int] | None
    ops_min: Callable[[Shape], int] | None
    capturable: bool
    gates: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Case:
    """One implementation of one op at one shape."""

    row: BenchRow
    shape: str
    implementation: str

    @property
    def id(self) -> str:
        """Return the case's name in ids and files."""
        return f"{self.row.name}-{self.shape}-{self.implementation}".replace(" ", "_")

    @property
    def sizes(self) -> Shape:
        """Return the sizes of the shape."""
        return self.row.shapes[self.shape]


@cache
def rows() -> Mapping[str, BenchRow]:
    """Return every row by name: the op table's and the compounds."""
    table = {
        row.name: BenchRow(
            name=row.name,
            family=row.family,
            shapes=_with_tokens(row.shapes) if row.name in LINEARS else row.shapes,
            bytes_min=row.bytes_min,
            ops_min=row.ops_min,
            capturable=row.capturable,
            gates=(row.name,),
        )
        for row in OP_TABLE.values()
    }
    count, step = OP_TABLE["accumulate_gradient"], OP_TABLE["apply_step"]
    update = BenchRow(
        name="update_step",
        family="update",
        shapes=UPDATE_SHAPES,
        # as one op: the float32 gradient is read once, the state read and written once
        bytes_min=lambda s: 4 * s["N"] * s["K"] + step.bytes_min(s),
        ops_min=lambda s: count.ops_min(s) + step.ops_min(s),
        capturable=True,
        gates=(count.name, step.name),
    )
    train = BenchRow(
        name="train_step",
        family="train_step",
        shapes=TRAIN_SHAPES,
        bytes_min=None,
        ops_min=None,
        capturable=False,  # as a whole: it looks at the loss, to refuse one that is not finite, between two graphs
        gates=STEP_OPS,
    )
    whole = replace(train, name="train_step_every_module", gates=(*STEP_OPS, *MODULE_OPS))
    return {**table, **{row.name: row for row in (update, train, whole)}}


def _with_tokens(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Return a linear's shapes with the M of TOKENS at each width, those the table has under the table's names."""
    found = dict(shapes)
    for width in WIDTHS:
        for tokens in TOKENS:
            sizes = {**shapes[width], "M": tokens}
            if all(dict(other) != sizes for other in found.values()):
                found[f"{width}_m{tokens}"] = sizes
    order = {name: (sizes["K"], sizes["M"]) for name, sizes in found.items()}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def implementations(row: BenchRow) -> tuple[str, ...]:
    """Return the names of what is timed for a row: ours, the peers, the reference."""
    return (OURS, *(peer.name for peer in peers_of(row.name)), REFERENCE)


@cache
def all_cases() -> Mapping[str, Case]:
    """Return every case by id, in the order to run them: peers right beside ours, the slow reference last."""
    cases = [
        Case(row, shape, implementation)
        for family in FAMILIES
        for row in rows().values()
        if row.family == family
        for shape in row.shapes
        for implementation in implementations(row)
    ]
    return {case.id: case for case in cases}


def interpreted() -> bool:
    """Whether Triton runs in its interpreter: code paths are then exercised, and times mean nothing."""
    return not machine.on_gpu() and os.environ.get("TRITON_INTERPRET") == "1"


def why_left_out(case: Case) -> str | None:
    """Return why a case does not run on this machine, or None if it does."""
    sizes = case.sizes
    if not machine.on_gpu():
        if case.shape not in ("tiny", "scalar"):
            return "shapes beyond tiny are for a GPU"
        if case.implementation == OURS and not interpreted():
            return "Triton kernels need CUDA"
        if case.implementation == OURS and case.row.family == "train_step":
            return "a train step takes minutes in Triton's interpreter"
    large = sizes.get("N", 0) * sizes.get("K", 0) > REFERENCE_MAX_WEIGHTS
    if case.implementation == REFERENCE and case.row.family == "update" and large:
        return (
            f"the reference's int64 temporaries are too large for more than {REFERENCE_MAX_WEIGHTS:,} weights"
        )
    return None


def ids_of(family: str) -> list[str]:
    """Return the ids of a family's cases that run here."""
    found = all_cases().values()
    return [case.id for case in found if case.row.family == family and why_left_out(case) is None]


def left_out() -> dict[str, int]:
    """Return how many cases do not run here, by reason."""
    counts: dict[str, int] = {}
    for case in all_cases().values():
        reason = why_left_out(case)
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
    return counts
