"""The table of all ops, with a row for each op. Conformance, bench and docs find the ops here.

Legend of sizes: N rows, K columns, G columns a group, M activation rows, B batch, C channels, L length,
J taps, E experts, `groups` groups of dither, `float_bytes` bytes of one activation (2: bfloat16, 4: float32).

The work models are lower bounds, for rooflines. `bytes_min` reads each input once and writes each output once, with weights in
their canonical bytes. `ops_min` counts the arithmetic of the formula, a multiply-add as two operations.

A family is a file of this folder with `OPS`, a tuple of rows. The file is found on disk, and no list names it. Families come in
alphabetical order, and rows in the order of their file. No rule depends on the order.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import MappingProxyType

from arbitor.reference.op_table.row import EXACT, TWICE, Exact, NoWorse, OpRow, Shape

__all__ = ["EXACT", "FAMILIES", "OP_TABLE", "TWICE", "Exact", "NoWorse", "OpRow", "Shape", "table_of"]


def table_of(families: Mapping[str, Iterable[OpRow]]) -> Mapping[str, OpRow]:
    """Return the rows of all families by the name of their op.

    Args:
        families: the rows of each file, by the name of the file.

    Raises ValueError for a row whose family is not its file, or for a second row of an op.
    """
    table: dict[str, OpRow] = {}
    for family, rows in families.items():
        for row in rows:
            if row.family != family:
                raise ValueError(
                    f"family of {row.name} is {row.family!r}, but must be its file's, {family!r}"
                )
            if row.name in table:
                raise ValueError(
                    f"name is {row.name!r} in {family}.py, but {table[row.name].family}.py has a row of that name"
                )
            table[row.name] = row
    return MappingProxyType(table)


_NAMES = sorted(found.name for found in pkgutil.iter_modules(__path__))
_MODULES = {name: import_module(f"{__name__}.{name}") for name in _NAMES}

OP_TABLE: Mapping[str, OpRow] = table_of(
    {name: module.OPS for name, module in _MODULES.items() if hasattr(module, "OPS")}
)
"""The rows by the name of their op, with the families in alphabetical order."""

FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(row.family for row in OP_TABLE.values()))
"""The families that have rows, in alphabetical order."""
