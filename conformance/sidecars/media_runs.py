"""Runs on small rendered media, with small random sidecars, for the tests of `arb train` and `arb generate`."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import wave
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arbitor.optimized import cli
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import PRESET_DEFAULTS, TrainOptions
from arbitor.optimized.training.run import Run
from arbitor.sidecars.vision import PREPROCESSING, PREPROCESSOR
from conformance.graph.models import WHOLE

CONFIG = replace(
    WHOLE,
    name="media",
    width=36,
    num_layers=1,
    num_experts=2,
    top_k=1,
    image_features=48,
    audio_features=48,
    video_latent=64,
    window=32,
)
"""A model of every module, as wide as the small sidecars. Its video latent is [16, 1, 2, 2]."""

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def save_image(path: Path, colour: str, number: int) -> None:
    """Write a square of a colour on grey, of a place and size by its number."""
    from PIL import Image

    pixels = np.full((48, 64, 3), 100 + number, dtype=np.uint8)
    pixels[8 : 24 + number, 8 : 30 + number] = COLOURS[colour]
    Image.fromarray(pixels).save(path)


def save_sound(path: Path, hertz: float, seconds: float) -> None:
    """Write a tone of 16 bits at 16 kHz."""
    samples = np.sin(2 * math.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 20_000).astype("<i2").tobytes())


def save_video(path: Path, colour: str, number: int, *, side: int = 32) -> None:
    """Write three frames of a colour, in a codec that loses nothing."""
    import av

    frame = np.full((side, side, 3), COLOURS[colour], dtype=np.uint8) // (number + 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv444p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


PATCHES = 16
"""Patches of a picture of the small vision sidecar, so that a pass is short."""


def register(patch: pytest.MonkeyPatch) -> None:
    """Let runs of the model write a short sample at their end."""
    patch.setitem(PRESET_DEFAULTS, CONFIG.name, {"sample_bytes": 4, "eval_windows": 4})


WRITERS: dict[str, tuple[str, Callable[[Path, str, int], None]]] = {
    "image": ("png", save_image),
    "audio": ("wav", lambda path, _, number: save_sound(path, 200.0 + 50 * number, 0.2 + 0.3 * (number % 5))),
    "video": ("mkv", save_video),
}
"""How files of a kind end, and what writes one, by its colour and number."""

KINDS = tuple(WRITERS)


def render(root: Path, checkpoints: Path, *, each: int = 4, kinds: Iterable[str] = KINDS) -> Path:
    """Write a folder of each kind with texts, `preset.json`, `text.txt`, and the sidecars. `dinov2` has few patches."""
    shutil.copytree(checkpoints, root)
    few = {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}
    (root / "dinov2" / PREPROCESSOR).write_text(json.dumps(PREPROCESSING | few))
    for kind in kinds:
        suffix, write = WRITERS[kind]
        (root / kind).mkdir()
        for index, colour in enumerate(list(COLOURS) * each):
            write(root / kind / f"{index:02d}.{suffix}", colour, index)
            (root / kind / f"{index:02d}.txt").write_text(f"{colour} number {index}")
    (root / "preset.json").write_text(CONFIG.to_json())
    (root / "text.txt").write_bytes(b"".join(b"line %d of a text.\n" % i for i in range(60)))
    return root


def options(root: Path, run: Path | None, *kinds: str, **changes: Any) -> TrainOptions:
    """Return the options of a short run on a text and on some kinds of rendered media.

    Args:
        root: what `render` wrote.
        run: folder of the run; None for one that keeps nothing.
        kinds: of the media.
        changes: further options.
    """
    sidecars = {
        "image": {"vision": root / "dinov2"},
        "audio": {"audio": root / "moonshine"},
        "video": {"video": root / "vae" / "pig_vae.safetensors"},
    }
    media: dict[str, Any] = {}
    for kind in kinds:
        media |= {f"data_{kind}": str(root / kind), **{k: str(v) for k, v in sidecars[kind].items()}}
    settings: dict[str, Any] = {
        "preset": str(root / "preset.json"),
        "data": str(root / "text.txt"),
        "device": "cpu",
        "steps": 6,
        "batch": 2,
        "context": 24,
        "eval_interval": 3,
        "save_interval": 2,
        "log_interval": 1,
    }
    if run is None:
        del settings["save_interval"]
        settings["save"] = False
    return TrainOptions(run=run, **{**settings, **media, **changes})


def outcome(folder: Path) -> tuple[Any, ...]:
    """Return what two runs that are the same must agree in: digests, numbers of what was held out, and lines of metrics."""
    summary = json.loads((folder / "summary.json").read_text())
    digests = [summary.get(name) for name in ("state_sha256", "adapter_sha256")]
    names = ("step", "train_bpb", "val_bpb", "flip_rate", "grad_norm", "media")
    lines = [{name: line.get(name) for name in names} for line in read_metrics(folder / "metrics.jsonl")]
    return digests, summary["media"], lines


def arb(arguments: list[str]) -> bytes:
    """Return what the command prints, which must end well."""
    out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    return out.buffer.getvalue()  # type: ignore[attr-defined]


def assert_captions_are_read(run: Run) -> None:
    """Fail unless the words of pictures are likelier after their own picture than after another one."""
    assert run.mix is not None
    batch = run.mix._of_items("image", run.mix._folders["image"].train)
    own = batch.on("cpu")
    other = {**own, "image_BNF": own["image_BNF"].roll(1, 0)}
    taught: Tensor = own.pop("targets").taught_BT
    other.pop("targets")
    with torch.no_grad():
        nats = [run.model.loss(**each, taught_BT=taught).item() for each in (own, other)]
    assert nats[0] < 0.9 * nats[1], nats
