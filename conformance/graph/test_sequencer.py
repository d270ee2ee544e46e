"""Sequencers of text, images and audio make windows of three, and refuse wrong inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.graph.sequencer import AudioSequencer, ImageSequencer, TrigramSequencer, audio_batch
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact
from conformance.graph.test_op_sets import contexts
from conformance.graph.test_video import count_weights
from conformance.graph.test_voting import context
from conformance.subject import Subject

FIELDS: dict[str, Any] = {"image_features": 8, "audio_features": 9}
KINDS = ((TrigramSequencer, 10), (ImageSequencer, 8), (AudioSequencer, 9))


def features(*shape: int) -> Tensor:
    """Return random features."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "width"), KINDS)
def test_a_position_is_the_norm_of_three_vectors_in_a_row(kind: Any, width: int) -> None:
    sequencer = kind(context(**FIELDS))
    x_BNF = features(2, 7, width)
    matrix = dequantize(sequencer.project.weight, dtype=torch.float64)
    with torch.no_grad():
        got = sequencer(x_BNF)
    assert got.shape == (2, 5, 24)
    for place in range(5):
        s = matrix @ torch.cat([x_BNF[1, place + near] for near in range(3)]).double()
        alike(got[1, place], s / (s.square().mean() + 1e-6).sqrt())


@pytest.mark.parametrize(("kind", "width"), KINDS)
def test_positions_are_those_of_the_reference(subject: Subject, kind: Any, width: int) -> None:
    """And a window moved by one gives the positions moved by one."""
    plain, tested = (kind(parts) for parts in contexts(subject, **FIELDS))
    x_BNF = features(2, 6, width)
    with torch.no_grad():
        want = plain(x_BNF)
        alike(tested(x_BNF.to(subject.device)).cpu(), want)
        alike(plain(x_BNF[:, 1:]), want[:, 1:])


def test_the_shapes_and_weights_of_the_original() -> None:
    """256 patches of 384 give 254 positions, and 38 frames of 416 give 36. A sequencer has 3 F D weights and a norm of D."""
    parts = context(image_features=384, audio_features=416, width=512)
    for kind, width, count in ((ImageSequencer, 384, 256), (AudioSequencer, 416, 38)):
        sequencer = kind(parts)
        assert sequencer(features(1, count, width)).shape == (1, count - 2, 512)
        assert count_weights(sequencer) == 3 * width * 512 + 512


def test_raw_audio_goes_through_features() -> None:
    """[T], [B, T] and [B, 1, T] reach the callable as [B, T]. Without a callable they are refused with the reason."""
    seen: list[tuple[int, ...]] = []

    def frames(audio_BT: Tensor) -> Tensor:
        seen.append(tuple(audio_BT.shape))
        return audio_BT.unfold(1, 9, 9)

    parts = context(**FIELDS)
    sequencer = AudioSequencer(parts, features=frames)
    for shape in ((54,), (2, 54), (2, 1, 54)):
        assert sequencer(features(*shape)).shape == (2 if len(shape) > 1 else 1, 4, 24)
        with pytest.raises(ValueError, match="raw audio"):
            AudioSequencer(parts)(features(*shape))
    assert seen == [(1, 54), (2, 54), (2, 54)]


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 2, 8), (5, 8), (1, 2, 5, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image_BNF"):
        ImageSequencer(context(**FIELDS))(features(*shape))


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 2, 9), (1, 2, 5, 9)])
def test_frames_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="audio"):
        AudioSequencer(context(**FIELDS))(features(*shape))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="image_BNF"):
        ImageSequencer(context(**FIELDS))(torch.zeros(1, 4, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="audio"):
        AudioSequencer(context(**FIELDS))(torch.zeros(1, 4, 9, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 2, 5), (1, 1, 1, 5)])
def test_shapes_of_raw_audio(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="audio"):
        audio_batch(torch.zeros(shape))
    exact(audio_batch(torch.arange(5.0)), torch.arange(5.0)[None])
