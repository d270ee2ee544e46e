"""Laws of orthogonalised gradients: singular values by a polynomial, in float64 and from the other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.constants import NEWTON_SCHULZ
from arbitor.reference.op_table import OP_TABLE

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, no_worse
from ..law import law
from ..mutant import mutants_of
from ..refusal import ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("orthogonal")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@magnitude("orthogonalize")
def magnitude(op: Callable[..., Any], case: Case) -> Tensor:
    """Return what one rounding of an element is relative to: what a rounding of every iterate may have grown to by the end.

    X, S and the polynomial are rounded to the dtype of the gradient by the rule itself, so what an element comes from is known
    to that dtype, not to float32, as the floor of `no_worse` supposes. Each element comes from all others, so the largest of
    its matrix counts; and a step hands on an error of a small direction up to 3.4445-fold.
    """
    grad, options = case.args[0].to(torch.float64), case.kwargs
    steps, num_groups = options["iterations"], options.get("num_groups", 1)
    if grad.numel() == 0:
        return grad
    start = torch.where(grad.isfinite().all(dim=1, keepdim=True), grad, 0.0).unflatten(0, (num_groups, -1))
    norm = start.square().sum(dim=(1, 2), keepdim=True).sqrt()
    handed_on = (start / norm.where(norm > 0, torch.ones_like(norm))).abs().amax(dim=(1, 2), keepdim=True)
    for step in range(1, steps + 1):
        x = op(grad, **{**options, "iterations": step}).nan_to_num().unflatten(0, (num_groups, -1))
        handed_on = NEWTON_SCHULZ[0] * handed_on + x.abs().amax(dim=(1, 2), keepdim=True)
    coarser = torch.finfo(case.args[0].dtype).eps / torch.finfo(torch.float32).eps
    return (handed_on * coarser).expand(start.shape).flatten(0, 1)


@st.composite
def stacks(draw: st.DrawFn, *, empty: bool = True) -> tuple[tuple[int, int], int]:
    """Draw the shape of a stack of matrices, wide, tall or with no row at all, and how many they are."""
    num_rows, num_columns = draw(ss.matrix_shapes(70))
    num_groups = draw(st.sampled_from((1, 1, 2, 5)), label="matrices")
    num_rows = 0 if empty and draw(st.integers(0, 19)) == 0 else num_rows
    return (num_groups * num_rows, num_columns), num_groups


@calls("orthogonalize")
def orthogonalize_calls(draw: st.DrawFn) -> Case:
    shape, num_groups = draw(stacks())
    grad = draw(ss.gradients(shape))
    return Case((grad,), {"iterations": draw(st.sampled_from((1, 2, 3, 5))), "num_groups": num_groups})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


ITERATIONS = st.sampled_from((1, 2, 3, 5))


def by_singular_values(grad_NK: Tensor, iterations: int) -> Tensor:
    """Return the gradient with each singular value, in parts of their root sum of squares, sent through the quintic."""
    left, values, right = torch.linalg.svd(grad_NK.to(torch.float64), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


ORTHOGONAL_GRADIENT_ASCENDS = mutant(
    "orthogonal_gradient_ascends",
    "(a * x.to(wide) + polynomial",
    "(-a * x.to(wide) - polynomial",
    compared="orthogonalize",
)
ORTHOGONAL_STACK_AS_ONE_MATRIX = mutant(
    "orthogonal_stack_as_one_matrix",
    "unflatten(0, (num_groups, -1))",
    "unflatten(0, (1, -1))",
    compared="orthogonalize",
)


@law(
    stack=stacks(empty=False),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    iterations=ITERATIONS,
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant(
            "orthogonal_without_the_quintic_term",
            "b * s.to(wide) + c *",
            "b * s.to(wide) + 0 * c *",
            compared="orthogonalize",
        ),
        mutant(
            "orthogonal_one_step_short",
            "in range(iterations)",
            "in range(iterations - 1)",
            compared="orthogonalize",
        ),
        mutant(
            "orthogonal_by_the_largest_element",
            ".square().sum().sqrt()",
            ".abs().max()",
            compared="orthogonalize",
        ),
        ORTHOGONAL_GRADIENT_ASCENDS,
        ORTHOGONAL_STACK_AS_ONE_MATRIX,
    ],
)
def test_orthogonalize_by_singular_values(
    ops: Subject, stack: tuple[tuple[int, int], int], dtype: torch.dtype, iterations: int, seed: int
) -> None:
    """Each matrix keeps its singular vectors, and the quintic makes each singular value, no worse than the reference."""
    shape, num_groups = stack
    grad = torch.randn(shape, generator=ss.generator(seed)).to(dtype)
    case = Case((grad,), {"iterations": iterations, "num_groups": num_groups})
    got, twin = (op(grad, **case.kwargs) for op in (ops.orthogonalize, reference_ops.orthogonalize))
    wide = [by_singular_values(matrix, iterations) for matrix in grad.unflatten(0, (num_groups, -1))]
    k = OP_TABLE["orthogonalize"].output.k
    terms = magnitude(reference_ops.orthogonalize, case)
    no_worse(got, twin=twin, wide=torch.cat(wide), magnitude=terms, k=k, what="orthogonalize")


@law(
    stack=stacks(empty=False),
    iterations=ITERATIONS,
    seed=ss.GENERATOR_SEEDS,
    data=st.data(),
    rejects=[
        mutant(
            "orthogonal_norm_in_the_gradients_dtype",
            "norm = grad_NK.to(torch.float64)",
            "norm = grad_NK",
            compared="orthogonalize",
        ),
        ORTHOGONAL_GRADIENT_ASCENDS,
    ],
)
def test_orthogonalize_descends(
    ops: Subject, stack: tuple[tuple[int, int], int], iterations: int, seed: int, data: st.DataObject
) -> None:
    """A step against it is a step down, whatever positive number each of its rows is scaled by afterwards."""
    shape, num_groups = stack
    grad = torch.randn(shape, generator=ss.generator(seed)) * 10.0 ** data.draw(st.integers(-30, 30))
    grad = grad.to(data.draw(ss.DTYPES))
    got = ops.orthogonalize(grad, iterations=iterations, num_groups=num_groups).to(torch.float64)
    along = (got * grad.to(torch.float64)).sum(dim=1)
    assert (along > 0).all(), f"row {int(along.argmin())} ascends"


@law(
    stack=stacks(),
    iterations=ITERATIONS,
    power=st.integers(-30, 30),
    seed=ss.GENERATOR_SEEDS,
    rejects=[
        mutant(
            "orthogonal_zeros_divide", "torch.where(norm > 0, norm, 1.0)", "norm", compared="orthogonalize"
        ),
    ],
)
def test_orthogonalize_ignores_the_scale(
    ops: Subject, stack: tuple[tuple[int, int], int], iterations: int, power: int, seed: int
) -> None:
    """A power of two changes not one bit, and a sign changes the sign. Zeros stay zero."""
    shape, num_groups = stack
    options = {"iterations": iterations, "num_groups": num_groups}
    grad = torch.randn(shape, generator=ss.generator(seed))
    got = ops.orthogonalize(grad, **options)
    exact(ops.orthogonalize(grad * -(2.0**power), **options), -got)
    exact(ops.orthogonalize(torch.zeros(shape), **options), torch.zeros(shape))


@law(
    stack=stacks(empty=False),
    iterations=ITERATIONS,
    bad=st.sampled_from((float("nan"), float("inf"))),
    data=st.data(),
    rejects=[
        mutant(
            "orthogonal_bad_rows_spread",
            "torch.where(finite_N, grad_NK, 0.0)",
            "(grad_NK + 0.0)",
            compared="orthogonalize",
        ),
        mutant(
            "orthogonal_bad_rows_fall_silent",
            "torch.where(finite_N, out_NK, torch.nan)",
            "out_NK",
            compared="orthogonalize",
        ),
    ],
)
def test_orthogonalize_leaves_bad_rows_out(
    ops: Subject, stack: tuple[tuple[int, int], int], iterations: int, bad: float, data: st.DataObject
) -> None:
    """A row with a NaN or an infinity is all NaN. Other rows are what they are with zeros in its place."""
    shape, num_groups = stack
    options = {"iterations": iterations, "num_groups": num_groups}
    grad = torch.randn(shape, generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    silent, faulty = grad.clone(), grad.clone()
    silent[row], faulty[row, column] = 0.0, bad
    want, got = ops.orthogonalize(silent, **options), ops.orthogonalize(faulty, **options)
    assert got[row].isnan().all()
    others = torch.arange(shape[0]) != row
    exact(got[others], want[others])


@law(
    shape=ss.matrix_shapes(40),
    num_groups=st.integers(2, 4),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=ss.GENERATOR_SEEDS,
    rejects=[ORTHOGONAL_STACK_AS_ONE_MATRIX],
)
def test_orthogonalize_takes_each_matrix_on_its_own(
    ops: Subject, shape: tuple[int, int], num_groups: int, dtype: torch.dtype, seed: int
) -> None:
    """What the other matrices of a stack hold, however large, changes nothing: it is that of a stack of zeros around it."""
    grad = torch.randn((num_groups, *shape), generator=ss.generator(seed)).to(dtype)
    grad *= torch.logspace(-3, 3, num_groups)[:, None, None].to(dtype)
    got = ops.orthogonalize(grad.flatten(0, 1), num_groups=num_groups).unflatten(0, (num_groups, -1))
    for index in range(num_groups):
        alone = torch.zeros_like(grad)
        alone[index] = grad[index]
        want = ops.orthogonalize(alone.flatten(0, 1), num_groups=num_groups)
        exact(got[index], want.unflatten(0, (num_groups, -1))[index])


# --- what is refused -------------------------------------------------------------------------------------------------


_GRADIENT = ones(4, 3)


# fmt: off
test_refusals_of_orthogonal = refusals(
    "orthogonal",
    refused("orthogonalize", "float16", TypeError, "grad_NK", ones(4, 3, dtype=torch.float16)),
    refused("orthogonalize", "three dimensions", ValueError, "grad_NK", ones(2, 2, 3)),
    refused("orthogonalize", "no columns", ValueError, "grad_NK", ones(4, 0)),
    refused("orthogonalize", "no iterations", ValueError, "iterations", _GRADIENT, iterations=0),
    refused("orthogonalize", "11 iterations", ValueError, "iterations", _GRADIENT, iterations=11),
    refused("orthogonalize", "3.0 iterations", TypeError, "iterations", _GRADIENT, iterations=3.0),
    refused("orthogonalize", "3 matrices of 4 rows", ValueError, "num_groups", _GRADIENT, num_groups=3),
    refused("orthogonalize", "no matrix", ValueError, "num_groups", _GRADIENT, num_groups=0),
    rejects=[
        mutant("iterations_unchecked", 'checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)', "pass"),
        mutant("stack_unchecked", 'checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)', "pass"),
    ],
)
# fmt: on
