"""A weight refuses tensors that do not fit each other, and levels beyond the rails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arbitor.reference.ops.packing import weight_of_trits
from conformance.refusal import weight


@pytest.mark.parametrize(
    ("error", "says", "tensors"),
    [
        (ValueError, "packed", {"packed": torch.zeros(8, dtype=torch.uint8)}),
        (TypeError, "packed", {"packed": torch.zeros(9, dtype=torch.int8)}),
        (ValueError, "exponents", {"exponents": torch.zeros(3, 1, dtype=torch.int8)}),
        (ValueError, "trit_accum", {"trit_accum": torch.zeros(14, 3, dtype=torch.int8)}),
        (TypeError, "exponent_accum", {"exponent_accum": torch.zeros(3, 2, dtype=torch.int16)}),
        (ValueError, "trit_accum", {"trit_accum": torch.zeros(3, 14, dtype=torch.int8, device="meta")}),
    ],
)
def test_weight_refuses_tensors_that_do_not_fit(
    error: type[Exception], says: str, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(error, match=says):
        replace(weight(), **tensors)


@pytest.mark.parametrize(("level", "bits"), [(16, 0), (-33, 0), (32, 1), (-65, 1), (64, 2)])
def test_weight_refuses_levels_beyond_the_rails(level: int, bits: int) -> None:
    trits = torch.zeros(1, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="exponents"):
        weight_of_trits(trits, torch.full((1, 1), level, dtype=torch.int8), mantissa_bits=bits)


@pytest.mark.parametrize(
    ("error", "trits"),
    [
        (TypeError, torch.zeros(1, 3, dtype=torch.int16)),
        (ValueError, torch.zeros(3, dtype=torch.int8)),
        (ValueError, torch.zeros(1, 3, 1, dtype=torch.int8)),
    ],
)
def test_weight_refuses_trits_that_are_no_matrix(error: type[Exception], trits: torch.Tensor) -> None:
    with pytest.raises(error, match="trits has"):
        weight_of_trits(trits, torch.zeros(1, 1, dtype=torch.int8))
