"""Sidecars on a GPU: near what a CPU gives, the same bits twice, and under a model and a run that train there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arbitor import ArbModel
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.sidecars import Encoders, FeatureCache
from conformance.compare import exact
from conformance.report import skip
from conformance.sidecars.media_runs import CONFIG, options, render
from conformance.sidecars.test_loading import KINDS, LOADERS, output
from conformance.training.runs import train_until_killed

LIBRARIES = ("transformers", "diffusers", "optimum.quanto", "PIL")
"""What these tests need. Nothing here decodes sound or video."""

pytestmark = pytest.mark.usefixtures("gpu", "short")


@pytest.fixture(scope="module")
def gpu(num_gpus: int) -> None:
    """Leave these tests out where there is no GPU."""
    if not num_gpus:
        skip("sidecars on a GPU", "torch finds no CUDA device here")


@pytest.mark.parametrize("kind", KINDS)
def test_near_what_a_cpu_gives_and_the_same_bits_twice(checkpoints: Path, kind: str) -> None:
    """Sums in another order move features by less than a tenth of what int8 weights do."""
    on_cpu = output(LOADERS[kind](checkpoints))
    kept = output(LOADERS[kind](checkpoints, precision="bfloat16"))
    sidecar = LOADERS[kind](checkpoints)
    identity = sidecar.identity
    got = output(sidecar.to("cuda"))
    assert got.device.type == "cuda" and sidecar.identity == identity
    exact(got, output(sidecar))
    moved, rounded = (float((other.cpu() - on_cpu).norm() / on_cpu.norm()) for other in (got, kept))
    assert moved < rounded / 10, (moved, rounded)
    assert not any(parameter.requires_grad for parameter in sidecar.network.parameters())
    exact(output(sidecar.to("cpu")), on_cpu)


def test_a_model_takes_its_encoders_along(checkpoints: Path, tmp_path: Path) -> None:
    """Raw media reach the model where it is, and features of the two devices are kept apart."""
    cache = FeatureCache(tmp_path / "cache")
    encoders = Encoders(vision=checkpoints / "dinov2", cache=cache)
    pictures = [torch.full((3, 60, 60), number, dtype=torch.uint8) for number in (20, 200)]
    ids_BT = torch.tensor([list(b"some text"), list(b"more text")])
    model = ArbModel(CONFIG, device="cpu").use_encoders(encoders)
    model.losses(ids_BT, images=pictures)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    moved = ArbModel(CONFIG, device="cuda").use_encoders(encoders)
    losses = moved.losses(ids_BT.cuda(), images=pictures)
    assert encoders.sidecar("vision").device.type == "cuda"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    assert moved.backward(losses, rate=6.0, step=0)


def test_a_killed_run_ends_with_the_same_hash(checkpoints: Path, tmp_path: Path) -> None:
    media = render(tmp_path / "media", checkpoints, kinds=["image"])
    for name in ("whole", "killed"):
        asked = options(media, tmp_path / name, "image", device="cuda")
        if name == "whole":
            train(asked)
            continue
        train_until_killed(3, asked)
        train(TrainOptions(run=tmp_path / name, resume=True))
    whole, killed = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")
    )
    assert (whole["state_sha256"], whole["media"]) == (killed["state_sha256"], killed["media"])
