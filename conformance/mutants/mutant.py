"""Implementations that are broken on purpose, and the laws that must notice.

A mutant is the reference with one piece of its text exchanged: what a wrong kernel would compute. `rejected_by` names the laws
that fail on it; the comparison of `compared` with the reference fails too, unless the mutant cannot show there, which then
is said. A law that rejects no mutant has no business in the suite: test_mutants.py sees to that.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import arbitor.reference.ops as reference_ops

PACKAGE = "arbitor.reference.ops"
FUTURE = "from __future__ import annotations\n"


@dataclass(frozen=True)
class Mutant:
    """One broken implementation: in `file`.py of the reference's ops, `old` (found once) is exchanged for `new`."""

    name: str
    file: str
    old: str
    new: str
    rejected_by: tuple[str, ...]
    compared: tuple[str, ...] = ()
    times: int = 1


def build(mutant: Mutant) -> ModuleType:
    """Return the ops of a mutant: the reference's sources, patched, imported under a name of their own."""
    package = f"mutant_{mutant.name}"
    folder = Path(reference_ops.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / package
        copy.mkdir()
        for source in folder.glob("*.py"):
            text = source.read_text()
            if source.stem == mutant.file:
                found = text.count(mutant.old)
                assert found == mutant.times, (
                    f"{mutant.name}: `{mutant.old}` is {found} times in {source.name}"
                )
                text = text.replace(mutant.old, mutant.new)
                # What is put in may name torch where the file had no need to.
                text = text.replace(FUTURE, f"{FUTURE}import torch\n", 1)
            (copy / source.name).write_text(text.replace(PACKAGE, package))
        sys.path.insert(0, temporary)
        writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            importlib.invalidate_caches()
            return importlib.import_module(package)
        finally:
            sys.path.remove(temporary)
            sys.dont_write_bytecode = writes_bytecode
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                del sys.modules[name]


def m(
    name: str, file: str, old: str, new: str, *laws: str, compared: tuple[str, ...] | str = (), times: int = 1
) -> Mutant:
    ops = (compared,) if isinstance(compared, str) else compared
    return Mutant(name, file, old, new, tuple(f"test_{law}" for law in laws), ops, times)
