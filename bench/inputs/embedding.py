"""Inputs of the family embedding."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import FLOATS, Inputs, activations, ids, weight

MOST = {"K": 2304}

INPUTS: Mapping[str, Inputs] = {
    "embedding": lambda make, s: ((ids(make, s), weight(make, s)), {"dtype": FLOATS[s["float_bytes"]]}),
    "embedding_row_grads": lambda make, s: ((ids(make, s), activations(make, s, "K")), {}),
}
