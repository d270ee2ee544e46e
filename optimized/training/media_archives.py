"""Archives of media as webdataset writes them: `.tar` files whose members `KEY.png` and `KEY.txt` or `KEY.json` are one sample.

Only headers are read here. A sample's file is later read from its place in the archive, and nothing is ever extracted, so that the
names of members decide nothing but which of them belong together.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import open_regular

SUFFIX = ".tar"
"""How archives end. Compressed ones have no places to read from, and are refused."""

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

MEMBER_BYTES = 2**30
"""Bytes of a member at most."""

MEMBERS = 2**22
"""Members of an archive at most."""

_TEXTS = (".txt", ".json")


@dataclass(frozen=True, order=True)
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


@dataclass(frozen=True)
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

    A key is the name of a member up to the first dot behind the last slash, as webdataset has it.

    Args:
        archive: path of a `.tar` file.
        suffixes: how files of the kind end, in lower case.

    Raises:
        TrainingError: the archive cannot be read, is damaged or compressed, or has a member or more members than are allowed.
    """
    found: dict[str, tuple[list[Place], list[Place]]] = {}
    wanted = {*suffixes, *_TEXTS}
    try:
        # "r:" takes no compressed archive, whose members have no places.
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar, start=1):
                if count > MEMBERS:
                    raise TrainingError(f"{str(archive)!r} has more than {MEMBERS:,} members")
                if member.size < 0:
                    raise tarfile.ReadError(f"its member {member.name!r} has a size below 0")
                path = PurePosixPath(member.name)
                suffix = path.suffix.lower()
                # A hidden file, such as macOS adds, has no key.
                is_file = member.isreg() and not member.issparse() and not path.name.startswith(".")
                if not is_file or suffix not in wanted:
                    continue
                if member.size > MEMBER_BYTES:
                    raise TrainingError(
                        f"{str(archive)!r} has the member {member.name!r} of {member.size:,} bytes, but a member has at most "
                        f"{MEMBER_BYTES:,}"
                    )
                media, texts = found.setdefault(str(path.with_name(path.name.partition(".")[0])), ([], []))
                place = Place(member.offset_data, member.size, member.name)
                (texts if suffix in _TEXTS else media).append(place)
    except OSError as error:
        raise TrainingError(f"cannot read {str(archive)!r}: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError) as error:
        raise TrainingError(
            f"{str(archive)!r} is no archive that can be read ({error}); it must be an uncompressed .tar file"
        ) from error
    return {key: Sample(tuple(media), tuple(texts)) for key, (media, texts) in sorted(found.items()) if media}
