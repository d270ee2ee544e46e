"""`arb finetune` on text, pictures, sounds and videos: it repeats to the bit, and captions are learned over a frozen base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph.adapters import adapters_of
from conformance.sidecars import media_runs
from conformance.sidecars.media_runs import KINDS, assert_captions_are_read, outcome
from conformance.training.runs import train_until_killed

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture(scope="module")
def base(media: Path, short: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every module that has read text alone."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train(media_runs.options(media, folder, steps=2))
    return folder


def options(base: Path, media: Path, run: Path | None, *kinds: str, **changes: Any) -> TrainOptions:
    made = media_runs.options(media, run, *kinds, **changes)
    return replace(made, preset=None, finetune=True, init_from=str(base))


def test_killed_and_resumed_ends_the_same(base: Path, media: Path, cache: str, tmp_path: Path) -> None:
    """With every kind, after which heads and readers of media have moved, and the base has not."""
    more = {"feature_cache": cache, "lora_rank": 2, "steps": 8, "eval_interval": 8}
    train(options(base, media, tmp_path / "whole", *KINDS, **more))
    want = outcome(tmp_path / "whole")
    assert want[1].keys() == {"text", *KINDS} and want[1]["video"]["val_latent"] > 0
    folder = tmp_path / "killed"
    train_until_killed(5, options(base, media, folder, *KINDS, **more))
    train(TrainOptions(run=folder, resume=True, finetune=True))
    got = outcome(folder)
    # The line of the step after the resumption lacks the step before the kill.
    assert got[:2] == want[:2] and got[2][-1] == want[2][-1]
    state = load_checkpoint(folder / "final.safetensors").adapter
    assert state is not None
    moved = {name for name, (_, b_NR) in state.matrices.items() if b_NR.any()}
    assert {
        "image_sequencer.project",
        "audio_sequencer.project",
        "video_head.latent_out",
        "router.out",
        "byte_head.down",
    } <= moved
    source = load_checkpoint(base / "best.safetensors")
    assert {name for name, kept in state.moments.items() if kept["step"] < 8}, "every kind was in every step"
    final = load_checkpoint(folder / "final.safetensors").state
    assert all(
        torch.equal(part, source.state[name].tensors()[key])  # type: ignore[union-attr]
        for name, weight in final.items()
        if not isinstance(weight, torch.Tensor)
        for key, part in weight.tensors().items()
    )


def test_captions_are_read_from_the_pictures(base: Path, media: Path, cache: str) -> None:
    """After some steps the words are likelier after their own picture than after another one. The base had seen none."""
    asked = options(
        base,
        media,
        None,
        "image",
        feature_cache=cache,
        steps=24,
        batch=12,
        mix="text=0,image=1",
        eval_interval=1000,
        learning_rate=0.03,
    )
    with opened(asked, None) as run:
        assert adapters_of(run.model)
        run.take_steps()
        assert_captions_are_read(run)
