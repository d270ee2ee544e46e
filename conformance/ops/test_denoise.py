"""Laws of the denoise step and of the whole loop.

Legend: B samples, S numbers of a latent and width at once, P tokens, T steps.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.denoise_loop import loop_weights
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject

SHAPES = st.one_of(ss.matrix_shapes(), st.sampled_from(((), (0,), (2, 3, 5))))


def _integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return ss.float_values(shape, "small integers", seed).to(dtype)


@law(shape=SHAPES, seed=ss.GENERATOR_SEEDS, dtype=ss.DTYPES)
def test_denoise_step_by_hand(ops: Subject, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """At alpha = 1/4: (latent - 3/4 pred) / (1/2) = 2 latent - 3/2 pred, exact on small integers."""
    latent, pred = _integers(shape, seed, dtype), _integers(shape, seed + 1, dtype)
    exact(ops.denoise_step(latent, pred, alpha=0.25) + 0.0, 2 * latent - 1.5 * pred + 0.0)


@law(shape=SHAPES, seed=ss.GENERATOR_SEEDS, dtype=ss.DTYPES)
def test_denoise_step_at_one(ops: Subject, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """A step that keeps all of the signal returns the latent."""
    latent = ss.float_values(shape, "normal", seed).to(dtype)
    exact(ops.denoise_step(latent, latent.flip(0) if shape else latent, alpha=1.0), latent)


@law(shape=SHAPES, seed=ss.GENERATOR_SEEDS, alpha=st.sampled_from((1.0, 0.25, 0.0625)))
def test_denoise_step_adjoint(ops: Subject, shape: tuple[int, ...], seed: int, alpha: float) -> None:
    """<dy, step(latent, pred)> = <d latent, latent> + <d pred, pred>, exactly where alpha has an exact root."""
    latent, pred, grad = (_integers(shape, seed + offset, torch.float32) for offset in range(3))
    grad_latent, grad_pred = ops.denoise_step_backward(grad, alpha=alpha)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(grad, ops.denoise_step(latent, pred, alpha=alpha))
    assert forward == dot(grad_latent, latent) + dot(grad_pred, pred)


FAR = 200.0
"""Silu of this is this, and of its negative 0: the sigmoid has left float32."""

BIG = 2.0**30
"""Added to this, a number of the size of 1 is lost."""


def diagonal(signs: Tensor, exponent: int) -> TernaryWeight:
    """Return a square weight of signs times 2**exponent on its diagonal."""
    trits = torch.diag(signs).to(torch.int8)
    exponents = torch.full((len(signs), -(-len(signs) // 12)), exponent, dtype=torch.int8)
    return weight_of_trits(trits, exponents)


def rows_of(signs_TS: Tensor, exponent: int) -> TernaryWeight:
    """Return a weight of signs times 2**exponent."""
    exponents = torch.full((len(signs_TS), -(-signs_TS.shape[1] // 12)), exponent, dtype=torch.int8)
    return weight_of_trits(signs_TS.to(torch.int8), exponents)


def signs(rng: torch.Generator, *shape: int) -> Tensor:
    """Return random signs."""
    return (torch.randint(0, 2, shape, generator=rng) * 2 - 1).to(torch.float32)


SIZES = st.sampled_from((4, 16, 64))
"""Sizes with an exact square root: what a score is divided by."""


@law(
    size=SIZES,
    dtype=ss.DTYPES,
    count=st.sampled_from((2, 5, 40)),
    by_row=st.booleans(),
    seed=ss.GENERATOR_SEEDS,
)
def test_denoise_loop_by_hand(
    ops: Subject, size: int, dtype: torch.dtype, count: int, by_row: bool, seed: int
) -> None:
    """One step of which every number is known: unit rows are signs, the softmax takes one token, silu cuts at 0.

    A query is 2 W_query n, of signs, plus the row of the step, which is 16 times signs or a sixteenth of them and so decides
    or does not. Of the tokens, all alike in size, one lies along what decides and the others point away from it.
    """
    rng = ss.generator(seed)
    latent, row = signs(rng, 3, size) * 2, signs(rng, size)
    w_in, w_query, w_out = (signs(rng, size) for _ in range(3))
    n = w_in * latent.sign()
    along = row.expand(3, size) if by_row else w_query * n
    order = torch.randperm(count, generator=rng)
    tokens_BPD = FAR * along[:, None] * torch.cat([-torch.ones(count - 1), torch.ones(1)])[order][:, None]
    weights = (
        diagonal(w_in, 5),
        diagonal(w_query, 1),
        rows_of(row[None], 4 if by_row else -4),
        diagonal(w_out, -3),
    )
    got = ops.denoise_loop(latent.to(dtype), tokens_BPD.to(dtype), *weights, alphas=(0.25,))
    pred = (n + FAR * along).clamp(min=0) * w_out / 8
    exact(got + 0.0, (2 * latent - 1.5 * pred).to(dtype) + 0.0)


@law(share=0.5, size=SIZES, count=st.sampled_from((1, 3)), steps=st.integers(1, 3), seed=ss.GENERATOR_SEEDS)
def test_denoise_loop_takes_its_steps(ops: Subject, size: int, count: int, steps: int, seed: int) -> None:
    """Tokens so large that the latent does not show in the prediction: a step doubles the latent and takes 3 off it."""
    rng = ss.generator(seed)
    latent = signs(rng, 2, size) * 4
    tokens_BPD = torch.full((2, count, size), BIG)
    tokens_BPD[1] = -BIG  # silu of these is 0, and so is the prediction
    weights = (diagonal(signs(rng, size), 3), diagonal(signs(rng, size), 0), rows_of(signs(rng, 3, size), 0))
    w_out = signs(rng, size)
    got = ops.denoise_loop(latent, tokens_BPD, *weights, diagonal(w_out, -29), alphas=(0.25,) * steps)
    for _ in range(steps):
        latent = 2 * latent - torch.stack([3 * w_out, torch.zeros(size)])
    exact(got, latent)


@law(share=0.5, size=SIZES, threshold=st.sampled_from((0.5, 0.75, 1.0)), seed=ss.GENERATOR_SEEDS)
def test_denoise_loop_halts_each_sample(ops: Subject, size: int, threshold: float, seed: int) -> None:
    """Three samples that see as much signal as noise, three times as much, and no noise, after a step at alpha = 1/4.

    Their p are 1/2, 3/4 and 1 (but for eps, which is lost): what each adds of its second step, by the threshold.
    """
    rng = ss.generator(seed)
    w_out = signs(rng, size)
    pred = torch.stack([w_out, w_out, torch.zeros(size)]) * 2.0**10
    loud = torch.tensor([1.0, 1.0, 1.0, 3.0]).repeat(size // 4)  # a mean square of 3
    after = torch.stack([pred[0], pred[1] * loud, signs(rng, size) * 4])
    tokens_BPD = torch.tensor([BIG, BIG, -BIG])[:, None, None].expand(3, 2, size)
    weights = (diagonal(signs(rng, size), 0), diagonal(signs(rng, size), 0), rows_of(signs(rng, 2, size), 0))
    got = ops.denoise_loop(
        (after + 1.5 * pred) / 2,
        tokens_BPD,
        *weights,
        diagonal(w_out, -20),
        alphas=(0.25, 0.25),
        halt_threshold=threshold,
    )
    p = torch.tensor([[0.5], [0.75], [1.0]])
    share = torch.where(p < threshold, p, 1.0)
    exact(got + 0.0, share * after + (1 - share) * (2 * after - 1.5 * pred) + 0.0)


@law(
    share=0.5,
    size=st.sampled_from((1, 12, 33)),
    width=st.sampled_from((3, 24)),
    seed=ss.GENERATOR_SEEDS,
    data=st.data(),
)
def test_denoise_loop_of_one_step_has_one_form(
    ops: Subject, size: int, width: int, seed: int, data: st.DataObject
) -> None:
    """A single step has a share of all of 1, whatever its noise: both forms give the same bits."""
    latent = ss.float_values((3, size), "normal", seed)
    tokens_BPD = ss.float_values((3, 4, width), "normal", seed + 1)
    weights = data.draw(loop_weights(size, width, 2))
    fixed = ops.denoise_loop(latent, tokens_BPD, *weights, alphas=(0.5,))
    exact(ops.denoise_loop(latent, tokens_BPD, *weights, alphas=(0.5,), halt_threshold=0.99), fixed)


@law(
    share=0.5,
    size=st.sampled_from((5, 33)),
    width=st.sampled_from((3, 24)),
    steps=st.integers(1, 3),
    data=st.data(),
)
def test_denoise_loop_rounds_once(
    ops: Subject, size: int, width: int, steps: int, data: st.DataObject
) -> None:
    """In bfloat16 it gives what it gives for the same numbers in float32, rounded at the end."""
    seed = data.draw(ss.GENERATOR_SEEDS)
    latent = ss.float_values((2, size), "normal", seed).to(torch.bfloat16)
    tokens_BPD = ss.float_values((2, 4, width), "normal", seed + 1).to(torch.bfloat16)
    weights, at = data.draw(loop_weights(size, width, 3)), {"alphas": (0.5,) * steps}
    wide = ops.denoise_loop(latent.float(), tokens_BPD.float(), *weights, **at)
    exact(ops.denoise_loop(latent, tokens_BPD, *weights, **at), wide.to(torch.bfloat16))
