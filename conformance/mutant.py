"""Implementations that are broken on purpose. A law must notice one to deserve its place.

A mutant is the reference with one piece of its text exchanged: what a wrong kernel would compute. A law names the mutants that
it rejects (`rejects=` in law.py). `compared` names the ops whose comparison with the reference rejects the mutant; a mutant
without it cannot be told from the reference there, or only by a rare draw. A mutant stands beside the first law that rejects
it, or behind the laws of its family if only the comparison does. test_mutants.py runs them all.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import arbitor.reference.ops as reference_ops

PACKAGE = "arbitor.reference.ops"
FUTURE = "from __future__ import annotations\n"

MUTANTS: dict[str, Mutant] = {}
"""Every mutant by name, as far as the files of families are imported (families.py imports all)."""


@dataclass(frozen=True)
class Mutant:
    """One broken implementation: in `file`.py of the reference's ops, `old` (found `times`) is exchanged for `new`."""

    name: str
    file: str
    old: str
    new: str
    compared: tuple[str, ...] = ()
    times: int = 1


def mutants_of(family: str) -> Callable[..., Mutant]:
    """Return the maker of mutants of a family's file. `mutant(name, old, new)` changes reference/ops/<family>.py."""

    def mutant(
        name: str, old: str, new: str, *, compared: str | tuple[str, ...] = (), times: int = 1
    ) -> Mutant:
        """Return a mutant, filed under its name.

        Args:
            name:     what is wrong, in words: `pad_with_minus_one`.
            old:      text of the family's file; it occurs `times` times.
            new:      the text in its place.
            compared: the op, or the ops, whose comparison with the reference rejects the mutant.
            times:    how often `old` occurs.
        """
        ops = (compared,) if isinstance(compared, str) else compared
        assert name not in MUTANTS, f"two mutants are called {name}"
        MUTANTS[name] = Mutant(name, family, old, new, ops, times)
        return MUTANTS[name]

    return mutant


def build(mutant: Mutant) -> ModuleType:
    """Return the ops of a mutant, which are the reference's sources, patched, imported under a name of their own."""
    package = f"mutant_{mutant.name}"
    folder = Path(reference_ops.__file__).parent
    sources = {source.name: source.read_text() for source in folder.glob("*.py")}
    sources[f"{mutant.file}.py"] = patched(mutant, sources.get(f"{mutant.file}.py", ""))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / package
        copy.mkdir()
        for name, text in sources.items():
            (copy / name).write_text(text.replace(PACKAGE, package))
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


def patched(mutant: Mutant, text: str) -> str:
    """Return the text of the mutant's file with the change made. Refuse a change that the text has no place for."""
    found = text.count(mutant.old)
    assert found == mutant.times, (
        f"mutant {mutant.name}: `{mutant.old}` is found {found} times in {mutant.file}.py of the reference's ops,"
        f" not {mutant.times}: say what is broken in the text as it is now"
    )
    # What is put in may name torch where the file had no need to.
    return text.replace(mutant.old, mutant.new).replace(FUTURE, f"{FUTURE}import torch\n", 1)
