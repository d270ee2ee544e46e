"""Laws of orthogonalised gradients, singular values by a polynomial in float64 and from the other end; and of averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.constants import AVERAGE_MEMORY_MAX, NEWTON_SCHULZ
from arbitor.reference.op_table import OP_TABLE

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, no_worse
from ..law import law
from ..mutant import mutants_of
from ..refusal import I8, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("orthogonal")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@magnitude("orthogonalize")
def magnitude_of_orthogonalize(op: Callable[..., Any], case: Case) -> Tensor:
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


@st.composite
def means(
    draw: st.DrawFn, shape: tuple[int, int], *, least: int = -128, most: int = 121
) -> tuple[Tensor, Tensor]:
    """Draw the mean of a gradient: bytes, and the exponents of rows from the least to the largest."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    spread = draw(st.sampled_from((1, 2, 128)), label="spread")
    mean = torch.randint(-spread + 1, spread, shape, generator=rng)
    exponents = torch.randint(least, most + 1, shape[:1], generator=rng)
    return mean.to(torch.int8), exponents.to(torch.int8)


MEMORIES = st.integers(1, AVERAGE_MEMORY_MAX)


@calls("average_gradient")
def average_gradient_calls(draw: st.DrawFn) -> Case:
    shape = draw(ss.matrix_shapes(70))
    shape = (0, shape[1]) if draw(st.integers(0, 19)) == 0 else shape
    grad, (mean, exponents) = draw(ss.gradients(shape)), draw(means(shape))
    memory = draw(MEMORIES, label="memory")
    kwargs: dict[str, Any] = {"memory": memory} if memory > 1 else {}
    kind = draw(st.sampled_from(("new", "other", "itself", "strided")), label="out")
    if kind == "itself":
        # A drawn gradient may hold its rows once for all, and then nothing can be written to it.
        grad = grad.clone(memory_format=torch.contiguous_format)
        kwargs["out"] = (grad, mean, exponents)
    elif kind != "new":
        width = shape[1] * (2 if kind == "strided" else 1)
        spare = [torch.full((shape[0], width), 7, dtype=part.dtype) for part in (grad, mean)]
        parts = [part[:, :: width // shape[1]] for part in spare]
        kwargs["out"] = (*parts, torch.full(shape[:1], 7, dtype=torch.int8))
    return Case((grad, mean, exponents, draw(ss.rates())), kwargs)


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
    "x = product(q, x)",
    "x = product(-q, x)",
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
            "in range(length)",
            "in range(length - 1)",
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
    terms = magnitude_of_orthogonalize(reference_ops.orthogonalize, case)
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
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
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
    ops: Subject,
    stack: tuple[tuple[int, int], int],
    iterations: int,
    dtype: torch.dtype,
    bad: float,
    data: st.DataObject,
) -> None:
    """A row with a NaN or an infinity is all NaN. Other rows are what they are with zeros in its place."""
    shape, num_groups = stack
    options = {"iterations": iterations, "num_groups": num_groups}
    grad = torch.randn(shape, generator=ss.generator(data.draw(ss.GENERATOR_SEEDS))).to(dtype)
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


@law(
    iterations=st.integers(6, 10),
    rejects=[
        mutant(
            "orthogonal_steps_after_a_round_of_three",
            "in orthogonal_rounds(iterations)",
            "in (min(iterations, 3), *[1] * (iterations - 3))",
        )
    ],
)
def test_orthogonalize_stays_bounded(ops: Subject, iterations: int) -> None:
    """No number of steps grows without end. After three in one round a singular value of this gradient is above 1.264."""
    place = torch.arange(32, dtype=torch.float64)
    cosines = torch.cos(torch.pi / 32 * (place[:, None] + 0.5) * (place + 0.5)) / 4
    grad = (cosines * (1 + place) ** -0.8) @ cosines.roll(7, 0).T
    got = ops.orthogonalize(grad.to(torch.bfloat16), iterations=iterations).to(torch.float64)
    assert got.isfinite().all() and torch.linalg.matrix_norm(got, 2) < 1.264


AVERAGED = ss.matrix_shapes(40).flatmap(
    lambda shape: st.tuples(st.just(shape), means(shape, least=-20, most=0))
)


@law(
    drawn=AVERAGED,
    seed=ss.GENERATOR_SEEDS,
    power=st.integers(-30, 30),
    memory=MEMORIES,
    rejects=[
        mutant(
            "average_without_its_exponent",
            "m_NK = (kept_NK * (parts - 1) + wide_NK) / parts",
            "m_NK = (mean_NK * (parts - 1) + wide_NK) / parts",
            compared="average_gradient",
        )
    ],
)
def test_average_gradient_of_another_scale(
    ops: Subject, drawn: Any, seed: int, power: int, memory: int
) -> None:
    """A power of two moves the exponents, and no bit of the mean."""
    shape, (mean, exponents) = drawn
    grad = torch.randn(shape, generator=ss.generator(seed))
    led, new_mean, new_exponents = ops.average_gradient(grad, mean, exponents, 1.0, memory=memory)
    scaled = ops.average_gradient(grad * 2.0**power, mean, exponents + power, 1.0, memory=memory)
    exact(scaled, (led * 2.0**power, new_mean, new_exponents + power))


@law(
    drawn=AVERAGED,
    seed=ss.GENERATOR_SEEDS,
    memory=MEMORIES,
    rejects=[
        mutant("average_with_a_bit_less", "(k_N - 7)", "(k_N - 6)", compared="average_gradient"),
        mutant(
            "average_towards_zero",
            ".round().clamp(-ACCUM",
            ".trunc().clamp(-ACCUM",
            compared="average_gradient",
        ),
        mutant(
            "average_of_the_whole_matrix",
            "m_NK.abs().amax(dim=1)",
            "m_NK.abs().amax().expand(len(m_NK))",
            compared="average_gradient",
        ),
    ],
)
def test_average_gradient_is_off_by_half_a_step(ops: Subject, drawn: Any, seed: int, memory: int) -> None:
    """The mean is its part of the old one, and a part of the gradient. Each row uses its seven bits."""
    shape, (mean, exponents) = drawn
    grad = torch.randn(shape, generator=ss.generator(seed)) * torch.logspace(-3, 3, shape[0])[:, None]
    _, q, e = ops.average_gradient(grad, mean, exponents, 1.0, memory=memory)
    part = 0.5**memory
    want = mean * 2.0 ** exponents.double()[:, None] * (1 - part) + grad.double() * part
    step = 2.0 ** e.double()[:, None]
    limit = torch.where(q.abs() == 127, 1.0, 0.5)
    assert ((q * step - want).abs() <= limit * step).all()
    assert (q.abs().amax(dim=1) >= 64).all()


@law(
    shape=ss.matrix_shapes(40),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=ss.GENERATOR_SEEDS,
    memory=MEMORIES,
    rejects=[
        mutant(
            "average_against_the_gradient",
            "(parts - 1) + wide_NK) / parts",
            "(parts - 1) - wide_NK) / parts",
            compared="average_gradient",
        ),
        mutant(
            "mean_alone_leads",
            "((m_NK * parts - m_NK + wide_NK) / parts)",
            "(m_NK / 2)",
            compared="average_gradient",
        ),
    ],
)
def test_average_gradient_comes_to_what_is_repeated(
    ops: Subject, shape: tuple[int, int], dtype: torch.dtype, seed: int, memory: int
) -> None:
    """The same gradient again and again leads as it is, as near as seven bits say it.

    A mean that moves by less than half a step of its row stays, so that a long memory may leave it off by 2**(memory - 1) steps.
    """
    grad = torch.randn(shape, generator=ss.generator(seed)).to(dtype)
    mean, exponents = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0], dtype=torch.int8)
    for _ in range(5 * 2**memory):
        led, mean, exponents = ops.average_gradient(grad, mean, exponents, 1.0, memory=memory)
    largest = grad.double().abs().amax(dim=1, keepdim=True)
    steps = 1 + 2.0 ** (memory - 1)
    assert ((led.double() - grad.double()).abs() <= largest * (steps + 1) / 64).all()


@law(
    drawn=AVERAGED,
    seed=ss.GENERATOR_SEEDS,
    bad=st.sampled_from((float("nan"), float("inf"))),
    data=st.data(),
    rejects=[
        mutant(
            "average_moves_at_rate_0",
            "moves & grad_NK.isfinite().all(dim=1)",
            "grad_NK.isfinite().all(dim=1)",
            compared="average_gradient",
        ),
        mutant(
            "average_takes_bad_rows",
            "moves & grad_NK.isfinite().all(dim=1)",
            "moves.expand(len(grad_NK))",
            compared="average_gradient",
        ),
    ],
)
def test_average_gradient_leaves_bad_rows_as_they_are(
    ops: Subject, drawn: Any, seed: int, bad: float, data: st.DataObject
) -> None:
    """A row with a NaN or an infinity, and all rows at rate 0. Other rows are what they are beside a good one."""
    shape, (mean, exponents) = drawn
    grad = torch.randn(shape, generator=ss.generator(seed))
    exact(ops.average_gradient(grad, mean, exponents, 0.0), (grad, mean, exponents))
    row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    want = ops.average_gradient(grad, mean, exponents, 1.0)
    faulty = grad.clone()
    faulty[row, column] = bad
    got = ops.average_gradient(faulty, mean, exponents, 1.0)
    others = torch.arange(shape[0]) != row
    exact(tuple(each[others] for each in got), tuple(each[others] for each in want))
    exact(tuple(each[row] for each in got), (faulty[row], mean[row], exponents[row]))


# --- what is refused -------------------------------------------------------------------------------------------------


_GRADIENT = ones(4, 3)
_SHORT = lambda: (ones(4, 3)(), ones(4, 3, dtype=I8)(), ones(3, dtype=I8)())  # noqa: E731
_SHORTS = ones(4, 3, dtype=torch.int16)
_MEAN = (ones(4, 3, dtype=I8), ones(4, dtype=I8))


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
    refused("average_gradient", "float64", TypeError, "grad_NK", ones(4, 3, dtype=torch.float64), *_MEAN, 1.0),
    refused("average_gradient", "another mean", ValueError, "mean_NK", ones(4, 2), *_MEAN, 1.0),
    refused("average_gradient", "a mean of int16", TypeError, "mean_NK", _GRADIENT, _SHORTS, _MEAN[1], 1.0),
    refused("average_gradient", "too few exponents", ValueError, "exponents_N", _GRADIENT, _MEAN[0], ones(3, dtype=I8), 1.0),
    refused("average_gradient", "another out", ValueError, "out[2]", _GRADIENT, *_MEAN, 1.0, out=_SHORT),
    refused("average_gradient", "a tuple of one as out", ValueError, "out", _GRADIENT, *_MEAN, 1.0, out=(_GRADIENT,)),
    refused("average_gradient", "one tensor as out", TypeError, "out", _GRADIENT, *_MEAN, 1.0, out=_GRADIENT),
    refused("average_gradient", "a rate of 128", ValueError, "rate", _GRADIENT, *_MEAN, 128.0),
    refused("average_gradient", "a memory of 0", ValueError, "memory", _GRADIENT, *_MEAN, 1.0, memory=0),
    refused("average_gradient", "a memory of 7", ValueError, "memory", _GRADIENT, *_MEAN, 1.0, memory=7),
    refused("average_gradient", "a memory of 2.0", TypeError, "memory", _GRADIENT, *_MEAN, 1.0, memory=2.0),
    rejects=[
        mutant("average_unchecked", 'checks.averages("grad_NK", grad_NK, mean_NK, exponents_N, out)', "pass"),
        mutant("average_rate_unchecked", "checks.vote_rate(rate)", "pass"),
        mutant("average_memory_unchecked", 'checks.integer("memory", memory, 1, AVERAGE_MEMORY_MAX)', "pass"),
        mutant("iterations_unchecked", 'checks.integer("iterations", iterations, 1, MAX_ORTHOGONAL_STEPS)', "pass"),
        mutant("stack_unchecked", 'checks.stacked_rows("grad_NK", grad_NK.shape[0], num_groups)', "pass"),
    ],
)
# fmt: on
