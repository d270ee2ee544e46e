"""The op set that a model computes with, in a holder that can be copied and pickled, which a module cannot."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class OpSet:
    """A holder of an op set. A copy holds the same op set, and a pickle holds the name by which it is imported.

    Fields:
        ops: `arbitor.reference.ops`, or another object with its names.
    """

    ops: ModuleType

    @property
    def name(self) -> str:
        """The name of a module, or the type of another object."""
        return getattr(self.ops, "__name__", type(self.ops).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpSet:
        """Return this holder itself, because op sets have no state of a model."""
        return self

    def __reduce__(self) -> tuple[Callable[[str], OpSet], tuple[str]]:
        """Return the content of a pickle. Raises TypeError for an op set that cannot be imported by its name."""
        if sys.modules.get(self.name) is not self.ops:
            raise TypeError(
                f"ops is {self.name!r}, which cannot be imported by that name, but must be importable to be pickled"
            )
        return _imported, (self.name,)


def _imported(name: str) -> OpSet:
    """Return the op set of that name."""
    return OpSet(importlib.import_module(name))
