"""gemlite: products of few rows with weights of two bits, which a user of low-bit weights would run.

It is timed where it is installed (`pip install gemlite`), on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Arguments, Sizes
from bench.peers import Peer

GROUP = 16
"""Columns of a group: the fewest that gemlite takes."""

BITS = 2
"""Bits of a weight: 0, 1 and 2 stand for -1, 0 and 1."""

ERROR = 1e-2
"""Norm of the error over the norm of the product, at most: bfloat16 operands stay below it."""


def _linear(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    from gemlite.core import DType, GemLiteLinearTriton

    x: Tensor = arguments[0][0]
    num_outputs, num_inputs = sizes["N"], sizes["K"]
    random = torch.Generator(device=x.device).manual_seed(0)
    levels_NK = torch.randint(
        0, 3, (num_outputs, num_inputs), generator=random, dtype=torch.uint8, device=x.device
    )
    exponents = torch.randint(
        -8, -3, (num_outputs, num_inputs // GROUP), generator=random, dtype=torch.int32, device=x.device
    )
    scales = (2.0**exponents).to(x.dtype)
    layer = GemLiteLinearTriton(
        BITS,
        group_size=GROUP,
        in_features=num_inputs,
        out_features=num_outputs,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    # A number for the zero of all groups: the fewest bytes.
    layer.pack(levels_NK, scales, 1)
    w_NK = (levels_NK.to(x.dtype) - 1) * scales.repeat_interleave(GROUP, dim=1)
    want = torch.nn.functional.linear(x, w_NK).float()
    error = float((layer(x).float() - want).norm() / want.norm())
    if not error <= ERROR:
        raise RuntimeError(
            f"gemlite is off by {error:.2g} of the product with its own weights at {dict(sizes)}"
        )
    return lambda: layer(x)


def _bytes(s: Sizes) -> int:
    """Return two activations, two bits a weight, and a bfloat16 scale a group."""
    weights = s["N"] * s["K"]
    return s["float_bytes"] * s["M"] * (s["N"] + s["K"]) + weights * BITS // 8 + 2 * weights // GROUP


PEERS = {
    "linear": (
        Peer(
            f"gemlite, groups of {GROUP}",
            _linear,
            _bytes,
            note=f"weights of its own with groups of {GROUP}, since it takes none of 12; its product with them is checked",
            checked=False,
            needs="gemlite",
        ),
    ),
}
"""Peers by op."""
