"""The audio encoder and its convolution make the right frames and tokens, and their weights alone vote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import ops
from arbitor.reference.graph.audio import AUDIO_CODES, SAMPLES_PER_FRAME, AudioVQEncoder, TernaryConv1d
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph.test_op_sets import contexts, integers
from conformance.graph.test_video import count_weights, on_meta, weights_of
from conformance.graph.test_voting import context
from conformance.subject import Subject


def sound(*shape: int) -> Tensor:
    """Return noise as audio."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_weights_are_as_many_as_the_seed_counts() -> None:
    encoder = AudioVQEncoder(context())
    assert count_weights(encoder) == 404_864
    assert not list(encoder.parameters())
    assert not [buffer for buffer in encoder.buffers() if buffer.is_floating_point()]


def test_it_builds_on_the_meta_device() -> None:
    assert count_weights(AudioVQEncoder(on_meta())) == 404_864


def test_the_smoke_of_the_seed() -> None:
    """REFACTOR9 has logits (1, 4, 289) and tokens (1, 4). 640 samples give them, in each shape that audio may have."""
    encoder = AudioVQEncoder(context())
    with torch.no_grad():
        results = [encoder(sound(640).reshape(shape)) for shape in ((640,), (1, 640), (1, 1, 640))]
    for logits, ids in results:
        assert logits.shape == (1, 4, 289) and logits.dtype == torch.float32
        assert ids.shape == (1, 4) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < AUDIO_CODES
        exact((logits, ids), results[0])


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_frame_each_ten_milliseconds(frames: int) -> None:
    encoder = AudioVQEncoder(context())
    with torch.no_grad():
        assert encoder(sound(2, frames * SAMPLES_PER_FRAME))[1].shape == (2, frames)
    with pytest.raises(ValueError, match="audio"):
        encoder(sound(SAMPLES_PER_FRAME - 1))


def test_tokens_are_the_nearest_codes_and_logits_read_them() -> None:
    encoder = AudioVQEncoder(context())
    seen: list[Tensor] = []
    encoder.project.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits, ids = encoder(sound(2, 480))
    z = seen[0] / (seen[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact(ids, ops.nearest_codes(z, encoder.codebook.weight))
    alike(
        logits,
        dequantize(encoder.codebook.weight, dtype=torch.float64)[ids]
        @ dequantize(encoder.out.weight, dtype=torch.float64).T,
    )


def test_every_weight_votes_from_logits_and_codebook_losses() -> None:
    """The loss of the logits reaches the first convolution straight through the choice of a code."""
    parts = context()
    encoder = AudioVQEncoder(parts)
    logits, ids, losses = encoder.encode(sound(2, 480))
    targets = (ids + 1) % AUDIO_CODES
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    with parts.voting.taking(rate=1.0, step=0):
        loss.backward(retain_graph=True)
    voted = {name for name, module in weights_of(encoder).items() if module.weight.trit_accum.any()}
    assert voted == {"first", "second", "project", "out"}
    with parts.voting.taking(rate=1.0, step=1):
        losses["codebook"].backward()
    assert encoder.codebook.weight.trit_accum.any()


def test_a_convolution_votes_and_steps_alike(subject: Subject) -> None:
    results = []
    for parts in contexts(subject):
        layer = TernaryConv1d(parts, 3, 5, kernel_size=4, stride=2, padding=1)
        outputs: list[Any] = []
        for step in range(2):
            x = integers(2, 3, 11, seed=step).to(parts.device).requires_grad_()
            y = layer(x)
            with parts.voting.taking(rate=2.0, step=step):
                (y * integers(*y.shape, seed=9).to(parts.device)).sum().backward()
            outputs += [y.detach().cpu(), x.grad.cpu()]
            layer.step_weight()
        results.append((unsigned_zeros(tuple(outputs)), parts.ops.to_spec(layer.weight).to("cpu")))
    exact(results[1], results[0])
    assert results[0][1].trit_accum.any()


def test_a_convolution_is_torchs() -> None:
    layer = TernaryConv1d(context(), 3, 5, kernel_size=4, stride=2, padding=1)
    x = sound(2, 3, 11)
    taps = dequantize(layer.weight, dtype=torch.float64).reshape(5, 3, 4)
    with torch.no_grad():
        alike(layer(x), F.conv1d(x.double(), taps, stride=2, padding=1))


def test_a_convolution_behind_a_detached_input_votes() -> None:
    parts = context()
    first, second = TernaryConv1d(parts, 1, 3, kernel_size=3), TernaryConv1d(parts, 3, 2, kernel_size=3)
    with parts.voting.taking(rate=1.0, step=0):
        second(first(sound(2, 1, 12)).detach()).square().sum().backward()
    parts.voting.deliver()
    assert second.voted and not first.voted


def test_a_convolution_changed_before_its_backward_pass_is_refused() -> None:
    parts = context()
    layer = TernaryConv1d(parts, 1, 3, kernel_size=3)
    loss = layer(sound(2, 1, 12)).square().sum()
    layer.load(parts.ops.to_spec(layer.weight).clone())
    with (
        parts.voting.taking(rate=1.0, step=0),
        pytest.raises(RuntimeError, match="changed between forward and backward"),
    ):
        loss.backward()


def test_tokens_of_both_op_sets(subject: Subject) -> None:
    """Tokens are equal, as no two codes are so near on these sounds that a rounding decides. Logits are alike."""
    plain, tested = (AudioVQEncoder(parts, channels=(3, 5)) for parts in contexts(subject))
    with torch.no_grad():
        want, got = plain(sound(1, 320)), tested(sound(1, 320).to(subject.device))
    exact(got[1].cpu(), want[1])
    alike(got[0].cpu(), want[0])
