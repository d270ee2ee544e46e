"""Inputs of the family packing."""

from __future__ import annotations

from collections.abc import Mapping

from bench.inputs.maker import Inputs

INPUTS: Mapping[str, Inputs] = {
    "pack_trits": lambda make, s: ((make.trits((s["N"], s["K"])),), {}),
    "unpack_trits": lambda make, s: ((make.packed(s["N"], s["K"]), (s["N"], s["K"])), {}),
}
