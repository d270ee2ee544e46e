"""Ranks that read other files of media than rank 0: each says which one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from arbitor.optimized.distributed import world
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_mix import Mix
from conformance.distributed.threads import Table, on_threads


class ThreadWorld(world.World):
    """A rank that is a thread."""

    def __init__(self, number: int, table: Table) -> None:
        super().__init__(number, table.count)
        self._table = table

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self._table.meet(self.number, tensor)


def told_of_files(*ranks: list[Item]) -> list[str]:
    """Return what each of some ranks says of the files that they read, "" where it goes on."""

    def told(number: int, table: Table) -> str:
        mix: Any = SimpleNamespace(world=ThreadWorld(number, table))
        try:
            Mix._refuse_other_files(mix, "images held out", ranks[number])
        except TrainingError as error:
            return str(error)
        return ""

    return on_threads(len(ranks), told)


def items(folder: str, *numbers: int) -> list[Item]:
    """Return files of a folder, each of a content and a name of its own."""
    return [Item(bytes([number]) * 32, b"text", Path(folder) / f"{number}.png") for number in numbers]


def test_the_first_file_that_ranks_do_not_share_is_named() -> None:
    """By its place in the list, of ten files or more too. Names play no part, which may differ between machines."""
    first, elsewhere = items("/a", *range(12)), items("/b", *range(12))
    assert told_of_files(first, elsewhere) == ["", ""]
    of, must = "images held out that can be decoded", ", and all ranks must have the same"
    assert told_of_files(first, elsewhere, items("/b", 0, 1, *range(3, 13))) == 3 * [
        f"rank 2 has '/b/3.png (03030303)' for file 3 of {of}, but rank 0 has '/a/2.png (02020202)'{must}"
    ]
    assert told_of_files(first, elsewhere[:-1]) == 2 * [
        f"rank 1 has None for file 12 of {of}, but rank 0 has '/a/11.png (0b0b0b0b)'{must}"
    ]
    assert told_of_files(first[:-1], elsewhere) == 2 * [
        f"rank 1 has '/b/11.png (0b0b0b0b)' for file 12 of {of}, but rank 0 has None{must}"
    ]
