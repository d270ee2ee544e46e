"""One row an op: the table of contents of the repo. Conformance, bench and docs are driven by it.

Legend of sizes: N rows, K columns, G columns a group, M activation rows, B batch, C channels, L length,
J taps, E experts, `groups` groups of dither, `float_bytes` bytes of one activation (2: bfloat16, 4: float32).

The work models are floors, for rooflines: `bytes_min` reads each input once and writes each output once,
weights in their canonical bytes; `ops_min` counts the arithmetic of the formula, a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from arbitor.reference.op_table import (
    attention,
    codebook,
    conv,
    denoise,
    dither,
    edges,
    embedding,
    experts,
    layout,
    linear,
    memory,
    norm,
    orthogonal,
    packing,
    scale,
    update,
    votes,
)
from arbitor.reference.op_table.row import EXACT, TWICE, Exact, NoWorse, OpRow, Shape

__all__ = ["EXACT", "OP_TABLE", "TWICE", "Exact", "NoWorse", "OpRow", "Shape"]

_FAMILIES = (
    packing,
    dither,
    scale,
    votes,
    update,
    orthogonal,
    linear,
    conv,
    norm,
    embedding,
    denoise,
    layout,
    codebook,
    experts,
    attention,
    edges,
    memory,
)

OP_TABLE: Mapping[str, OpRow] = MappingProxyType(
    {row.name: row for family in _FAMILIES for row in family.OPS}
)
"""The rows by name, in the order of the spec."""
