"""Implementations that are broken on purpose. A law must notice one to deserve its place.

A mutant is the reference with one piece of its text exchanged: what a wrong kernel would compute. A law names the mutants that
it rejects (`rejects=` in law.py). `compared` names the ops whose comparison with the reference rejects the mutant; a mutant
without it cannot be told from the reference there, or only by a rare draw. A mutant stands beside the first law that rejects
it, or behind the laws of its family if only the comparison does. test_mutants.py runs them all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import arbitor.reference.ops as reference_ops

PACKAGE = "arbitor.reference.ops"
MUTATED = "mutated_ops"
"""The name that the package has while a mutant is imported."""
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
    folder = Path(reference_ops.__file__).parent
    sources = {source.stem: source.read_text() for source in folder.glob("*.py")}
    sources[mutant.file] = patched(mutant, sources.get(mutant.file, ""))
    importer = Sources(sources)
    sys.meta_path.insert(0, importer)
    try:
        return importlib.import_module(MUTATED)
    finally:
        sys.meta_path.remove(importer)
        for name in [name for name in sys.modules if importer.knows(name)]:
            del sys.modules[name]


class Sources(MetaPathFinder, InspectLoader):
    """Imports the modules of a mutant from their texts, by the name of their file."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = {
            ".".join([MUTATED, *[stem] * (stem != "__init__")]): text.replace(PACKAGE, MUTATED)
            for stem, text in texts.items()
        }

    def knows(self, name: str) -> bool:
        return name in self.texts

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if self.knows(name) else None

    def is_package(self, name: str) -> bool:
        return name == MUTATED

    def get_source(self, name: str) -> str:
        return self.texts[name]

    def get_code(self, name: str) -> CodeType:
        return compiled(name, self.texts[name])


@cache
def compiled(name: str, text: str) -> CodeType:
    """Compile a module. All mutants have one name, so that what a mutant does not change is compiled once for all of them."""
    return compile(text, f"<{name}>", "exec")


def patched(mutant: Mutant, text: str) -> str:
    """Return the text of the mutant's file with the change made. Refuse a change that the text has no place for."""
    found = text.count(mutant.old)
    assert found == mutant.times, (
        f"mutant {mutant.name}: `{mutant.old}` is found {found} times in {mutant.file}.py of the reference's ops,"
        f" not {mutant.times}: say what is broken in the text as it is now"
    )
    # What is put in may name torch where the file had no need to.
    return text.replace(mutant.old, mutant.new).replace(FUTURE, f"{FUTURE}import torch\n", 1)
