"""Speech of a run: the codec that is trained before the first step, the tokens of its sounds, and the file that keeps it.

Legend: B sounds of a batch, T samples, F frames of 160 samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.optimized.training.checkpoint import (
    CheckpointError,
    check_fits,
    load_checkpoint,
    save_checkpoint,
)
from arbitor.optimized.training.runtime import Runtime
from arbitor.optimized.training.schedule import rate
from arbitor.optimized.training.sizes import config_of
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph.audio import SAMPLES_PER_FRAME
from arbitor.reference.graph.codec import AudioCodec

CODEC_STEPS = 120
"""Steps that train a codec."""

CODEC_BATCH = 16
"""Pieces of sounds in a step of the codec."""

PIECE_FRAMES = 20
"""Frames of such a piece, a fifth of a second."""

TOGETHER = 16
"""Sounds whose tokens are made in one pass, since the pass reads every weight once, whatever the number of sounds."""

TABULATED = 1000
"""Sounds at most whose frames say what tokens sound like."""


def whole_frames(clip: Tensor, frames: int = 1) -> Tensor:
    """Return a sound float [T], filled up with silence to whole frames, at least so many."""
    count = max(frames, -(-len(clip) // SAMPLES_PER_FRAME))
    return F.pad(clip, (0, count * SAMPLES_PER_FRAME - len(clip)))


def trained_codec(
    read: Callable[[int], Tensor], count: int, config: ArbConfig, runtime: Runtime, *, seed: int
) -> AudioCodec:
    """Return a codec that has learned some sounds.

    A hash of the seed and the number of the step draws the pieces, so that the same sounds give the same codec, bit for bit.

    Args:
        read: returns the sound of a number below `count`, float32 [T] at 16 kHz.
        count: number of sounds, at least 1.
        config: rules of the votes.
        runtime: where it is trained.
        seed: of its weights, of the dither and of the pieces, below 2^63.
    """
    codec = AudioCodec(config, ops=runtime.ops(), device=runtime.device, seed=seed)
    for step in range(CODEC_STEPS):
        pieces = [_piece(read(draw % count), place) for draw, place in _draws(seed, step)]
        audio_BT = torch.stack(pieces).to(runtime.device)
        codec.learn(audio_BT, rate=rate(step, CODEC_STEPS, theta=config.theta), step=step)
    codec.tabulate(audio_BT.to(runtime.device) for audio_BT in _equal(read, min(count, TABULATED)))
    return codec


def _equal(read: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
    """Yield the first sounds, float [B, 160 F], those of equal length among TOGETHER neighbours in one batch."""
    for begin in range(0, count, TOGETHER):
        of_length: dict[int, list[Tensor]] = {}
        for number in range(begin, min(begin + TOGETHER, count)):
            clip = whole_frames(read(number), PIECE_FRAMES)
            of_length.setdefault(len(clip), []).append(clip)
        yield from map(torch.stack, of_length.values())


def _draws(seed: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield two numbers below 2^64 for each piece of a step: one draws the sound, the other the place in it."""
    key = f"arb codec: seed {seed}, step {step}".encode()
    digest = hashlib.shake_256(key).digest(16 * CODEC_BATCH)
    for begin in range(0, len(digest), 16):
        yield (
            int.from_bytes(digest[begin : begin + 8], "little"),
            int.from_bytes(digest[begin + 8 : begin + 16], "little"),
        )


def _piece(clip: Tensor, draw: int) -> Tensor:
    """Return a piece of a sound that a number draws, float [160 PIECE_FRAMES], at the place of a frame."""
    whole = whole_frames(clip, PIECE_FRAMES)
    begin = draw % (len(whole) // SAMPLES_PER_FRAME - PIECE_FRAMES + 1)
    return whole[begin * SAMPLES_PER_FRAME :][: PIECE_FRAMES * SAMPLES_PER_FRAME]


def save_codec(path: Path, codec: AudioCodec, *, seed: int, sha256: str) -> None:
    """Write a codec.

    Args:
        path: file to write, whole or not at all.
        codec: what is written.
        seed: that it was trained from.
        sha256: digest of the sounds that it was trained on.

    Raises:
        TrainingError: the file cannot be written.
    """
    save_checkpoint(
        path,
        codec.state(),
        config=json.loads(codec.config.to_json()),
        step=CODEC_STEPS,
        seed=seed,
        best_bpb=None,
        run={"media_sha256": {"speech": sha256}},
        progress={},
    )


def load_codec(path: Path, runtime: Runtime, *, sha256: str | None = None) -> AudioCodec:
    """Return the codec of a file, which was verified.

    Args:
        path: file that `save_codec` wrote.
        runtime: where it runs.
        sha256: digest of the sounds that it must have been trained on, or None.

    Raises:
        CheckpointError: the file is missing, damaged, no codec, or of other sounds.
    """
    checkpoint = load_checkpoint(path)
    try:
        config = config_of(checkpoint.config)
        check_fits(checkpoint, AudioCodec(config, device="meta"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the codec in {str(path)!r} is refused: {error}") from error
    if sha256 is not None and checkpoint.run.get("media_sha256") != {"speech": sha256}:
        raise CheckpointError(f"the codec in {str(path)!r} was trained on other sounds than those of the run")
    codec = AudioCodec(config, ops=runtime.ops(), device=runtime.device, seed=checkpoint.seed)
    codec.load_state(checkpoint.state)
    return codec


def tokens_of(codec: AudioCodec, clips: Sequence[Tensor]) -> list[Tensor]:
    """Return the tokens of sounds float [T] on the CPU, int64 [F] each.

    The sounds are filled up with silence to the longest. The encoder has no biases, so that silence behind a sound is to it what
    the end of the sound is.
    """
    whole = [whole_frames(clip) for clip in clips]
    audio_BT = padded(whole, 0).to(codec.voting.faults.device)
    tokens_BF = codec.tokens(audio_BT).cpu()
    return [row_F[: len(clip) // SAMPLES_PER_FRAME] for row_F, clip in zip(tokens_BF, whole, strict=True)]


def padded(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Return rows of unequal length as one tensor, filled up behind."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, longest - len(row)), value=fill) for row in rows])
