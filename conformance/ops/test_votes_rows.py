"""The scale of a row that votes are in units of: its root mean square, rounded to a power of two."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import SILENT_ROW

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ones, refusals, refused
from ..subject import Subject
from .test_votes import FINITE, GRADIENTS, VOTES_FOR_NAN

mutant = mutants_of("votes")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("row_exponents")
def row_exponents_calls(draw: st.DrawFn) -> Case:
    return Case((draw(ss.gradients(draw(ss.gradient_shapes()))),))


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


EXPONENT_OF_HALF = mutant(
    "exponent_of_half",
    'frexp_exponent.div(2, rounding_mode="floor")',
    'frexp_exponent.div(2, rounding_mode="trunc")',
    compared="row_exponents",
)


@law(
    grad=GRADIENTS,
    rejects=[
        mutant(
            "rms_over_padded_columns",
            ".square().mean(dim=1)",
            ".square().sum(dim=1) / (-(-grad_NK.shape[1] // 12) * 12)",
            compared=("row_exponents", "stochastic_votes"),
        ),
        mutant("sum_for_mean", ".square().mean(dim=1)", ".square().sum(dim=1)", compared="row_exponents"),
        mutant("largest_for_rms", ".square().mean(dim=1)", ".square().amax(dim=1)", compared="row_exponents"),
        EXPONENT_OF_HALF,
        mutant(
            "float32_squares",
            "grad_NK.to(torch.float64).square()",
            "grad_NK.to(torch.float32).square()",
            compared="row_exponents",
        ),
        mutant("infinite_rows_vote", "votes = mean_square.isfinite() &", "votes =", compared="row_exponents"),
        VOTES_FOR_NAN,
    ],
)
def test_row_exponents_by_fractions(ops: Subject, grad: Tensor) -> None:
    """2**(2V - 1) <= mean square < 2**(2V + 1), in exact fractions. Rows that are zero or not finite are silent."""
    found = [oracle.row_exponent(row) for row in grad.tolist()]
    want = [SILENT_ROW if exponent is None else exponent for exponent in found]
    exact(ops.row_exponents(grad), torch.tensor(want, dtype=torch.int32))


@law(
    grad=FINITE,
    power=st.integers(-40, 40),
    rejects=[
        EXPONENT_OF_HALF,
        mutant(
            "first_column_left_out",
            "grad_NK.to(torch.float64).square()",
            "(grad_NK.to(torch.float64) * (torch.arange(grad_NK.shape[1]) > 0)).square()",
            compared="row_exponents",
        ),
    ],
)
def test_row_exponents_follow_the_scale(ops: Subject, grad: Tensor, power: int) -> None:
    """2 * g raises V by one, and the order of columns does not matter."""
    exponents = ops.row_exponents(grad)
    shifted = torch.where(exponents == SILENT_ROW, SILENT_ROW, exponents + power).to(torch.int32)
    exact(ops.row_exponents(grad * 2.0**power), shifted)
    exact(ops.row_exponents(grad.flip(1)), exponents)


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_votes_rows = refusals(
    "votes_rows",
    refused("row_exponents", "float16", TypeError, "grad_NK", ones(2, 3, dtype=F16)),
    refused("row_exponents", "one dimension", ValueError, "grad_NK", ones(3)),
    refused("row_exponents", "no columns", ValueError, "grad_NK", ones(3, 0)),
    rejects=[mutant("gradient_unchecked", 'checks.gradient_matrix("grad_NK", grad_NK)', "pass", times=2)],
)
# fmt: on
