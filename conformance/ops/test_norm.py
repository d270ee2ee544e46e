"""Laws of RMSNorm: torch's own, and its autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.ops import constant_weight, initial_weight
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

from .. import strategies as ss
from ..case import Case, calls, compare, magnitude
from ..compare import exact, no_worse, one_rounding, roundings, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, meta, ones, refusals, refused, weight
from ..subject import Subject, needs_cuda

mutant = mutants_of("norm")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@magnitude("rms_norm_input_grad")
def magnitude_of_norm_input_grad(op: Callable[..., Any], case: Case) -> Tensor:
    """Return (|dy w| + |x^| mean |x^ dy w|) / rms, the terms of dx, and |added| if dx is added to another gradient."""
    grad, x, weight = case.args
    grad, x = grad.to(torch.float64), x.to(torch.float64)
    rms = (x.square().mean(dim=-1, keepdim=True) + case.kwargs.get("eps", 1e-6)).sqrt()
    scaled, unit = (grad * dequantize(weight, dtype=torch.float64)[0]).abs(), (x / rms).abs()
    terms = (scaled + unit * (unit * scaled).mean(dim=-1, keepdim=True)) / rms
    added = case.kwargs.get("added")
    return terms if added is None else terms + added.to(torch.float64).abs()


@magnitude("add_rms_norm")
def magnitude_of_normed_sum(op: Callable[..., Any], case: Case) -> tuple[Tensor, Tensor]:
    """Return |x| + |y|, the terms of the sum, and the magnitudes of its norm."""
    x, y, weight = case.args
    x, y = x.to(torch.float64), y.to(torch.float64)
    return x.abs() + y.abs(), op(x, y, weight, **case.kwargs)[1].abs()


@calls("rms_norm", "add_rms_norm", "rms_norm_input_grad", "rms_norm_weight_grad")
def norm_calls(draw: st.DrawFn, op: str) -> Case:
    dtype, eps = draw(ss.DTYPES), draw(st.sampled_from((1e-6, 1e-12, 1.0)))
    weight = draw(ss.weights((1, draw(st.deferred(ss.sizes)))))
    shape = (*draw(ss.leading()), weight.shape[1])
    # The square of a huge value overflows. A product with a tiny value loses bits, more or fewer by the order of factors.
    kinds = ("normal", "wild", "faint", "constant")
    x = draw(ss.activations(shape, dtype, exact=False, kinds=kinds))
    grad = draw(ss.activations(shape, dtype, exact=False, kinds=("normal", "constant")))
    if op == "rms_norm_input_grad" and draw(st.booleans()):
        added = draw(ss.activations(shape, dtype, exact=False, kinds=("normal", "wild", "constant")))
        return Case((grad, x, weight), {"eps": eps, "added": added})
    args = {
        "rms_norm": (x, weight),
        "add_rms_norm": (x, grad, weight),
        "rms_norm_input_grad": (grad, x, weight),
        "rms_norm_weight_grad": (grad, x),
    }
    return Case(args[op], {"eps": eps})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


WEIGHTS = st.deferred(ss.sizes).flatmap(lambda width: ss.weights((1, width)))
LEADING = ss.leading(empty=False)
EPS = st.sampled_from((1e-6, 1e-3, 1.0))
KINDS = ("normal", "wild", "faint")


def _draw(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, kinds: tuple[str, ...] = KINDS
) -> Tensor:
    return data.draw(ss.activations(shape, dtype, exact=False, kinds=kinds))


NORM_GRAD_WITHOUT_PROJECTION = mutant(
    "norm_grad_without_projection",
    "unit * (unit * scaled).mean(dim=-1, keepdim=True)",
    "0",
    compared="rms_norm_input_grad",
)


@law(
    weight=WEIGHTS,
    lead=LEADING,
    dtype=ss.DTYPES,
    eps=EPS,
    data=st.data(),
    rejects=[
        mutant(
            "eps_outside_the_root",
            "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
            "x_wide.square().mean(dim=-1, keepdim=True).sqrt() + eps",
            compared="rms_norm",
        ),
        mutant(
            "norm_of_the_sum",
            "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
            "(x_wide.square().sum(dim=-1, keepdim=True) + eps).sqrt()",
            compared=("rms_norm", "rms_norm_weight_grad"),
        ),
        NORM_GRAD_WITHOUT_PROJECTION,
    ],
)
def test_rms_norm_by_torch(
    ops: Subject,
    weight: TernaryWeight,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    data: st.DataObject,
) -> None:
    """Forward and both gradients are no worse than autograd through torch.nn.functional.rms_norm."""
    x = _draw(data, (*lead, weight.shape[1]), dtype)
    grad = _draw(data, x.shape, dtype, ("normal",))
    wide, twin = (_by_torch(grad, x, weight, eps, to) for to in (torch.float64, torch.float32))
    got = (
        ops.rms_norm(x, weight, eps=eps),
        ops.rms_norm_input_grad(grad, x, weight, eps=eps),
        ops.rms_norm_weight_grad(grad, x, eps=eps),
    )
    unit = x.to(torch.float64) / (x.to(torch.float64).square().mean(dim=-1, keepdim=True) + eps).sqrt()
    terms = (
        wide[0].abs(),
        magnitude_of_norm_input_grad(ops.rms_norm, Case((grad, x, weight), {"eps": eps})),
        (grad.to(torch.float64) * unit).abs().reshape(-1, x.shape[-1]).sum(dim=0, keepdim=True),
    )
    names = ("rms_norm", "rms_norm_input_grad", "rms_norm_weight_grad")
    for index, name in enumerate(names):
        plain = twin[index].to(got[index].dtype)
        k = OP_TABLE[name].output.k
        no_worse(got[index], twin=plain, wide=wide[index], magnitude=terms[index], k=k, what=name)


SUM_AND_NORM = "return total, rms_norm(total, weight, eps=eps)"


@law(
    weight=WEIGHTS,
    lead=LEADING,
    dtype=ss.DTYPES,
    eps=EPS,
    data=st.data(),
    rejects=[
        mutant("norm_of_the_stream_alone", SUM_AND_NORM, "return total, rms_norm(x, weight, eps=eps)",
               compared="add_rms_norm"),
        mutant("stream_without_its_branch", SUM_AND_NORM, "return x, rms_norm(total, weight, eps=eps)",
               compared="add_rms_norm"),
    ],
)  # fmt: skip
def test_add_rms_norm_is_a_sum_and_its_norm(
    ops: Subject,
    weight: TernaryWeight,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    data: st.DataObject,
) -> None:
    """The first result is x + y, rounded once, and the second is no worse than torch's norm of that result."""
    x, y = (_draw(data, (*lead, weight.shape[1]), dtype) for _ in range(2))
    total, normed = ops.add_rms_norm(x, y, weight, eps=eps)
    # float64 has more than twice the bits of the dtype, so that to round there first changes nothing.
    exact(total, (x.to(torch.float64) + y.to(torch.float64)).to(dtype))
    wide, twin = (_by_torch(total, total, weight, eps, to)[0] for to in (torch.float64, torch.float32))
    k = OP_TABLE["add_rms_norm"].output.k
    no_worse(normed, twin=twin.to(dtype), wide=wide, magnitude=wide.abs(), k=k)


@law(
    width=st.integers(3, 37),
    power=st.integers(-30, 30),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant(
            "norm_of_a_sum_that_is_not_rounded",
            SUM_AND_NORM,
            "return total, rms_norm(x.to(wide_dtype(x)) + y, weight, eps=eps).to(x.dtype)",
        ),
    ],
)
def test_add_rms_norm_is_of_the_sum_as_it_is_stored(ops: Subject, width: int, power: int, seed: int) -> None:
    """257 is no bfloat16. A row of 256 and of 256 + 1 is a row of 256, so that its norm is 1; that of 256 beside 257 is below 1."""
    signs = torch.randint(0, 2, (4, width), generator=ss.generator(seed)) * 2.0 - 1.0
    x, y = (signs * size * 2.0**power for size in (256.0, 1.0))
    y[:, 0] = 0.0
    weight = constant_weight((1, width), trit=1, exponent=0)
    total, normed = ops.add_rms_norm(x.to(torch.bfloat16), y.to(torch.bfloat16), weight, eps=2.0**-100)
    exact(total, x.to(torch.bfloat16))
    exact(normed, signs.to(torch.bfloat16))


@law(
    dtype=ss.DTYPES,
    factors=st.lists(st.integers(-36, 36), min_size=1, max_size=9),
    data=st.data(),
    rejects=[
        mutant("norm_grad_forgets_the_residual", "dx if added is None else added.to(dtype) + dx", "dx",
               compared="rms_norm_input_grad"),
        mutant("norm_grad_takes_the_residual_off", "added.to(dtype) + dx", "added.to(dtype) - dx",
               compared="rms_norm_input_grad"),
        mutant("norm_grad_is_rounded_before_its_sum", "added.to(dtype) + dx", "added + dx.to(x.dtype)"),
    ],
)  # fmt: skip
def test_rms_norm_input_grad_cancels_a_residual(
    ops: Subject, dtype: torch.dtype, factors: list[int], data: st.DataObject
) -> None:
    """A gradient that is added to its own opposite, as bfloat16 has it, leaves exactly what bfloat16 had cut off.

    The mean square of x and eps make 16, whose root is 4, and dy is orthogonal to x. So dx is dy w / 4, and every step is exact. Of
    the products of dy with a scale of 5 / 4, bfloat16 holds some and rounds others.
    """
    order = data.draw(st.permutations(range(4)))
    trits = data.draw(ss.trit_tensors((1, 1)))
    weight = weight_of_trits(trits.expand(1, 4), torch.full((1, 1), 1, dtype=torch.int8), 12, mantissa_bits=2)
    rows = torch.tensor([[7.0, 3.0, 2.0, 1.0]] * len(factors))
    grad = torch.tensor([[3.0 * factor, -7.0 * factor, 0.0, 0.0] for factor in factors])
    dx = grad * trits * 1.25 / 4.0
    given = [part[:, order].to(dtype) for part in (grad, rows, -dx.to(torch.bfloat16))]
    got = ops.rms_norm_input_grad(*given[:2], weight, eps=0.25, added=given[2])
    same_sums(got, (dx[:, order] + given[2]).to(dtype))


def _by_torch(
    grad: Tensor, x: Tensor, weight: TernaryWeight, eps: float, to: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x_leaf = x.to(to).detach().requires_grad_()
    w_leaf = dequantize(weight, dtype=to)[0].requires_grad_()
    y = functional.rms_norm(x_leaf, (x.shape[-1],), w_leaf, eps)
    dx, dw = torch.autograd.grad(y, (x_leaf, w_leaf), grad.to(to))
    return y.detach(), dx, dw.reshape(1, -1)


@law(
    weight=WEIGHTS,
    dtype=ss.DTYPES,
    eps=EPS,
    rejects=[
        mutant(
            "norm_without_eps",
            "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
            "x_wide.square().mean(dim=-1, keepdim=True).sqrt()",
        ),
    ],
)
def test_rms_norm_of_zeros(ops: Subject, weight: TernaryWeight, dtype: torch.dtype, eps: float) -> None:
    """Zeros stay zeros, and their gradients stay finite."""
    x = torch.zeros(3, weight.shape[1], dtype=dtype)
    same_sums(ops.rms_norm(x, weight, eps=eps), x)
    assert ops.rms_norm_input_grad(torch.ones_like(x), x, weight, eps=eps).isfinite().all()
    same_sums(ops.rms_norm_weight_grad(torch.ones_like(x), x, eps=eps), x[:1].to(torch.float32))


@law(
    width=st.deferred(ss.sizes),
    dtype=ss.DTYPES,
    power=st.integers(-8, 8),
    data=st.data(),
    rejects=[
        mutant(
            "norm_weight_grad_rectified",
            "reshape(-1, x.shape[-1]).sum(dim=0",
            "reshape(-1, x.shape[-1]).relu().sum(dim=0",
            compared="rms_norm_weight_grad",
        ),
    ],
)
def test_rms_norm_weight_grad_scales_with_grad(
    ops: Subject, width: int, dtype: torch.dtype, power: int, data: st.DataObject
) -> None:
    """Linear in the gradient: a power of two, and a sign, come out bit for bit."""
    x, grad = (
        ss.float_values((9, width), "normal", data.draw(ss.GENERATOR_SEEDS)).to(dtype) for _ in range(2)
    )
    first = ops.rms_norm_weight_grad(grad, x)
    exact(ops.rms_norm_weight_grad(grad * -(2.0**power), x), first * -(2.0**power))


@law(
    weight=WEIGHTS,
    lead=LEADING,
    dtype=ss.DTYPES,
    eps=EPS,
    data=st.data(),
    rejects=[NORM_GRAD_WITHOUT_PROJECTION],
)
def test_rms_norm_input_grad_is_orthogonal(
    ops: Subject,
    weight: TernaryWeight,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    data: st.DataObject,
) -> None:
    """<dx, x> = eps <dy w, x> / rms**3, which vanishes with eps, as far as the errors of dx allow."""
    x = _draw(data, (*lead, weight.shape[1]), dtype)
    grad = _draw(data, x.shape, dtype, ("normal",))
    terms = magnitude_of_norm_input_grad(ops.rms_norm, Case((grad, x, weight), {"eps": eps}))
    wide, twin = (_by_torch(grad, x, weight, eps, to)[1] for to in (torch.float64, torch.float32))
    allowed = OP_TABLE["rms_norm_input_grad"].output.k * roundings(twin.to(dtype), wide, terms).max() + 1.0
    x_wide = x.to(torch.float64)
    slack = (x_wide.abs() * allowed * one_rounding(dtype, wide, terms)).sum(dim=-1)

    rms = (x_wide.square().mean(dim=-1) + eps).sqrt()
    along = (grad.to(torch.float64) * dequantize(weight, dtype=torch.float64)[0] * x_wide).sum(dim=-1)
    dx = ops.rms_norm_input_grad(grad, x, weight, eps=eps).to(torch.float64)
    beyond = ((dx * x_wide).sum(dim=-1) - eps * along / rms**3).abs() > slack
    assert not beyond.any(), f"<dx, x> is off in {int(beyond.sum())} rows"


@pytest.mark.parametrize("width", [1025, 4096, 8192, 8193, 16400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_of_long_rows(subject: Subject, width: int, dtype: torch.dtype) -> None:
    """Rows that a kernel holds as a whole, and rows that it has to take in parts."""
    weight = initial_weight((1, width), std=0.5, seed=1, tensor_id=2)
    grad, x = (ss.float_values((3, width), kind, 3).to(dtype) for kind in ("normal", "wild"))
    compare(subject, "rms_norm", Case((x, weight)))
    compare(subject, "add_rms_norm", Case((x, grad, weight)))
    compare(subject, "rms_norm_input_grad", Case((grad, x, weight)))
    compare(subject, "rms_norm_input_grad", Case((grad, x, weight), {"added": x}))
    compare(subject, "rms_norm_weight_grad", Case((grad, x)))


@pytest.mark.parametrize(("width", "programs"), [(13, 4096), (1000, 4096), (1030, 2048), (8193, 2048)])
def test_rms_norm_of_many_rows(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, width: int, programs: int
) -> None:
    """Programs take several rows. Those of short rows load one row ahead, and the longest rows are more than a program holds."""
    if width > 1030:
        needs_cuda(subject, "many rows of more than 8,192 channels")
    if subject.name == "arbitor.optimized.ops" and subject.device.type == "cpu":
        # The interpreter takes 2 ms a row, and fewer programs need fewer rows.
        programs = 16
        for name in ("PROGRAMS", "SHORT_PROGRAMS"):
            monkeypatch.setattr(f"arbitor.optimized.kernels.norm.{name}", programs)
    # Three rows for each program but the last.
    count = 2 * programs + 3
    weight = initial_weight((1, width), std=0.5, seed=1, tensor_id=2)
    grad, x = (ss.float_values((count, width), "normal", seed) for seed in (1, 2))
    compare(subject, "rms_norm", Case((x, weight)))
    compare(subject, "add_rms_norm", Case((x, grad, weight)))
    compare(subject, "rms_norm_input_grad", Case((grad, x, weight)))
    compare(subject, "rms_norm_input_grad", Case((grad, x, weight), {"added": x}))


@pytest.mark.parametrize("count", [127, 128, 129, 300])
@pytest.mark.parametrize("width", [1, 130])
def test_rms_norm_weight_grad_of_many_rows(subject: Subject, count: int, width: int) -> None:
    """Each of the rows that a kernel adds up in parts counts, and counts once."""
    grad, x = (ss.float_values((count, width), "normal", seed) for seed in (1, 2))
    compare(subject, "rms_norm_weight_grad", Case((grad, x)))
    compare(subject, "rms_norm_weight_grad", Case((grad.to(torch.bfloat16), x.to(torch.bfloat16))))


def test_rms_norm_input_grad_of_one_channel_cancels(subject: Subject) -> None:
    """With one channel nothing is left but eps, and x times 1 / rms is one rounding too many where division is approximate.

    The first row is the draw that showed it on a GPU, alone, as the worst element decides. The interpreter divides exactly, so that
    there the test cannot fail for this reason.
    """
    weight = weight_of_trits(torch.ones(1, 1, dtype=torch.int8), torch.full((1, 1), 15, dtype=torch.int8))
    x = torch.linspace(-3.0, 3.0, 64)[:, None]
    for grad, row in ((torch.tensor([[1.5390625]]), torch.tensor([[0.92578125]])), (x.flip(0), x)):
        case = Case((grad.to(torch.bfloat16), row.to(torch.bfloat16), weight), {"eps": 1e-12})
        compare(subject, "rms_norm_input_grad", case)


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_norm = refusals(
    "norm",
    refused("rms_norm", "eps 0", ValueError, "eps", ones(2, 14), lambda: weight(1), eps=0.0),
    refused("rms_norm", "eps 2", ValueError, "eps", ones(2, 14), lambda: weight(1), eps=2.0),
    refused("rms_norm", "three rows", ValueError, "weight", ones(2, 14), weight),
    refused("rms_norm", "13 channels", ValueError, "x", ones(2, 13), lambda: weight(1)),
    refused("rms_norm", "no channels", ValueError, "x", ones(2, 0), lambda: weight(1)),
    refused("rms_norm", "float16", TypeError, "x", ones(2, 14, dtype=F16), lambda: weight(1)),
    refused("rms_norm", "another device", ValueError, "x", meta(2, 14), lambda: weight(1)),
    refused("add_rms_norm", "eps 0", ValueError, "eps", ones(2, 14), ones(2, 14), lambda: weight(1), eps=0.0),
    refused("add_rms_norm", "13 channels", ValueError, "x", ones(2, 13), ones(2, 13), lambda: weight(1)),
    refused("add_rms_norm", "a branch of another shape", ValueError, "y", ones(2, 14), ones(14), lambda: weight(1)),
    refused("add_rms_norm", "a branch of another dtype", TypeError,
            "y", ones(2, 14, dtype=torch.bfloat16), ones(2, 14), lambda: weight(1)),
    refused("add_rms_norm", "no branch", TypeError, "y", ones(2, 14), None, lambda: weight(1)),
    refused("add_rms_norm", "a branch elsewhere", ValueError, "y", ones(2, 14), meta(2, 14), lambda: weight(1)),
    refused("rms_norm_input_grad", "a residual of another shape", ValueError,
            "added", ones(2, 14), ones(2, 14), lambda: weight(1), added=ones(1, 14)),
    refused("rms_norm_input_grad", "a residual of another dtype", TypeError,
            "added", ones(2, 14), ones(2, 14), lambda: weight(1), added=ones(2, 14, dtype=torch.bfloat16)),
    refused("rms_norm_input_grad", "a residual elsewhere", ValueError,
            "added", ones(2, 14), ones(2, 14), lambda: weight(1), added=meta(2, 14)),
    refused("rms_norm_input_grad", "no gradient", TypeError, "grad", None, ones(2, 14), lambda: weight(1)),
    refused("rms_norm_weight_grad", "no gradient", TypeError, "grad", None, ones(2, 14)),
    refused("rms_norm_input_grad", "two shapes", ValueError, "grad", ones(3, 14), ones(2, 14), lambda: weight(1)),
    refused("rms_norm_input_grad", "two dtypes", TypeError,
            "grad", ones(2, 14, dtype=torch.bfloat16), ones(2, 14), lambda: weight(1)),
    refused("rms_norm_weight_grad", "two shapes", ValueError, "grad", ones(3, 14), ones(2, 14)),
    refused("rms_norm_weight_grad", "a scalar", ValueError, "x", ones(), ones()),
    refused("rms_norm_weight_grad", "no channels", ValueError, "x", ones(2, 0), ones(2, 0)),
    rejects=[
        mutant("branch_of_the_norm_unchecked", 'checks.matching("y", y, "x", x)', "pass"),
        mutant("residual_of_the_norm_unchecked", 'checks.matching("added", added, "x", x)', "pass"),
        mutant("norm_eps_unchecked", 'checks.number("eps", eps, 0.0, 1.0, open_low=True)', "pass"),
    ],
)
# fmt: on
