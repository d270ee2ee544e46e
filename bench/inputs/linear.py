"""Inputs of the family linear."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import Inputs, activations, weight

MOST = {"M": 1040, "N": (256, 3072, 7168, 16384), "K": 2352}

INPUTS: Mapping[str, Inputs] = {
    "linear": lambda make, s: ((activations(make, s, "K"), weight(make, s)), {}),
    "linear_input_grad": lambda make, s: ((activations(make, s, "N"), weight(make, s)), {}),
    "linear_weight_grad": lambda make, s: ((activations(make, s, "N"), activations(make, s, "K")), {}),
}
