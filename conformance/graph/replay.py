"""A training step of one op set, played again on another with the same inputs wherever floats become integers.

Two op sets agree on activations and gradients up to rounding, so votes and codes may differ where a value lies on an edge. Here
the first model records what such ops were given, rounded to small integers times a power of two, on which every sum is exact;
the second runs the same step, but these ops get what was recorded. All state must then be equal in every bit. The
result of `orthogonalize` is voted with but exact on no input, so it is recorded and rounded too.

Equal state says nothing of what was exchanged: every activation and every gradient. So each model also keeps what it made of
its own, before the exchange, and the test compares that: `all_alike` in float32, a twin's error in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph.models import with_ops

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
    "choose_experts": (0,),
    "expert_load": (0,),
    "balance_experts": (0,),
    "ngram_rows": (0,),
    "count_codes": (1,),
    "revival_vectors": (0, 2),
    "revive_codes": (1,),
    "update_neighbours": (3, 4),
    "touch_strengths": (1,),
}
"""Ops that make integers of activations and gradients, and the places of these among their arguments."""

BY_ROW = ("edge_sum_sign_grad",)
"""Ops whose every sum is over one row of an input. Every row may have a power of two of its own."""

ORTHOGONALIZE = "orthogonalize"

RAISED = 8
"""How much farther than other values those of `orthogonalize` may lie apart. Each of its steps raises errors of S twelvefold.
Where an H200 adds in another order they lay 2.6 times ALIKE apart."""

LEVEL_BITS = 6
"""Bits of the integers that a recorded value is rounded to. Products have twice as many, so 4,096 products have an exact sum.
With fewer, small values beside large ones become zeros, and weights behind them do not move."""


Calls = list[tuple[str, tuple[Tensor, ...]]]
"""What replayed ops were given, in order."""

Own = dict[str, Tensor]
"""What a model handed to the replayed ops before it was exchanged, and what `orthogonalize` made, by call and place."""


def recording(ops: ModuleType, calls: Calls, own: Own) -> ModuleType:
    """Return ops that work on rounded inputs where integers come out. Rounded inputs go to `calls`, unrounded ones to `own`."""

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            keep(own, name, [args[place] for place in REPLAYED[name]])
            given = tuple(rounded(args[place], by_row=name in BY_ROW) for place in REPLAYED[name])
            if name in ("linear_weight_grad", "grouped_linear_weight_grad"):
                given = (*rounded_pair(*args[:2]), *given[2:])
            calls.append((name, tuple(value.detach().cpu().clone() for value in given)))
            return getattr(ops, name)(*exchanged(args, name, given), **kwargs)

        return call

    def orthogonalize(grad_NK: Tensor, **options: Any) -> Tensor:
        result = ops.orthogonalize(grad_NK, **options)
        keep(own, ORTHOGONALIZE, [result])
        name = orthogonalize_of(options["num_groups"])
        calls.append((name, tuple(value.detach().cpu().clone() for value in (grad_NK, result))))
        return rounded(result)

    return with_ops(ops, {name: wrapped(name) for name in REPLAYED} | {ORTHOGONALIZE: orthogonalize})


def replaying(ops: ModuleType, calls: Calls, own: Own) -> ModuleType:
    """Return ops that work on what `recording` kept, call by call, in place of their own inputs, which go to `own`.

    The activations may have another dtype than the recorded ones, since recorded values are exact in every dtype.
    """
    left = iter(calls)

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            recorded, values = next(left)
            shapes = tuple(args[place].shape for place in REPLAYED[name])
            assert (recorded, tuple(value.shape for value in values)) == (name, shapes), (
                f"{name} of {shapes} is called where the first model called {recorded}"
            )
            keep(own, name, [args[place] for place in REPLAYED[name]])
            given = tuple(
                value.to(args[place].device, args[place].dtype)
                for value, place in zip(values, REPLAYED[name], strict=True)
            )
            return getattr(ops, name)(*exchanged(args, name, given), **kwargs)

        return call

    def orthogonalize(grad_NK: Tensor, **options: Any) -> Tensor:
        (recorded, (given, result)), name = next(left), orthogonalize_of(options["num_groups"])
        assert recorded == name, f"{name} is called where the first model called {recorded}"
        # A wider model rounds a sum of several gradients once, where the first model rounded each of them.
        if grad_NK.dtype == given.dtype:
            exact(
                unsigned_zeros(grad_NK.cpu()), unsigned_zeros(given), "the gradient that is made orthogonal"
            )
        keep(own, ORTHOGONALIZE, [ops.orthogonalize(grad_NK, **options)])
        return rounded(result).to(grad_NK)

    return with_ops(ops, {name: wrapped(name) for name in REPLAYED} | {ORTHOGONALIZE: orthogonalize})


def orthogonalize_of(num_groups: int) -> str:
    """Return the name that a call is recorded under. The name tells matrices made orthogonal one by one from a single matrix."""
    return f"{ORTHOGONALIZE} of {num_groups}"


def keep(own: Own, name: str, values: list[Tensor]) -> None:
    """Keep values under a name that says how many were kept before, so that two models name theirs alike."""
    for place, value in enumerate(values):
        own[f"{len(own)}, value {place} of {name}"] = value.detach().cpu().clone()


def kind_of(what: str) -> str:
    """Return the kind of a value that was kept: its op, and its place among the inputs, gradients or results of the op."""
    return what.partition(", ")[2]


def all_alike(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Fail unless two float32 models made the same integers, and floats that are ALIKE.

    ALIKE bounds an error by the norm of the whole tensor, and no smaller part would do: some rows of a gradient are 0 but for
    rounding (the queries of a first position, which sees one key), and others cancel to a thousandth of their neighbours. Of
    the norm, float32 is off by 2**-19 at most in the models of test_whole_models.py, an eighth of what is allowed; a gradient
    that is scaled, negated or left out, by half of it or more.
    What `orthogonalize` makes may be off by RAISED times as much.
    A twin's error is no yardstick here: the worst of all values is one with few, which one order of summation gets right by luck.
    """
    assert list(got) == list(want), "the models called the replayed ops differently"
    for what, value in want.items():
        if not value.is_floating_point():
            exact(got[what], value, what)
        else:
            alike(got[what], value, what, times=RAISED if what.endswith(f" of {ORTHOGONALIZE}") else 1.0)


def exchanged(args: tuple[Any, ...], name: str, given: tuple[Tensor, ...]) -> list[Any]:
    """Return the arguments of a call, with the replayed arguments exchanged."""
    changed = list(args)
    for place, value in zip(REPLAYED[name], given, strict=True):
        changed[place] = value
    return changed


def rounded(value: Tensor, *, by_row: bool = False) -> Tensor:
    """Return integers as they are, and floats as whole multiples, at most 2**LEVEL_BITS, of a power of two."""
    if not value.is_floating_point() or not value.numel():
        return value
    largest = value.detach().abs().double()
    largest = largest.amax(dim=-1, keepdim=True) if by_row else largest.max()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - LEVEL_BITS).to(value.dtype)
    return (value / unit).round() * unit


def rounded_pair(grad_MN: Tensor, x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient and the input of a linear, rounded. Gradients that meet an input of zeros are left out.

    RMSNorm hands back a thousand times the gradient where its input is zero: beside such rows, all others would round to zero.
    """
    return rounded(torch.where(x_MK.any(dim=-1, keepdim=True), grad_MN, 0.0)), rounded(x_MK)
