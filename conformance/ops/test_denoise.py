"""Laws of the denoise step and of the whole loop.

Legend: B samples, S numbers of a latent and width at once, P tokens, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, meta, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("denoise")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@magnitude("denoise_step")
def magnitude_of_denoise(op: Callable[..., Any], case: Case) -> Tensor:
    """Return (|latent| + (1 - alpha) |pred|) / sqrt(alpha)."""
    latent, pred = (value.to(torch.float64).abs() for value in case.args)
    return op(latent, -pred, **case.kwargs)


@calls("denoise_step", "denoise_step_backward")
def denoise_step_calls(draw: st.DrawFn, op: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    # an alpha of 4**-n has an exact root; 1 - alpha then costs 2n bits more, op bfloat16 does not have
    alpha = draw(st.sampled_from((1.0, 0.25) if exact_sums else (1.0, 0.999, 0.5, 0.1, 1e-4)), label="alpha")
    shape = draw(st.one_of(ss.matrix_shapes(), st.sampled_from(((0,), (), (2, 3, 5, 7)))))
    tensors = [
        draw(ss.activations(shape, dtype, exact=False, kinds=("normal", "wild", "tiny"))) for _ in range(2)
    ]
    if exact_sums:
        tensors = [ss.lay_out(tensor.sign() * 4, "contiguous") for tensor in tensors]
    return Case(
        tuple(tensors[: 1 if op == "denoise_step_backward" else 2]), {"alpha": alpha}, sums_exact=exact_sums
    )


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


SHAPES = st.one_of(ss.matrix_shapes(), st.sampled_from(((), (0,), (2, 3, 5))))


def _integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return ss.float_values(shape, "small integers", seed).to(dtype)


DENOISE_SIGN = mutant(
    "denoise_sign",
    "latent.to(dtype) - (1.0 - alpha)",
    "latent.to(dtype) + (1.0 - alpha)",
    compared="denoise_step",
)


@law(
    shape=SHAPES,
    seed=ss.GENERATOR_SEEDS,
    dtype=ss.DTYPES,
    rejects=[
        DENOISE_SIGN,
        mutant(
            "denoise_without_root",
            "pred.to(dtype)) / math.sqrt(alpha)",
            "pred.to(dtype)) / alpha",
            compared="denoise_step",
        ),
    ],
)
def test_denoise_step_by_hand(ops: Subject, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """At alpha = 1/4: (latent - 3/4 pred) / (1/2) = 2 latent - 3/2 pred, exact on small integers."""
    latent, pred = _integers(shape, seed, dtype), _integers(shape, seed + 1, dtype)
    same_sums(ops.denoise_step(latent, pred, alpha=0.25), 2 * latent - 1.5 * pred)


@law(
    shape=SHAPES,
    seed=ss.GENERATOR_SEEDS,
    dtype=ss.DTYPES,
    rejects=[
        mutant(
            "denoise_alpha_for_its_rest",
            "latent.to(dtype) - (1.0 - alpha)",
            "latent.to(dtype) - alpha",
            compared="denoise_step",
        ),
    ],
)
def test_denoise_step_at_one(ops: Subject, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """A step that keeps all of the signal returns the latent."""
    latent = ss.float_values(shape, "normal", seed).to(dtype)
    exact(ops.denoise_step(latent, latent.flip(0) if shape else latent, alpha=1.0), latent)


@law(
    shape=SHAPES,
    seed=ss.GENERATOR_SEEDS,
    alpha=st.sampled_from((1.0, 0.25, 0.0625)),
    rejects=[
        DENOISE_SIGN,
        mutant(
            "denoise_backward_sign",
            "factor = -(1.0 - alpha)",
            "factor = (1.0 - alpha)",
            compared="denoise_step_backward",
        ),
    ],
)
def test_denoise_step_adjoint(ops: Subject, shape: tuple[int, ...], seed: int, alpha: float) -> None:
    """<dy, step(latent, pred)> = <d latent, latent> + <d pred, pred>, exactly where alpha has an exact root."""
    latent, pred, grad = (_integers(shape, seed + offset, torch.float32) for offset in range(3))
    grad_latent, grad_pred = ops.denoise_step_backward(grad, alpha=alpha)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    forward = dot(grad, ops.denoise_step(latent, pred, alpha=alpha))
    assert forward == dot(grad_latent, latent) + dot(grad_pred, pred)


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_denoise = refusals(
    "denoise",
    refused("denoise_step", "alpha 0", ValueError, "alpha", ones(2), ones(2), alpha=0.0),
    refused("denoise_step", "alpha 1.1", ValueError, "alpha", ones(2), ones(2), alpha=1.1),
    refused("denoise_step", "alpha NaN", ValueError, "alpha", ones(2), ones(2), alpha=float("nan")),
    refused("denoise_step", "two shapes", ValueError, "pred", ones(2), ones(3), alpha=0.5),
    refused("denoise_step", "two dtypes", TypeError, "pred", ones(2), ones(2, dtype=torch.bfloat16), alpha=0.5),
    refused("denoise_step", "two devices", ValueError, "pred", ones(2), meta(2), alpha=0.5),
    refused("denoise_step_backward", "alpha -1", ValueError, "alpha", ones(2), alpha=-1.0),
    refused("denoise_step_backward", "float16", TypeError, "grad", ones(2, dtype=F16), alpha=0.5),
    rejects=[
        mutant("alpha_unchecked", 'checks.number("alpha", alpha, 0.0, 1.0, open_low=True)', "pass", times=2),
    ],
)
# fmt: on
