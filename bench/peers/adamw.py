"""Fused AdamW: the optimizer step that counting votes and stepping trits replace, at an equal number of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.inputs import Arguments, Sizes
from bench.peers import Peer

BYTES_PER_WEIGHT = 28
"""float32 weight, gradient and two moments read; weight and moments written."""

OPS_PER_WEIGHT = 14
"""Two moments (3 and 4), decay 1, bias corrections 2, root, sum, quotient and update."""


def _step(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad = arguments[0][1]
    weight = torch.nn.Parameter(torch.randn_like(grad))
    weight.grad = grad
    # capturable keeps the step count on the device, which a CUDA graph needs and eager runs do not mind
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True, capturable=grad.device.type == "cuda")

    def step() -> torch.Tensor:
        optimizer.step()
        return weight.data

    return step


PEERS = {
    "update_step": (
        Peer(
            "AdamW fused float32",
            _step,
            lambda s: BYTES_PER_WEIGHT * s["N"] * s["K"],
            lambda s: OPS_PER_WEIGHT * s["N"] * s["K"],
            note="another rule: equal weights and gradients, not equal results",
            checked=False,
        ),
    ),
}
"""Peers by op."""
