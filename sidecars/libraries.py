"""The optional libraries. One function imports them all, so that an error names the missing library and what installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from arbitor.sidecars.sidecar import MissingLibraryError, SidecarError

EXTRA_OF = {
    "transformers": "sidecars",
    "diffusers": "sidecars",
    "optimum.quanto": "sidecars",
    "optimum.quanto.nn": "sidecars",
    "huggingface_hub": "sidecars",
    "safetensors.torch": "sidecars",
    "PIL.Image": "media",
    "PIL.ImageOps": "media",
    "av": "media",
    "datasets": "streams",
}
"""The extra of this package that installs each library, by import name."""


def library(name: str) -> ModuleType:
    """Return an optional library, imported.

    Raises MissingLibraryError, with the command that installs it, where it is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A library may be installed and lack a package that it needs. Then the message names that package.
        missing = error.name or name
        raise MissingLibraryError(
            f"{name} needs the package {missing!r}, which is not installed: pip install 'arbitor[{EXTRA_OF[name]}]'"
        ) from error


def has_quanto() -> bool:
    """Return whether optimum-quanto can be imported."""
    try:
        library("optimum.quanto")
    except SidecarError:
        return False
    return True
