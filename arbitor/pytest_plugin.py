"""Lets pytest find the options of the suite: `pytest --pyargs arbitor.conformance --impl my.module`.

pytest loads this file in every session of an environment that has arbitor. It does nothing there unless the suite is asked for.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SUITE = "arbitor.conformance"


def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Load the options and fixtures of the suite where the suite, or a part of it, is to be run."""
    asked = "--pyargs" in args and any(arg.partition("::")[0].startswith(SUITE) for arg in args)
    if not asked:
        return
    if importlib.util.find_spec("hypothesis") is None:
        import pytest

        raise pytest.UsageError(
            "arbitor.conformance needs hypothesis, which is not installed: pip install 'arbitor[conformance]'"
        )
    early_config.pluginmanager.import_plugin(f"{SUITE}.plugin")
