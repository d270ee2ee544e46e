"""Sums over ranks: a kernel adds the gradients of ranks as the rule says, one after the other in float32."""

from __future__ import annotations

import math

import pytest
import torch

from arbitor.optimized.distributed.ranks import merged
from arbitor.optimized.distributed.sums import sum_in_order
from arbitor.optimized.kernels import parts
from conformance.compare import exact
from conformance.subject import Subject, needs_ours


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summed_in", [torch.float32, torch.bfloat16])
def test_a_kernel_adds_the_gradients_of_ranks_in_their_order(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, count: int, dtype: torch.dtype, summed_in: torch.dtype
) -> None:
    """The bits are those of one addition after the other in float32, rounded once, zeros below 0 and NaN included."""
    needs_ours(subject, "sums over ranks")
    # So that some programs add more elements than others.
    monkeypatch.setattr(parts, "MANY", 1000)
    for size in (7, 1500):
        given = torch.randn(count, size, generator=torch.Generator().manual_seed(size)).mul(2.0**5)
        given[:, 0], given[:, 1], given[:, 2] = -0.0, math.nan, math.inf
        given[:, 3] = torch.tensor([2.0**30 if part % 2 else 1.0 for part in range(count)])
        given = given.to(dtype)
        want = torch.empty(size, dtype=summed_in)
        sum_in_order(given, want)
        found = torch.empty(size, dtype=summed_in, device=subject.device)
        parts.add_parts(given.to(subject.device), found)
        # NaN are of many bits.
        assert found.cpu().isnan().equal(want.isnan()) and want[1].isnan()
        exact(found.cpu().nan_to_num(nan=0.5, posinf=math.inf), want.nan_to_num(nan=0.5, posinf=math.inf))


@pytest.mark.parametrize("num_matrices", [0, 2])
@pytest.mark.parametrize("chosen", [((1, -1), (1, 3)), ((-1, -1), (2, 0)), ((-1, -1), (-1, -1))])
def test_rows_that_ranks_have_chosen_stand_once(
    subject: Subject, chosen: tuple[tuple[int, ...], ...], num_matrices: int
) -> None:
    """With the sum of their gradients. Slots that no rank uses name no row, not even one whose gradient would be 0."""
    height = 2 if num_matrices else 1
    rows = [
        torch.tensor([-1 if name < 0 else height * name + at for name in names for at in range(height)])
        for names in chosen
    ]
    grads = [torch.randint(-8, 9, (len(each), 3)).float() * (each >= 0)[:, None] for each in rows]
    want = torch.zeros(4 * height, 3)
    for grad, each in zip(grads, rows, strict=True):
        want.index_add_(0, each.clamp(min=0), grad)
    there_grads, there_rows = ([each.to(subject.device) for each in given] for given in (grads, rows))
    found = merged(there_grads, there_rows, num_matrices, 4 * height, subject.ops)
    assert found.rows is not None
    named = found.rows.cpu()
    assert sorted(named[named >= 0].tolist()) == sorted(
        {int(row) for each in rows for row in each if row >= 0}
    )
    spread = torch.zeros(4 * height, 3)
    spread[named[named >= 0]] = found.grad_NK.cpu().float()[named >= 0]
    exact(spread, want)
    assert found.num_matrices == (len(named) // height if num_matrices else 0)
