"""Runs that campaigns attack: on a text, on a mix of every kind of data, and of adapters over a finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.training import nano

STEPS = 8
"""Steps of a run."""

SIZES = [
    *("--device", "cpu", "--steps", str(STEPS), "--save-interval", "1", "--log-interval", "1"),
    *("--eval-interval", "2"),
]

Live = Callable[[list[str], str], None]
"""Runs ``arb`` with a command line to its end, under a name."""


def text(scratch: Path, live: Live) -> list[str]:
    """Return the command line that begins a run on a text, but for its folder."""
    return ["train", "--preset", "nano", "--data", str(scratch / "text.txt"), *SIZES]


def mix(scratch: Path, live: Live) -> list[str]:
    """Return that of a run on texts, code, pictures, sounds, videos and speech."""
    from arbitor.optimized.training import media_speech
    from conformance.sidecars import media_runs
    from conformance.sidecars.small_checkpoints import write_checkpoints

    patch, root, checkpoints = pytest.MonkeyPatch(), scratch / "media", scratch / "checkpoints"
    media_runs.register(patch)
    patch.setattr(media_speech, "CODEC_STEPS", 2)
    checkpoints.mkdir()
    write_checkpoints(checkpoints)
    media_runs.render(root, checkpoints)
    (root / "preset.json").write_text(replace(media_runs.CONFIG, talker_tokens=289).to_json())
    named = {
        "preset": root / "preset.json",
        "data-text": root / "text.txt",
        "data-code": scratch / "text.txt",
        **{f"data-{kind}": root / kind for kind in media_runs.KINDS},
        "data-speech": root / "audio",
        "vision": root / "dinov2",
        "audio": root / "moonshine",
        "video": root / "vae" / "pig_vae.safetensors",
    }
    options = [word for name, path in named.items() for word in (f"--{name}", str(path))]
    return ["train", *options, "--batch", "2", "--context", "24", *SIZES]


def adapters(scratch: Path, live: Live) -> list[str]:
    """Return that of a run of adapters over a run on a text."""
    live([*text(scratch, live), "--run", str(scratch / "base")], "base")
    (scratch / "other.txt").write_bytes(nano.TEXT[::-1])
    named = ["--base", str(scratch / "base"), "--data", str(scratch / "other.txt"), "--lora-rank", "2"]
    return ["finetune", *named, "--batch", "2", "--context", "16", *SIZES]


BEGINNINGS: Mapping[str, Callable[[Path, Live], list[str]]] = {
    "text": text,
    "mix": mix,
    "adapters": adapters,
}
"""What prepares a run in a folder, and returns the command line that begins it, by what it learns."""
