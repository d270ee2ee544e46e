"""The cache of features: what it holds is what would be made, within its bound, whatever happens to its files."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arbitor.sidecars import FeatureCache, Sidecar
from conformance.compare import exact


def sidecar(identity: str = "one") -> Sidecar:
    network = nn.Linear(2, 2)
    network.requires_grad_(False)
    return Sidecar(network, identity=identity, precision="bfloat16")


class Maker:
    """Makes features and counts how often."""

    def __init__(self, value: float, size: int = 100) -> None:
        self.calls, self.features = 0, torch.full((size,), value, dtype=torch.float32)

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.features


def test_made_once(tmp_path: Path) -> None:
    cache, make = FeatureCache(tmp_path), Maker(1.0)
    for _ in range(3):
        exact(cache.get(b"content", sidecar(), make), make.features)
    exact(FeatureCache(tmp_path).get(b"content", sidecar(), make), make.features)
    assert make.calls == 1


def test_other_content_and_other_sidecars_have_their_own(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for number, (content, identity) in enumerate(
        ((b"a", "one"), (b"b", "one"), (b"a", "two"), (b"aone", ""))
    ):
        make = Maker(float(number))
        exact(cache.get(content, sidecar(identity), make), make.features)
        assert make.calls == 1


def test_the_bound_holds_and_the_oldest_go(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=1800)
    for number in range(3):
        cache.get(bytes([number]), sidecar(), Maker(number))
        for path in tmp_path.iterdir():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    cache.get(bytes([0]), sidecar(), Maker(0))
    cache.get(b"new", sidecar(), Maker(9))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1800
    kept, gone = Maker(0), Maker(1)
    cache.get(bytes([0]), sidecar(), kept)
    cache.get(bytes([1]), sidecar(), gone)
    assert (kept.calls, gone.calls) == (0, 1)


def test_what_is_larger_than_the_bound_is_made_and_not_kept(tmp_path: Path) -> None:
    cache, make = FeatureCache(tmp_path, max_bytes=100), Maker(1.0)
    for _ in range(2):
        exact(cache.get(b"a", sidecar(), make), make.features)
    assert make.calls == 2 and not list(tmp_path.iterdir())
    # And nothing makes room for it.
    kept = FeatureCache(tmp_path, max_bytes=2000)
    kept.get(b"b", sidecar(), make)
    large = Maker(2.0)
    large.features = torch.zeros(4000)
    kept.get(b"c", sidecar(), large)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "a bit", "a pipe", "a link"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    """Also where one bit of the features has changed, which no format notices, and where nothing would ever be read."""
    cache, make = FeatureCache(tmp_path / "cache"), Maker(1.0)
    cache.get(b"a", sidecar(), make)
    [path] = cache.folder.iterdir()
    data = path.read_bytes()
    path.unlink()
    if damage == "a pipe":
        os.mkfifo(path)
    elif damage == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        bit = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        path.write_bytes({"cut": data[:-1], "other": b"x" * 200, "empty": b"", "a bit": bit}[damage])
    for _ in range(2):
        exact(cache.get(b"a", sidecar(), make), make.features)
    assert make.calls == 2


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.get(b"a", sidecar(), Maker(1.0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    with pytest.raises(ValueError, match="max_bytes is 0"):
        FeatureCache(tmp_path, max_bytes=0)


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path) -> None:
    for name, age in (("old", 3700), ("new", 60)):
        path = tmp_path / f".{name}.partial"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    FeatureCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".new.partial"]


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    """A cache may be shared by users: the umask decides, as for any file."""
    before = os.umask(0o022)
    try:
        FeatureCache(tmp_path).get(b"a", sidecar(), Maker(1.0))
    finally:
        os.umask(before)
    [path] = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_folder_is_not_looked_at_for_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But often enough that files of other processes count: once more after each sixteenth of the bound."""
    looks = []
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: looks.append(pattern) or real(self, pattern))
    cache = FeatureCache(tmp_path, max_bytes=16 * 2000)
    other = FeatureCache(tmp_path)
    for number in range(24):
        cache.get(b"one %d" % number, sidecar(), Maker(number))
        other.get(b"other %d" % number, sidecar(), Maker(number))
    assert 3 < len([pattern for pattern in looks if not pattern.startswith(".")]) < 24
    size = sum(path.stat().st_size for path in real(tmp_path, "*"))
    assert size <= 16 * 2000 + 2 * 2000


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        FeatureCache(tmp_path).get(b"a", sidecar(), Maker(1.0))
    assert not list(tmp_path.iterdir())
