"""The examples of the pages about media run as they stand there, with small sidecars in the places that they name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training import media_speech
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import PRESET_DEFAULTS
from arbitor.reference.config import with_fields
from arbitor.reference.presets import PRESETS
from arbitor.sidecars.vision import PREPROCESSOR
from conformance import pages
from conformance.front.test_pages import OF_MEDIA
from conformance.import_lint import ROOT
from conformance.sidecars.media_runs import CONFIG, options, save_sound
from conformance.system.command import Here

pytestmark = pytest.mark.usefixtures("short")

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
def run(place: Path, media: Path) -> None:
    """Train what the page takes for granted: a run that learned from pictures."""
    folder = place / "runs" / "small-001"
    if not folder.exists():
        train(options(media, folder, "image", steps=1))


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


WIDE = 384
"""Features of a patch that `--enable-image` asks for."""

NO_MEDIA = with_fields(
    CONFIG, name="small", image_features=0, audio_features=0, video_latent=0, talker_tokens=0, router_inner=0
)
"""Stands for the presets that the pages name. The options of a line switch its media on."""

LEFT_OUT = {
    "hf:HuggingFaceFW": "it is on a hub, and conformance/training/test_streams.py has streams of files",
    "documents.parquet": "conformance/training/test_streams.py has streams of files",
}
"""What a line has that does not run here, with the reason."""

TUTORIAL = "docs/tutorials/finetune.md"
"""Page of which conformance/system/test_pages_run.py runs all but the lines with pictures."""


@pytest.mark.parametrize("pages_read", [("docs/media.md", TUTORIAL), ("docs/training.md",)], ids="-".join)
def test_the_commands_of_a_page_run_in_their_order(
    pages_read: tuple[str, ...],
    tmp_path: Path,
    media: Path,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """With two steps each, and a network of the sidecar's width that is small otherwise."""
    import transformers

    for name in ("small", "tiny"):
        monkeypatch.setitem(PRESETS, name, NO_MEDIA)
        monkeypatch.setitem(
            PRESET_DEFAULTS,
            name,
            {"steps": 2, "batch": 2, "context": 24, "sample_bytes": 4, "eval_windows": 4},
        )
    monkeypatch.setattr(media_speech, "CODEC_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text(NO_MEDIA.to_json())
    (tmp_path / "books").mkdir()
    shutil.copy(media / "text.txt", tmp_path / "books")
    for kind, name in (("image", "photos"), ("video", "clips"), ("audio", "voices")):
        shutil.copytree(media / kind, tmp_path / name)
    shutil.copy(media / "image" / "00.png", tmp_path / "holiday.jpg")
    shutil.copytree(checkpoints / "vae", tmp_path / "wan")
    (tmp_path / "wan" / "pig_vae.safetensors").rename(tmp_path / "wan" / "vae.safetensors")
    vision = transformers.Dinov2Config(
        hidden_size=WIDE, num_attention_heads=2, num_hidden_layers=1, mlp_ratio=1, image_size=518
    )
    transformers.Dinov2Model(vision).save_pretrained(tmp_path / "facebook" / "dinov2-small")
    shutil.copy(media / "dinov2" / PREPROCESSOR, tmp_path / "facebook" / "dinov2-small")
    ran = dict.fromkeys(pages_read, 0)
    for command in (each for page in pages_read for each in pages.shown() if each.page == page):
        line = " ".join(command.words)
        elsewhere = command.page == TUTORIAL and "--data-image" not in line
        left_out = elsewhere or any(part in line for part in LEFT_OUT)
        if not command.whole or command.words[0] != "arb" or left_out:
            continue
        words = [*command.words[1:], "--device", "cpu"]
        if "--steps" in words:
            words[words.index("--steps") + 1] = "2"
        if words[0] == "generate" and "--as" not in words:
            words += ["--bytes", "4"]
        result = Here(capfdbinary)(*words)
        assert result.returncode == 0, (line, result.stderr.decode())
        ran[command.page] += 1
    assert ran.get(TUTORIAL, 1) == 1 and ran[pages_read[0]] >= 2
    if TUTORIAL in pages_read:
        assert (tmp_path / "dog.png").is_file() and (tmp_path / "answer.wav").is_file()
