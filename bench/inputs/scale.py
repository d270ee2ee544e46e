"""Inputs of the family scale."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import ORIGIN, Arguments, Inputs, Maker, Sizes, weight

MOST = {"K": 2304}


def initial(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `initial_weight`."""
    return ((s["N"], s["K"]),), {
        "std": s["K"] ** -0.5,
        **ORIGIN,
        "group_size": s["G"],
        "device": make.device,
    }


def constant(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `constant_weight`."""
    return ((s["N"], s["K"]),), {"trit": 1, "exponent": 0, "group_size": s["G"], "device": make.device}


INPUTS: Mapping[str, Inputs] = {
    "group_scales": lambda make, s: ((weight(make, s).exponents,), {}),
    "dequantize": lambda make, s: ((weight(make, s),), {}),
    "initial_weight": initial,
    "constant_weight": constant,
}
