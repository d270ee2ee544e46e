"""Elementwise torch in the dtype of the activations: gates, rotary turns and the keys of heads.

Legend: as in bench/inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from arbitor.reference.op_table import OP_TABLE
from bench.inputs import Arguments, Sizes
from bench.peers import Peer

NAME = "torch elementwise"


def _gated(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    gate, up, *terms = arguments[0]
    if not terms:
        return lambda: F.silu(gate) * up
    return lambda: F.silu(gate) * up * (1 + terms[0].sum(dim=-2))


def _gated_grads(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, gate, up, *terms = arguments[0]

    def backward() -> Any:
        s = gate.sigmoid()
        silu = gate * s
        factor = grad * (1 + terms[0].sum(dim=-2)) if terms else grad
        grads = (factor * up * (s * (1 + gate * (1 - s))), factor * silu)
        return (*grads, grad * silu * up) if terms else grads

    return backward


def _rotate(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    x, cosine, sine = arguments[0]
    half = cosine.shape[-1]

    def turned() -> Any:
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        both = torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
        return torch.cat([both.to(x.dtype), rest], dim=-1)

    return turned


def _head_keys(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    shared, own = arguments[0]
    return lambda: torch.cat([shared.unsqueeze(-2).expand(*own.shape[:-1], -1), own], dim=-1)


def _head_keys_grads(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad,), at = arguments
    width = at["num_shared"]
    return lambda: (grad[..., :width].sum(dim=-2), grad[..., width:].contiguous())


_BUILDERS = {
    "gated": _gated,
    "gated_grads": _gated_grads,
    "rotate": _rotate,
    "head_keys": _head_keys,
    "head_keys_grads": _head_keys_grads,
}

PEERS = {
    op: (Peer(NAME, build, OP_TABLE[op].bytes_min, note="rounds after each operation"),)
    for op, build in _BUILDERS.items()
}
"""Peers by op. Their least bytes are those of the op, which several launches exceed."""
