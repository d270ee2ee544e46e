"""Laws of weighed ranks: the softmax and its autograd in float64, and what an expert that was not chosen holds.

Legend: M positions, E experts, R ranks of an expert, k chosen experts of a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, no_worse
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ids, meta, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("experts")

KINDS = ("normal", "tiny", "constant")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def weighings(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ranks of all experts, logits, and different experts of each position."""
    lead = draw(ss.leading())
    num_experts = draw(st.sampled_from((1, 2, 5, 32, 70)), label="E")
    num_ranks = draw(st.sampled_from((1, 3, 24, 130)), label="R")
    top_k = draw(st.integers(1, min(num_experts, 4)), label="k")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    logits = (3 * torch.randn(*lead, num_experts, generator=rng)).to(dtype)
    experts = torch.rand(*lead, num_experts, generator=rng).argsort(dim=-1)[..., :top_k]
    ranks = draw(ss.activations((*lead, num_experts * num_ranks), dtype, exact=False, kinds=KINDS))
    return ranks, logits, experts.sort(dim=-1).values


def slots_of(ranks: Tensor, logits: Tensor, experts: Tensor) -> Tensor:
    """Return the ranks of the chosen experts alone, in the order of the experts."""
    of_experts = ranks.unflatten(-1, (logits.shape[-1], -1))
    index = experts[..., None].expand(*experts.shape, of_experts.shape[-1])
    return of_experts.gather(-2, index).flatten(-2)


@calls("weigh_ranks", "weigh_ranks_grads")
def weigh_ranks_calls(draw: st.DrawFn, op: str) -> Case:
    dtype = draw(ss.DTYPES)
    found = draw(weighings(dtype))
    kwargs = {}
    if draw(st.booleans(), label="chosen only"):
        kwargs, found = {"chosen_only": True}, (slots_of(*found), *found[1:])
    if op == "weigh_ranks_grads":
        grad = draw(ss.activations(tuple(found[0].shape), dtype, exact=False, kinds=KINDS))
        return Case((grad, *found), kwargs)
    return Case(found, kwargs)


def shares_of(logits: Tensor, experts: Tensor) -> Tensor:
    """Return the shares of all experts, 0 where the softmax does not run, by exponentials."""
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    if experts.shape[-1] > 1:
        powers = powers * torch.zeros_like(powers).scatter(-1, experts, 1.0)
    return powers / powers.sum(dim=-1, keepdim=True)


@magnitude("weigh_ranks")
def magnitude_of_weighed(op: Callable[..., Any], case: Case) -> Tensor:
    """Return the absolute result. The logits keep their signs."""
    return op(*(value.to(torch.float64) for value in case.args[:2]), case.args[2], **case.kwargs).abs()


@magnitude("weigh_ranks_grads")
def magnitude_of_weighed_grads(op: Callable[..., Any], case: Case) -> tuple[Tensor, Tensor]:
    """Return the absolute gradients of the ranks, and the absolute terms of those of the logits."""
    grad, ranks, logits = (value.to(torch.float64) for value in case.args[:3])
    experts, products = case.args[3], grad.abs() * ranks.abs()
    shares_E = shares_of(logits, experts)
    if case.kwargs.get("chosen_only"):
        of_slots = products.unflatten(-1, (experts.shape[-1], -1)).sum(dim=-1)
        terms_E = torch.zeros_like(logits).scatter(-1, experts, of_slots)
    else:
        is_chosen = torch.zeros_like(logits).scatter(-1, experts, 1.0)
        terms_E = products.unflatten(-1, (logits.shape[-1], -1)).sum(dim=-1) * is_chosen
    of_logits = shares_E * (terms_E + (shares_E * terms_E).sum(dim=-1, keepdim=True))
    return op(grad, ranks, logits, experts, **case.kwargs)[0].abs(), of_logits


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


GRAD_OF_EVERY_RANK = mutant(
    "gradient_of_every_rank",
    "dy = torch.where(is_rank, widened(grad).unflatten(-1, matrix), 0.0)",
    "dy = widened(grad).unflatten(-1, matrix)",
    compared="weigh_ranks_grads",
)


@law(
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "shares_over_all_experts",
            "over = is_chosen if experts.shape[-1] > 1 else torch.ones_like(is_chosen)",
            "over = torch.ones_like(is_chosen)",
            compared=("weigh_ranks", "weigh_ranks_grads"),
        ),
        mutant(
            "a_single_expert_takes_all",
            "over = is_chosen if experts.shape[-1] > 1 else torch.ones_like(is_chosen)",
            "over = is_chosen",
            compared=("weigh_ranks", "weigh_ranks_grads"),
        ),
        mutant(
            "ranks_of_all_experts",
            "torch.where(is_chosen[..., None], weighed, 0.0)",
            "weighed",
            compared="weigh_ranks",
        ),
        mutant(
            "ranks_unweighed",
            "widened(ranks).unflatten(-1, (logits.shape[-1], -1)) * shares_E[..., None]",
            "widened(ranks).unflatten(-1, (logits.shape[-1], -1)) + 0 * shares_E[..., None]",
            compared="weigh_ranks",
        ),
        mutant(
            "shares_gradient_without_mean",
            "shares_E * (of_shares_E - mean)",
            "shares_E * of_shares_E",
            compared="weigh_ranks_grads",
        ),
        GRAD_OF_EVERY_RANK,
    ],
)
def test_weigh_ranks_by_autograd(ops: Subject, dtype: torch.dtype, data: st.DataObject) -> None:
    """Forward and gradients are no worse than the formula and its autograd in float32."""
    ranks, logits, experts = data.draw(weighings(dtype))
    grad = data.draw(ss.activations(tuple(ranks.shape), dtype, exact=False, kinds=("normal",)))
    wide, twin = (_with_grads(grad, ranks, logits, experts, to) for to in (torch.float64, torch.float32))
    case = Case((grad, ranks, logits, experts))
    terms = (wide[0].abs(), *magnitude_of_weighed_grads(lambda *_: wide[1:], case))
    got = (ops.weigh_ranks(ranks, logits, experts), *ops.weigh_ranks_grads(grad, ranks, logits, experts))
    for index, one in enumerate(got):
        plain = twin[index].to(one.dtype)
        no_worse(one, twin=plain, wide=wide[index], magnitude=terms[index], k=2.0, what=f"result {index}")


def _with_grads(
    grad: Tensor, ranks: Tensor, logits: Tensor, experts: Tensor, to: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the formula's result and its gradients."""
    leaves = [each.to(to).detach().requires_grad_() for each in (ranks, logits)]
    is_chosen = torch.zeros_like(leaves[1]).scatter(-1, experts, 1.0)
    shares = shares_of(leaves[1], experts) * is_chosen
    y = (leaves[0].unflatten(-1, (logits.shape[-1], -1)) * shares[..., None]).flatten(-2)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad.to(to)))


@law(
    data=st.data(),
    rejects=[
        mutant(
            "zero_times_what_was_not_chosen",
            "torch.where(is_chosen[..., None], weighed, 0.0)",
            "(is_chosen[..., None] * weighed)",
        ),
        mutant(
            "zero_times_gradients_that_were_not_chosen",
            "dy = torch.where(is_rank, widened(grad).unflatten(-1, matrix), 0.0)",
            "dy = is_rank * widened(grad).unflatten(-1, matrix)",
        ),
        GRAD_OF_EVERY_RANK,
    ],
)
def test_weigh_ranks_reads_the_chosen_alone(ops: Subject, data: st.DataObject) -> None:
    """A NaN in the ranks, or in their gradient, of an expert that was not chosen changes no bit."""
    ranks, logits, experts = data.draw(weighings(torch.float32))
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, experts, True)
    spoil = lambda each: torch.where(  # noqa: E731
        is_chosen[..., None], each.unflatten(-1, (logits.shape[-1], -1)), torch.nan
    ).flatten(-2)
    grad = ranks.flip(-1)
    exact(ops.weigh_ranks(spoil(ranks), logits, experts), ops.weigh_ranks(ranks, logits, experts))
    exact(
        ops.weigh_ranks_grads(spoil(grad), spoil(ranks), logits, experts),
        ops.weigh_ranks_grads(grad, ranks, logits, experts),
    )


@law(
    data=st.data(),
    rejects=[
        mutant("slots_with_shares_in_their_order", "shares_k = shares_E.gather(-1, experts)",
               "shares_k = shares_E[..., : experts.shape[-1]]", compared="weigh_ranks"),
        mutant("gradients_of_slots_unweighed", "grad_ranks = shares_E.gather(-1, experts)[..., None] * dy",
               "grad_ranks = 1.0 * dy", compared="weigh_ranks_grads"),
        mutant("gradients_of_slots_in_their_order", "scatter(-1, experts, of_shares_k)",
               "scatter(-1, torch.arange(experts.shape[-1]).expand(experts.shape), of_shares_k)",
               compared="weigh_ranks_grads"),
    ],
)  # fmt: skip
def test_weigh_ranks_of_the_chosen_only(ops: Subject, data: st.DataObject) -> None:
    """Ranks of the chosen experts alone are weighed as among those of all, and so are the gradients."""
    ranks, logits, experts = data.draw(weighings(torch.float32))
    grad = ranks.flip(-1)
    wide, twin = (_with_grads(grad, ranks, logits, experts, to) for to in (torch.float64, torch.float32))
    given, how = (slots_of(ranks, logits, experts), logits, experts), {"chosen_only": True}
    got = (
        ops.weigh_ranks(*given, **how),
        *ops.weigh_ranks_grads(slots_of(grad, logits, experts), *given, **how),
    )
    wide, twin = (
        (slots_of(y, logits, experts), slots_of(of_ranks, logits, experts), of_logits)
        for y, of_ranks, of_logits in (wide, twin)
    )
    case = Case((slots_of(grad, logits, experts), *given), how)
    terms = (wide[0].abs(), *magnitude_of_weighed_grads(lambda *_, **__: wide[1:], case))
    for index, one in enumerate(got):
        what = f"result {index}"
        no_worse(one, twin=twin[index], wide=wide[index], magnitude=terms[index], k=2.0, what=what)


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_experts_ranks = refusals(
    "experts_ranks",
    refused("weigh_ranks", "float16", TypeError, "logits or ranks", ones(2, 6, dtype=F16), ones(2, 3, dtype=F16), ids(0, 1)),
    refused("weigh_ranks", "a number", ValueError, "logits", ones(6), ones(), ids(0)),
    refused("weigh_ranks", "two dtypes", TypeError, "ranks", ones(6, dtype=torch.bfloat16), ones(3), ids(0)),
    refused("weigh_ranks", "ranks that do not divide", ValueError, "ranks", ones(7), ones(3), ids(0)),
    refused("weigh_ranks", "no ranks", ValueError, "ranks", ones(0), ones(3), ids(0)),
    refused("weigh_ranks", "other positions", ValueError, "ranks", ones(2, 6), ones(3), ids(0)),
    refused("weigh_ranks", "experts of other positions", ValueError, "experts", ones(2, 6), ones(2, 3), ids(0)),
    refused("weigh_ranks", "four of three experts", ValueError, "experts", ones(6), ones(3), ids(0, 1, 2, 0)),
    refused("weigh_ranks", "expert E", ValueError, "experts", ones(6), ones(3), ids(3)),
    refused("weigh_ranks", "expert -1", ValueError, "experts", ones(6), ones(3), ids(-1)),
    refused("weigh_ranks", "an expert twice", ValueError, "experts", ones(6), ones(3), ids(2, 2)),
    refused("weigh_ranks", "int32 experts", TypeError, "experts", ones(6), ones(3), ones(1, dtype=torch.int32)),
    refused("weigh_ranks", "ranks of all for two chosen of three", ValueError,
            "ranks", ones(3), ones(3), ids(0, 1), chosen_only=True),
    refused("weigh_ranks", "a number for a flag", TypeError, "chosen_only", ones(6), ones(3), ids(0), chosen_only=1),
    refused("weigh_ranks", "two devices", ValueError, "ranks", meta(6), ones(3), ids(0)),
    refused("weigh_ranks_grads", "another shape", ValueError, "grad", ones(3), ones(6), ones(3), ids(0)),
    refused("weigh_ranks_grads", "another dtype", TypeError,
            "grad", ones(6, dtype=torch.bfloat16), ones(6), ones(3), ids(0)),
    refused("weigh_ranks_grads", "elsewhere", ValueError, "grad", meta(6), ones(6), ones(3), ids(0)),
    refused("weigh_ranks_grads", "expert E", ValueError, "experts", ones(6), ones(6), ones(3), ids(3)),
    refused("weigh_ranks_grads", "an expert twice", ValueError, "experts", ones(6), ones(6), ones(3), ids(2, 0, 2)),
    rejects=[
        mutant("ranks_unchecked", "checks.weighed_ranks(ranks, logits, experts, chosen_only)", "pass", times=2),
        mutant(
            "chosen_experts_unchecked",
            'checks.values_between("experts", experts, 0, logits.shape[-1] - 1)',
            "pass",
            times=2,
        ),
        mutant("an_expert_twice_unchecked", 'checks.different("experts", experts)', "pass", times=2),
    ],
)
# fmt: on
