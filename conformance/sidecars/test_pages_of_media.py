"""The examples of the pages about media run as they stand there, with small sidecars in the places that they name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training.loop import train
from arbitor.reference.presets import PRESETS
from conformance import pages
from conformance.front.test_pages import OF_MEDIA
from conformance.import_lint import ROOT
from conformance.sidecars.media_runs import CONFIG, options, save_sound

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [
    pytest.param(block, id=f"{page}-{place}")
    for page in sorted(OF_MEDIA)
    for place, (_, block) in enumerate(fence for fence in pages.fences(ROOT / page) if fence[0] == "python")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, media: Path, checkpoints: Path) -> Path:
    """Return a folder in which the examples run: with sidecars, a picture and a sound."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("examples")
    for name in ("facebook/dinov2-small", "path/to/dinov2-small"):
        shutil.copytree(media / "dinov2", folder / name)
    shutil.copytree(checkpoints / "moonshine", folder / "UsefulSensors" / "moonshine-base")
    for name in ("holiday.jpg", "picture.jpg"):
        Image.new("RGB", (64, 48), "green").save(folder / name)
    save_sound(folder / "bark.wav", 300.0, 0.5)
    return folder


@pytest.fixture
def run(place: Path, media: Path, checkpoints: Path) -> None:
    """Train what the page takes for granted: a run that learned from pictures."""
    folder = place / "runs" / "small-001"
    if not folder.exists():
        train(options(media, checkpoints, folder, "image", steps=1))


@pytest.mark.parametrize("source", EXAMPLES)
def test_an_example_runs(source: str, place: Path, run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(PRESETS, "r11", CONFIG)
    left: dict[str, Any] = {}
    exec(compile(source, "example", "exec"), left)
    if "losses" in left:
        assert left["losses"]["bytes"].item() > 0
    if "features_BNF" in left:
        assert left["features_BNF"].shape[0] == 1
