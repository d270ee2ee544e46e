"""Inputs of the family codebook.

Legend: M vectors, N codes of K columns, G columns a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from arbitor.reference.types import TernaryWeight
from bench.inputs.maker import ORIGIN, Arguments, Inputs, Maker, Sizes, activations, ids, weight

MOST = {"M": 1024, "N": 2**17}


def initial(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `initial_codebook`."""
    at = {"sign_bits": s["sign_bits"], "group_size": s["G"], **ORIGIN, "device": make.device}
    return ((s["N"], s["K"]),), at


def codes(make: Maker, s: Sizes) -> TernaryWeight:
    """Return codes in the midst of training, with the exponents that they have there."""
    made = weight(make, s)
    exponents = make.integers(-2, 1, tuple(made.exponents.shape), torch.int8)
    return replace(made, exponents=exponents, mantissa_bits=0)


def candidates(make: Maker, s: Sizes) -> Tensor:
    """Return the ids of as many candidates as the probed buckets hold, -1 for none."""
    width = s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])
    return make.integers(-1, s["N"] - 1, (s["M"], width), torch.int64)


def usage(make: Maker, s: Sizes, most: int) -> Tensor:
    """Return counts of use in 0 .. most."""
    return make.integers(0, most, (s["N"],), torch.int16)


def count(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `count_codes`."""
    counts = usage(make, s, 100)
    return (counts, ids(make, s)), {"out": counts}


def choose(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `revival_vectors`: no code of the window was used, so that each asks for a vector."""
    table, at = codes(make, s), {"first": s["N"] // 2, "window": s["window"]}
    return (activations(make, s, "K"), table, ids(make, s), usage(make, s, 0)), at


def vectors(make: Maker, s: Sizes) -> Tensor:
    """Return a vector of the batch for each code of the window."""
    return make.integers(0, s["M"] - 1, (s["window"],), torch.int64)


def revive(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `revive_codes`: each code of the window is revived."""
    table = codes(make, s)
    at = {"first": s["N"] // 2, "sign_bits": s["sign_bits"], "out": table}
    return (table, activations(make, s, "K"), vectors(make, s)), at


def age(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `age_codes`."""
    counts = usage(make, s, 100)
    return (counts, vectors(make, s)), {"first": s["N"] // 2, "out": counts}


INPUTS: Mapping[str, Inputs] = {
    "initial_codebook": initial,
    "nearest_codes": lambda make, s: ((activations(make, s, "K"), codes(make, s)), {}),
    "candidate_codes": lambda make, s: (
        (activations(make, s, "K"),),
        {"num_codes": s["N"], "sign_bits": s["sign_bits"], "num_probes": s["probes"]},
    ),
    "nearest_candidates": lambda make, s: (
        (activations(make, s, "K"), codes(make, s), candidates(make, s)),
        {},
    ),
    "count_codes": count,
    "revival_vectors": choose,
    "revive_codes": revive,
    "age_codes": age,
}
