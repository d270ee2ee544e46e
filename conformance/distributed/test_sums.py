"""Sums over ranks: a kernel adds the gradients of ranks as the rule says, one after the other in float32."""

from __future__ import annotations

import math

import pytest
import torch

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
