"""Calls of the family experts that must be refused."""

from __future__ import annotations

import torch

from arbitor.reference.constants import MAX_ROUTER_COLUMNS, groups_per_row, packed_bytes
from arbitor.reference.types import TernaryWeight
from conformance.ops.refusals.refusal import F16, I8, Refusal, ids, meta, ones, refused, weight

_SIX = lambda: weight(6)  # noqa: E731  three experts of two rows
_BF16 = torch.bfloat16


def _wide_router() -> TernaryWeight:
    """Return a weight of more columns than a sum over them is exact for, on a device without memory."""
    columns = MAX_ROUTER_COLUMNS + 1
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.int8, device="meta")  # noqa: E731
    groups = groups_per_row(columns, 96)
    packed = torch.zeros(packed_bytes(columns), dtype=torch.uint8, device="meta")
    return TernaryWeight(packed, zeros(1, groups), zeros(1, columns), zeros(1, groups), (1, columns), 96)


REFUSALS: tuple[Refusal, ...] = (
    refused("choose_experts", "no expert", ValueError, "top_k", ones(2, 14), _SIX, top_k=0),
    refused("choose_experts", "seven of six experts", ValueError, "top_k", ones(2, 14), _SIX, top_k=7),
    refused("choose_experts", "half an expert", TypeError, "top_k", ones(2, 14), _SIX, top_k=0.5),
    refused("choose_experts", "13 columns", ValueError, "x has shape", ones(2, 13), _SIX, top_k=2),
    refused("choose_experts", "a number", ValueError, "x has shape", ones(), _SIX, top_k=2),
    refused("choose_experts", "float16", TypeError, "x has dtype", ones(2, 14, dtype=F16), _SIX, top_k=2),
    refused("choose_experts", "another device", ValueError, "x is on", meta(2, 14), _SIX, top_k=2),
    refused("choose_experts", "too many columns", ValueError, "weight has shape", meta(2, 14), _wide_router, top_k=1),
    refused("grouped_linear", "expert E", ValueError, "experts_M", ones(2, 14), _SIX, ids(0, 3), num_groups=3),
    refused("grouped_linear", "expert -2", ValueError, "experts_M", ones(2, 14), _SIX, ids(0, -2), num_groups=3),
    refused("grouped_linear", "another number of slots", ValueError,
            "experts_M", ones(2, 14), _SIX, ids(0), num_groups=3),
    refused("grouped_linear", "int32 experts", TypeError,
            "experts_M", ones(2, 14), _SIX, ones(2, dtype=torch.int32), num_groups=3),
    refused("grouped_linear", "a matrix of experts", ValueError,
            "experts_M", ones(2, 14), _SIX, ones(2, 1, dtype=torch.int64), num_groups=3),
    refused("grouped_linear", "rows that do not divide", ValueError,
            "num_groups", ones(2, 14), _SIX, ids(0, 1), num_groups=4),
    refused("grouped_linear", "no groups", ValueError, "num_groups", ones(2, 14), _SIX, ids(0, 1), num_groups=0),
    refused("grouped_linear", "13 columns", ValueError, "x_MK", ones(2, 13), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "three dimensions", ValueError, "x_MK", ones(1, 2, 14), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "float16", TypeError, "x_MK", ones(2, 14, dtype=F16), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear", "another device", ValueError, "x_MK", meta(2, 14), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "six columns", ValueError,
            "grad_MN", ones(2, 6), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "int8", TypeError,
            "grad_MN", ones(2, 2, dtype=I8), _SIX, ids(0, 1), num_groups=3),
    refused("grouped_linear_input_grad", "expert E", ValueError,
            "experts_M", ones(2, 2), _SIX, ids(0, 3), num_groups=3),
    refused("grouped_linear_input_grad", "rows that do not divide", ValueError,
            "num_groups", ones(2, 2), _SIX, ids(0, 1), num_groups=4),
    refused("grouped_linear_weight_grad", "two dtypes", TypeError,
            "x_MK", ones(2, 3), ones(2, 14, dtype=_BF16), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "other slots", ValueError,
            "x_MK", ones(2, 3), ones(3, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "no columns", ValueError,
            "grad_MN", ones(2, 0), ones(2, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "expert E", ValueError,
            "experts_M", ones(2, 3), ones(2, 14), ids(0, 3), num_groups=3),
    refused("grouped_linear_weight_grad", "another number of slots", ValueError,
            "experts_M", ones(2, 3), ones(2, 14), ids(0), num_groups=3),
    refused("grouped_linear_weight_grad", "two devices", ValueError,
            "x_MK", ones(2, 3), meta(2, 14), ids(0, 1), num_groups=3),
    refused("grouped_linear_weight_grad", "no groups", ValueError,
            "num_groups", ones(2, 3), ones(2, 14), ids(0, 1), num_groups=0),
    refused("expert_load", "expert E", ValueError, "experts", ids(0, 3), num_groups=3),
    refused("expert_load", "expert -2", ValueError, "experts", ids(-2), num_groups=3),
    refused("expert_load", "float32", TypeError, "experts", ones(2), num_groups=3),
    refused("expert_load", "no groups", ValueError, "num_groups", ids(0), num_groups=0),
)  # fmt: skip
"""Every call that must be refused."""
