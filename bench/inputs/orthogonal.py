"""Inputs of the family orthogonal."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes

MOST = {"N": 4160, "K": 4160}


def averaged(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `average_gradient`, which overwrites the mean."""
    grad = make.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]])
    mean = make.integers(-127, 127, (s["N"], s["K"]), torch.int8)
    exponents = make.integers(-9, -5, (s["N"],), torch.int8)
    return (grad, mean, exponents, 6.0), {"out": (mean, exponents)}


INPUTS: Mapping[str, Inputs] = {
    "average_gradient": averaged,
    "orthogonalize": lambda make, s: (
        (make.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]]),),
        {"iterations": s["iterations"], "num_groups": s["E"]},
    ),
}
