"""Streams as data of runs: local files through the streaming mode of `datasets`, the same code that reads a hub."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import baselines, data, streams
from arbitor.optimized.training.baselines import baseline_bpb
from arbitor.optimized.training.data import (
    load_corpus,
    split_corpus,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.streams import documents, stream_of, written
from arbitor.optimized.training.texts import find_texts
from arbitor.sidecars import SidecarError
from conformance.system.command import TIMEOUT, arb
from conformance.training import texts_at_work
from conformance.training.runs import options, train_until_killed

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None,
    reason="streams need the package 'datasets': pip install 'arbitor[streams]'",
)

TEXTS = [f"Document {number} says nothing new.\nIt has two lines." for number in range(120)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that keeps what streams gave."""
    monkeypatch.setenv("ARB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "streams"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def joined(texts: list[str]) -> bytes:
    return b"".join(text.encode() + streams.BETWEEN for text in texts)


@needs_datasets
def test_documents_of_every_local_kind(jsonl: Path, tmp_path: Path) -> None:
    """A file of JSON, a file of Parquet and a folder give the same documents in their order."""
    import pyarrow
    import pyarrow.parquet

    parquet, folder = tmp_path / "documents.parquet", tmp_path / "folder"
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, parquet, row_group_size=50)
    folder.mkdir()
    for part, begin in enumerate(range(0, len(TEXTS), 40)):
        pyarrow.parquet.write_table(table.slice(begin, 40), folder / f"train-{part:02d}.parquet")
    for path in (jsonl, parquet, folder):
        corpus = load_corpus(f"hf:{path}:train")
        assert bytes(corpus.data_N.tolist()) == joined(TEXTS)
        assert corpus.description() == f"a stream, of which {len(joined(TEXTS)):,} bytes are read"


@needs_datasets
def test_no_more_is_read_than_was_asked_for(
    jsonl: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream without end is read to the bound, the last document is cut, and the file is there for the next run."""
    taken = []

    def endless(stream: streams.Stream) -> Iterator[bytes]:
        while True:
            taken.append(stream)
            yield b"ten bytes."

    with monkeypatch.context() as patch:
        patch.setattr(streams, "documents", endless)
        path = written(f"hf:{jsonl}", 29)
    assert path.read_bytes() == b"ten bytes.\n\nten bytes.\n\nten b" and len(taken) == 3
    assert path.parent == cache
    # Once it is there the stream is not read.
    monkeypatch.setattr(streams, "documents", lambda stream: pytest.fail("the stream was read again"))
    assert written(f"hf:{jsonl}", 29) == path
    # A local file that has changed is another stream.
    os.utime(jsonl, (1, 1))
    monkeypatch.setattr(streams, "documents", lambda stream: iter([b"other"]))
    assert written(f"hf:{jsonl}", 29) != path


@needs_datasets
def test_a_killed_run_ends_with_the_same_hash(
    jsonl: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file that the stream gave is gone, and asked for by a path from another folder."""
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"data": f"hf:{jsonl.name}", "stream_bytes": 4000, "steps": 4}
    whole = train(options(jsonl, tmp_path / "whole", **asked)).summary
    train_until_killed(2, options(jsonl, tmp_path / "killed", **asked))
    for path in cache.glob("*.bin"):
        path.unlink()
    monkeypatch.chdir("/")
    resumed = train(TrainOptions(run=tmp_path / "killed", resume=True)).summary
    assert resumed["state_sha256"] == whole["state_sha256"]
    # What the stream gives now is compared with what it gave.
    (tmp_path / "killed" / "summary.json").unlink()
    jsonl.write_text(json.dumps({"text": "other words " * 400}) + "\n")
    with pytest.raises(
        TrainingError, match=r"cannot go on with data 'hf:.*documents\.jsonl:train' of 4000 bytes"
    ):
        train(TrainOptions(run=tmp_path / "killed", resume=True, steps=6))


def test_a_name_that_is_too_long_is_none() -> None:
    with pytest.raises(ValueError, match="there is no file or folder 'aaa"):
        stream_of("hf:" + "a" * 5000)


def test_names_of_streams(tmp_path: Path) -> None:
    found = stream_of("hf:HuggingFaceFW/fineweb/sample-10BT:train")
    assert (found.name, found.config, found.split) == ("HuggingFaceFW/fineweb", "sample-10BT", "train")
    assert stream_of("hf:roneneldan/TinyStories").source() == "hf:roneneldan/TinyStories:train"
    (tmp_path / "a.jsonl").touch()
    assert stream_of(f"hf:{tmp_path}/a.jsonl:test").source() == f"hf:{tmp_path}/a.jsonl:test"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:", "there is no file or folder ''"),
        ("hf:name", "on a hub it must be hf:OWNER/NAME"),
        ("hf:a/b/c/d", "on a hub it must be hf:OWNER/NAME"),
        ("hf:../secret", "there is no file or folder '../secret'"),
        ("hf:a/b:", "has the split '', but must name one"),
        ("hf:a/b:train[:10]", "has the split 'train\\[:10\\]', but must name one"),
        ("hf:README.md", "names the file 'README.md', but a file must end in .jsonl, .json, .parquet"),
    ],
)
def test_names_that_are_none(source: str, says: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        stream_of(source)
    with pytest.raises(ValueError, match=says):
        train(TrainOptions(run=tmp_path / "run", data=source))
    assert not (tmp_path / "run").exists()


@needs_datasets
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"words": "a"}\n', r"have the fields 'words', but must have a text in one of text, content, code"),
        ('{"text": 3}\n', "have the fields 'text', but must have a text"),
        ('{"text": ""}\n{"text": null}\n', "has no text"),
        ("no json\n", "cannot read the stream"),
    ],
)
def test_datasets_that_are_no_texts(tmp_path: Path, cache: Path, content: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(TrainingError, match=says):
        load_corpus(f"hf:{path}")
    assert [each.suffix for each in cache.iterdir()] == [".lock"]


@needs_datasets
def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    """The library would read every file that the name fits, or none."""
    for name in ("a[1].jsonl", "a*.jsonl", "ab.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
        assert list(documents(stream_of(f"hf:{tmp_path / name}"))) == [name.encode()]
    (tmp_path / "b[1]").mkdir()
    with pytest.raises(
        ValueError, match=r"but the library would take \*, \? or \[ in a folder's name for a pattern"
    ):
        stream_of(f"hf:{tmp_path / 'b[1]'}")


@needs_datasets
def test_a_stream_of_nothing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a loop is the library's error where its files hold nothing."""
    import datasets

    def end(**named: Any) -> None:
        raise StopIteration

    monkeypatch.setattr(datasets, "load_dataset", end)
    with pytest.raises(TrainingError, match=r"^cannot read the stream 'hf:a/b:train': it has no documents$"):
        next(documents(stream_of("hf:a/b")))


@needs_datasets
def test_a_hub_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(**named: Any) -> None:
        assert named == {"path": "a/b", "name": "c", "split": "train", "streaming": True}
        raise ConnectionError("the hub\nis away")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TrainingError, match=r"^cannot read the stream 'hf:a/b/c:train': the hub$"):
        next(documents(stream_of("hf:a/b/c")))


def test_what_reads_no_stream_says_so(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="is a stream, but must be a file or a folder where each file counts"
    ):
        find_texts("hf:a/b")
    with pytest.raises(
        ValueError, match=r"stream_bytes is 9, but does nothing without data of a stream, hf:NAME"
    ):
        train(options(text, tmp_path / "run", stream_bytes=9))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(SidecarError, match=r"pip install 'arbitor\[streams\]'"):
        next(documents(stream_of("hf:a/b")))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of texts that count as large."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(b"%d says little.\n" % number * (50 + number))
    (folder / "weights.pt").write_bytes(b"1")
    monkeypatch.setattr(data, "PIECE_BYTES", 7)
    return folder


def test_large_data_are_mapped(large: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a folder give what they give if they are read, a piece at a time. The copy of a folder has no name."""
    sources = (str(large / "1.txt"), str(large))
    want = [load_corpus(source) for source in sources]
    monkeypatch.setattr(data, "MAPPED_BYTES", 100)
    calls: list[Path] = []
    mapped = data.mapped
    monkeypatch.setattr(data, "mapped", lambda path, size: calls.append(path) or mapped(path, size))
    for source, read in zip(sources, want, strict=True):
        found = load_corpus(source)
        assert torch.equal(found.data_N, read.data_N) and len(read.ends) in (0, 3)
        assert replace(found, data_N=None) == replace(read, data_N=None)  # type: ignore[arg-type]
    assert len(calls) == 2 and not list(cache.parent.iterdir())
    (large / "empty.txt").touch()
    monkeypatch.setattr(data, "MAPPED_BYTES", 0)
    with pytest.raises(TrainingError, match="is empty"):
        load_corpus(str(large / "empty.txt"))


def test_a_stream_is_read_by_one_process_at_a_time(
    jsonl: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes second waits for the first, and finds the file."""
    source, read = f"hf:{jsonl}", []

    def documents(stream: streams.Stream) -> Iterator[bytes]:
        read.append(stream)
        yield b"a document"

    monkeypatch.setattr(streams, "documents", documents)
    path = written(source, 100)
    path.unlink()
    with path.with_suffix(".lock").open("a") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(written, source, 100)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        path.write_bytes(b"of the first")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result(timeout=TIMEOUT).read_bytes() == b"of the first"
    assert len(read) == 1


@needs_datasets
def test_a_stream_that_cannot_be_kept_is_a_sentence(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARB_CACHE", str(jsonl))
    with pytest.raises(TrainingError, match=r"^cannot write the stream 'hf:.*' to '.*': (Not a dir|File ex)"):
        load_corpus(f"hf:{jsonl}")


def test_a_copy_that_cannot_be_written_is_a_sentence(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAPPED_BYTES", 100)
    monkeypatch.setenv("ARB_CACHE", str(large / "0.txt"))
    with pytest.raises(TrainingError, match=r"^cannot write a copy of the data to '.*0\.txt': File exists$"):
        load_corpus(str(large))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("way", texts_at_work.WAYS)
def test_a_text_may_be_larger_than_memory(tmp_path: Path, way: str) -> None:
    """A folder of three files takes less memory than one: to be read, split, counted, or drawn from.

    A process of its own is measured. One that has run other tests grows when it likes.
    """
    done = arb(str(tmp_path), way, module=texts_at_work.__name__)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < texts_at_work.SIZE


def test_counting_stops_somewhere(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counting models of a long text are those of its beginning."""
    corpus = load_corpus(str(text))
    split = split_corpus(corpus, 16)
    windows_WT = validation_windows(corpus, split, count=8, context=16)
    start = split.train.runs[0][0]
    few = data.Segments(((start, start + 700),))
    want = baseline_bpb(corpus, few, windows_WT)
    assert want != baseline_bpb(corpus, split.train, windows_WT)
    monkeypatch.setattr(baselines, "COUNTED_BYTES", 700)
    assert baseline_bpb(corpus, split.train, windows_WT) == want
