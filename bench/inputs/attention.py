"""Inputs of the family attention.

Legend: B sequences, H heads, S slots of L latent and R rotary columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes

MOST = {"H": 128, "S": 1600, "L": 512}


def decode(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `decode_attention`: some of the slots are summaries, which weigh as many bytes as they stand for."""
    dtype, columns = FLOATS[s["float_bytes"]], s["L"] + s["R"]
    bias = make.integers(0, 1, (s["B"], s["S"]), torch.int64).to(torch.float32) * math.log(64)
    q, keys = (make.normal((s["B"], s[rows], columns), dtype) for rows in ("H", "S"))
    return (q, keys, bias), {"value_width": s["L"], "scale": columns**-0.5}


def looking_back(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `visible_slots`, for sequences of different lengths."""
    sizes = {"num_queries": s["Q"], "window": s["w"], "block": s["b"], "num_summaries": s["N"]}
    return (make.integers(0, 2**20, (s["B"],), torch.int64),), sizes


INPUTS: Mapping[str, Inputs] = {"decode_attention": decode, "visible_slots": looking_back}
