"""Dense bfloat16 experts: torch's grouped product on sorted slots, and a loop over experts on the host.

Legend: as in bench/inputs; E experts of N rows each, M slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.inputs import Arguments, Sizes
from bench.peers import Peer, dense


def by_expert(experts: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return slots in the order of their experts, and where each expert's end; nothing waits for the device."""
    in_order, order = experts.sort(stable=True)
    groups = torch.arange(num_groups, device=experts.device)
    return order, torch.searchsorted(in_order, groups, right=True).to(torch.int32)


def _by_library(arguments: Arguments, transposed: bool) -> Callable[[], Any]:
    (x, weight, experts), options = arguments
    num_groups = options["num_groups"]
    w = dense(weight, x.dtype).unflatten(0, (num_groups, -1))
    w = w if transposed else w.transpose(1, 2)

    def run() -> Tensor:
        order, ends = by_expert(experts, num_groups)
        y = F.grouped_mm(x[order], w, offs=ends)
        return torch.empty_like(y).index_copy_(0, order, y)

    return run


def _by_loop(arguments: Arguments, transposed: bool) -> Callable[[], Any]:
    (x, weight, experts), options = arguments
    w = dense(weight, x.dtype).unflatten(0, (options["num_groups"], -1))
    w = w if transposed else w.transpose(1, 2)

    def run() -> Tensor:
        y = x.new_zeros(x.shape[0], w.shape[2])
        for expert in experts.unique().tolist():
            slots = (experts == expert).nonzero().flatten()
            y[slots] = x[slots] @ w[expert]
        return y

    return run


def _weight_grad_by_library(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, x, experts), options = arguments

    def run() -> Tensor:
        order, ends = by_expert(experts, options["num_groups"])
        return F.grouped_mm(grad[order].T, x[order], offs=ends).flatten(0, 1)

    return run


def _weight_grad_by_loop(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, x, experts), options = arguments

    def run() -> Tensor:
        out = x.new_zeros(options["num_groups"], grad.shape[1], x.shape[1])
        for expert in experts.unique().tolist():
            slots = (experts == expert).nonzero().flatten()
            out[expert] = grad[slots].T @ x[slots]
        return out.flatten(0, 1)

    return run


def _load(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (experts,), options = arguments
    return lambda: torch.bincount(experts, minlength=options["num_groups"])


def _bytes(s: Sizes) -> int:
    """Return slots, and the dense matrices of the experts that they use."""
    used = min(s["E"], s["M"])
    return 8 * s["M"] + s["float_bytes"] * (s["M"] * (s["N"] + s["K"]) + used * s["N"] * s["K"])


def _grad_bytes(s: Sizes) -> int:
    return 8 * s["M"] + s["float_bytes"] * (s["M"] * (s["N"] + s["K"]) + s["E"] * s["N"] * s["K"])


_LOOP = "waits for the device: the host must know which experts are used"
_BFLOAT16 = "writes bfloat16, the op float32"

PEERS = {
    "grouped_linear": (
        Peer("grouped_mm bf16", lambda a, s: _by_library(a, False), _bytes),
        Peer("loop over experts", lambda a, s: _by_loop(a, False), _bytes, note=_LOOP, capturable=False),
    ),
    "grouped_linear_input_grad": (
        Peer("grouped_mm bf16", lambda a, s: _by_library(a, True), _bytes),
        Peer("loop over experts", lambda a, s: _by_loop(a, True), _bytes, note=_LOOP, capturable=False),
    ),
    "grouped_linear_weight_grad": (
        Peer("grouped_mm bf16", _weight_grad_by_library, _grad_bytes, note=_BFLOAT16),
        Peer(
            "loop over experts",
            _weight_grad_by_loop,
            _grad_bytes,
            note=f"{_BFLOAT16}; {_LOOP}",
            capturable=False,
        ),
    ),
    "expert_load": (
        Peer(
            "bincount",
            _load,
            lambda s: 8 * (s["M"] + s["E"]),
            note="waits for the device, to learn the largest",
            capturable=False,
        ),
    ),
}
"""Peers by op."""
