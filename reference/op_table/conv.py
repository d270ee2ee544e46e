"""Rows of the family conv."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from arbitor.reference.op_table.row import TWICE, OpRow, Shape, sums
from arbitor.reference.op_table.work import elements, sizes, values


def positions(s: Shape) -> int:
    """Return the number of positions of a convolution."""
    return (s["L"] + 2 * s["padding"] - s["J"]) // s["stride"] + 1


def conv_weight(s: Shape) -> Shape:
    """Return the sizes of a convolution's weight as a matrix."""
    return {"N": s["N"], "K": s["C"] * s["J"], "G": s["G"]}


def conv_activations(s: Shape) -> int:
    """Return the bytes of a convolution's input and output (or of their gradients)."""
    return s["float_bytes"] * s["B"] * (s["C"] * s["L"] + s["N"] * positions(s))


def conv_ops(s: Shape) -> int:
    """Return the operations of a convolution, or of one of its gradients."""
    return 2 * s["B"] * positions(s) * s["N"] * s["C"] * s["J"]


def convolved(x_BCL: Tensor, weight: Any, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return an empty tensor like the result of a convolution."""
    places = (x_BCL.shape[2] + 2 * padding - kernel_size) // stride + 1
    return x_BCL.new_empty((x_BCL.shape[0], weight.shape[0], places))


TAPS = {"J": 3, "stride": 1, "padding": 1, "G": 12, "float_bytes": 2}

CONV = sizes(
    tiny={"B": 2, "C": 64, "L": 128, "N": 64, **TAPS},
    _3072={"B": 4, "C": 1024, "L": 1024, "N": 3072, **TAPS},
    _7168={"B": 1, "C": 7168, "L": 1024, "N": 7168, **TAPS, "stride": 2},
)

# fmt: off
OPS = (
    OpRow(
        "conv1d", "conv", TWICE, CONV,
        bytes_min=lambda s: conv_activations(s) + values(conv_weight(s)),
        ops_min=conv_ops,
        like=convolved,
    ),
    OpRow(
        "conv1d_input_grad", "conv", TWICE, CONV,
        bytes_min=lambda s: conv_activations(s) + values(conv_weight(s)),
        ops_min=conv_ops,
        like=lambda grad_BNP, weight, length, kernel_size, stride, padding: grad_BNP.new_empty(
            (grad_BNP.shape[0], weight.shape[1] // kernel_size, length)
        ),
    ),
    OpRow(
        "conv1d_weight_grad", "conv", TWICE, CONV,
        bytes_min=lambda s: conv_activations(s) + 4 * elements(conv_weight(s)),
        ops_min=conv_ops,
        like=lambda grad_BNP, x_BCL, kernel_size, stride, padding: sums(
            x_BCL, grad_BNP.shape[1], x_BCL.shape[1] * kernel_size
        ),
    ),
)
# fmt: on
