"""Streams that go away while a command writes to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training.shown import Unbreakable


class Gone:
    """A stream on a file, of which one method finds that nobody reads any more."""

    encoding = "utf-8"

    def __init__(self, path: Path, broken: str) -> None:
        self._file = path.open("w")
        self._broken = broken
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.asked.append(name)
        if name == self._broken:
            raise BrokenPipeError(32, "Broken pipe")
        return getattr(self._file, name)


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_a_stream_that_went_away_is_asked_no_more(tmp_path: Path, broken: str) -> None:
    """What is left in its buffer goes nowhere, so that the end of the process raises nothing either."""
    stream = Gone(tmp_path / "pipe", broken)
    wrapped = Unbreakable(stream)  # type: ignore[arg-type]
    assert wrapped.encoding == "utf-8" and wrapped.fileno() == stream._file.fileno()
    assert not wrapped.isatty() and not wrapped.lost
    assert wrapped.write("first") == 5
    wrapped.flush()
    assert wrapped.lost
    stream.asked.clear()
    assert wrapped.write("second") == 6 and not wrapped.isatty()
    wrapped.flush()
    assert not stream.asked
    assert os.path.samestat(os.fstat(wrapped.fileno()), os.stat(os.devnull))
    stream._file.close()
    assert (tmp_path / "pipe").read_bytes() == b""
