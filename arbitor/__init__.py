"""ARB: models whose weights are trits, trained in place by votes. What most users need stands here.

    from arbitor import ArbModel

    model = ArbModel.from_pretrained("runs/demo")
    print(model.generate("def ", max_new_bytes=100))

Names are looked up when they are first used: `import arbitor` imports no torch and touches no GPU. Three folders of the repository
are subpackages: `arbitor.reference` (rules), `arbitor.optimized` (Triton, the trainer), `arbitor.sidecars` (frozen encoders).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from arbitor import adapters, convert, nn, optimized, reference, sidecars
    from arbitor.model import ArbModel
    from arbitor.optimizer import ArbOptimizer
    from arbitor.reference.config import ArbConfig
    from arbitor.reference.presets import PRESETS, preset
    from arbitor.reference.types import TernaryWeight

    ops: ModuleType
    __version__: str

__all__ = [
    "PRESETS",
    "ArbConfig",
    "ArbModel",
    "ArbOptimizer",
    "TernaryWeight",
    "__version__",
    "adapters",
    "convert",
    "nn",
    "ops",
    "optimized",
    "preset",
    "reference",
    "sidecars",
]

_HOMES = {
    "ArbConfig": "arbitor.reference.config",
    "ArbModel": "arbitor.model",
    "ArbOptimizer": "arbitor.optimizer",
    "PRESETS": "arbitor.reference.presets",
    "TernaryWeight": "arbitor.reference.types",
    "preset": "arbitor.reference.presets",
}
"""Where each exported name is defined."""

_MODULES = ("adapters", "convert", "nn", "optimized", "reference", "sidecars")
"""Modules that are imported when they are first used."""


# Type checkers read the imports above, and so notice a name that is not there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return an exported name, and keep it for the next time."""
        value: Any
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        elif name in _MODULES:
            value = importlib.import_module(f"{__name__}.{name}")
        elif name == "ops":
            value = _ops_of_this_machine()
        elif name == "__version__":
            value = importlib.import_module("arbitor.optimized.version").package_version()
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the names of the module, also those that nobody has used yet."""
    return sorted({*globals(), *__all__})


def _ops_of_this_machine() -> ModuleType:
    """Return the op set that a model gets here by default: Triton's where torch finds a CUDA device, else the reference's.

    It is chosen at the first use of `arbitor.ops` and then stays. `ARB_BACKEND` overrules the choice, as it does for `arb`.
    """
    runtime = importlib.import_module("arbitor.optimized.training.runtime")
    ops: ModuleType = runtime.choose_runtime().ops()
    return ops
