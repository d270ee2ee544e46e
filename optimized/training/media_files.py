"""Folders of media with texts: the files, the text of each, and what is held out. Nothing is decoded here.

The text of `NAME.png` is in `NAME.txt` beside it, or in a line of a `.jsonl` file of the folder, as Hugging Face's folders of
images and sounds have it: an object with the path in `file_name` and the text in `text`. A file may have several texts. Or both lie
in an archive of webdataset, see `media_archives`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbitor.optimized.training.data import VALIDATION_EVERY
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media_archives import COMPRESSED, Place, samples_of
from arbitor.optimized.training.media_archives import SUFFIX as ARCHIVE
from arbitor.optimized.training.regular import open_regular, read_regular, regular_lines
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.texts import in_words, no_data, walk
from arbitor.reference.json_text import parsed_object
from arbitor.sidecars import Blob

_SOUNDS = frozenset({".aac", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"})

SUFFIXES: Mapping[str, frozenset[str]] = {
    "image": frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}),
    "audio": _SOUNDS,
    "video": frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm"}),
    "speech": _SOUNDS,
}
"""How files of a kind end, in lower case."""

FILE_FIELDS = ("file_name", "file")
TEXT_FIELDS = ("text", "caption", "transcription")
"""Fields of a line of JSON that name the file and its text. The first of them that a line has counts."""

TEXT_BYTES = 2**20
"""Bytes of a text, or of a line of JSON, at most."""

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, order=True, slots=True)
class Item:
    """A file and one of its texts. Items are ordered by their content, so that their order does not depend on names.

    Attributes:
        content: SHA-256 of the file.
        text: bytes without line ends, at least one.
        path: of the file, or of the archive that it lies in.
        place: where it lies in its archive, or None.
        stamp: size and time of the last change of what `path` names, when its content was read.
    """

    content: bytes
    text: bytes
    path: Path
    place: Place | None = None
    stamp: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def medium(self) -> Path | Blob:
        """Return what is decoded.

        Raises:
            TrainingError: the file or the archive cannot be read, or was changed since its content was.
        """
        if self.stamp is not None and _stamp(self.path) != self.stamp:
            raise TrainingError(
                f"{str(self.path)!r} was changed since the run read it, but must stay as it is until the run has ended"
            )
        return self.path if self.place is None else Blob(str(self), self.place.read(self.path))

    def __str__(self) -> str:
        """Return what messages call the file."""
        return str(self.path) if self.place is None else f"{self.path}:{self.place.name}"


@dataclass(frozen=True)
class MediaFolder:
    """The items of a folder, cut in two. No file is in both parts, nor two files of equal content.

    Attributes:
        kind: `image`, `audio`, `video` or `speech`.
        source: what was asked for.
        train, validation: what the model learns from, and what it is judged by.
        left_out: files of the kind that are no data: paths in the folder, by the reason.
        sha256: hex digest of all contents and texts.
    """

    kind: str
    source: str
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    left_out: Mapping[str, Sequence[str]]
    sha256: str

    def description(self) -> str:
        """Return how many items there are, how many of them are held out, and what was left out."""
        number = len(self.train) + len(self.validation)
        return f"{number:,} with text, {len(self.validation):,} of them held out{in_words(self.left_out)}"


def load_media(kind: str, source: str, run: Path | None = None) -> MediaFolder:
    """Return the items of a folder.

    Of a folder are left out: links, hidden files, version control, the folders of runs, and files of the kind without a text. One
    item in ten is held out, at least one.

    Args:
        kind: `image`, `audio`, `video` or `speech`.
        source: path of the folder.
        run: the folder of the run that reads them, which is never data.

    Raises:
        TrainingError: there is no such folder, a file cannot be read, a line of JSON says no file or text or names a file that is
            not there, or the folder has fewer than two files of the kind with a text and of different content.
    """
    root = Path(source)
    if not root.is_dir():
        raise TrainingError(
            f"cannot read the data {source!r}: data_{kind} must be a folder of files with texts beside them"
        )
    left_out: dict[str, list[str]] = {}
    paths = walk(root, no_data(run), left_out)
    # Such as macOS adds beside every file. An archive has none either.
    hidden = {path for path in paths if path.name.startswith(".")}
    paths = [path for path in paths if path not in hidden]
    files = {path for path in paths if path.suffix.lower() in SUFFIXES[kind]}
    texts = _texts(paths, files)
    without = sorted(shown(path.relative_to(root).as_posix()) for path in files - texts.keys())
    told = {"linked": left_out.get("linked", []), "without text": without}
    found: list[Item] = []
    for path in sorted(texts):
        stamp, content = _stamp(path), _digest(path)
        found += [Item(content, text, path, None, stamp) for text in texts[path]]
    for archive in paths:
        if archive.name.lower().endswith(COMPRESSED):
            raise TrainingError(
                f"{str(archive)!r} is compressed, but an archive of media must be a plain .tar file"
            )
        if archive.suffix.lower() == ARCHIVE:
            found += _archived(archive, kind, root, without)
    items = sorted(found)
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.content + hashlib.sha256(item.text).digest())
    train, validation = _cut(items)
    if not train:
        different = len({item.content for item in items})
        raise TrainingError(
            f"the folder {source!r} has {different} different files of {kind} with a text, but needs two, one to learn from and "
            "one to be judged by: a text is in NAME.txt beside the file, in a .jsonl file, or beside it in a .tar archive"
        )
    kept = {reason: names for reason, names in told.items() if names}
    return MediaFolder(kind, source, tuple(train), tuple(validation), kept, digest.hexdigest())


def _cut(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Return the items to learn from and the last tenth of them. Digests are as good as random, so the order is none of names."""
    place = len(items) - max(1, len(items) // VALIDATION_EVERY)
    # Files of equal content stay together.
    while 0 < place < len(items) and items[place - 1].content == items[place].content:
        place -= 1
    return items[: max(place, 0)], items[max(place, 0) :]


def _texts(paths: Sequence[Path], files: set[Path]) -> dict[Path, list[bytes]]:
    """Return the texts of files that have some, from the text files and the lines of JSON among the paths."""
    texts: dict[Path, list[bytes]] = {}
    captions = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}
    for path in sorted(files):
        beside = captions.get(path.with_suffix(""))
        if beside is not None:
            text = _one_line(_read_text(beside))
            if text:
                texts.setdefault(path, []).append(text)
    known = set(paths)
    for path in paths:
        if path.suffix.lower() != ".jsonl":
            continue
        for number, line in _lines(path):
            try:
                file, text = _named_in(line, path.parent, known)
            except ValueError as error:
                raise TrainingError(f"line {number} of {str(path)!r} is refused: {error}") from None
            if file in files:
                texts.setdefault(file, []).append(text)
    return texts


def _archived(archive: Path, kind: str, root: Path, without: list[str]) -> Iterator[Item]:
    """Yield the items of an archive; what has no text is added to a list."""
    stamp = _stamp(archive)
    for sample in samples_of(archive, SUFFIXES[kind]).values():
        # A .json beside a .txt says other things of the sample.
        plain = [place for place in sample.texts if place.name.lower().endswith(".txt")]
        texts = [text for place in plain or sample.texts if (text := _text_of(archive, place))]
        for place in sample.media:
            content = hashlib.sha256(place.read(archive)).digest()
            yield from (Item(content, text, archive, place, stamp) for text in texts)
            if not texts:
                without.append(shown(f"{archive.relative_to(root).as_posix()}:{place.name}"))


def _text_of(archive: Path, place: Place) -> bytes:
    """Return the text of a member of an archive, which is the text itself or an object of JSON with it."""
    if place.size > TEXT_BYTES:
        raise TrainingError(f"{str(archive)!r} has the text {place.name!r} of more than {TEXT_BYTES:,} bytes")
    data = place.read(archive)
    if place.name.lower().endswith(".json"):
        try:
            data = _field(parsed_object(data), TEXT_FIELDS).encode("utf-8", errors="surrogatepass")
        except ValueError as error:
            raise TrainingError(
                f"the member {place.name!r} of {str(archive)!r} is refused: {error}"
            ) from None
    return _one_line(data)


def _named_in(line: bytes, folder: Path, known: set[Path]) -> tuple[Path, bytes]:
    """Return the file and the text of a line of JSON; raise ValueError where it has none."""
    values = parsed_object(line)
    name, text = _field(values, FILE_FIELDS), _field(values, TEXT_FIELDS)
    # Only files that were found in the folder are data, so that no line can name one outside of it.
    path = folder / name
    if path not in known:
        raise ValueError(f"it names {name!r}, but there is no such file in the folder")
    content = _one_line(text.encode("utf-8", errors="surrogatepass"))
    if not content:
        raise ValueError("its text is empty")
    return path, content


def _field(values: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if name in values:
            if not isinstance(values[name], str):
                raise ValueError(f"its {name} is {type(values[name]).__name__}, but must be a string")
            return str(values[name])
    raise ValueError(f"it has none of {', '.join(names)}")


def _one_line(text: bytes) -> bytes:
    """Return a text with single spaces in place of line ends and runs of spaces."""
    return b" ".join(text.split())


def _read_text(path: Path) -> bytes:
    try:
        return read_regular(path, most=TEXT_BYTES)
    except OSError as error:
        raise TrainingError(f"cannot read the text {str(path)!r}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the lines of a file, those of nothing but spaces left out."""
    try:
        for number, line in regular_lines(path, most=TEXT_BYTES):
            if line is None:
                raise TrainingError(f"line {number} of {str(path)!r} has more than {TEXT_BYTES:,} bytes")
            if line.strip():
                yield number, line
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of the last change of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise TrainingError(f"cannot read the data file {str(path)!r}: {error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> bytes:
    """Return the SHA-256 of a file, which is read a block at a time."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise TrainingError(f"cannot read the data file {str(path)!r}: {error.strerror or error}") from error
    return digest.digest()
