"""Laws of orthogonalised gradients: singular values by a polynomial, in float64 and from the other end."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE
from conformance import strategies as ss
from conformance.cases.case import Case
from conformance.cases.orthogonal import magnitude, stacks
from conformance.compare import exact, no_worse
from conformance.law import law
from conformance.subject import Subject

ITERATIONS = st.sampled_from((1, 2, 3, 5))


def by_singular_values(grad_NK: Tensor, iterations: int) -> Tensor:
    """Return the gradient with each singular value, in parts of their root sum of squares, sent through the quintic."""
    left, values, right = torch.linalg.svd(grad_NK.to(torch.float64), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@law(
    stack=stacks(empty=False),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    iterations=ITERATIONS,
    seed=ss.GENERATOR_SEEDS,
)
def test_orthogonalize_by_singular_values(
    ops: Subject, stack: tuple[tuple[int, int], int], dtype: torch.dtype, iterations: int, seed: int
) -> None:
    """Each matrix keeps its singular vectors; each singular value is what the quintic makes of it. No worse than the reference."""
    shape, num_groups = stack
    grad = torch.randn(shape, generator=ss.generator(seed)).to(dtype)
    case = Case((grad,), {"iterations": iterations, "num_groups": num_groups})
    got, twin = (op(grad, **case.kwargs) for op in (ops.orthogonalize, reference_ops.orthogonalize))
    wide = [by_singular_values(matrix, iterations) for matrix in grad.unflatten(0, (num_groups, -1))]
    k = OP_TABLE["orthogonalize"].output.k
    terms = magnitude(reference_ops.orthogonalize, case)
    no_worse(got, twin=twin, wide=torch.cat(wide), magnitude=terms, k=k, what="orthogonalize")


@law(stack=stacks(empty=False), iterations=ITERATIONS, seed=ss.GENERATOR_SEEDS, data=st.data())
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


@law(stack=stacks(), iterations=ITERATIONS, power=st.integers(-30, 30), seed=ss.GENERATOR_SEEDS)
def test_orthogonalize_ignores_the_scale(
    ops: Subject, stack: tuple[tuple[int, int], int], iterations: int, power: int, seed: int
) -> None:
    """A power of two changes not one bit, and a sign changes the sign; zeros stay zero."""
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
)
def test_orthogonalize_leaves_bad_rows_out(
    ops: Subject, stack: tuple[tuple[int, int], int], iterations: int, bad: float, data: st.DataObject
) -> None:
    """A row with a NaN or an infinity is all NaN; the others are what they are with zeros in its place."""
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
