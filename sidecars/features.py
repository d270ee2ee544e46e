"""A cache of features on disk. Sidecars are frozen, so that the features of a file never change."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from arbitor.sidecars.libraries import library
from arbitor.sidecars.sidecar import Sidecar

SUFFIX = ".safetensors"
"""Ending of the files of a cache."""


class FeatureCache:
    """Features by the content that they were made from, in a folder of bounded size.

    A file is named by a digest of the content and of the sidecar's identity: its weights, precision and library. If the folder
    would grow beyond its bound, the files that were used longest ago go first. Processes may share a folder, because files are
    written beside their place and renamed. A file that cannot be read is made anew.

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
            tensors: dict[str, Tensor] = library("safetensors.torch").load_file(str(path))
            os.utime(path)
            return tensors["features"]
        except Exception:
            # Whatever is wrong with a cached file, the features can be made again.
            return None

    def _write(self, path: Path, features: Tensor) -> None:
        data = library("safetensors.torch").save({"features": features})
        self._make_room(len(data))
        if len(data) > self.max_bytes:
            return
        # A name of its own, since processes that share the folder may write the same features at the same time.
        with tempfile.NamedTemporaryFile(
            dir=self.folder, prefix=".", suffix=".partial", delete=False
        ) as file:
            partial = Path(file.name)
            try:
                file.write(data)
                file.flush()
                partial.replace(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used longest ago, until so many bytes more fit."""
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + needed <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
