"""A cache of features on disk. Sidecars are frozen, so that the features of a file never change."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from arbitor.sidecars.libraries import library
from arbitor.sidecars.sidecar import Sidecar

SUFFIX = ".safetensors"
"""Ending of the files of a cache."""

PARTIAL = ".partial"
"""Ending of a file that is being written."""

ABANDONED_SECONDS = 3600
"""Age at which a file that is being written belongs to no process any more."""


class FeatureCache:
    """Features by the content that they were made from, in a folder of bounded size.

    A file is named by a digest of the content and of the sidecar's identity: its weights, precision and library. If the folder
    would grow beyond its bound, the files that were used longest ago go first. Processes may share a folder, because files are
    written beside their place and renamed. A file that cannot be read, or whose features are not those that were written, is made
    anew.

    Args:
        folder:    where the files lie; created if it is not there.
        max_bytes: most bytes of all files, at least 1.

    Raises ValueError for a bound below 1.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = 2**34) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, but must be at least 1")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        # Bytes that the folder had when it was looked at, and bytes written since. At first it counts as full.
        self._total, self._unseen = max_bytes, 0

    def get(self, content: bytes, sidecar: Sidecar, make: Callable[[], Tensor]) -> Tensor:
        """Return the features of some content, on the CPU, from the folder; make and keep them if the folder has none.

        Args:
            content: the bytes of the file, or other bytes that decide the features.
            sidecar: the sidecar that makes the features.
            make:    makes the features; called only if the folder has none.
        """
        path = self.folder / f"{self.key(content, sidecar)}{SUFFIX}"
        found = self._read(path)
        if found is None:
            found = make().detach().cpu().contiguous()
            self._write(path, found)
        return found

    @staticmethod
    def key(content: bytes, sidecar: Sidecar) -> str:
        """Return the name of the features of some content."""
        digest = hashlib.sha256(hashlib.sha256(content).digest())
        digest.update(sidecar.identity.encode())
        return digest.hexdigest()

    def _read(self, path: Path) -> Tensor | None:
        """Return the features of a file and note that it was used; None if the file is missing or damaged."""
        try:
            data = _regular_bytes(path, self.max_bytes)
            tensors: dict[str, Tensor] = library("safetensors.torch").load(data)
            features, digest = tensors["features"], tensors["sha256"]
            if not torch.equal(digest, _digest_of(features)):
                return None
            os.utime(path)
            return features
        except Exception:
            # Whatever is wrong with a cached file, the features can be made again.
            return None

    def _write(self, path: Path, features: Tensor) -> None:
        data = library("safetensors.torch").save({"features": features, "sha256": _digest_of(features)})
        if len(data) > self.max_bytes:
            return
        self._make_room(len(data))
        # A name of its own, since processes that share the folder may write the same features at the same time.
        partial = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{PARTIAL}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            # As readable as any file of the user, since folders are shared.
            with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
                file.write(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _remove_abandoned(self) -> None:
        """Remove files that a killed process left half written. A process that writes takes no hour for one file."""
        for path in self.folder.glob(f".*{PARTIAL}"):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used longest ago, until so many bytes more fit.

        The folder is looked at when its own count says that the bound is near, and whenever a sixteenth of the bound was written,
        since other processes write too. A look at every file for every file would take most of the time.
        """
        self._unseen += needed
        if self._total + self._unseen <= self.max_bytes and self._unseen <= self.max_bytes // 16:
            return
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        self._total, self._unseen = sum(size for _, size, _ in files), needed
        for _, size, path in sorted(files):
            if self._total + needed <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            self._total -= size


def _digest_of(features: Tensor) -> Tensor:
    """Return the SHA-256 of some features, of their dtype and shape too, as uint8 [32]."""
    digest = hashlib.sha256(f"{features.dtype}:{tuple(features.shape)}:".encode())
    digest.update(features.contiguous().view(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _regular_bytes(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file of at most so many. Anything else in its place is an OSError, and is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(f"{str(path)!r} is no file of features")
        return file.read()
