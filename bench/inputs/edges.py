"""Inputs of the family edges.

Legend: M rows gather from N nodes of K columns by J slots each; G columns a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes, activations

MOST = {"K": 2304}


def slots(make: Maker, s: Sizes) -> Tensor:
    """Return the neighbours of M rows, of which one in ten is an empty slot."""
    named = make.integers(0, s["N"] - 1, (s["M"], s["J"]), torch.int32)
    return torch.where(make.integers(0, 9, (s["M"], s["J"]), torch.int32) == 0, -1, named)


def signs(make: Maker, s: Sizes) -> Tensor:
    """Return the signs of M rows of edges."""
    return make.trits((s["M"], s["J"])).to(FLOATS[s["float_bytes"]])


def nodes(make: Maker, s: Sizes) -> Tensor:
    """Return the vectors of N nodes."""
    return make.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]])


def frequent(make: Maker, s: Sizes) -> Tensor:
    """Return M ids of nodes, of which some are frequent."""
    drawn = make.normal((s["M"],), torch.float32).abs().pow(3)
    return drawn.mul(s["N"] / 64).long().clamp(max=s["N"] - 1)


def neighbours(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `update_neighbours`: tables in the midst of training, written in place."""
    shape = (s["N"], s["J"])
    named = make.integers(0, s["N"] - 1, shape, torch.int32)
    scores = make.integers(0, 20, shape, torch.int8)
    tables = (named, scores, make.weight(*shape, s["G"]))
    return (*tables, frequent(make, s), frequent(make, s)), {"out": tables}


INPUTS: Mapping[str, Inputs] = {
    "edge_sum": lambda make, s: ((nodes(make, s), slots(make, s), signs(make, s)), {}),
    "edge_sum_input_grad": lambda make, s: (
        (activations(make, s, "K"), slots(make, s), signs(make, s)),
        {"num_nodes": s["N"]},
    ),
    "edge_sum_sign_grad": lambda make, s: ((activations(make, s, "K"), nodes(make, s), slots(make, s)), {}),
    "update_neighbours": neighbours,
}
