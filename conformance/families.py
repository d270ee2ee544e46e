"""Every family of the op table, with all that the suite knows of it. Files are found on disk, and no family is listed.

The file of a family is `conformance/ops/test_<family>.py`. A large family has parts beside it, `test_<family>_<part>.py`. Importing
a file files what it states: how calls are drawn (`CASES`, `MAGNITUDES`), `LAWS`, `MUTANTS`, `REFUSALS`. Whoever needs all of
them imports them from here. `missing` names what a family lacks, and test_families.py fails with what it says.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from arbitor.reference import op_table
from arbitor.reference import ops as reference_ops
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

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[1]

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
    path.stem: family_of(path.stem) for path in sorted((HERE / "ops").glob("test_*.py"))
}
"""The family of each file of `conformance/ops`, by the name of the file without `.py`."""

for _stem in FILES:
    importlib.import_module(f"{__package__}.ops.{_stem}")


def missing(family: str) -> list[str]:
    """Return a sentence for each piece of the reference and of the suite that a family of the table lacks."""
    files = {stem for stem, owner in FILES.items() if owner == family}
    laws = [
        law for law in LAWS.values() if law.file in files and not law.name.startswith("test_refusals_of_")
    ]
    page = ROOT / "docs" / "spec" / f"{family}.md"
    lines = page.read_text().splitlines() if page.exists() else []
    headings = {line.strip("# `\n") for line in lines if line.startswith("#")}
    pieces = {
        f"the page docs/spec/{family}.md": page.exists(),
        f"the file conformance/ops/test_{family}.py": bool(files),
        "a law: a function under @law in its file": bool(laws),
    }
    for op in FAMILIES[family]:
        function = getattr(reference_ops, op, None)
        home = getattr(inspect.getmodule(function), "__name__", None)
        pieces |= {
            f"`{op}` among what arbitor.reference.ops exports": op in reference_ops.__all__,
            f"`{op}` in reference/ops/{family}.py": home == f"arbitor.reference.ops.{family}",
            f"the heading `{op}` in docs/spec/{family}.md": op in headings,
            f"calls of `{op}` to compare: a function under @calls": op in CASES,
            f'a mutant that comparing `{op}` rejects: one with compared="{op}"': any(
                op in mutant.compared for mutant in MUTANTS.values()
            ),
            f"a call that `{op}` refuses": op in REFUSES_NOTHING or any(case.op == op for case in REFUSALS),
            f"the golden vector conformance/vectors/{op}.json": (HERE / "vectors" / f"{op}.json").exists(),
        }
    return [f"family `{family}` lacks {piece}" for piece, present in pieces.items() if not present]
