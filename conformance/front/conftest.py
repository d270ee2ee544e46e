"""What the tests of `arbitor` itself share: the trainer's thread, preset and text, and models in the library transformers."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from conformance.report import skip
from conformance.training.conftest import few_programs, nano_preset, one_thread, pictures, text

__all__ = ["few_programs", "hub", "model", "nano_preset", "one_thread", "pictures", "text"]


@pytest.fixture(scope="session")
def hub() -> Any:
    """The library, with our classes registered."""
    if importlib.util.find_spec("transformers") is None:
        skip("models in transformers", "the library is not installed")
    importlib.import_module("arbitor.transformers")
    return importlib.import_module("transformers")


@pytest.fixture
def model(hub: Any, folder: Path) -> Any:
    """The model of the module's folder, as the library loads it."""
    return hub.AutoModelForCausalLM.from_pretrained(folder)
