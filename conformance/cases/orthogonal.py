"""Calls to compare of orthogonalised gradients.

Legend: E matrices of N rows each, stacked, K columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance import strategies as ss
from conformance.cases.case import Case, widened


def magnitude(op: Callable[..., Any], case: Case) -> Tensor:
    """Return what one rounding of an element is relative to: the largest element of its matrix, times the slope of a step.

    X, S and the polynomial are rounded to the dtype of the gradient by the rule itself, so in bfloat16 what an element comes
    from is known to bfloat16, not to float32, as the floor of `no_worse` supposes; each element comes from all others; and a
    step hands on an error of a small direction 3.4445-fold.
    """
    grad, options = case.args[0], case.kwargs
    result = widened(op, case, lambda value: value.to(torch.float64)).nan_to_num()
    matrices = result.unflatten(0, (options.get("num_groups", 1), -1))
    largest = matrices.abs().amax(dim=(1, 2), keepdim=True) if matrices.numel() else matrices
    coarser = torch.finfo(grad.dtype).eps / torch.finfo(torch.float32).eps
    return (3.4445 * largest * coarser).expand_as(matrices).flatten(0, 1)


@st.composite
def stacks(draw: st.DrawFn, *, empty: bool = True) -> tuple[tuple[int, int], int]:
    """Draw the shape of a stack of matrices, wide, tall or with no row at all, and how many they are."""
    num_rows, num_columns = draw(ss.matrix_shapes(70))
    num_groups = draw(st.sampled_from((1, 1, 2, 5)), label="matrices")
    num_rows = 0 if empty and draw(st.integers(0, 19)) == 0 else num_rows
    return (num_groups * num_rows, num_columns), num_groups


@st.composite
def orthogonalize(draw: st.DrawFn) -> Case:
    shape, num_groups = draw(stacks())
    grad = draw(ss.gradients(shape))
    return Case((grad,), {"iterations": draw(st.sampled_from((1, 2, 3, 5))), "num_groups": num_groups})


CASES: dict[str, SearchStrategy[Case]] = {"orthogonalize": orthogonalize()}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {"orthogonalize": magnitude}
"""What roundings are counted in, by op."""
