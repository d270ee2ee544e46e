"""Laws of the denoise step."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance import strategies as ss
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
