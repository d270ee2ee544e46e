"""Every family of the op table, with all that the suite knows of it. Files are found on disk, and no family is listed.

The file of a family is `conformance/ops/test_<family>.py`. A large family has parts beside it, `test_<family>_<part>.py`. Importing
a file files what it states: how calls are drawn (`CASES`, `MAGNITUDES`), `LAWS`, `MUTANTS`, `REFUSALS`. Whoever needs all of
them imports them from here.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from arbitor.reference import op_table
from arbitor.reference.op_table import OP_TABLE

from .case import CASES, MAGNITUDES, compare
from .law import LAWS
from .mutant import MUTANTS
from .refusal import REFUSALS, REFUSES_NOTHING

__all__ = [
    "CASES",
    "FAMILIES",
    "FILES",
    "LAWS",
    "MAGNITUDES",
    "MUTANTS",
    "REFUSALS",
    "REFUSES_NOTHING",
    "compare",
]

FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name, row in OP_TABLE.items() if row.family == family)
    for family in op_table.FAMILIES
}
"""The ops of each family."""


def family_of(stem: str) -> str | None:
    """Return the family of `test_<family>` or `test_<family>_<part>`, None if the table has none of that name."""
    name = stem.removeprefix("test_")
    fitting = [family for family in FAMILIES if name == family or name.startswith(f"{family}_")]
    return max(fitting, key=len, default=None)


FILES: dict[str, str | None] = {
    path.stem: family_of(path.stem) for path in sorted((Path(__file__).parent / "ops").glob("test_*.py"))
}
"""The family of each file of `conformance/ops`, by the name of the file without `.py`."""

for _stem in FILES:
    importlib.import_module(f"{__package__}.ops.{_stem}")
