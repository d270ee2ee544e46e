"""Inputs of the family votes."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import CLOCK, RATE, Inputs, gradient

MOST = {"K": 2304}

INPUTS: Mapping[str, Inputs] = {
    "row_exponents": lambda make, s: ((gradient(make, s),), {}),
    "stochastic_votes": lambda make, s: ((gradient(make, s), RATE), {"group_size": s["G"], **CLOCK}),
    "sign_votes": lambda make, s: ((gradient(make, s), 3), {}),
    "step_from_loss": lambda make, s: ((2.5, 5.693732138802635, 8), {}),
}
