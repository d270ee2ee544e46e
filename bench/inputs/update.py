"""Inputs of the family update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.inputs.maker import CLOCK, RATE, Arguments, Inputs, Maker, Sizes, gradient, in_place, weight

# Several tiles of groups, and a chunk of the CUDA C++ kernel that the end of a row cuts, as in the wider weights.
MOST = {"K": 12_496}


def several(make: Maker, s: Sizes, *rest: Any, **clock: Any) -> Arguments:
    """Return the arguments of a call that updates W weights in place."""
    weights = tuple(weight(make, s) for _ in range(s["W"]))
    return (weights, *rest), {**clock, "out": weights}


def voting(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of a call that counts the votes of W weights."""
    clock = {name: value for name, value in CLOCK.items() if name != "tensor_id"}
    grads = make.normal((s["W"] * s["N"], s["K"]), torch.float32)
    return several(make, s, grads, RATE, tensor_ids=tuple(range(s["W"])), **clock)


INPUTS: Mapping[str, Inputs] = {
    "accumulate": lambda make, s: in_place(
        weight(make, s), make.integers(-4, 4, (s["N"], s["K"]), torch.int8), **CLOCK
    ),
    "apply_step": lambda make, s: in_place(weight(make, s)),
    "accumulate_gradient": lambda make, s: in_place(weight(make, s), gradient(make, s), RATE, **CLOCK),
    "accumulate_gradients": voting,
    "apply_steps": several,
    "count_nonfinite_rows": lambda make, s: ((gradient(make, s),), {}),
    "count_changed_trits": lambda make, s: ((weight(make, s), weight(make, s)), {}),
    "count_state": lambda make, s: ((weight(make, s),), {}),
}
