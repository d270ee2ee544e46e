"""cuBLAS through torch: the dense bfloat16 products that a ternary linear replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from bench.inputs import Arguments, Sizes
from bench.peers import Peer, dense


def _forward(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    x, weight = arguments[0]
    w = dense(weight, x.dtype)
    return lambda: F.linear(x, w)


def _input_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, weight = arguments[0]
    w = dense(weight, grad.dtype)
    return lambda: torch.mm(grad, w)


def _weight_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, x = arguments[0]
    return lambda: torch.mm(grad.T, x)


def _bytes(s: Sizes) -> int:
    """Return two activations and one matrix, all in the activations' dtype."""
    return s["float_bytes"] * (s["M"] * (s["N"] + s["K"]) + s["N"] * s["K"])


PEERS = {
    "linear": (Peer("cuBLAS bf16", _forward, _bytes),),
    "linear_input_grad": (Peer("cuBLAS bf16", _input_grad, _bytes),),
    "linear_weight_grad": (
        Peer("cuBLAS bf16", _weight_grad, _bytes, note="writes bfloat16, the op float32"),
    ),
}
"""Peers by op."""
