"""Fused AdamW and Muon: the optimizer steps that counting votes and stepping trits replace, at an equal number of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.inputs import Arguments, Sizes
from bench.peers import Peer
from bench.peers.functional import muon_ops

BYTES_PER_WEIGHT = 28
"""float32 weight, gradient and two moments read; weight and moments written."""

OPS_PER_WEIGHT = 14
"""Two moments (3 and 4), decay 1, bias corrections 2, root, sum, quotient and update."""

MUON_ITERATIONS = 5
"""As many as torch's Muon takes unless told otherwise."""


def _step(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    # AdamW takes a gradient in the dtype of its weight. That a bfloat16 gradient is made float32 is not timed.
    grad = arguments[0][1].to(torch.float32)
    weight = torch.nn.Parameter(torch.randn_like(grad))
    weight.grad = grad
    # capturable keeps the step count on the device, which a CUDA graph needs and eager runs do not mind
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True, capturable=grad.device.type == "cuda")

    def step() -> torch.Tensor:
        optimizer.step()
        return weight.data

    return step


def _muon_step(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad = arguments[0][1]
    weight = torch.nn.Parameter(torch.randn_like(grad))
    weight.grad = grad
    optimizer = torch.optim.Muon([weight], lr=1e-3, ns_steps=MUON_ITERATIONS)

    def step() -> torch.Tensor:
        optimizer.step()
        return weight.data

    return step


PEERS = {
    "orthogonal_update_step": (
        Peer(
            "torch Muon",
            _muon_step,
            # float32 weight, gradient and momentum read; weight and momentum written.
            lambda s: 20 * s["N"] * s["K"],
            lambda s: muon_ops({**s, "E": 1, "iterations": MUON_ITERATIONS}),
            note="another rule: it keeps a float32 momentum and makes that orthogonal in 5 iterations, ours the gradient in 3",
            checked=False,
            # Its learning rate lies on the host, and torch refuses to record it.
            capturable=False,
        ),
    ),
    "update_step": (
        Peer(
            "AdamW fused float32",
            _step,
            lambda s: BYTES_PER_WEIGHT * s["N"] * s["K"],
            lambda s: OPS_PER_WEIGHT * s["N"] * s["K"],
            note="another rule: equal weights and gradients, not equal results; its gradient is float32 in every case",
            checked=False,
        ),
    ),
}
"""Peers by op."""
