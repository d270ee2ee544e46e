"""Inputs of the family experts.

Legend: E experts of N rows and K columns each, M slots, G columns a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arbitor.reference.types import TernaryWeight
from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes, activations

MOST = {"M": 8192, "N": 640, "K": 1024}


def stacked(make: Maker, s: Sizes) -> TernaryWeight:
    """Return the matrices of all experts, one below the other."""
    return make.weight(s["E"] * s["N"], s["K"], s["G"])


def dealt(make: Maker, s: Sizes) -> Tensor:
    """Return experts dealt out in turn, shuffled: as many as can be are used, equally often."""
    order = torch.randperm(s["M"], generator=make.generator, device=make.device)
    return torch.arange(s["M"], device=make.device)[order] % s["E"]


def grouped(make: Maker, s: Sizes, width: str) -> Arguments:
    """Return the arguments of a product with slots as wide as the size called `width`."""
    return (activations(make, s, width), stacked(make, s), dealt(make, s)), {"num_groups": s["E"]}


def routed(make: Maker, s: Sizes) -> Arguments:
    """Return vectors, the weight of a router of one row an expert, and a handicap of each expert."""
    handicap = make.integers(-100, 100, (s["N"],), torch.int16)
    given = (activations(make, s, "K"), make.weight(s["N"], s["K"], s["G"]))
    return given, {"top_k": s["top_k"], "handicap_E": handicap}


def weighings(make: Maker, s: Sizes) -> tuple[Tensor, ...]:
    """Return ranks of all experts, logits, and experts of which k are dealt out to each position."""
    floats = FLOATS[s["float_bytes"]]
    ranks, logits = (make.normal((s["M"], width), floats) for width in (s["E"] * s["R"], s["E"]))
    first = torch.arange(s["M"], device=make.device)[:, None]
    return ranks, logits, (first + torch.arange(s["top_k"], device=make.device)) % s["E"]


def balanced(make: Maker, s: Sizes) -> Arguments:
    """Return choices, and the tables of experts that they change in place."""
    tables = (
        make.integers(0, 2**20, (s["E"],), torch.int64),
        make.integers(0, 100, (s["E"],), torch.int16),
    )
    return (dealt(make, s), *tables), {"out": tables}


INPUTS: Mapping[str, Inputs] = {
    "choose_experts": routed,
    "grouped_linear": lambda make, s: grouped(make, s, "K"),
    "grouped_linear_input_grad": lambda make, s: grouped(make, s, "N"),
    "grouped_linear_weight_grad": lambda make, s: (
        (activations(make, s, "N"), activations(make, s, "K"), dealt(make, s)),
        {"num_groups": s["E"]},
    ),
    "weigh_ranks": lambda make, s: (weighings(make, s), {}),
    "weigh_ranks_grads": lambda make, s: (
        (make.normal((s["M"], s["E"] * s["R"]), FLOATS[s["float_bytes"]]), *weighings(make, s)),
        {},
    ),
    "expert_load": lambda make, s: ((dealt(make, s),), {"num_groups": s["E"]}),
    "balance_experts": balanced,
}
