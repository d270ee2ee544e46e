"""Inputs of the family activations.

Legend: M rows of K columns with J terms each; for turns M positions, H heads of C columns, R of which are turned.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes, activations

MOST = {"M": 16_384, "K": 1024}


def gates(make: Maker, s: Sizes) -> tuple[Tensor, ...]:
    """Return gate, up and, if there are any, terms."""
    found = (activations(make, s, "K"), activations(make, s, "K"))
    if not s["J"]:
        return found
    return (*found, make.normal((s["M"], s["J"], s["K"]), FLOATS[s["float_bytes"]]))


def keys(make: Maker, s: Sizes) -> Arguments:
    """Return the columns that all heads share, and the columns of each head."""
    shapes = ((s["M"], s["R"]), (s["M"], s["H"], s["C"] - s["R"]))
    return tuple(make.normal(shape, FLOATS[s["float_bytes"]]) for shape in shapes), {}


def turns(make: Maker, s: Sizes) -> Arguments:
    """Return vectors of heads, and the cosine and sine of an angle for each position and column pair."""
    x = make.normal((s["M"], s["H"], s["C"]), FLOATS[s["float_bytes"]])
    angles = make.normal((s["M"], 1, s["R"] // 2), torch.float32)
    return (x, angles.cos(), angles.sin()), {}


INPUTS: Mapping[str, Inputs] = {
    "gated": lambda make, s: (gates(make, s), {}),
    "gated_grads": lambda make, s: ((activations(make, s, "K"), *gates(make, s)), {}),
    "head_keys": keys,
    "head_keys_grads": lambda make, s: (
        (make.normal((s["M"], s["H"], s["C"]), FLOATS[s["float_bytes"]]),),
        {"num_shared": s["R"]},
    ),
    "rotate": turns,
}
