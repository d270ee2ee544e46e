"""What a step costs on machines that nobody here has, from measured rates of one GPU and data sheets of links.

`python -m bench.report` puts its tables into docs/scaling.md. Bytes follow from the rule
(`arbitor.optimized.distributed.sizes`). Times are sums of parts. None of them was measured on more than one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from arbitor.optimized.distributed.sizes import (
    CodebookUse,
    codebook_bytes,
    codes_received_spread,
    codes_received_whole,
    kept_bytes,
    read_bytes,
    received_bytes,
    slots_received,
)
from arbitor.optimized.layouts import DeviceWeight
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import DEFAULT_GROUP_SIZE, groups_per_row
from arbitor.reference.graph.composite import COMPOSITES_PER_CODE
from arbitor.reference.graph.mxint8 import encoded_bytes
from arbitor.reference.presets import preset
from bench.learning.rules import FLOAT_BYTES
from bench.scaling.floats import BYTES_A_WEIGHT

SIDE = 960
"""Rows and columns of the matrix that bytes a weight are counted on: a multiple of 16, 12 and 32, so that nothing is ragged."""


def laid_out(num_rows: int, num_columns: int) -> DeviceWeight:
    """Return a weight as a GPU holds it, without memory."""
    groups = groups_per_row(num_columns, DEFAULT_GROUP_SIZE)
    empty = partial(torch.empty, dtype=torch.int8, device="meta")
    return DeviceWeight(
        words=empty(num_rows, -(-num_columns // 16), dtype=torch.int32),
        exponents=empty(num_rows, groups),
        trit_accum=empty(num_rows, num_columns),
        exponent_accum=empty(num_rows, groups),
        shape=(num_rows, num_columns),
        group_size=DEFAULT_GROUP_SIZE,
    )


WEIGHT = laid_out(SIDE, SIDE)

GRADIENT_BYTES = {"bfloat16": 2.0, "mxint8": encoded_bytes(SIDE, SIDE) / SIDE**2}
"""Bytes of an element of a gradient that is made orthogonal."""

CHANGED_BYTES = 0.01
"""Bytes of trits and scales that a step changes, for a weight. Measured shares are in docs/scaling.md, below this."""

PRODUCT_SECONDS = 3 * 589e-6 / (7168**2 * 4096)
"""Of a weight and a position: the product of a linear and its two gradients, 7168 x 7168 with 4,096 rows, one H200."""

ORTHOGONAL_SECONDS = 10.9e-3 / 7168**2
"""Of a weight: `orthogonalize` of 7168 x 7168, one H200."""

UPDATE_SECONDS = 4.43e-3 / 2**30
"""Of a weight: votes and step of 2^30 weights, one H200."""

NVLINK, NETWORK = 450e9 * 0.8, 50e9 * 0.8
"""Bytes a second that a GPU receives within a host and from other hosts: four fifths of the data sheets of an H200 (900 GB/s both
ways) and of a 400 Gb/s adapter for each GPU. They are assumptions."""

GPUS_OF_HOST = 8
"""GPUs that NVLINK connects."""

POSITIONS = 2**14
"""Bytes that a GPU reads in a step."""


@dataclass(frozen=True)
class Step:
    """What a step of a model costs a rank.

    Fields:
        kept: bytes.
        received: bytes.
        products, orthogonal, update: seconds of the GPU.
        exchange: seconds of the link, if nothing else holds it up.
    """

    kept: float
    received: float
    products: float
    orthogonal: float
    update: float
    exchange: float


def kept(count: int) -> float:
    """Return the bytes a weight that a rank keeps."""
    return kept_bytes(WEIGHT, count) / SIDE**2


def received(count: int, gradients: str) -> float:
    """Return the bytes a weight that a rank receives in a step.

    Args:
        count: ranks.
        gradients: a key of `GRADIENT_BYTES`.
    """
    changed = round(CHANGED_BYTES * SIDE**2)
    of_all = received_bytes(WEIGHT, count, gradient_bytes=GRADIENT_BYTES[gradients], changed=changed)
    return of_all / count / SIDE**2


def of_floats(count: int, way: str) -> float:
    """Return the bytes a weight that a rank of float weights receives in a step. `way` is a key of `BYTES_A_WEIGHT`."""
    return BYTES_A_WEIGHT[way] * (count - 1) / count


def step(weights: float, count: int, gradients: str) -> Step:
    """Return what a step costs a rank, of a model whose positions use every weight once."""
    bytes_received = received(count, gradients) * weights
    # Every rank receives as much from each other rank.
    outside = max(count - GPUS_OF_HOST, 0) / max(count - 1, 1)
    seconds = max(bytes_received * (1 - outside) / NVLINK, bytes_received * outside / NETWORK)
    return Step(
        kept=kept(count) * weights,
        received=bytes_received,
        products=PRODUCT_SECONDS * weights * POSITIONS,
        orthogonal=ORTHOGONAL_SECONDS * weights / count,
        update=UPDATE_SECONDS * weights / count,
        exchange=seconds,
    )


def table_of_bytes() -> str:
    """Return the table of bytes a weight, as Markdown."""
    lines = [
        "| ranks | kept | received, bfloat16 | received, mxint8 | DDP | FSDP2 | of FSDP2, bfloat16 | of FSDP2, mxint8 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count in (1, 2, 4, 8, 64, 1024):
        ours = [received(count, gradients) for gradients in GRADIENT_BYTES]
        floats = [of_floats(count, way) for way in BYTES_A_WEIGHT]
        shares = ["" if count == 1 else f"{each / floats[1]:.3f}" for each in ours]
        cells = [f"{kept(count):.3f}", *(f"{each:.3f}" for each in (*ours, *floats)), *shares]
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_steps() -> str:
    """Return the table of large models, as Markdown."""
    lines = [
        "| weights | ranks | gradients | kept, GB | received, GB | products s | orthogonal s | votes, step s | exchange s |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for billions, count in ((10, 8), (100, 8), (100, 64), (1000, 1024)):
        for gradients in GRADIENT_BYTES:
            cost = step(billions * 1e9, count, gradients)
            lines.append(
                f"| {billions:,} B | {count:,} | {gradients} | {cost.kept / 1e9:.1f} | {cost.received / 1e9:,.1f} "
                f"| {cost.products:.2f} | {cost.orthogonal:.3f} | {cost.update:.4f} | {cost.exchange:.2f} |"
            )
    return "\n".join(lines)


def table_of_memory() -> str:
    """Return the table of the largest models, as Markdown: what a rank keeps, and what a rank of float AdamW would."""
    lines = [
        "| weights | ranks | kept by a rank, GiB | float AdamW, sharded over as many, GiB |",
        "|---:|---:|---:|---:|",
    ]
    for billions, count in ((90, 1), (150, 2), (220, 4), (300, 8)):
        gibibytes = billions * 1e9 / 2**30
        lines.append(
            f"| {billions} B | {count} | {kept(count) * gibibytes:.1f} | {FLOAT_BYTES / count * gibibytes:,.1f} |"
        )
    return "\n".join(lines)


def experts(name: str) -> tuple[int, int, int]:
    """Return the weights of the experts of a preset, and what a rank of very many receives for them in a step.

    Returns:
        Weights; bytes of their gradients in bfloat16; and bytes of the slots if experts are spread over ranks.
    """
    config = preset(name)
    width = config.width + config.shared_inner
    weights = config.num_layers * config.num_experts * config.expert_rank * width
    slots = config.num_layers * config.top_k * POSITIONS
    down = slots_received(slots, config.width, config.expert_rank, 2)
    up = slots_received(slots, config.expert_rank, config.shared_inner, 2)
    return weights, 2 * weights, down + up


@dataclass(frozen=True)
class CodeTable:
    """A table with a row for each code, and what a pass of a rank asks of it at most, as every vector may find another code.

    Fields:
        num_rows, columns: of the table.
        use:      what is asked.
        integers: bytes of a row beside the weight and the count of use of a codebook, or of the weight of edges.
    """

    num_rows: int
    columns: int
    use: CodebookUse
    integers: int = 0

    @property
    def kept(self) -> int:
        """Bytes on a GPU."""
        weight = laid_out(self.num_rows, self.columns)
        if self.integers:
            return sum(tensor.nbytes for tensor in weight.tensors().values()) + self.integers * self.num_rows
        return codebook_bytes(weight)


def code_tables(config: ArbConfig) -> list[CodeTable]:
    """Return the codebooks of a model that reads text, and the edges of their codes.

    A position reads its code, the codes that `nodes_read` counts, and in a model with composites its code once more, for the motif.
    Its proposal is read twice, and its code reads the composites that it keeps.
    """
    composites = bool(config.composite_codes)
    nodes, inner = (nodes_read(config, config.num_hops - last) for last in (0, 1))
    codes = CodebookUse(POSITIONS, POSITIONS * (1 + composites) + nodes, POSITIONS, (POSITIONS,))
    found = [
        CodeTable(config.num_codes, config.code_dim, codes),
        _edges(config.num_codes, config.num_neighbours, inner),
    ]
    if composites:
        kept = COMPOSITES_PER_CODE * POSITIONS
        proposals = CodebookUse(POSITIONS, 2 * POSITIONS + kept, POSITIONS + kept, (POSITIONS, kept))
        found += [
            CodeTable(config.composite_codes, config.code_dim, proposals),
            _edges(config.num_codes, COMPOSITES_PER_CODE, POSITIONS),
        ]
    return found


def nodes_read(config: ArbConfig, hops: int) -> int:
    """Return the codes that the graph reads at most: those of a rank's positions, and the neighbours that so many hops reach."""
    return min(sum(POSITIONS * config.num_neighbours**hop for hop in range(hops + 1)), config.num_codes)


def _edges(num_codes: int, num_neighbours: int, read: int) -> CodeTable:
    """Return the edges of codes. Their neighbours, of which some rows are read, travel in the bytes of as many rows that vote."""
    use = CodebookUse(0, read, 2 * read, (read,))
    return CodeTable(num_codes, num_neighbours, use, integers=(4 + 1) * num_neighbours)


def table_of_codes() -> str:
    """Return the table of codebooks and edges whose rows are spread over ranks, as Markdown."""
    lines = [
        "| preset | ranks | kept, MB | kept, spread | received, MB | received, spread |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in ("r12", "r14"):
        tables = code_tables(preset(name))
        kept = sum(each.kept for each in tables)
        for count in (2, 8, 64):
            whole = sum(
                codes_received_whole(each.use, each.num_rows, each.columns, count, 2) for each in tables
            )
            spread = sum(codes_received_spread(each.use, each.columns, count) for each in tables)
            cells = [f"{each / 1e6:,.1f}" for each in (kept, kept / count, whole, spread)]
            lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_experts() -> str:
    """Return the table of experts over ranks, as Markdown."""
    lines = [
        "| preset | weights of experts | gradients, MB | slots, MB | slots over gradients | state spread over 8, saved MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in ("small", "r11", "r12", "r14"):
        weights, gradients, slots = experts(name)
        # Accumulators are on one rank each as it is. Trits and scales are on all.
        saved = read_bytes(WEIGHT) / SIDE**2 * weights * 7 / 8
        lines.append(
            f"| {name} | {weights / 1e6:,.0f} M | {gradients / 1e6:,.0f} | {slots / 1e6:,.0f} | {slots / gradients:.1f} "
            f"| {saved / 1e6:,.0f} |"
        )
    return "\n".join(lines)
