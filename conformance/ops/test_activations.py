"""Laws of gates and rotary turns: autograd of the formula in float64, and what a turn leaves alone.

Legend: K columns, J terms; P positions, H heads, C columns of a head, R of which are turned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, no_worse, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, meta, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("activations")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


KINDS = ("normal", "tiny", "faint", "constant")
BF16 = torch.bfloat16


@st.composite
def gates(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Draw gate and up, and often terms."""
    shape = (*draw(ss.leading()), draw(st.deferred(ss.sizes), label="K"))
    found = [draw(ss.activations(shape, dtype, exact=False, kinds=KINDS)) for _ in range(2)]
    num_terms = draw(st.sampled_from((0, 1, 2, 5)), label="J")
    if num_terms:
        of_terms = (*shape[:-1], num_terms, shape[-1])
        found.append(draw(ss.activations(of_terms, dtype, exact=False, kinds=KINDS)))
    return tuple(found)


@calls("gated", "gated_grads")
def gated_calls(draw: st.DrawFn, op: str) -> Case:
    dtype = draw(ss.DTYPES)
    found = draw(gates(dtype))
    if op == "gated_grads":
        found = (draw(ss.activations(tuple(found[0].shape), dtype, exact=False, kinds=KINDS)), *found)
    return Case(found)


@st.composite
def heads(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw shared columns of some rows, and columns of each head; sums over their heads are exact."""
    lead = draw(ss.leading())
    num_shared, num_own = (draw(st.sampled_from((1, 2, 12, 33)), label=name) for name in ("R", "K"))
    num_heads = draw(st.sampled_from((1, 3, 8)), label="H")
    return (
        draw(ss.activations((*lead, num_shared), dtype, exact=True)),
        draw(ss.activations((*lead, num_heads, num_own), dtype, exact=True)),
    )


@calls("head_keys")
def head_keys_calls(draw: st.DrawFn) -> Case:
    return Case(draw(heads(draw(ss.DTYPES))))


@calls("head_keys_grads")
def head_keys_grads_calls(draw: st.DrawFn) -> Case:
    dtype = draw(ss.DTYPES)
    shared, own = draw(heads(dtype))
    shape = (*own.shape[:-1], shared.shape[-1] + own.shape[-1])
    grad = draw(ss.activations(tuple(shape), dtype, exact=False, kinds=(*KINDS, "wild")))
    return Case((grad,), {"num_shared": shared.shape[-1]})


@st.composite
def turns(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw vectors of heads, and cosines and sines of angles, one for each position of all sequences or of each sequence."""
    positions = (
        *draw(st.sampled_from(((), (2,), (3, 2), (0,)))),
        draw(st.sampled_from((1, 3, 17)), label="P"),
    )
    half = draw(st.sampled_from((1, 2, 6, 16)), label="R / 2")
    columns = 2 * half + draw(st.sampled_from((0, 1, 5, 32)), label="C - R")
    x = draw(
        ss.activations(
            (*positions, draw(st.sampled_from((1, 3, 8)), label="H"), columns),
            dtype,
            exact=False,
            kinds=(*KINDS, "wild"),
        )
    )
    shared = draw(st.booleans(), label="shared")
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    angles = 100 * torch.randn(*(positions[-1:] if shared else positions), 1, half, generator=rng)
    return x, angles.cos(), angles.sin()


@calls("rotate")
def rotate_calls(draw: st.DrawFn) -> Case:
    return Case(draw(turns(draw(ss.DTYPES))))


@magnitude("rotate")
def magnitude_of_rotate(op: Callable[..., Any], case: Case) -> Tensor:
    """Return |a cos| + |b sin| and |a sin| + |b cos|; other columns are copied."""
    x, cosine, sine = (value.to(torch.float64).abs() for value in case.args)
    a, b, rest = x.split([cosine.shape[-1], cosine.shape[-1], x.shape[-1] - 2 * cosine.shape[-1]], dim=-1)
    return torch.cat([a * cosine + b * sine, a * sine + b * cosine, rest], dim=-1)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


def _by_hand(gate: Tensor, up: Tensor, terms: Tensor | None = None) -> Tensor:
    """Return the formula of `gated`, written with an exponential."""
    hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden if terms is None else hidden * (1 + terms.sum(dim=-2))


@law(
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "gate_without_silu",
            "F.silu(widened(gate)) * widened(up)",
            "widened(gate).sigmoid() * widened(up)",
            compared="gated",
        ),
        mutant(
            "modulation_without_one",
            "hidden * (1 + widened(terms).sum(dim=-2))",
            "hidden * widened(terms).sum(dim=-2)",
            compared="gated",
        ),
        mutant(
            "gate_gradient_of_a_sigmoid",
            "(s * (1 + g * (1 - s)))",
            "(s * (1 - s))",
            compared="gated_grads",
        ),
        mutant(
            "up_gradient_without_terms",
            "factor * (g * s)]",
            "dy * (g * s)]",
            compared="gated_grads",
        ),
        mutant(
            "terms_gradient_with_terms",
            "grads.append(dy * (g * s * u))",
            "grads.append(factor * (g * s * u))",
            compared="gated_grads",
        ),
    ],
)
def test_gated_by_autograd(ops: Subject, dtype: torch.dtype, data: st.DataObject) -> None:
    """Forward and gradients are no worse than the formula and its autograd in float32."""
    given = data.draw(gates(dtype))
    grad = data.draw(ss.activations(tuple(given[0].shape), dtype, exact=False, kinds=("normal",)))
    wide, twin = (_with_grads(grad, given, to) for to in (torch.float64, torch.float32))
    terms = _with_grads(grad.abs(), tuple(each.abs() for each in given), torch.float64)
    got = (ops.gated(*given), *ops.gated_grads(grad, *given))
    for index, one in enumerate(got):
        plain = twin[index].to(one.dtype)
        no_worse(one, twin=plain, wide=wide[index], magnitude=terms[index], k=2.0, what=f"gated[{index}]")


def _with_grads(grad: Tensor, given: tuple[Tensor, ...], to: torch.dtype) -> tuple[Tensor, ...]:
    """Return the formula's result and its gradients, with the one gradient that all terms have."""
    leaves = [each.to(to).detach().requires_grad_() for each in given]
    y = _by_hand(*leaves)
    grads = list(torch.autograd.grad(y, leaves, grad.to(to)))
    if len(grads) == 3:
        grads[2] = grads[2].select(-2, 0)
    return (y.detach(), *grads)


@law(
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "own_columns_first",
            "torch.cat([heads, own], dim=-1)",
            "torch.cat([own, heads], dim=-1)",
            compared="head_keys",
        ),
        mutant(
            "gradient_of_one_head",
            "widened(shared).sum(dim=-2).to(grad.dtype)",
            "shared[..., 0, :]",
            compared="head_keys_grads",
        ),
        mutant(
            "gradient_of_the_mean_head",
            "widened(shared).sum(dim=-2).to(grad.dtype)",
            "widened(shared).mean(dim=-2).to(grad.dtype)",
            compared="head_keys_grads",
        ),
    ],
)
def test_head_keys_adjoint(ops: Subject, dtype: torch.dtype, data: st.DataObject) -> None:
    """Every column keeps its bits, and <dy, keys(shared, own)> = <d shared, shared> + <d own, own> on sums that are exact."""
    shared, own = data.draw(heads(dtype))
    keys, num_shared = ops.head_keys(shared, own), shared.shape[-1]
    exact(keys[..., num_shared:], own)
    exact(keys[..., :num_shared], shared.unsqueeze(-2).expand_as(keys[..., :num_shared]))
    grad = (torch.arange(keys.numel()) % 7 - 3).reshape(keys.shape).to(dtype)
    grad_shared, grad_own = ops.head_keys_grads(grad, num_shared=num_shared)
    dot = lambda a, b: (a.to(torch.float64) * b.to(torch.float64)).sum().item()  # noqa: E731
    assert dot(grad, keys) == dot(grad_shared, shared) + dot(grad_own, own)


@law(
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "turned_backwards",
            "a * cosine - b * sine, a * sine + b * cosine",
            "a * cosine + b * sine, b * cosine - a * sine",
            compared="rotate",
        ),
        mutant(
            "neighbours_are_paired",
            "a, b = widened(first).chunk(2, dim=-1)",
            "a, b = widened(first)[..., ::2], widened(first)[..., 1::2]",
            compared="rotate",
        ),
    ],
)
def test_rotate_by_a_quarter(ops: Subject, dtype: torch.dtype, data: st.DataObject) -> None:
    """A turn by a right angle moves the first half of the columns to the second, and the negated second to the first, exactly."""
    x, cosine, _ = data.draw(turns(dtype))
    half = cosine.shape[-1]
    got = ops.rotate(x, torch.zeros_like(cosine), torch.ones_like(cosine))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    same_sums(got, torch.cat([-b, a, rest], dim=-1))


@law(
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "other_columns_are_lost",
            "torch.cat([turned, rest], dim=-1)",
            "torch.cat([turned, 0 * rest], dim=-1)",
        ),
        mutant(
            "turned_by_no_sine",
            "a * cosine - b * sine, a * sine + b * cosine",
            "a * cosine, b * cosine",
            compared="rotate",
        ),
    ],
)
def test_rotate_is_a_rotation(ops: Subject, dtype: torch.dtype, data: st.DataObject) -> None:
    """The negated sine turns back, no angle changes nothing, and columns that are not turned keep their bits."""
    x, cosine, sine = data.draw(turns(dtype))
    same_sums(ops.rotate(x, torch.ones_like(cosine), torch.zeros_like(sine)), x)
    there = ops.rotate(x, cosine, sine)
    exact(there[..., 2 * cosine.shape[-1] :], x[..., 2 * cosine.shape[-1] :])
    back = ops.rotate(there, cosine, -sine).to(torch.float64)
    room = 4 * torch.finfo(dtype).eps * x.to(torch.float64).square().sum(dim=-1, keepdim=True).sqrt()
    assert ((back - x.to(torch.float64)).abs() <= room + 1e-30).all()


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_activations = refusals(
    "activations",
    refused("gated", "float16", TypeError, "gate", ones(2, 3, dtype=F16), ones(2, 3, dtype=F16)),
    refused("gated", "a number", ValueError, "gate", ones(), ones()),
    refused("gated", "two shapes", ValueError, "up", ones(2, 3), ones(3, 2)),
    refused("gated", "two dtypes", TypeError, "up", ones(2, 3), ones(2, 3, dtype=BF16)),
    refused("gated", "two devices", ValueError, "up", ones(2, 3), meta(2, 3)),
    refused("gated", "terms without a dimension of terms", ValueError, "terms", ones(2, 3), ones(2, 3), ones(2, 3)),
    refused("gated", "no terms", ValueError, "terms", ones(2, 3), ones(2, 3), ones(2, 0, 3)),
    refused("gated", "terms of another width", ValueError, "terms", ones(2, 3), ones(2, 3), ones(2, 1, 4)),
    refused("gated", "terms of another dtype", TypeError, "terms", ones(2, 3), ones(2, 3), ones(2, 1, 3, dtype=BF16)),
    refused("gated", "terms elsewhere", ValueError, "terms", ones(2, 3), ones(2, 3), meta(2, 1, 3)),
    refused("gated_grads", "another shape", ValueError, "grad", ones(3), ones(2, 3), ones(2, 3)),
    refused("gated_grads", "another dtype", TypeError, "grad", ones(2, 3, dtype=BF16), ones(2, 3), ones(2, 3)),
    refused("gated_grads", "elsewhere", ValueError, "grad", meta(2, 3), ones(2, 3), ones(2, 3)),
    refused("gated_grads", "two shapes", ValueError, "up", ones(2, 3), ones(2, 3), ones(3, 2)),
    refused("head_keys", "float16", TypeError, "shared", ones(2, 3, dtype=F16), ones(2, 1, 3, dtype=F16)),
    refused("head_keys", "a number", ValueError, "shared", ones(), ones(1)),
    refused("head_keys", "no shared column", ValueError, "shared", ones(2, 0), ones(2, 1, 3)),
    refused("head_keys", "no column of a head", ValueError, "own", ones(2, 3), ones(2, 1, 0)),
    refused("head_keys", "no heads", ValueError, "own", ones(2, 3), ones(2, 3)),
    refused("head_keys", "other rows", ValueError, "own", ones(2, 3), ones(3, 1, 3)),
    refused("head_keys", "two dtypes", TypeError, "own", ones(2, 3), ones(2, 1, 3, dtype=BF16)),
    refused("head_keys", "two devices", ValueError, "own", ones(2, 3), meta(2, 1, 3)),
    refused("head_keys_grads", "float16", TypeError, "grad", ones(2, 1, 3, dtype=F16), num_shared=1),
    refused("head_keys_grads", "no heads", ValueError, "grad", ones(3), num_shared=1),
    refused("head_keys_grads", "all columns", ValueError, "num_shared", ones(2, 1, 3), num_shared=3),
    refused("head_keys_grads", "no column", ValueError, "num_shared", ones(2, 1, 3), num_shared=0),
    refused("rotate", "float16", TypeError, "x", ones(2, 1, 4, dtype=F16), ones(2, 1, 2), ones(2, 1, 2)),
    refused("rotate", "no heads", ValueError, "x", ones(2, 4), ones(2, 1, 2), ones(2, 1, 2)),
    refused("rotate", "bfloat16 cosines", TypeError, "cosine", ones(2, 1, 4), ones(2, 1, 2, dtype=BF16), ones(2, 1, 2)),
    refused("rotate", "other positions", ValueError, "cosine", ones(2, 1, 4), ones(3, 1, 2), ones(3, 1, 2)),
    refused("rotate", "an angle a head", ValueError, "cosine", ones(2, 2, 4), ones(2, 2, 2), ones(2, 2, 2)),
    refused("rotate", "too many angles", ValueError, "cosine", ones(2, 1, 4), ones(2, 1, 3), ones(2, 1, 3)),
    refused("rotate", "no angle", ValueError, "cosine", ones(2, 1, 4), ones(2, 1, 0), ones(2, 1, 0)),
    refused("rotate", "other sines", ValueError, "sine", ones(2, 1, 4), ones(2, 1, 2), ones(2, 1, 1)),
    refused("rotate", "sines of another dtype", TypeError, "sine", ones(2, 1, 4), ones(2, 1, 2), ones(2, 1, 2, dtype=BF16)),
    refused("rotate", "sines elsewhere", ValueError, "sine", ones(2, 1, 4), ones(2, 1, 2), meta(2, 1, 2)),
    rejects=[
        mutant("gates_unchecked", "checks.gate_inputs(gate, up, terms)", "pass", times=2),
        mutant("keys_unchecked", "checks.head_columns(shared, own)", "pass"),
        mutant("key_gradients_unchecked", "checks.key_columns(grad, num_shared)", "pass"),
        mutant("turns_unchecked", "checks.turns(x, cosine, sine)", "pass"),
    ],
)
# fmt: on
