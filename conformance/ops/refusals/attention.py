"""Calls of the family attention that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conformance.ops.refusals.refusal import F16, Refusal, meta, ones, refused


def bias(value: float, *shape: int) -> Callable[[], Tensor]:
    """Return a maker of biases that are 0 but for the last."""
    return lambda: torch.zeros(shape).index_fill_(-1, torch.tensor([shape[-1] - 1]), value)


BF16, F64 = torch.bfloat16, torch.float64
Q, KEYS, BIAS = ones(2, 3, 5), ones(2, 4, 5), ones(2, 4)
AT = {"value_width": 3, "scale": 0.5}

REFUSALS: tuple[Refusal, ...] = (
    refused("decode_attention", "float16", TypeError, "q_BHK", ones(2, 3, 5, dtype=F16), KEYS, BIAS, **AT),
    refused("decode_attention", "two dimensions", ValueError, "q_BHK", ones(3, 5), KEYS, BIAS, **AT),
    refused("decode_attention", "no columns", ValueError, "q_BHK", ones(2, 3, 0), ones(2, 4, 0), BIAS, **AT),
    refused("decode_attention", "two dtypes", TypeError, "keys_BSK", Q, ones(2, 4, 5, dtype=BF16), BIAS, **AT),
    refused("decode_attention", "another width", ValueError, "keys_BSK", Q, ones(2, 4, 6), BIAS, **AT),
    refused("decode_attention", "another batch", ValueError, "keys_BSK", Q, ones(1, 4, 5), BIAS, **AT),
    refused("decode_attention", "keys in a list", TypeError, "keys_BSK", Q, lambda: [1.0], BIAS, **AT),
    refused("decode_attention", "keys of one head", ValueError, "keys_BSK", Q, ones(2, 1, 4, 5), BIAS, **AT),
    refused("decode_attention", "a bias a head", ValueError, "bias_BS", Q, KEYS, ones(2, 3, 4), **AT),
    refused("decode_attention", "bfloat16 bias", TypeError, "bias_BS", Q, KEYS, ones(2, 4, dtype=BF16), **AT),
    refused("decode_attention", "float64 bias", TypeError, "bias_BS", Q, KEYS, ones(2, 4, dtype=F64), **AT),
    refused("decode_attention", "NaN in the bias", ValueError, "bias_BS", Q, KEYS, bias(float("nan"), 2, 4), **AT),
    refused("decode_attention", "+inf in the bias", ValueError, "bias_BS", Q, KEYS, bias(float("inf"), 2, 4), **AT),
    refused("decode_attention", "another device", ValueError, "keys_BSK", Q, meta(2, 4, 5), BIAS, **AT),
    refused("decode_attention", "no values", ValueError, "value_width", Q, KEYS, BIAS, value_width=0, scale=0.5),
    refused("decode_attention", "6 of 5 columns", ValueError, "value_width", Q, KEYS, BIAS, value_width=6, scale=0.5),
    refused("decode_attention", "width 2.0", TypeError, "value_width", Q, KEYS, BIAS, value_width=2.0, scale=0.5),
    refused("decode_attention", "scale 0", ValueError, "scale", Q, KEYS, BIAS, value_width=3, scale=0.0),
    refused("decode_attention", "scale NaN", ValueError, "scale", Q, KEYS, BIAS, value_width=3, scale=float("nan")),
    refused("decode_attention", "a scale in words", TypeError, "scale", Q, KEYS, BIAS, value_width=3, scale="1"),
)  # fmt: skip
"""Every call that must be refused."""
