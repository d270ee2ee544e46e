"""What the tests of the system share: a text, and one finished run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance.system.command import Here, arb, finished_line
from conformance.training import nano


@pytest.fixture
def here(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """``arb`` in this process, with the preset nano, stand-ins for pictures, one thread and no settings."""
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("ARB_BACKEND", "ARB_VALUE_CHECKS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Here(capfdbinary)
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(nano.TEXT)
    return path


@pytest.fixture(scope="package")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = arb(*finished_line(text, folder))
    assert result.returncode == 0, result.stderr.decode()
    (folder / "stdout").write_bytes(result.stdout)
    return folder
