"""Every family of the op table with all that the suite knows of it: files are found on disk, and no family is listed.

The file of a family is `conformance/ops/test_<family>.py`. A large family has parts beside it, `test_<family>_<part>.py`. Importing
a file files what it states: how calls are drawn (`CASES`, `MAGNITUDES`), `LAWS`, `MUTANTS`, `REFUSALS`. Whoever needs all of
them imports them from here. `missing` names what a family lacks, and test_families.py fails with what it says.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE
from conformance.case import CASES, MAGNITUDES, compare
from conformance.law import LAWS
from conformance.mutant import MUTANTS
from conformance.refusal import REFUSALS, REFUSES_NOTHING

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

ROOT = Path(__file__).resolve().parents[1]

FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name, row in OP_TABLE.items() if row.family == family)
    for family in dict.fromkeys(row.family for row in OP_TABLE.values())
}
"""The ops of each family."""


def family_of(stem: str) -> str | None:
    """Return the family of `test_<family>` or `test_<family>_<part>`, None if the table has none of that name."""
    name = stem.removeprefix("test_")
    fitting = [family for family in FAMILIES if name == family or name.startswith(f"{family}_")]
    return max(fitting, key=len, default=None)


FILES: dict[str, str | None] = {
    path.stem: family_of(path.stem) for path in sorted((ROOT / "conformance" / "ops").glob("test_*.py"))
}
"""The family of each file of `conformance/ops`, by the name of the file without `.py`."""

for _stem in FILES:
    importlib.import_module(f"conformance.ops.{_stem}")


def missing(family: str) -> list[str]:
    """Return a sentence for each piece of the reference and of the suite that a family of the table lacks."""
    files = {stem for stem, owner in FILES.items() if owner == family}
    laws = [
        law for law in LAWS.values() if law.file in files and not law.name.startswith("test_refusals_of_")
    ]
    found = []
    if not files:
        found.append(f"has no file conformance/ops/test_{family}.py")
    if not laws:
        found.append(f"has no law: conformance/ops/test_{family}.py needs a function under @law")
    for op in FAMILIES[family]:
        found += [f"{what} of `{op}`" for what in _missing_of_op(family, op)]
    return [f"family `{family}` {what}" for what in found]


def _missing_of_op(family: str, op: str) -> list[str]:
    """Return the pieces that an op lacks, as the beginning of a sentence that ends in the op's name."""
    found = []
    function = getattr(reference_ops, op, None)
    if function is None or op not in reference_ops.__all__:
        found.append("lacks, in what arbitor.reference.ops exports, the function")
    elif inspect.getmodule(function).__name__ != f"arbitor.reference.ops.{family}":
        found.append(f"has, outside of reference/ops/{family}.py, the function")
    page = ROOT / "docs" / "spec" / f"{family}.md"
    lines = page.read_text().splitlines() if page.exists() else []
    if not lines:
        found.append(f"has no page docs/spec/{family}.md for the rule")
    elif op not in [line.strip("# `\n") for line in lines if line.startswith("#")]:
        found.append(f"has, in docs/spec/{family}.md, no heading with the name")
    if op not in CASES:
        found.append(f"draws, in conformance/ops/test_{family}.py, no calls")
    if not any(op in mutant.compared for mutant in MUTANTS.values()):
        found.append("has no mutant that is `compared=` with the reference by the calls")
    if not any(case.op == op for case in REFUSALS) and op not in REFUSES_NOTHING:
        found.append(f"refuses, in conformance/ops/test_{family}.py, no call")
    if not (ROOT / "conformance" / "vectors" / f"{op}.json").exists():
        found.append(f"has no golden vector conformance/vectors/{op}.json")
    return found
