"""Archives of webdataset: samples are found by their keys, files are read from their places, and strangers' archives do no harm."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from arbitor.optimized.training import media_archives
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media_files import load_media
from arbitor.sidecars import Blob


def archive(path: Path, members: Mapping[str, bytes], *, mode: Literal["w", "w:gz", "w:xz"] = "w") -> Path:
    """Write an archive with members of these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(count: int, *, begin: int = 0) -> dict[str, bytes]:
    """Return the members of some samples, as webdataset's writer orders them."""
    found = {}
    for number in range(begin, begin + count):
        found[f"shard/{number:04d}.jpg"] = b"picture %d" % number
        found[f"shard/{number:04d}.txt"] = b"text\n %d" % number
    return found


def test_samples_of_several_archives(tmp_path: Path) -> None:
    """Beside files with texts of their own; the order is that of the contents, wherever they lie."""
    archive(tmp_path / "a" / "000.tar", members(3))
    archive(tmp_path / "b.tar", members(2, begin=3))
    (tmp_path / "alone.png").write_bytes(b"picture 5")
    (tmp_path / "alone.txt").write_bytes(b"text 5")
    found = load_media("image", str(tmp_path))
    items = [*found.train, *found.validation]
    assert sorted(item.text for item in items) == [b"text %d" % number for number in range(6)]
    for item in items:
        medium = item.medium()
        data = medium.data if isinstance(medium, Blob) else medium.read_bytes()
        assert data == b"picture " + item.text.split()[-1]
    assert (
        str(next(item for item in items if item.text == b"text 4")) == f"{tmp_path / 'b.tar'}:shard/0004.jpg"
    )
    # Unpacked, the same files are the same data.
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "b.tar").unlink()
    assert load_media("image", str(tmp_path)).sha256 == found.sha256


def test_texts_in_json_and_several_media(tmp_path: Path) -> None:
    """A key ends at the first dot behind the last slash. A member of another kind is no medium, and no text."""
    made = {
        "one.left.png": b"left",
        "one.right.PNG": b"right",
        "one.json": json.dumps({"caption": "two\n eyes", "width": 3}).encode(),
        "one.cls": b"7",
        "v1.0/two.png": b"dotted",
        "v1.0/two.txt": b"dots",
        "three.png": b"alone",
        # As datasets of pictures from the web are packed: the caption in one member, what else is known in another.
        "four.png": b"both",
        "four.txt": b"said",
        "four.json": json.dumps({"caption": "not said", "url": "x"}).encode(),
        "five.png": b"facts",
        "five.txt": b"told",
        "five.json": json.dumps({"width": 3}).encode(),
        "._five.png": b"what macOS adds",
    }
    archive(tmp_path / "data.tar", made)
    found = load_media("image", str(tmp_path))
    texts = {item.medium().data: item.text for item in (*found.train, *found.validation)}  # type: ignore[union-attr]
    assert texts == {
        b"left": b"two eyes",
        b"right": b"two eyes",
        b"dotted": b"dots",
        b"both": b"said",
        b"facts": b"told",
    }
    assert len(found.train) + len(found.validation) == 5
    assert found.left_out == {"without text": ["data.tar:three.png"]}


def test_names_that_lead_elsewhere_are_names(tmp_path: Path) -> None:
    """Nothing is extracted, and links and devices are no members."""
    path = tmp_path / "data" / "evil.tar"
    archive(
        path,
        {"../../../etc/a.png": b"one", "../../../etc/a.txt": b"text", "/b.png": b"two", "/b.txt": b"text"},
    )
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("c.png", tarfile.SYMTYPE),
            ("d.png", tarfile.CHRTYPE),
            ("e.png", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = load_media("image", str(tmp_path / "data"))
    assert len(found.train) + len(found.validation) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "evil.tar"]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member, which says whatever size it likes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(path: Path, head: bytes, size: int) -> None:
    """Write a file of a head and of nothing, which takes no place on the disk."""
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + size)


def altered(path: Path, place: int, data: bytes = b"\xff", cut: int | None = None) -> None:
    """Write an archive of three samples with other bytes at a place, or without its end."""
    content = bytearray(archive(path, members(3)).read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(content[:cut])


LONG = header("././@LongLink", 4, tarfile.GNUTYPE_LONGNAME) + b"abc\0".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"no archive" * 100), "is no archive that can be read"),
        (lambda path: path.write_bytes(b""), "is no archive that can be read"),
        (lambda path: archive(path, {**members(2), "a.png": b"x", "a.json": b"[]"}), "a.json.*is refused: it is no object"),
        (lambda path: archive(path, {"a.png": b"x", "a.json": b"{}"}), "a.json.*it has none of text, caption, transcription"),
        (lambda path: archive(path, {"a.png": b"x", "a.txt": b" " * (2**20 + 1)}), "the text 'a.txt' of more than 1,048,576 bytes"),
        (lambda path: archive(path, {"a.png": b"x" * 200, "a.txt": b"a"}), "of 200 bytes, but a member has at most 100"),
        (lambda path: archive(path, {f"{i}.png": b"" for i in range(9)}), "has more than 8 members"),
        (lambda path: archive(path, {f"a.{i}.png": b"" for i in range(5)}), "has more than 4 members of the sample 'a'"),
        (lambda path: path.write_bytes(header("a.png", -512) * 2 + bytes(10240)), "its member 'a.png' has a size below 0"),
        (lambda path: path.write_bytes(header("a.xyz", 2**70) + bytes(10240)), "is no archive that can be read"),
        (lambda path: sparse(path, header("a", 2**40, tarfile.GNUTYPE_LONGNAME), 2**40), "a header of 1,099,511,627,776 bytes"),
        (lambda path: sparse(path, header("a", 2**40, tarfile.XHDTYPE), 2**40), "a header of 1,099,511,627,776 bytes"),
        (lambda path: path.write_bytes(header("a", -512, tarfile.GNUTYPE_LONGNAME) + bytes(10240)), "a header of -512 bytes"),
        (lambda path: path.write_bytes(LONG * 5000 + header("a.png", 0) + bytes(10240)), "is no archive that can be read"),
        (lambda path: altered(path, 4 * 512 + 148), "what stands at byte 2,048 is neither a member nor its end"),
        (lambda path: altered(path, 0, b"", 4 * 512 + 100), "it has no end, so that a part of it may be missing"),
        (lambda path: altered(path, 0, b"", 4 * 512), "it has no end"),
        (lambda path: altered(path, 20 * 512 - 1, b"\0" * 1 + LONG), "what stands at byte 6,144 is neither"),
    ],
)  # fmt: skip
def test_archives_that_are_refused(
    tmp_path: Path, write: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "200 bytes" in says:
        monkeypatch.setattr(media_archives, "MEMBER_BYTES", 100)
    monkeypatch.setattr(media_archives, "MEMBERS", 8)
    monkeypatch.setattr(media_archives, "SAMPLE_MEMBERS", 4)
    write(tmp_path / "data.tar")  # type: ignore[operator]
    with pytest.raises(TrainingError, match=says):
        load_media("image", str(tmp_path))


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.xz"])
def test_compressed_archives_are_refused(tmp_path: Path, suffix: str) -> None:
    archive(tmp_path / f"data.{suffix}", members(3), mode="w:xz" if suffix.endswith("xz") else "w:gz")
    with pytest.raises(
        TrainingError, match=r"is compressed, but an archive of media must be a plain \.tar file"
    ):
        load_media("image", str(tmp_path))


def test_an_archive_that_was_cut_is_a_sentence(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.tar", members(4))
    found = load_media("image", str(tmp_path))
    last = max((*found.train, *found.validation), key=lambda item: item.place)  # type: ignore[arg-type, return-value]
    assert last.place is not None
    with path.open("r+b") as file:
        file.truncate(last.place.begin + 3)
    with pytest.raises(TrainingError, match="was changed since the run read it"):
        last.medium()
    with pytest.raises(TrainingError, match=r"ends within its member 'shard/0003\.jpg'"):
        last.place.read(path)
    path.unlink()
    for read in (lambda: last.place.read(path), lambda: media_archives.samples_of(path, [".jpg"])):
        with pytest.raises(TrainingError, match=r"^cannot read '.*data\.tar': No such file or directory$"):
            read()


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    """`tar --append` writes a new version of a file behind the old one."""
    old = archive(tmp_path / "data.tar", members(3))
    with tarfile.open(old, "a") as tar:
        for name, data in (("shard/0001.jpg", b"new"), ("shard/0001.txt", b"newer")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = load_media("image", str(tmp_path))
    texts = {item.medium().data: item.text for item in (*found.train, *found.validation)}  # type: ignore[union-attr]
    assert texts == {b"picture 0": b"text 0", b"new": b"newer", b"picture 2": b"text 2"}


def test_many_members_take_little_memory(tmp_path: Path) -> None:
    """tarfile itself keeps half a kilobyte of each, also of those that are no data."""
    empty = header("0.xyz", 0)
    (tmp_path / "data.tar").write_bytes(empty * 5_000 + archive(tmp_path / "some", members(2)).read_bytes())
    (tmp_path / "some").unlink()
    tracemalloc.start()
    try:
        assert len(load_media("image", str(tmp_path)).train) == 1
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_media_of_an_archive_are_read_one_at_a_time(tmp_path: Path) -> None:
    """An archive may be larger than memory."""
    made = {f"{number}.png": bytes([number]) * 2**20 for number in range(24)}
    archive(tmp_path / "data.tar", made | {f"{number}.txt": b"text" for number in range(24)})
    tracemalloc.start()
    try:
        found = load_media("image", str(tmp_path))
        for item in (*found.train, *found.validation):
            medium = item.medium()
            assert isinstance(medium, Blob) and len(medium.data) == 2**20
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_an_archive_that_changes_during_a_run_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "data.tar", members(4))
    found = load_media("image", str(tmp_path))
    archive(path, {**members(3), "shard/0009.jpg": b"picture 9", "shard/0009.txt": b"a"})
    os.utime(path, (1, 1))
    with pytest.raises(TrainingError, match=r"data\.tar' was changed since the run read it"):
        found.train[0].medium()
