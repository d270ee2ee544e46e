"""What is timed: every op of the table and some compounds, at each shape, by every implementation.

A case id is `op-shape-implementation`, for example `linear-7168_m16-ours`. Shapes are those of `op_table`. A linear is timed
with the M of TOKENS at each width besides, and `linear` with those of LARGE_TOKENS at a large matrix. An op that has CUDA C++
kernels is timed a second time on Triton's kernels alone. A case that a machine cannot run is counted, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch

from arbitor.optimized import settings
from arbitor.optimized.ops import paths
from arbitor.reference.constants import DEFAULT_ORTHOGONAL_STEPS
from arbitor.reference.op_table import OP_TABLE, OpRow, Shape
from bench import machine, train_step
from bench.peers import peers_of

OURS, OURS_ON_TRITON, REFERENCE = "ours", "ours on Triton", "reference"

ALL_OURS = (OURS, OURS_ON_TRITON)
"""Implementations of this repository that are checked before they are timed and must not become slower."""

LINEARS = "linear"
"""Family of the ops that are timed with the M of TOKENS."""

TRAIN_FAMILY = "train_step"
"""Family of the compounds that are a whole train step; it has no file of ops."""

LARGE_TOKENS = (1, 8, 16, 64, 256, 512)
"""Activation rows M that `linear` is timed at with LARGE_LINEAR, from one sequence that decodes to a small batch."""

TOKENS = (*LARGE_TOKENS, 4096)
"""Activation rows M that a linear is timed at. 512 and 4096 are what training has."""

LARGE_LINEAR: Shape = {"N": 16384, "K": 15360, "G": 12, "float_bytes": 2}
"""A matrix so large that the time of `linear` with few rows is that of its bytes, not that of a launch."""

ON_BOTH_PATHS = ("denoise_loop", "grouped_linear", "linear", "update_step")
"""Rows of ops that have CUDA C++ kernels, which are timed on Triton's kernels besides."""

WIDTHS = ("3072", "7168")
"""Shapes of the table whose N and K the M above are combined with."""

UPDATE_SHAPES: Mapping[str, Shape] = {
    "tiny": {"N": 256, "K": 256, "G": 12},
    "3072": {"N": 3072, "K": 3072, "G": 12},
    "7168": {"N": 7168, "K": 7168, "G": 12},
    "2^28": {"N": 16384, "K": 16384, "G": 12},
    "2^30": {"N": 32768, "K": 32768, "G": 12},
    "2^30_bf16": {"N": 32768, "K": 32768, "G": 12, "float_bytes": 2},
}
"""Weights of an update step: 65 thousand, 9.4, 51.4, 268 million and 1.07e9; the last with a bfloat16 gradient too."""

ORTHOGONAL = "orthogonal_update_step"
"""Name of the update step whose gradient is made orthogonal first. At the shapes above up to 7168: more is minutes of products."""

REFERENCE_MAX_WEIGHTS = 7168 * 7168
"""Most weights that the reference is timed with; its temporaries are int64, some of them a dozen numbers a group."""

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

    bytes_min, ops_min: least bytes and operations of a shape, or None where no model of the work exists.
    gates: returns the ops that must agree with the reference before ours is timed.
    """

    name: str
    family: str
    shapes: Mapping[str, Shape]
    bytes_min: Callable[[Shape], int] | None
    ops_min: Callable[[Shape], int] | None
    capturable: bool
    gates: Callable[[], tuple[str, ...]]


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
    """Return every row by name: the op table's and the compounds, family by family in alphabetical order."""
    table = [
        BenchRow(
            name=row.name,
            family=row.family,
            shapes=_with_tokens(row) if row.family == LINEARS else row.shapes,
            bytes_min=row.bytes_min,
            ops_min=row.ops_min,
            capturable=row.capturable,
            gates=partial(_only, row.name),
        )
        for row in OP_TABLE.values()
    ]
    count, step = OP_TABLE["accumulate_gradient"], OP_TABLE["apply_step"]
    update = BenchRow(
        name="update_step",
        family="update",
        shapes=UPDATE_SHAPES,
        # As one op it reads the gradient once, and reads and writes the state once.
        bytes_min=lambda s: s.get("float_bytes", 4) * s["N"] * s["K"] + step.bytes_min(s),
        ops_min=lambda s: count.ops_min(s) + step.ops_min(s),
        capturable=True,
        gates=partial(_only, count.name, step.name),
    )
    orthogonalize = OP_TABLE["orthogonalize"]
    orthogonal = replace(
        update,
        name=ORTHOGONAL,
        shapes={shape: UPDATE_SHAPES[shape] for shape in ("tiny", "3072", "7168")},
        ops_min=lambda s: (
            update.ops_min(s) + orthogonalize.ops_min({**s, "E": 1, "iterations": DEFAULT_ORTHOGONAL_STEPS})
        ),
        gates=partial(_only, orthogonalize.name, count.name, step.name),
    )
    trains = [
        BenchRow(
            name=name,
            family=TRAIN_FAMILY,
            shapes=shapes,
            bytes_min=None,
            ops_min=None,
            # The host looks at the loss between two graphs, to refuse one that is not finite.
            capturable=False,
            gates=partial(train_step.ops_of, name),
        )
        for name, shapes in train_step.SHAPES.items()
    ]
    return {
        row.name: row for row in sorted((*table, update, orthogonal, *trains), key=lambda row: row.family)
    }


def _only(*ops: str) -> tuple[str, ...]:
    return ops


@cache
def families() -> tuple[str, ...]:
    """Return every family in the order that its cases run, so that what matters most is measured if time runs out.

    The order is made from what a train step uses. Families of an op of the plain train step come first, with the train step
    itself. Families of an op that only every module adds come next, and all other families last. Within each of the three the
    order is alphabetical.
    """
    trunk, whole = set(train_step.ops_of(train_step.TRUNK)), set(train_step.ops_of(train_step.EVERY_MODULE))
    ranks: dict[str, int] = {}
    for row in rows().values():
        rank = 0 if row.family == TRAIN_FAMILY or row.name in trunk else 1 if row.name in whole else 2
        ranks[row.family] = min(rank, ranks.get(row.family, rank))
    return tuple(sorted(ranks, key=lambda family: (ranks[family], family)))


def _with_tokens(row: OpRow) -> Mapping[str, Shape]:
    """Return a linear's shapes with the M of TOKENS at each width, those the table has under the table's names."""
    found = dict(row.shapes)
    for width in (width for width in WIDTHS if width in row.shapes):
        for tokens in TOKENS:
            sizes = {**row.shapes[width], "M": tokens}
            if all(dict(other) != sizes for other in found.values()):
                found[f"{width}_m{tokens}"] = sizes
    if row.name == "linear":
        name = f"{LARGE_LINEAR['N']}x{LARGE_LINEAR['K']}"
        found |= {f"{name}_m{tokens}": {**LARGE_LINEAR, "M": tokens} for tokens in LARGE_TOKENS}
    order = {name: (sizes["K"], sizes["M"]) for name, sizes in found.items()}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def implementations(row: BenchRow) -> tuple[str, ...]:
    """Return the names of what is timed for a row: ours, the peers, the reference."""
    on_triton = (OURS_ON_TRITON,) if row.name in ON_BOTH_PATHS else ()
    return (OURS, *on_triton, *(peer.name for peer in peers_of(row.name)), REFERENCE)


@cache
def all_cases() -> Mapping[str, Case]:
    """Return every case by id, in the order to run them: peers right beside ours, the slow reference last."""
    cases = [
        Case(row, shape, implementation)
        for family in families()
        for row in rows().values()
        if row.family == family
        for shape in row.shapes
        for implementation in implementations(row)
    ]
    return {case.id: case for case in cases}


def interpreted() -> bool:
    """Whether Triton runs in its interpreter: code paths are then exercised, and times mean nothing."""
    return not machine.on_gpu() and os.environ.get("TRITON_INTERPRET") == "1"


def on_one_path() -> bool:
    """Whether ours has no CUDA C++ kernels here, because they cannot be had or ARB_PATH is triton."""
    if not machine.on_gpu() or settings.path() == "triton":
        return True
    return paths.why_not(torch.device("cuda")) is not None


def why_left_out(case: Case) -> str | None:
    """Return why a case does not run on this machine, or None if it does."""
    sizes = case.sizes
    if not machine.on_gpu():
        if case.shape not in ("tiny", "scalar"):
            return "shapes beyond tiny are for a GPU"
        if case.implementation == OURS and not interpreted():
            return "Triton kernels need CUDA"
        if case.implementation == OURS and case.row.family == TRAIN_FAMILY:
            return "a train step takes minutes in Triton's interpreter"
    if case.implementation == OURS_ON_TRITON and on_one_path():
        return "ours runs on Triton's kernels alone"
    peer = next((peer for peer in peers_of(case.row.name) if peer.name == case.implementation), None)
    if peer is not None and peer.needs and not (machine.on_gpu() and find_spec(peer.needs)):
        return f"{peer.needs} is not installed, or there is no GPU"
    weights = sizes.get("N", 0) * sizes.get("K", 0)
    if case.row.name == train_step.TRANSFORMER:
        weights = train_step.weights_of(sizes)
    large = weights > REFERENCE_MAX_WEIGHTS
    if case.implementation == REFERENCE and case.row.family in ("update", LINEARS, TRAIN_FAMILY) and large:
        return (
            f"the reference's int64 temporaries are too large for more than {REFERENCE_MAX_WEIGHTS:,} weights"
        )
    return None


def ids() -> list[str]:
    """Return the ids of the cases that run here, in the order to run them."""
    return [case.id for case in all_cases().values() if why_left_out(case) is None]


def left_out() -> dict[str, int]:
    """Return how many cases do not run here, by reason."""
    counts: dict[str, int] = {}
    for case in all_cases().values():
        reason = why_left_out(case)
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
    return counts
