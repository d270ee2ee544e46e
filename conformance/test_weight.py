"""A weight refuses tensors that do not fit each other, and levels beyond the rails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.optimized.layouts import DeviceWeight
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
        (ValueError, "group_size is 7", {"group_size": 7}),
        (ValueError, "group_size is 0", {"group_size": 0}),
        (ValueError, "mantissa_bits is 7", {"mantissa_bits": 7}),
        (ValueError, "shape is", {"shape": (3, 0)}),
    ],
)
def test_weight_refuses_fields_that_do_not_fit(
    error: type[Exception], says: str, tensors: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^{says}"):
        replace(weight(), **tensors)


def test_a_layout_refuses_tensors_that_kernels_would_misread() -> None:
    """Kernels count rows from the first, so that every tensor of a device layout is contiguous."""
    laid_out = DeviceWeight(
        torch.zeros(3, 1, dtype=torch.int32),
        torch.zeros(3, 2, dtype=torch.int8),
        torch.zeros(3, 14, dtype=torch.int8),
        torch.zeros(3, 2, dtype=torch.int8),
        (3, 14),
    )
    for name, tensor in laid_out.tensors().items():
        strided = torch.zeros(3, 2 * tensor.shape[1], dtype=tensor.dtype)[:, : tensor.shape[1]]
        with pytest.raises(ValueError, match=f"^{name} has strides .* must be contiguous"):
            replace(laid_out, **{name: strided})
        with pytest.raises(TypeError, match=f"^{name} has dtype"):
            replace(laid_out, **{name: tensor.to(torch.float32)})
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            replace(laid_out, **{name: tensor[:2]})
    with pytest.raises(ValueError, match=r"^group_size is 7"):
        replace(laid_out, group_size=7)
    with pytest.raises(ValueError, match=r"^mantissa_bits is 7"):
        replace(laid_out, mantissa_bits=7)
    with pytest.raises(ValueError, match=r"^trit_accum is on meta"):
        replace(laid_out, trit_accum=torch.zeros(3, 14, dtype=torch.int8, device="meta"))


@pytest.mark.parametrize(("level", "bits"), [(16, 0), (-33, 0), (32, 1), (-65, 1), (64, 2)])
def test_weight_refuses_levels_beyond_the_rails(level: int, bits: int) -> None:
    trits = torch.zeros(1, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="exponents"):
        weight_of_trits(trits, torch.full((1, 1), level, dtype=torch.int8), mantissa_bits=bits)


@pytest.mark.parametrize(
    ("says", "fields"),
    [
        ("group_size is 0", {"group_size": 0}),
        ("group_size is 7", {"group_size": 7}),
        ("mantissa_bits is -1", {"mantissa_bits": -1}),
        ("mantissa_bits is 9", {"mantissa_bits": 9}),
    ],
)
def test_weight_of_trits_refuses_a_form_before_it_reads_levels(says: str, fields: dict[str, int]) -> None:
    trits, levels = torch.zeros(1, 3, dtype=torch.int8), torch.full((1, 1), 99, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"^{says}, but must be one of"):
        weight_of_trits(trits, levels, **fields)


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
