"""Inputs of the family layout."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import Inputs, weight

INPUTS: Mapping[str, Inputs] = {
    "from_spec": lambda make, s: ((weight(make, s),), {}),
    "to_spec": lambda make, s: ((weight(make, s),), {}),
}
