"""Inputs of the family update."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.inputs.maker import CLOCK, RATE, Inputs, gradient, in_place, weight

# Several tiles of groups, and a chunk of the CUDA C++ kernel that the end of a row cuts, as in the wider weights.
MOST = {"K": 12_496}

INPUTS: Mapping[str, Inputs] = {
    "accumulate": lambda make, s: in_place(
        weight(make, s), make.integers(-4, 4, (s["N"], s["K"]), torch.int8), **CLOCK
    ),
    "apply_step": lambda make, s: in_place(weight(make, s)),
    "accumulate_gradient": lambda make, s: in_place(weight(make, s), gradient(make, s), RATE, **CLOCK),
    "count_nonfinite_rows": lambda make, s: ((gradient(make, s),), {}),
    "count_changed_trits": lambda make, s: ((weight(make, s), weight(make, s)), {}),
}
