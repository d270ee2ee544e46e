"""The source of a sidecar: a folder, a file or the name of a repository; and the check that all of it arrived.

Only safetensors and JSON are read. A source that exists on disk is read from there and nowhere else.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arbitor.reference.json_text import parsed_object
from arbitor.sidecars.libraries import library
from arbitor.sidecars.precision import frozen
from arbitor.sidecars.sidecar import SidecarError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A name on a hub: OWNER/NAME."""

CONFIG = "config.json"
"""File of a folder that says what network its weights are of."""

SHOWN = 5
"""Most names of weights that an error lists."""


def local_folder(source: str | Path) -> Path:
    """Return the folder of a sidecar: the one named, or a snapshot of a repository, downloaded if it is not cached.

    Raises SidecarError where it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise SidecarError(
            f"source is {str(source)!r}, a file, but must be a folder or the name of a repository"
        )
    if not REPOSITORY.fullmatch(str(source)):
        raise SidecarError(
            f"source is {str(source)!r}, but must be a folder that exists or OWNER/NAME of a repository"
        )
    return Path(_download(str(source), allow_patterns=["*.json", "*.safetensors"]))


def local_file(source: str | Path) -> Path:
    """Return the safetensors file of a sidecar: the one named, or OWNER/NAME/FILE of a repository, downloaded if not cached.

    Raises SidecarError where it is neither.
    """
    path, name = Path(source), str(source)
    if path.suffix != ".safetensors":
        raise SidecarError(f"source is {name!r}, but must be a file that ends in .safetensors")
    if path.is_file():
        return path
    repository, _, file = _split(name)
    if not (REPOSITORY.fullmatch(repository) and file):
        raise SidecarError(
            f"source is {name!r}, but must be a file that exists or OWNER/NAME/FILE of a repository"
        )
    found = Path(_download(repository, allow_patterns=[file])) / file
    if not found.is_file():
        raise SidecarError(f"the repository {repository!r} has no file {file!r}")
    return found


def _split(name: str) -> tuple[str, str, str]:
    owner, _, rest = name.partition("/")
    repository, slash, file = rest.partition("/")
    return f"{owner}/{repository}", slash, file


def _download(repository: str, *, allow_patterns: Sequence[str]) -> str:
    hub = library("huggingface_hub")
    try:
        return str(hub.snapshot_download(repository, allow_patterns=list(allow_patterns)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SidecarError(
            f"source is {repository!r}, which is no folder here and could not be downloaded ({reason})"
        ) from error


def identity_of(kind: str, paths: Iterable[Path], *, precision: str, versions: Mapping[str, str]) -> str:
    """Return what tells features of two sidecars apart: a digest of their files, precision and libraries."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    made = ",".join(f"{name}={version}" for name, version in sorted(versions.items()))
    return f"{kind}:{precision}:{made}:{digest.hexdigest()}"


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that decide what a network computes.

    Raises SidecarError where the folder has no configuration or no safetensors.
    """
    weights, config = sorted(folder.glob("*.safetensors")), folder / CONFIG
    if not config.is_file() or not weights:
        missing = CONFIG if not config.is_file() else "*.safetensors file"
        raise SidecarError(
            f"the folder {str(folder)!r} has no {missing}; other formats of weights are not read"
        )
    return [config, *weights]


def json_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises SidecarError where the file holds none.
    """
    try:
        return parsed_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SidecarError(f"the settings in {str(path)!r} cannot be read: {error}") from error


class Loaded(NamedTuple):
    """A network of transformers, frozen.

    Fields:
        network:   the network.
        folder:    folder that it was loaded from.
        precision: precision that it got.
        identity:  digest of what decides its features, for `Sidecar`.
    """

    network: Any
    folder: Path
    precision: str
    identity: str


def load_frozen(
    kind: str,
    source: str | Path,
    *,
    class_name: str,
    model_type: str,
    precision: str,
    part: str | None = None,
    may_be_left: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Loaded:
    """Return a network of transformers, loaded from a folder or a repository and frozen.

    Args:
        kind:        name of the sidecar in its identity.
        source:      a folder with config.json and safetensors, or OWNER/NAME.
        class_name:  class of the network in transformers.
        model_type:  the type that config.json must name.
        precision:   `int8` or `bfloat16`.
        part:        submodule to keep; None keeps all.
        may_be_left: as for `pretrained`.
        settings:    further files of the folder that decide the features, where they are there.

    Raises:
        SidecarError: a library is missing, or the weights are not just those of the network.
        ValueError: another precision.
    """
    transformers = library("transformers")
    folder = local_folder(source)
    files = weight_files(folder)
    # Not by the library, which may ask whether to run code that the folder brings along.
    found = json_settings(folder / CONFIG).get("model_type")
    if found != model_type:
        raise SidecarError(f"the folder {str(folder)!r} holds a {found!r}, but must hold a {model_type!r}")
    whole = pretrained(getattr(transformers, class_name), folder, may_be_left=may_be_left)
    network, got = frozen(whole if part is None else getattr(whole, part), precision)
    files += [folder / name for name in settings if (folder / name).is_file()]
    identity = identity_of(kind, files, precision=got, versions={"transformers": transformers.__version__})
    return Loaded(network, folder, got, identity)


def pretrained(cls: Any, folder: Path, *, may_be_left: Sequence[str] = ()) -> Any:
    """Return a network of transformers in float32, loaded from a folder, all of it and nothing else.

    Args:
        cls:         class of the network, with `from_pretrained`.
        folder:      folder with config.json and safetensors.
        may_be_left: beginnings of names of weights in the folder that the network has no use for.

    Raises SidecarError where weights are missing, of another shape, or left over. The library would only log that.
    """
    weight_files(folder)
    options = {
        "local_files_only": True,
        "use_safetensors": True,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        network, report = cls.from_pretrained(str(folder), **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SidecarError(
            f"the folder {str(folder)!r} holds no {cls.__name__} that loads ({reason})"
        ) from error
    left = [name for name in report["unexpected_keys"] if not name.startswith(tuple(may_be_left))]
    refuse_differences(
        str(folder),
        missing=report["missing_keys"],
        mismatched=report["mismatched_keys"],
        left_over=left,
    )
    return network


def refuse_differences(
    source: str,
    *,
    missing: Iterable[Any] = (),
    mismatched: Iterable[Any] = (),
    left_over: Iterable[Any] = (),
) -> None:
    """Refuse weights that are not those of the network, with their names.

    Raises SidecarError unless all three are empty.
    """
    parts = []
    for what, names in (
        ("lacks", missing),
        ("has with another shape", mismatched),
        ("has beside the network's", left_over),
    ):
        listed = sorted(name[0] if isinstance(name, tuple) else str(name) for name in names)
        if listed:
            more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
            parts.append(f"{what} {', '.join(listed[:SHOWN])}{more}")
    if parts:
        raise SidecarError(f"{source!r} {'; it '.join(parts)}")


Fingerprint = tuple[tuple[int, ...], int]
"""Shape and checksum of a tensor."""


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return shape and checksum of a tensor's float32 bytes. Equal tensors have equal fingerprints, whatever their names."""
    data = tensor.detach().to("cpu", torch.float32).contiguous()
    return tuple(data.shape), zlib.crc32(data.numpy().tobytes())


def refuse_other_tensors(source: str, stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Refuse a network that does not hold just the tensors of a file. Names do not matter.

    Raises SidecarError with the names of the tensors that have no counterpart.
    """
    of_file, of_network = ({name: fingerprint(t) for name, t in side.items()} for side in (stored, loaded))
    refuse_differences(
        source,
        missing=_without_counterpart(of_network, of_file),
        left_over=_without_counterpart(of_file, of_network),
    )


def _without_counterpart(side: Mapping[str, Fingerprint], other: Mapping[str, Fingerprint]) -> list[str]:
    """Return the names of the tensors of one side that are left over when equal tensors of both sides are paired."""
    left = Counter(other.values())
    lonely = []
    for name, mark in side.items():
        if left[mark]:
            left[mark] -= 1
        else:
            lonely.append(name)
    return lonely
