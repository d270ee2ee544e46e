"""Ranks that read other files of media than rank 0, or have another codec: each says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed import world
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media_batch import Batch
from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_mix import Mix
from conformance.distributed.threads import Table, on_threads


class ThreadWorld(world.World):
    """A rank that is a thread."""

    def __init__(self, number: int, table: Table) -> None:
        super().__init__(number, table.count)
        self._table, self.meetings = table, 0

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.meetings += 1
        return self._table.meet(self.number, tensor)


def told_of_files(
    *ranks: list[Item],
    read: Callable[[Any], Any] = lambda mix: mix._refuse_other_files("images held out", mix.files),
) -> list[str]:
    """Return what each of some ranks says of the files that they read in some way, "" where it goes on."""

    def told(number: int, table: Table) -> str:
        files = ranks[number]
        mix: Any = SimpleNamespace(
            world=ThreadWorld(number, table),
            files=files,
            held_out_items=lambda kind: files,
            batch=lambda micro_step: Batch("image", torch.zeros(1, 4), items=tuple(files)),
        )
        mix._refuse_other_files = partial(Mix._refuse_other_files, mix)
        try:
            read(mix)
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


def test_ranks_that_read_the_same_files_meet_once() -> None:
    """They tell each other a digest, and no names."""
    meetings: list[int] = []

    def read(mix: Any) -> None:
        mix._refuse_other_files("images held out", mix.files)
        meetings.append(mix.world.meetings)

    assert told_of_files(items("/a", 1, 2), items("/b", 1, 2), read=read) == ["", ""]
    assert meetings == [1, 1]


@pytest.mark.parametrize(
    ("what", "read"),
    [
        ("image held out", lambda mix: next(Mix.held_out(mix, "image"))),
        ("micro-batch 7", lambda mix: Mix.take(mix, SimpleNamespace(), rate=1.0, micro_step=7)),
    ],
)
def test_files_are_compared_before_anything_is_computed(what: str, read: Callable[[Any], Any]) -> None:
    """There is no encoder here, and a model without losses."""
    told = told_of_files(items("/a", 1, 2), items("/a", 1, 3), read=read)
    assert told[0] == told[1]
    assert told[0].startswith(f"rank 1 has '/a/3.png (03030303)' for file 2 of {what} that can be decoded, ")


def begun(*numbers: int) -> list[tuple[str, int]]:
    """Begin a mix of speech on ranks that train codecs of some numbers.

    Return what each rank says, "" where it goes on, and how often ranks had met when it opened its codec.
    """

    def begin(number: int, table: Table) -> tuple[str, int]:
        own = ThreadWorld(number, table)
        met: list[int] = []

        def opened() -> Any:
            met.append(own.meetings)
            return SimpleNamespace(state=lambda: {"weight": torch.tensor([numbers[number]])})

        folders = {"speech": SimpleNamespace(train=(), validation=())}
        mix: Any = SimpleNamespace(
            world=own, reader=SimpleNamespace(), _folders=folders, _opened_codec=opened
        )
        try:
            Mix.begin(mix, lambda sentence: None)
        except TrainingError as error:
            return str(error), met[0]
        return "", met[0]

    return on_threads(len(numbers), begin)


def test_ranks_have_one_codec() -> None:
    """Each trains its own, once rank 0 has emptied a folder that is to begin anew."""
    assert begun(1, 1) == 2 * [("", 1)]
    (first, met), other = begun(1, 2)
    assert other == (first, met) and met == 1
    assert first.startswith("rank 1 has ") and " for the codec of speech, but rank 0 has " in first
