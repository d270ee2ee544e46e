"""The video head votes and halts as it should, and computes the same latent in training and in generation.

Legend: B samples, P tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops
from arbitor.reference.config import HALT_THRESHOLD
from arbitor.reference.constants import DEFAULT_EPS
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.units import unit_rows
from arbitor.reference.graph.video import (
    FIRST_SIGNAL,
    GAIN,
    NOISE_TENSOR,
    VideoHead,
    cosine_alphas,
    noise_scales,
    signal_shares,
)
from arbitor.reference.ops.scale import dequantize
from conformance import oracle
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.graph.test_op_sets import contexts, integers
from conformance.graph.test_voting import context
from conformance.subject import Subject

FIELDS: dict[str, Any] = {"video_latent": 20, "video_steps": 3}


def tokens(*, batch: int = 2, seed: int = 0) -> Tensor:
    """Return tokens [B, 5, D] of a nano model."""
    return torch.randn(batch, 5, models.NANO.width, generator=torch.Generator().manual_seed(seed))


def units(x: Tensor) -> Tensor:
    """Return rows of root mean square 1, by torch."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=DEFAULT_EPS)


def on_meta(**fields: Any) -> GraphContext:
    """Return the context of a model of any size, which takes no memory."""
    config = replace(models.NANO, **fields)
    return GraphContext(ops, config, device="meta", dtype=torch.float32, seed=5)


def weights_of(module: torch.nn.Module) -> dict[str, TernaryModule]:
    """Return the modules with a weight by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, TernaryModule)}


def count_weights(module: torch.nn.Module) -> int:
    """Return the number of ternary weights in a module."""
    return sum(math.prod(part.weight.shape) for part in weights_of(module).values())


@pytest.mark.parametrize(
    ("width", "latent", "wanted"), [(512, 16 * 32 * 32, 17_040_896), (7168, 4096, 110_121_984)]
)
def test_weights_are_as_many_as_the_seeds_count(width: int, latent: int, wanted: int) -> None:
    """The head has REFACTOR9's figure, and REFACTOR14's 112,193,536 less 289 * 7168 of the talker head. On the meta device."""
    head = VideoHead(on_meta(width=width, video_latent=latent))
    assert count_weights(head) == wanted == 2 * width * latent + width**2 + 3 * width
    assert not [buffer for buffer in head.buffers() if buffer.is_floating_point()] and not list(
        head.parameters()
    )


@given(st.integers(1, 50))
def test_alphas_keep_the_same_share_whatever_the_steps(num_steps: int) -> None:
    alphas = cosine_alphas(num_steps)
    assert len(alphas) == num_steps and all(0 < alpha <= 1 for alpha in alphas)
    assert math.prod(alphas) == pytest.approx(FIRST_SIGNAL)
    assert list(alphas) == sorted(alphas), "the noisiest step comes first"


@given(st.integers(1, 50))
def test_the_noise_times_its_scale_takes_a_step_along_the_loop(num_steps: int) -> None:
    """From the state of one step to that of the next, with the same noise, and in the end to the target itself."""
    shares, alphas, scales = signal_shares(num_steps), cosine_alphas(num_steps), noise_scales(num_steps)
    assert shares[0] == pytest.approx(FIRST_SIGNAL) and shares[-1] == 1.0
    x, noise = 0.7, -1.3
    state = math.sqrt(shares[0]) * x + math.sqrt(1 - shares[0]) * noise
    for step, (alpha, scale) in enumerate(zip(alphas, scales, strict=True)):
        state = (state - (1 - alpha) * scale * noise) / math.sqrt(alpha)
        rest = math.sqrt(max(0.0, 1 - shares[step + 1]))
        assert state == pytest.approx(math.sqrt(shares[step + 1]) * x + rest * noise, abs=1e-9)
    assert state == pytest.approx(x)


def test_a_head_that_knows_the_noise_draws_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error of the noise is 0, and the loop ends at the target, each step nearer than the one before."""
    head, target_BL = VideoHead(context(**FIELDS)), tokens(seed=4).flatten(1)[:, :20]
    begin_BL = head.noise(torch.zeros(2, dtype=torch.int64))
    noise_BL = (begin_BL - math.sqrt(FIRST_SIGNAL) * target_BL) / math.sqrt(1 - FIRST_SIGNAL)
    number = iter([0, 1, 2, 0, 0, 1, 0, 1, 2])

    def knows(latent: Tensor, seen: Tensor, row_D: Tensor) -> Tensor:
        return noise_BL * noise_scales(3)[next(number)] / GAIN

    monkeypatch.setattr(head, "_predicted", knows)
    assert head.noise_errors(tokens(), target_BL).max() < 1e-12
    drawn = [head(tokens(), steps=count).flatten(1) for count in (1, 2, 3)]
    alike(drawn[-1], target_BL)
    errors = [float((latent - target_BL).square().mean()) for latent in (begin_BL, *drawn)]
    assert errors == sorted(errors, reverse=True)


def test_noise_errors_by_hand() -> None:
    """In plain float64, from dense matrices."""
    head, seen, target_BL = (
        VideoHead(context(**FIELDS)),
        tokens(seed=1).double(),
        tokens(seed=4).double().flatten(1)[:, :20],
    )
    matrices = {name: dequantize(part.weight, dtype=torch.float64) for name, part in weights_of(head).items()}
    begin_BL = head.noise(torch.zeros(2, dtype=torch.int64)).double()
    shares, scales = signal_shares(3), noise_scales(3)
    noise_BL = (begin_BL - shares[0] ** 0.5 * target_BL) / (1 - shares[0]) ** 0.5
    wanted, read = torch.zeros(2).double(), units(seen)
    for step in range(3):
        state_BL = shares[step] ** 0.5 * target_BL + (1 - shares[step]) ** 0.5 * noise_BL
        n = units(state_BL / 4 @ matrices["latent_in"].T)
        q = n @ matrices["query"].T + matrices["steps"][step]
        a = torch.einsum("bd,bpd->bp", q, read).div(24**0.5).softmax(-1)
        u = n + torch.einsum("bp,bpd->bd", a, read)
        found = 4 * (u * u.sigmoid()) @ matrices["latent_out"].T / scales[step]
        wanted += (found - noise_BL).square().mean(dim=1) / 3
    alike(head.noise_errors(seen, target_BL).detach(), wanted)


def test_fewer_steps_are_the_first_of_the_loop() -> None:
    """Trained and generated alike; without a number all are taken."""
    head, latent = VideoHead(context(**FIELDS)), tokens(seed=2).flatten(1)[:, :20]
    with torch.no_grad():
        exact(head(tokens(), latent, steps=3), head(tokens(), latent))
        weights = (head.latent_in, head.query, head.steps, head.latent_out)
        read = unit_rows(tokens())
        parts = (part.weight for part in weights)
        want = 4 * ops.denoise_loop(latent / 4, read, *parts, alphas=head.alphas[:2])
        exact(head(tokens(), latent, steps=2), want)
    exact(head(tokens(), latent, steps=2).detach(), want)
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            head(tokens(), steps=steps)


@pytest.mark.parametrize("name", ["latent_in", "query", "steps", "latent_out"])
def test_hooks_of_each_part_are_called_where_latents_are_drawn(name: str) -> None:
    """What a hook makes of a part's output is what the loop goes on with, with a gradient and without one."""
    head, latent = VideoHead(context(**FIELDS)), tokens(seed=2).flatten(1)[:, :20]
    unhooked = head(tokens(), latent).detach()
    head.get_submodule(name).register_forward_hook(lambda _, given, y: y + 1.0)
    want = head(tokens(), latent).detach()
    assert not torch.equal(want, unhooked)
    with torch.no_grad():
        exact(head(tokens(), latent), want)


@pytest.mark.parametrize("size", [1, 64])
def test_the_size_of_tokens_does_not_fix_what_the_head_looks_at(size: int) -> None:
    """A softmax of large scores would look at one token alone, whatever the loss. No gradient would reach the query."""
    head, target_BL = VideoHead(context(**FIELDS)), tokens(seed=4).flatten(1)[:, :20]
    seen, small = size * tokens(seed=1).double(), tokens(seed=1).double()
    seen.requires_grad_()
    errors_B = head.noise_errors(seen, target_BL.double())
    alike(errors_B.detach(), head.noise_errors(small, target_BL.double()).detach())
    errors_B.sum().backward()
    assert seen.grad is not None
    # A step of one size in each token moves the loss by what each is worth, and none of the five is worth nothing.
    worth_BP = (size * seen.grad).norm(dim=-1)
    assert (worth_BP > worth_BP.max() / 100).all(), worth_BP


def test_the_noise_that_is_learned_lets_each_step_draw_better() -> None:
    """A token decides which of four latents is meant. All steps learn together, and the loop ends nearer than their mean."""
    parts = context(**FIELDS, theta=16)
    head, num_steps = VideoHead(parts), 80
    rng = torch.Generator().manual_seed(3)
    seen_KPD, target_KL = torch.randn(4, 1, 24, generator=rng), torch.randn(4, 20, generator=rng)

    def errors() -> list[float]:
        with torch.no_grad():
            drawn = [head(seen_KPD, steps=count).flatten(1) for count in (1, 2, 3)]
        return [float((latent - target_KL).square().mean()) for latent in drawn]

    for step in range(num_steps):
        with parts.voting.taking(rate=4.0 * (1 - step / num_steps), step=step):
            head.noise_errors(seen_KPD, target_KL).mean().backward()
        for module in weights_of(head).values():
            module.step_weight()
    found = errors()
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.8 * float((target_KL - target_KL.mean(dim=0)).square().mean())


def test_noise_is_a_sum_of_bytes_by_scalar_philox() -> None:
    head = VideoHead(context(**FIELDS))
    noise = head.noise(torch.tensor([0, 7]), draw=3)
    assert noise.shape == (2, 20)
    for row, sample in enumerate((0, 7)):
        for place in (0, 19):
            drawn = oracle.philox([sample * 20 + place, 0, 3, NOISE_TENSOR], [5, 0])
            data = b"".join(word.to_bytes(4, "little") for word in drawn)[:12]
            assert noise[row, place].item() == (sum(data) - 1530) / 256
    many = head.noise(torch.arange(500))
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05
    assert not torch.equal(head.noise(torch.tensor([0]), draw=4), noise[:1])


def test_noise_and_latents_of_both_op_sets_are_equal(subject: Subject) -> None:
    noises = [
        VideoHead(parts).noise(torch.tensor([0, 3], device=parts.device), draw=2).cpu()
        for parts in contexts(subject, **FIELDS)
    ]
    exact(noises[1], noises[0])


@pytest.mark.parametrize("halt_threshold", [None, 0.5, HALT_THRESHOLD])
def test_training_and_generation_give_the_same_latent(halt_threshold: float | None) -> None:
    """The steps one by one under autograd give the bits of the op, in the reference."""
    head = VideoHead(context(**FIELDS))
    trained = head(tokens(), halt_threshold=halt_threshold)
    assert trained.requires_grad
    with torch.no_grad():
        exact(head(tokens(), halt_threshold=halt_threshold), trained.detach())


@pytest.mark.parametrize("halt_threshold", [None, 0.5])
def test_latents_are_those_of_the_reference(subject: Subject, halt_threshold: float | None) -> None:
    """On the op set under test, in both ways, against the reference in float64."""
    wide, tested = (VideoHead(parts) for parts in contexts(subject, **FIELDS))
    latent, seen = tokens().flatten(1)[:, :20], tokens(seed=1)
    with torch.no_grad():
        want = wide(seen.double(), latent.double(), halt_threshold=halt_threshold)
        got = tested(seen.to(subject.device), latent.to(subject.device), halt_threshold=halt_threshold)
    alike(got.cpu(), want, "generated")
    got = tested(seen.to(subject.device), latent.to(subject.device), halt_threshold=halt_threshold)
    alike(got.cpu(), want, "trained")


def test_a_sample_does_not_see_the_batch() -> None:
    """Noise is the same for every sample, and a sample halts on its own."""
    head = VideoHead(context(**FIELDS))
    seen = tokens(batch=3)
    with torch.no_grad():
        together = head(seen)
        for place in range(3):
            alike(head(seen[place : place + 1])[0], together[place])


def test_a_latent_keeps_its_shape() -> None:
    head = VideoHead(context(**FIELDS))
    latent = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = head(tokens(), latent)
    assert out.shape == latent.shape
    alike(out.flatten(1), head(tokens(), latent.flatten(1)))


def test_noise_and_detached_tokens_let_the_weights_vote_at_no_cost() -> None:
    """REFACTOR11 let the first latent require a gradient, so that the query behind it gets one although tokens are frozen.

    Here each weight asks for its own: all vote, and nobody computes the gradient of noise.
    """
    asked: list[tuple[int, int]] = []

    def watched(grad: Tensor, weight: Any, **how: Any) -> Tensor:
        asked.append(weight.shape)
        return ops.linear_input_grad(grad, weight, **how)

    parts = context(models.ops_with(linear_input_grad=watched), **FIELDS)
    head = VideoHead(parts)
    with parts.voting.taking(rate=1.0, step=0):
        head(tokens().detach()).square().mean().backward()
    for name, module in weights_of(head).items():
        assert module.weight.trit_accum.any(), f"{name} did not vote"
    steps, first = FIELDS["video_steps"], head.latent_in.weight.shape
    assert asked.count(first) == steps - 1, "the gradient of noise was computed"
    assert asked.count(head.query.weight.shape) == asked.count(head.latent_out.weight.shape) == steps


def test_a_step_that_overflows_after_halting_leaves_everything_alone() -> None:
    """An overflow after halting leaves the latent, the gradient of the inputs and the votes alone. 0 times no number would not."""
    results = []
    for factor in (1.0, 1e30):
        parts = context(**FIELDS)
        head = VideoHead(parts)
        # Samples halt after the first of three steps.
        predict, factors = head.latent_out.forward, iter((1.0, factor, factor))

        def spoiled(x: Tensor, predict: Any = predict, factors: Any = factors) -> Tensor:
            return predict(x) * next(factors)

        head.latent_out.forward = spoiled
        latent = tokens(seed=2).flatten(1)[:, :20].requires_grad_()
        with parts.voting.taking(rate=1.0, step=0):
            out = head(tokens(), latent, halt_threshold=1e-6)
            out.square().sum().backward()
        votes = tuple(part.weight.trit_accum for part in weights_of(head).values())
        results.append((out.detach(), latent.grad, votes))
    exact(results[1], results[0])
    assert results[0][1].any()


def test_what_lies_before_the_first_latent_gets_a_gradient() -> None:
    head = VideoHead(context(**FIELDS))
    latent = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), requires_grad=True)
    head(tokens(), latent).square().sum().backward()
    assert latent.grad is not None and latent.grad.any()


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Through norm, attention, denoising and halting, against differences in float64."""
    head = VideoHead(context(**FIELDS))
    latent, seen = tokens().double().flatten(1)[:, :20], tokens(seed=1).double()
    latent.requires_grad_()
    seen.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, s: head(s, z, halt_threshold=0.9), (latent, seen), eps=1e-6, atol=1e-6
    )


def test_weight_gradients_are_those_of_plain_autograd() -> None:
    """What the weights vote with, against dense float64 matrices and the loop written out once more in plain torch."""
    found: dict[tuple[int, ...], Tensor] = {}

    def kept(op: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            grad = result[1] if isinstance(result, tuple) else result
            found[tuple(grad.shape)] = found.get(tuple(grad.shape), 0) + grad.double()
            return result

        return run

    watched = models.ops_with(
        linear_weight_grad=kept(ops.linear_weight_grad), embedding_row_grads=kept(ops.embedding_row_grads)
    )
    parts = context(watched, **FIELDS)
    head = VideoHead(parts)
    latent, seen = tokens().double().flatten(1)[:, :20], tokens(seed=1).double()
    matrices = {
        name: dequantize(part.weight, dtype=torch.float64).requires_grad_()
        for name, part in weights_of(head).items()
    }
    left, total, z, read = torch.ones(2, 1).double(), 0.0, latent / 4, units(seen)
    for step, alpha in enumerate(cosine_alphas(3)):
        n = units(z @ matrices["latent_in"].T)
        q = n @ matrices["query"].T + matrices["steps"][step]
        a = torch.einsum("bd,bpd->bp", q, read).div(24**0.5).softmax(-1)
        u = n + torch.einsum("bp,bpd->bd", a, read)
        pred = (u * u.sigmoid()) @ matrices["latent_out"].T
        z = (z - (1 - alpha) * pred) / alpha**0.5
        signal, noise = z.square().mean(1, keepdim=True) + DEFAULT_EPS, pred.square().mean(1, keepdim=True)
        p = signal / (signal + noise)
        p = left if step == 2 else torch.where(1 - left + p >= HALT_THRESHOLD, left, p)
        total, left = total + p * z, left - p
    (4 * total).square().sum().backward()
    with parts.voting.taking(rate=1.0, step=0):
        head(seen, latent, halt_threshold=HALT_THRESHOLD).square().sum().backward()
    # Each of the four weights has a shape of its own.
    for name, matrix in matrices.items():
        alike(found[tuple(matrix.shape)], matrix.grad, name)


def test_votes_and_steps_of_both_op_sets(subject: Subject) -> None:
    """On small integers the sums of the gradient that comes to latent_out, and through it, are exact."""
    results = []
    for parts in contexts(subject, **FIELDS):
        head = VideoHead(parts)
        x = integers(3, models.NANO.width, seed=1).to(parts.device)
        with parts.voting.taking(rate=2.0, step=0):
            (head.latent_out(x) * integers(3, 20, seed=2).to(parts.device)).sum().backward()
        head.latent_out.step_weight()
        results.append(parts.ops.to_spec(head.latent_out.weight).to("cpu"))
    exact(results[1], results[0])
    assert results[0].trit_accum.any()
