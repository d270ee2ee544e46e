"""Random inputs for every op of the table, on the device that is timed. Zeros would hide mistakes and run faster.

Each family has a file here, found on disk. It holds `INPUTS`, what makes the arguments of an op by the op's name. It may hold
`MOST`, the largest sizes that an op of the family is checked at before it is timed (see `bench.gate.small`).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module

from arbitor.reference.op_table import OP_TABLE, OpRow
from bench.inputs.maker import CLOCK, RATE, Arguments, Inputs, Maker, Sizes

__all__ = ["CLOCK", "FAMILIES", "INPUTS", "MOST", "RATE", "Arguments", "Inputs", "Maker", "Sizes", "faults"]

_NAMES = sorted(found.name for found in pkgutil.iter_modules(__path__))
_MODULES = {name: import_module(f"{__name__}.{name}") for name in _NAMES}

FAMILIES: Mapping[str, Mapping[str, Inputs]] = {
    name: module.INPUTS for name, module in _MODULES.items() if hasattr(module, "INPUTS")
}
"""The inputs of each file that has some, by the name of the file."""

INPUTS: Mapping[str, Inputs] = {op: make for family in FAMILIES.values() for op, make in family.items()}
"""What makes the arguments of an op, by the op's name."""

MOST: Mapping[str, Mapping[str, int | tuple[int, ...]]] = {
    name: getattr(_MODULES[name], "MOST", {}) for name in FAMILIES
}
"""Largest sizes of a check by family, where those of the tiny shape would not do. Of several numbers, in ascending order, a size is
checked at the largest one that it reaches: each of them takes another path."""


def faults(
    table: Mapping[str, OpRow] = OP_TABLE, families: Mapping[str, Mapping[str, Inputs]] = FAMILIES
) -> Iterator[str]:
    """Yield a sentence for each op of the table without inputs, and for inputs that belong to no op of their family."""
    for row in table.values():
        file = f"bench/inputs/{row.family}.py"
        if row.family not in families:
            yield f"{file} is missing, or holds no INPUTS: it makes the arguments of {row.name}"
        elif row.name not in families[row.family]:
            yield f"{file} has no inputs of {row.name}: INPUTS needs an entry of that name"
    for family, inputs in families.items():
        for op in inputs:
            if op not in table or table[op].family != family:
                yield f"bench/inputs/{family}.py has inputs of {op}, but the op table has no such op in {family}"
