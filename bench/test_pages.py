"""The commands of the benchmarks that pages show are understood."""

from __future__ import annotations

import pytest

from conformance import pages

COMMANDS = [each for each in pages.shown() if pages.is_of_bench(each)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_understood(command: pages.Shown, pytestconfig: pytest.Config) -> None:
    pages.understood(command, of_pytest=pytestconfig._parser)


def test_a_command_that_is_none_is_noticed(pytestconfig: pytest.Config) -> None:
    for line in ("python -m bench.learning --wings 2", "pytest bench --wings"):
        with pytest.raises((SystemExit, pytest.UsageError)):
            pages.understood(pages.Shown("a page", pages.typed(line), True), of_pytest=pytestconfig._parser)
