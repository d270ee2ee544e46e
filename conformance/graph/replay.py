"""A training step of one op set, played again on another with the same inputs wherever floats become integers.

Two op sets agree on activations and gradients up to rounding, so votes and codes may differ where a value lies on an edge. Here
the first model records what such ops were given, rounded to small integers times a power of two, on which every sum is exact;
the second runs the same step, but these ops get what was recorded. All state must then be equal in every bit. The
result of `orthogonalize` is voted with but exact on no input, so it is recorded and rounded too; the second model's must be alike.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from conformance.compare import alike, exact

REPLAYED = {
    "linear_weight_grad": (0, 1),
    "grouped_linear_weight_grad": (0, 1, 2),
    "conv1d_weight_grad": (0, 1),
    "rms_norm_weight_grad": (0, 1),
    "embedding_row_grads": (0, 1),
    "edge_sum_sign_grad": (0, 1, 2),
    "nearest_codes": (0,),
    "candidate_codes": (0,),
    "nearest_candidates": (0, 2),
    "expert_load": (0,),
    "ngram_rows": (0,),
    "count_codes": (1,),
    "revive_codes": (2,),
    "update_neighbours": (3, 4),
    "touch_strengths": (1,),
}
"""Ops that make integers of activations and gradients, and the places of these among their arguments."""

BY_ROW = ("edge_sum_sign_grad",)
"""Ops each of whose sums is of one row of an input: every row may have a power of two of its own."""

ORTHOGONALIZE = "orthogonalize"

LEVEL_BITS = 6
"""Bits of the integers that a recorded value is rounded to: products have twice as many, so 4,096 of them have an exact sum.
With fewer, small values beside large ones become zeros, and weights behind them do not move."""


def recording(ops: ModuleType, calls: list[tuple[str, tuple[Tensor, ...]]]) -> ModuleType:
    """Return ops that work on rounded inputs where integers come out, and keep these inputs in `calls`."""

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = tuple(rounded(args[place], by_row=name in BY_ROW) for place in REPLAYED[name])
            if name in ("linear_weight_grad", "grouped_linear_weight_grad"):
                given = (*rounded_pair(*args[:2]), *given[2:])
            calls.append((name, tuple(value.detach().cpu().clone() for value in given)))
            return getattr(ops, name)(*exchanged(args, name, given), **kwargs)

        return call

    def orthogonalize(grad_NK: Tensor, **options: Any) -> Tensor:
        result = ops.orthogonalize(grad_NK, **options)
        calls.append((ORTHOGONALIZE, tuple(value.detach().cpu().clone() for value in (grad_NK, result))))
        return rounded(result)

    return with_ops(ops, wrapped, orthogonalize)


def replaying(ops: ModuleType, calls: list[tuple[str, tuple[Tensor, ...]]]) -> ModuleType:
    """Return ops that work on what `recording` kept, call by call, in place of their own inputs."""
    left = iter(calls)

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            recorded, values = next(left)
            shapes = tuple(args[place].shape for place in REPLAYED[name])
            assert (recorded, tuple(value.shape for value in values)) == (name, shapes), (
                f"{name} of {shapes} is called where the first model called {recorded}"
            )
            given = tuple(
                value.to(args[place].device, args[place].dtype)
                for value, place in zip(values, REPLAYED[name], strict=True)
            )
            return getattr(ops, name)(*exchanged(args, name, given), **kwargs)

        return call

    def orthogonalize(grad_NK: Tensor, **options: Any) -> Tensor:
        recorded, (given, result) = next(left)
        assert recorded == ORTHOGONALIZE, (
            f"a gradient is made orthogonal where the first model called {recorded}"
        )
        exact(grad_NK.cpu(), given, "the gradient that is made orthogonal")
        alike(ops.orthogonalize(grad_NK, **options).cpu(), result, "the gradient made orthogonal")
        return rounded(result).to(grad_NK.device)

    return with_ops(ops, wrapped, orthogonalize)


def exchanged(args: tuple[Any, ...], name: str, given: tuple[Tensor, ...]) -> list[Any]:
    """Return the arguments of a call with those that are replayed exchanged."""
    changed = list(args)
    for place, value in zip(REPLAYED[name], given, strict=True):
        changed[place] = value
    return changed


def with_ops(ops: ModuleType, wrapped: Any, orthogonalize: Any) -> ModuleType:
    """Return an op set with the replayed ops wrapped."""
    module = ModuleType(f"{ops.__name__}_replay")
    module.__dict__.update(ops.__dict__)
    module.__dict__.update({name: wrapped(name) for name in REPLAYED})
    module.__dict__[ORTHOGONALIZE] = orthogonalize
    return module


def rounded(value: Tensor, *, by_row: bool = False) -> Tensor:
    """Return integers as they are, and floats as whole multiples, at most 2**LEVEL_BITS, of a power of two."""
    if not value.is_floating_point() or not value.numel():
        return value
    largest = value.detach().abs().double()
    largest = largest.amax(dim=-1, keepdim=True) if by_row else largest.max()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - LEVEL_BITS).to(value.dtype)
    return (value / unit).round() * unit


def rounded_pair(grad_MN: Tensor, x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient and the input of a linear, rounded; what meets an input of zeros is left out, as it counts for nothing.

    RMSNorm hands back a thousand times the gradient where its input is zero: beside such rows, all others would round to zero.
    """
    return rounded(torch.where(x_MK.any(dim=-1, keepdim=True), grad_MN, 0.0)), rounded(x_MK)
