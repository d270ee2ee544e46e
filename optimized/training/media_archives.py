"""Archives of media as webdataset writes them: `.tar` files whose members `KEY.png` and `KEY.txt` or `KEY.json` are one sample.

Only headers are read here. A sample's file is later read from its place in the archive, and nothing is ever extracted, so that the
names of members decide nothing but which of them belong together.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import open_regular
from arbitor.optimized.training.shown import shown

SUFFIX = ".tar"
"""How archives end. Compressed ones have no places to read from, and are refused."""

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

MEMBER_BYTES = 2**30
"""Bytes of a member at most."""

MEMBERS = 2**22
"""Members of an archive at most."""

SAMPLE_MEMBERS = 256
"""Members of a sample at most. Each of its files has each of its texts."""

HEADER_BYTES = 2**20
"""Bytes of a header at most. A long name is a header of its own, and may say that it is larger than memory."""

BEHIND_BYTES = 2**16
"""Bytes behind the last member that are looked at. A second archive that was joined to a first begins there."""

_TEXTS = (".txt", ".json")


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a member lies in its archive.

    Attributes:
        begin: of its bytes.
        size: number of its bytes.
        name: of the member.
    """

    begin: int
    size: int
    name: str

    def read(self, archive: Path) -> bytes:
        """Return the bytes of the member.

        Raises:
            TrainingError: the archive cannot be read, or ends before the member does.
        """
        try:
            with open_regular(archive) as file:
                file.seek(self.begin)
                data = file.read(self.size)
        except OSError as error:
            raise TrainingError(f"cannot read {str(archive)!r}: {error.strerror or error}") from error
        if len(data) != self.size:
            raise TrainingError(f"{str(archive)!r} ends within its member {self.name!r}")
        return data


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of an archive.

    Attributes:
        media: members that are files of the kind, in their order.
        texts: members that hold its texts.
    """

    media: tuple[Place, ...]
    texts: tuple[Place, ...]


def samples_of(archive: Path, suffixes: Collection[str]) -> Mapping[str, Sample]:
    """Return the samples of an archive by their keys, those without a file of the kind left out.

    A key is the name of a member up to the first dot behind the last slash, as webdataset has it. Of members of one name the last
    counts, as where an archive is extracted.

    Args:
        archive: path of a `.tar` file.
        suffixes: how files of the kind end, in lower case.

    Raises:
        TrainingError: the archive cannot be read, is damaged or compressed, ends too soon, has something behind its end, or has a
            member or more members than are allowed.
    """
    found: dict[str, dict[str, Place]] = {}
    wanted = {*suffixes, *_TEXTS}
    try:
        with open_regular(archive) as file:
            for member in _members(file):
                path = PurePosixPath(member.name)
                # A hidden file, such as macOS adds, has no key.
                is_file = member.isreg() and not member.issparse() and not path.name.startswith(".")
                if not is_file or path.suffix.lower() not in wanted:
                    continue
                if member.size > MEMBER_BYTES:
                    raise TrainingError(
                        f"{str(archive)!r} has the member {member.name!r} of {member.size:,} bytes, but a member has at most "
                        f"{MEMBER_BYTES:,}"
                    )
                places = found.setdefault(str(path.with_name(path.name.partition(".")[0])), {})
                places[member.name] = Place(member.offset_data, member.size, member.name)
                if len(places) > SAMPLE_MEMBERS:
                    raise TrainingError(
                        f"{str(archive)!r} has more than {SAMPLE_MEMBERS} members of the sample {path.name.partition('.')[0]!r}"
                    )
    except TrainingError:
        raise
    except OSError as error:
        raise TrainingError(f"cannot read {str(archive)!r}: {error.strerror or error}") from error
    # What a header makes tarfile stumble over has many names: numbers beyond 2**63, names nested a thousand deep.
    except Exception as error:
        raise TrainingError(
            f"{str(archive)!r} is no archive that can be read ({shown(str(error))}); it must be an uncompressed .tar file"
        ) from error
    samples = {key: _sample(places.values()) for key, places in sorted(found.items())}
    return {key: sample for key, sample in samples.items() if sample.media}


def _sample(places: Collection[Place]) -> Sample:
    parts: tuple[list[Place], list[Place]] = ([], [])
    for place in places:
        parts[PurePosixPath(place.name).suffix.lower() in _TEXTS].append(place)
    return Sample(tuple(parts[False]), tuple(parts[True]))


class _Headers:
    """A file of which tarfile reads headers alone, and no header that is larger than HEADER_BYTES."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        # A size below 0 would read all there is.
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"it has a header of {size:,} bytes")
        return self._file.read(size)


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive, MEMBERS at most.

    Raises ReadError for an archive that is damaged. At a damaged header tarfile itself stops without a word.
    """
    # "r:" takes no compressed archive, whose members have no places.
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
        for count, member in enumerate(tar, start=1):
            # It would keep them all.
            tar.members = []
            if count > MEMBERS:
                raise tarfile.ReadError(f"it has more than {MEMBERS:,} members")
            if member.size < 0:
                raise tarfile.ReadError(f"its member {member.name!r} has a size below 0")
            yield member
        file.seek(tar.offset)
        behind = file.read(BEHIND_BYTES)
        if len(behind) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end, so that a part of it may be missing")
        if behind.strip(b"\0"):
            raise tarfile.ReadError(f"what stands at byte {tar.offset:,} is neither a member nor its end")
