"""Inputs of the family norm."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import Inputs, activations, weight

MOST = {"M": 2080, "K": 7168}

INPUTS: Mapping[str, Inputs] = {
    "rms_norm": lambda make, s: ((activations(make, s, "K"), weight(make, s)), {}),
    "add_rms_norm": lambda make, s: (
        (activations(make, s, "K"), activations(make, s, "K"), weight(make, s)),
        {},
    ),
    "rms_norm_input_grad": lambda make, s: (
        (activations(make, s, "K"), activations(make, s, "K"), weight(make, s)),
        {},
    ),
    "rms_norm_weight_grad": lambda make, s: ((activations(make, s, "K"), activations(make, s, "K")), {}),
}
