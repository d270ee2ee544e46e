"""The version of the installed package."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    """Return the version of the installed package, or ``unknown`` in a checkout that is not installed."""
    try:
        return importlib.metadata.version("arbitor")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
