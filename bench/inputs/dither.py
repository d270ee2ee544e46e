"""Inputs of the family dither."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.inputs.maker import CLOCK, Inputs

INPUTS: Mapping[str, Inputs] = {
    "dither_bytes": lambda make, s: (
        (make.integers(0, 2**32 - 1, (s["groups"],), torch.int64),),
        {"group_size": s["G"], **CLOCK},
    ),
}
