"""Inputs of the family conv.

Legend: B batch, C channels, L length, J taps, N output channels, P positions, G columns a group.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from arbitor.reference.types import TernaryWeight
from bench.inputs.maker import FLOATS, Inputs, Maker, Sizes

MOST = {"C": 768, "L": 1024, "N": (64, 7168)}


def positions(s: Sizes) -> int:
    """Return P of a convolution."""
    return (s["L"] + 2 * s["padding"] - s["J"]) // s["stride"] + 1


def geometry(s: Sizes) -> dict[str, int]:
    """Return what says where the taps lie."""
    return {"kernel_size": s["J"], "stride": s["stride"], "padding": s["padding"]}


def signal(make: Maker, s: Sizes) -> Tensor:
    """Return x_BCL."""
    return make.normal((s["B"], s["C"], s["L"]), FLOATS[s["float_bytes"]])


def output_grad(make: Maker, s: Sizes) -> Tensor:
    """Return grad_BNP."""
    return make.normal((s["B"], s["N"], positions(s)), FLOATS[s["float_bytes"]])


def filters(make: Maker, s: Sizes) -> TernaryWeight:
    """Return the weight, whose columns are the taps of all channels."""
    return make.weight(s["N"], s["C"] * s["J"], s["G"])


INPUTS: Mapping[str, Inputs] = {
    "conv1d": lambda make, s: ((signal(make, s), filters(make, s)), geometry(s)),
    "conv1d_input_grad": lambda make, s: (
        (output_grad(make, s), filters(make, s)),
        {"length": s["L"], **geometry(s)},
    ),
    "conv1d_weight_grad": lambda make, s: ((output_grad(make, s), signal(make, s)), geometry(s)),
}
