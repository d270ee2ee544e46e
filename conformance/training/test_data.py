"""Corpora, splits and batches."""

from __future__ import annotations

import os
import socket
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from arbitor.optimized.training.data import (
    BLOCK_BYTES,
    Corpus,
    Split,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.run_text import check_same_split


def corpus_of(size: int) -> Corpus:
    """A corpus in which every window of three bytes names its own place, up to 2**24."""
    place_N = torch.arange(size)
    data_N = ((place_N // 3) >> (8 * (place_N % 3))).to(torch.uint8)
    return Corpus(source="made", data_N=data_N, sha256="", num_files=1)


def cut(size: int, context: int) -> Split:
    return split_corpus(Corpus("made", torch.zeros(size, dtype=torch.uint8), "", 1), context)


def test_load_corpus_takes_the_bytes_of_a_file_as_they_are(tmp_path: Path) -> None:
    # Not UTF-8, with NULs and line ends.
    content = bytes(range(256)) + b"\xff\xfe\r\n\0\xc3"
    (tmp_path / "file").write_bytes(content)
    corpus = load_corpus(str(tmp_path / "file"))
    assert bytes(corpus.data_N.tolist()) == content
    assert corpus.data_N.dtype == torch.uint8


def test_load_corpus_joins_the_text_files_of_a_folder_by_relative_path(tmp_path: Path) -> None:
    # Paths are sorted as bytes. '-' is before '/', '/' before '0', and capitals are before small letters.
    for name, content in (
        ("b", b"5"),
        ("a/z", b"3"),
        ("a0", b"4"),
        ("a-", b"2"),
        ("Z", b"1"),
        ("a/sub/x", b""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "binary").write_bytes(b"x" * 8191 + b"\0")
    (tmp_path / "late_nul").write_bytes(b"6" * 8192 + b"\0")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        corpus = load_corpus(str(tmp_path))
    assert bytes(corpus.data_N.tolist()) == b"12345" + b"6" * 8192 + b"\0"
    assert corpus.num_files == 6


def test_what_is_left_out_of_a_folder_is_named_and_counted(tmp_path: Path) -> None:
    """Version control, runs, and the folder of the run that reads it are no data, whatever they hold."""
    for name, content in (
        ("a.txt", b"text"),
        ("empty", b""),
        ("x.bin", b"\0\1\2"),
        ("y.bin", b"\0\1\2"),
        ("model.pt", b"text"),
        ("w.SafeTensors", b"text"),
        (".git/HEAD", b"text"),
        ("runs/one/config.json", b"{}"),
        ("runs/one/metrics.jsonl", b"{}"),
        ("own/config.json", b"{}"),
        ("sub/\x1b[31m.bin", b"\0"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "sub" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe")
    corpus = load_corpus(str(tmp_path), tmp_path / "own")
    assert bytes(corpus.data_N.tolist()) == b"text" and corpus.num_files == 1
    assert corpus.left_out == {
        "of version control": [".git"],
        "of runs": ["own", "runs/one"],
        "linked": ["link", "sub/up"],
        "special": ["pipe"],
        "empty": ["empty"],
        "of weights": ["model.pt", "w.SafeTensors"],
        "binary": ["sub/\N{REPLACEMENT CHARACTER}[31m.bin", "x.bin", "y.bin"],
    }
    described = corpus.description()
    assert described.startswith("1 file, 4 bytes; left out: ") and "\x1b" not in described
    for part in (
        "2 of runs (own, runs/one)",
        "1 empty (empty)",
        "2 of weights (model.pt, w.SafeTensors)",
    ):
        assert part in described
    assert load_corpus(str(tmp_path / "a.txt")).description() == "1 file, 4 bytes"


def test_data_in_the_folder_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_bytes(b"text")
    for data in (tmp_path, tmp_path / "sample.txt"):
        with pytest.raises(TrainingError, match="lies in the run folder"):
            load_corpus(str(data), tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["Grüße, 7 squared\r\n", "x" * 4095 + "😀" + "y"])
def test_utf16_is_data_alone_and_in_a_folder(tmp_path: Path, encoding: str, text: str) -> None:
    content = text.encode(encoding)
    (tmp_path / "text").write_bytes(content)
    for path in (tmp_path, tmp_path / "text"):
        assert bytes(load_corpus(str(path)).data_N.tolist()) == content


def test_a_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\3\4")
    with pytest.raises(TrainingError, match=r"'.*model\.pt' is a file of weights by its name"):
        load_corpus(str(tmp_path / "model.pt"))
    with pytest.raises(TrainingError, match="is a device, but must be"):
        load_corpus("/dev/zero")


def in_files(*sizes: int) -> Corpus:
    ends = tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))
    return Corpus("made", torch.zeros(sum(sizes), dtype=torch.uint8), "", len(sizes), ends=ends)


@pytest.mark.parametrize(
    ("sizes", "context", "validation"),
    [
        ((1000, 500, 2000), 10, ((900, 1000), (1450, 1500), (3300, 3500))),
        # Each short file lends what it owes to the next.
        ((60,) * 10, 12, ((108, 120), (228, 240), (348, 360), (468, 480), (588, 600))),
        ((1000, 3, 1000), 50, ((900, 1000), (1903, 2003))),
        # No file has room for a window of each kind: as if it were one file.
        ((9, 9, 9, 9), 5, ((30, 36),)),
        ((5000,), 10, ((4500, 5000),)),
    ],
)
def test_split_corpus_of_a_small_folder_is_spread_over_its_files(
    sizes: tuple[int, ...], context: int, validation: tuple[tuple[int, int], ...]
) -> None:
    corpus = in_files(*sizes)
    split = split_corpus(corpus, context)
    assert split.validation.runs == validation
    assert split.train.num_bytes() + split.validation.num_bytes() == sum(sizes)
    assert split.train.num_windows(context) > 0
    assert f"{split.validation.num_bytes():,} bytes" in split.description()


def test_split_corpus_of_a_large_folder_is_by_block() -> None:
    assert split_corpus(in_files(*(BLOCK_BYTES,) * 10), 10) == cut(10 * BLOCK_BYTES, 10)


def test_a_run_goes_on_with_its_validation_bytes_only() -> None:
    """One from before folders were cut file by file does not say which they are."""
    folder, file = in_files(1000, 1000), in_files(2000)
    split = split_corpus(folder, 10)
    check_same_split(folder, split, 10, None)
    check_same_split(folder, split, 10, {"validation_sha256": split.validation_sha256()})
    check_same_split(file, split_corpus(file, 10), 10, {})
    for recorded in ({}, {"validation_sha256": split_corpus(file, 10).validation_sha256()}):
        with pytest.raises(TrainingError, match="other validation bytes"):
            check_same_split(folder, split, 10, recorded)


def test_load_corpus_stdlib_is_the_sources_of_this_python() -> None:
    corpus = load_corpus("stdlib")
    data = bytes(corpus.data_N.numpy())
    root = Path(sysconfig.get_path("stdlib"))
    for inside in ("abc.py", "json/decoder.py", "pydoc_data/topics.py"):
        assert (root / inside).read_bytes() in data
    assert (root / "__future__.py").read_bytes() == data[: (root / "__future__.py").stat().st_size]
    tests = [path for path in root.glob("*/test*/*.py") if path.stat().st_size > 1000]
    assert not any(path.read_bytes() in data for path in tests[:5])
    assert load_corpus("stdlib").sha256 == corpus.sha256


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "cannot read the data .*No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.mkdir(), "holds no text"),
        (lambda path: (path.mkdir(), (path / "a").write_bytes(b"\0")), "holds no text"),
        (lambda path: os.mkfifo(path), "is a pipe, but must be a regular file or a folder"),
        (lambda path: path.symlink_to("/proc/self/mem"), "cannot read the data file .*Input/output error"),
        (lambda path: path.symlink_to(path), "cannot read the data .*symbolic links"),
    ],
    ids=["missing", "empty", "empty folder", "binary folder", "pipe", "unreadable", "loop"],
)
def test_load_corpus_refuses(tmp_path: Path, make, sentence: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(TrainingError, match=sentence) as caught:
        load_corpus(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_split_corpus_keeps_every_tenth_block() -> None:
    split = cut(25 * BLOCK_BYTES + 17, 128)
    assert split.validation.runs == (
        (9 * BLOCK_BYTES, 10 * BLOCK_BYTES),
        (19 * BLOCK_BYTES, 20 * BLOCK_BYTES),
    )
    assert split.train.runs == (
        (0, 9 * BLOCK_BYTES),
        (10 * BLOCK_BYTES, 19 * BLOCK_BYTES),
        (20 * BLOCK_BYTES, 25 * BLOCK_BYTES + 17),
    )


@pytest.mark.parametrize(
    ("size", "context", "validation"),
    [
        (1000, 10, (900, 1000)),
        (1009, 10, (900, 1009)),
        (200, 64, (128, 200)),
        (128, 64, (64, 128)),
        (8, 4, (4, 8)),
    ],
)
def test_split_corpus_of_a_small_file(size: int, context: int, validation: tuple[int, int]) -> None:
    split = cut(size, context)
    assert split.validation.runs == (validation,)
    assert split.train.runs == ((0, validation[0]),)


@pytest.mark.parametrize("size", [8, 9, 100, 1000, 5555, 640 * 1024, 1_500_000])
@pytest.mark.parametrize("context", [4, 5, 64])
def test_split_corpus_parts_are_disjoint_complete_and_long_enough(size: int, context: int) -> None:
    if size < 2 * context:
        with pytest.raises(TrainingError):
            cut(size, context)
        return
    split = cut(size, context)
    runs = sorted(split.train.runs + split.validation.runs)
    assert [start for start, _ in runs] == [0, *(end for _, end in runs[:-1])]
    assert runs[-1][1] == size
    assert split.train.num_windows(context) > 0
    assert split.validation.num_windows(context) > 0


def test_split_corpus_refuses_what_is_too_short() -> None:
    with pytest.raises(
        TrainingError, match=r"has 127 bytes, too few for a context of 64: .* 128 bytes together"
    ):
        cut(127, 64)
    with pytest.raises(ValueError, match="context is 3"):
        cut(1000, 3)


def test_training_batch_is_a_pure_function_of_seed_and_micro_step() -> None:
    corpus = corpus_of(100_000)
    split = split_corpus(corpus, 32)

    def draw(seed: int, micro_step: int) -> torch.Tensor:
        return training_batch(corpus, split, batch=8, context=32, seed=seed, micro_step=micro_step)

    first = draw(7, 3)
    torch.manual_seed(123)
    torch.rand(5)
    assert torch.equal(draw(7, 3), first)
    assert not torch.equal(draw(7, 4), first)
    assert not torch.equal(draw(8, 3), first)
    assert not torch.equal(draw(73, 0), draw(7, 30))
    assert first.dtype == torch.int64
    assert first.shape == (8, 32)


def test_training_batch_reaches_every_window_and_no_validation_byte() -> None:
    corpus = Corpus("made", torch.arange(60, dtype=torch.uint8), "", 1)
    split = split_corpus(corpus, 5)
    # Blocks of six bytes.
    assert split.validation.runs == ((54, 60),)
    seen = training_batch(corpus, split, batch=4000, context=5, seed=0, micro_step=0)
    assert sorted(set(seen[:, 0].tolist())) == list(range(50))
    assert bool((seen == seen[:, :1] + torch.arange(5)).all())
    counts = torch.bincount(seen[:, 0])
    # 80 expected, a standard deviation of 9.
    assert 40 < int(counts.min()) <= int(counts.max()) < 130


def test_training_batch_of_several_runs() -> None:
    """Window starts across the gaps that validation leaves, against a list of them."""
    split = cut(25 * BLOCK_BYTES + 17, 1000)
    valid = [start for begin, end in split.train.runs for start in range(begin, end - 1000 + 1)]
    index_B = torch.tensor([0, 1, len(valid) // 3, len(valid) // 2, len(valid) - 1])
    assert split.train.window_starts(index_B, 1000).tolist() == [valid[i] for i in index_B.tolist()]
    assert split.train.num_windows(1000) == len(valid)


def test_validation_windows_are_fixed_disjoint_and_spread_out() -> None:
    corpus = corpus_of(20 * BLOCK_BYTES)
    split = split_corpus(corpus, 48)
    windows = validation_windows(corpus, split, count=100, context=48)
    assert torch.equal(windows, validation_windows(corpus, split, count=100, context=48))
    assert windows.shape == (100, 48)
    starts = sorted(_place_of(window, corpus) for window in windows)
    assert all(b - a >= 48 for a, b in pairwise(starts))
    assert starts[0] < 10 * BLOCK_BYTES < starts[-1]
    assert all(any(a <= s and s + 48 <= b for a, b in split.validation.runs) for s in starts)


def test_validation_windows_of_a_small_file_are_as_many_as_fit() -> None:
    corpus = corpus_of(1000)
    split = split_corpus(corpus, 30)
    assert validation_windows(corpus, split, count=100, context=30).shape == (3, 30)


def _place_of(window_T: torch.Tensor, corpus: Corpus) -> int:
    """Offset of a window of ``corpus_of``: found by trying the three alignments."""
    ids = window_T.tolist()
    for lead in range(3):
        place = (ids[lead] | ids[lead + 1] << 8 | ids[lead + 2] << 16) * 3 - lead
        if place >= 0 and corpus.data_N[place : place + len(ids)].tolist() == ids:
            return place
    raise AssertionError("the window is no part of the corpus")
