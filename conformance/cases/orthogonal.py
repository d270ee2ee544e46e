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

from arbitor.reference.constants import NEWTON_SCHULZ
from conformance import strategies as ss
from conformance.cases.case import Case


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


@st.composite
def orthogonalize(draw: st.DrawFn) -> Case:
    shape, num_groups = draw(stacks())
    grad = draw(ss.gradients(shape))
    return Case((grad,), {"iterations": draw(st.sampled_from((1, 2, 3, 5))), "num_groups": num_groups})


CASES: dict[str, SearchStrategy[Case]] = {"orthogonalize": orthogonalize()}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {"orthogonalize": magnitude}
"""What roundings are counted in, by op."""
