"""The Python examples of README and docs/python.md run as they stand there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training.loop import train
from conformance.import_lint import ROOT
from conformance.report import skip
from conformance.training import nano
from conformance.training.runs import options

PAGES = ("README.md", "docs/python.md")
EXAMPLES = [
    pytest.param(block, id=f"{page}-{place}")
    for page in PAGES
    for place, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    )
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples run: with a run, and a text to learn from."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_bytes(nano.TEXT)
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        nano.without_pictures(patch)
        train(options(folder / "text.txt", folder / "runs" / "demo"))
    return folder


def test_every_page_has_examples() -> None:
    pages = {str(example.id).rpartition("-")[0] for example in EXAMPLES}
    assert pages == set(PAGES)


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_runs(source: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in source and importlib.util.find_spec("transformers") is None:
        skip("an example", "it needs transformers, which is not installed")
    monkeypatch.chdir(demo)
    left: dict[str, Any] = {}
    exec(compile(source, "example", "exec"), left)
    if "losses" in left:
        assert left["losses"][-1] < left["losses"][0] - 1
        assert left["lost"].keys() and all(0 < loss.error < 0.6 for loss in left["lost"].values())
