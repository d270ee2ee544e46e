"""RMSNorm of rows of every size: a power of two on a row changes nothing but the influence of eps."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from arbitor.reference.ops import constant_weight
from arbitor.reference.ops.packing import weight_of_trits

from .. import strategies as ss
from ..case import as_tuple
from ..compare import exact, no_worse, same_sums
from ..law import law
from ..mutant import mutants_of
from ..subject import Subject

mutant = mutants_of("norm")

# The squares of small integers are exact. 8 times 2**124 is the largest power of two that float32 holds.
HUGE = st.sampled_from((70, 48, 60, 64, 124))
COUNTS = st.integers(1, 37)


NORM_OF_HUGE_ROWS_OVERFLOWS = mutant(
    "norm_of_huge_rows_overflows", "torch.where(huge, one * 2.0**exponent, one)", "one"
)


SIZED = st.one_of(
    st.tuples(st.deferred(ss.sizes), st.integers(10, 40)),
    st.tuples(COUNTS, HUGE),
)
"""Numbers of channels, and powers of two that rows are multiplied by."""


@law(
    # Two scales, of which each has as many examples as any other law.
    share=2.0,
    sized=SIZED,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "norm_forgets_the_root",
            "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
            "(x_wide.square().mean(dim=-1, keepdim=True) + eps)",
            compared="rms_norm",
        ),
        NORM_OF_HUGE_ROWS_OVERFLOWS,
        mutant("norm_tames_less_than_squares", "2.0**least", "2.0**64.5"),
        mutant(
            "norm_of_the_tamed_row",
            "return x_wide / _rms(tame, tame_eps) * power",
            "return tame / _rms(tame, tame_eps)",
        ),
    ],
)
def test_rms_norm_ignores_the_scale(
    ops: Subject, sized: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """A power of two on x changes not one bit, once eps is too small to count beside the mean square.

    This holds for the result and for the gradient of the weight, for rows whose squares overflow, beside rows of another size, and
    for elements that are far smaller than others of their row.
    """
    (width, power), few = sized, {"eps": 1e-12}
    weight = data.draw(ss.weights((1, 2 * width), levels=(-5, 5)))
    x, grad = (data.draw(ordinary_rows(2 * width, dtype)) for _ in range(2))
    # With all bits of the dtype.
    x[:, width:] *= 1.1 * 2.0**-120
    wanted = ops.rms_norm(x * 2.0**9, weight, **few)
    mixed = torch.cat([x * 2.0**power, x * 2.0**9])
    exact(ops.rms_norm(mixed, weight, **few), torch.cat([wanted, wanted]))
    exact(
        ops.rms_norm_weight_grad(grad, x * 2.0**power, **few),
        ops.rms_norm_weight_grad(grad, x * 2.0**9, **few),
    )


@law(
    width=COUNTS,
    dtype=ss.DTYPES,
    power=HUGE,
    data=st.data(),
    rejects=[
        NORM_OF_HUGE_ROWS_OVERFLOWS,
        mutant("norm_grad_of_the_tamed_row", "keepdim=True)) * power", "keepdim=True))"),
    ],
)
def test_rms_norm_input_grad_of_huge_rows(
    ops: Subject, width: int, dtype: torch.dtype, power: int, data: st.DataObject
) -> None:
    """The gradient shrinks as the row grows: by the same power of two, bit for bit, as long as nothing is a subnormal number."""
    weight = data.draw(ss.weights((1, width), levels=(0, 15)))
    x, grad = (data.draw(ordinary_rows(width, dtype)) for _ in range(2))
    grad = grad * 2.0**40
    got = ops.rms_norm_input_grad(grad, x * 2.0**power, weight)
    want = ops.rms_norm_input_grad(grad, x * 2.0**20, weight)
    exact(got, (want.to(torch.float64) * 2.0 ** (20 - power)).to(dtype))


@law(
    width=st.sampled_from((2, 4, 8, 16)),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "norm_grad_divided_last",
            "dx = (scaled - unit * (unit * scaled).mean(dim=-1, keepdim=True)) * power",
            "scaled = scaled * rms\n"
            "    dx = (scaled - unit * (unit * scaled).mean(dim=-1, keepdim=True)) / rms * power",
        ),
    ],
)
def test_rms_norm_input_grad_of_faint_rows(
    ops: Subject, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Where eps is all that a root mean square has, no product on the way underflows before it is divided by it.

    All is an integer times a power of two here, so that every step but the last is exact: rms is 2**-20.
    """
    trits = data.draw(ss.trit_tensors((1, width)))
    weight = weight_of_trits(trits, torch.zeros(1, 1, dtype=torch.int8), 16)
    rows, grad = (data.draw(ordinary_rows(width, dtype)) for _ in range(2))
    x = rows * 2.0**-100
    unit, scaled = rows.to(torch.float64) * 2.0**-80, grad.to(torch.float64) * trits * 2.0**20
    want = scaled - unit * (unit * scaled).mean(dim=-1, keepdim=True)
    got = ops.rms_norm_input_grad(grad, x, weight, eps=2.0**-40)
    same_sums(got, want.to(torch.float32).to(dtype))


@law(width=COUNTS, dtype=ss.DTYPES, data=st.data(), rejects=[NORM_OF_HUGE_ROWS_OVERFLOWS])
def test_rms_norm_of_the_largest_numbers(
    ops: Subject, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A row of the largest number that there is has root mean square 1, and an infinity leaves 0 beside it and NaN."""
    weight = constant_weight((1, width + 1), trit=1, exponent=0)
    x = torch.full((2, width + 1), torch.finfo(dtype).max, dtype=dtype)
    x[1, 0] = torch.inf
    y = ops.rms_norm(x, weight)
    exact(y[0].to(torch.float32).round(), torch.ones(width + 1))
    assert y[1, 0].isnan()
    exact(y[1, 1:], torch.zeros(width, dtype=dtype))


@law(
    width=COUNTS,
    dtype=ss.DTYPES,
    power=st.sampled_from((-20, -10, -70)),
    data=st.data(),
    rejects=[
        mutant(
            "norm_eps_stays_where_rows_grow",
            "return x_wide * power, power, power * eps * power",
            "power = power * 2.0**30\n    return x_wide * power, power, torch.full_like(power, eps)",
        ),
    ],
)
def test_rms_norm_of_small_rows(
    ops: Subject, width: int, dtype: torch.dtype, power: int, data: st.DataObject
) -> None:
    """Beside a small row eps decides, as in torch: rows of 2**-20 come out a thousand times as large, and no larger."""
    weight = constant_weight((1, width), trit=1, exponent=0)
    x = data.draw(ordinary_rows(width, dtype)) * 2.0**power
    wide, plain = (functional.rms_norm(x.to(to), (width,), eps=1e-6) for to in (torch.float64, torch.float32))
    no_worse(ops.rms_norm(x, weight), twin=plain.to(dtype), wide=wide, magnitude=wide.abs(), k=2.0)


@st.composite
def ordinary_rows(draw: st.DrawFn, width: int, dtype: torch.dtype) -> Tensor:
    """Draw five rows of integers from -8 to 8 without a zero: their sums of squares are exact."""
    x = ss.float_values((5, width), "small integers", draw(ss.GENERATOR_SEEDS))
    return torch.where(x == 0, 1.0, x).to(dtype)


@law(
    dtype=ss.DTYPES,
    rejects=[mutant("norm_eps_may_underflow", 'checks.normal_number("eps", eps, wide_dtype(x))', "pass")],
)
def test_rms_norm_refuses_an_eps_that_underflows(ops: Subject, dtype: torch.dtype) -> None:
    """An eps below the smallest normal float32 would lose bits on its way into the sum. At that number every op runs."""
    x, weight = torch.ones(2, 5, dtype=dtype), constant_weight((1, 5), trit=1, exponent=0)
    calls = {
        "rms_norm": (x, weight),
        "add_rms_norm": (x, x, weight),
        "rms_norm_input_grad": (x, x, weight),
        "rms_norm_weight_grad": (x, x),
    }
    for name, args in calls.items():
        error = ops.refuses(name, args, {"eps": 2.0**-127})
        assert isinstance(error, ValueError) and "eps is" in str(error), f"{name}: {error!r}"
        assert all(each.isfinite().all() for each in as_tuple(ops.call(name, *args, eps=2.0**-126)))
