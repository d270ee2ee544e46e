"""What the tests of the trainer share: one thread, the preset ``nano``, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from arbitor.optimized.training.loop import train
from conformance.graph.conftest import few_programs, one_thread
from conformance.training import nano
from conformance.training.runs import options

__all__ = ["few_programs", "finished", "nano_preset", "one_thread", "pictures", "text"]


@pytest.fixture
def pictures() -> None:
    """Let the pictures of a run be drawn. In tests that do not ask for this the pictures have stand-ins."""


@pytest.fixture(autouse=True)
def nano_preset(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    nano.register(monkeypatch)
    if "pictures" not in request.fixturenames:
        nano.without_pictures(monkeypatch)
    monkeypatch.delenv("ARB_BACKEND", raising=False)


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The folder of a finished run of ``nano``, not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_bytes(nano.TEXT)
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        nano.without_pictures(patch)
        train(options(folder / "text.txt", folder / "run"))
    return folder / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(nano.TEXT)
    return path
