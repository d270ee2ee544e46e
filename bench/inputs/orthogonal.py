"""Inputs of the family orthogonal."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import FLOATS, Inputs

MOST = {"N": 4160, "K": 4160}

INPUTS: Mapping[str, Inputs] = {
    "orthogonalize": lambda make, s: (
        (make.normal((s["N"], s["K"]), FLOATS[s["float_bytes"]]),),
        {"iterations": s["iterations"], "num_groups": s["E"]},
    ),
}
