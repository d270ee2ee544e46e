"""Rows of the family experts. They count the matrices of the experts that the slots use, not the whole weight."""

from __future__ import annotations

import torch

from arbitor.reference.op_table.row import EXACT, TWICE, OpRow, Shape, sums
from arbitor.reference.op_table.work import elements, linear_activations, linear_ops, sizes, values


def touched(s: Shape) -> int:
    """Return how many experts the slots of a timed call use. The inputs deal out the experts in turn."""
    return min(s["E"], s["M"])


def grouped_bytes(s: Shape) -> int:
    """Return the bytes of a grouped linear's slots, and of the matrices of the experts that are used."""
    return 8 * s["M"] + linear_activations(s) + touched(s) * values(s)


# Slots of experts: N rows for each of E experts. `small` is a batch of that preset. `21216` is the upper expert matrix of the
# largest presets, to decode and to train, at rank 1,024 where the presets have 1,192.
EXPERTS = sizes(
    tiny={"M": 64, "E": 4, "N": 64, "K": 48, "G": 12, "float_bytes": 2},
    small={"M": 32768, "E": 32, "N": 1024, "K": 24, "G": 12, "float_bytes": 2},
    _21216_m4={"M": 4, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
    _21216_m256={"M": 256, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
    _21216_m2048={"M": 2048, "E": 32, "N": 21216, "K": 1024, "G": 12, "float_bytes": 2},
)

# Routers of the presets: a row for each of N experts, and the experts that a position uses.
ROUTERS = sizes(
    tiny={"M": 64, "N": 4, "K": 144, "G": 12, "float_bytes": 2, "top_k": 2},
    small={"M": 16384, "N": 32, "K": 512, "G": 12, "float_bytes": 2, "top_k": 2},
    _7168_m1={"M": 1, "N": 32, "K": 7168, "G": 12, "float_bytes": 2, "top_k": 2},
    _7168_m1024={"M": 1024, "N": 32, "K": 7168, "G": 12, "float_bytes": 2, "top_k": 2},
)

# Ranks of all experts of M positions, R an expert, of which k experts count.
RANKS = sizes(
    tiny={"M": 256, "E": 4, "R": 12, "float_bytes": 2, "top_k": 2},
    small={"M": 16_256, "E": 32, "R": 24, "float_bytes": 2, "top_k": 2},
)


def weighed_bytes(s: Shape) -> int:
    """Return the bytes of the ranks and logits that are read, those of the chosen experts, and of the ranks that are written."""
    ranks = s["R"] * (s["top_k"] + s["E"]) + s["E"]
    return s["M"] * (s["float_bytes"] * ranks + 8 * s["top_k"])


LOADS = sizes(tiny={"M": 64, "E": 4}, small={"M": 32768, "E": 32})

# fmt: off
OPS = (
    OpRow(
        "choose_experts", "experts", EXACT, ROUTERS,
        bytes_min=lambda s: values(s) + s["M"] * (s["float_bytes"] * s["K"] + 8 * s["top_k"]),
        ops_min=linear_ops,
        like=lambda x, weight, top_k, handicap_E: x.new_empty((*x.shape[:-1], top_k), dtype=torch.int64),
    ),
    OpRow(
        "grouped_linear", "experts", TWICE, EXPERTS,
        bytes_min=grouped_bytes,
        ops_min=linear_ops,
        like=lambda x_MK, weight, experts_M, num_groups: x_MK.new_empty(
            (*x_MK.shape[:-1], weight.shape[0] // num_groups)
        ),
    ),
    OpRow(
        "grouped_linear_input_grad", "experts", TWICE, EXPERTS,
        bytes_min=grouped_bytes,
        ops_min=linear_ops,
        like=lambda grad_MN, weight, experts_M, num_groups: grad_MN.new_empty(
            (*grad_MN.shape[:-1], weight.shape[1])
        ),
    ),
    OpRow(
        "grouped_linear_weight_grad", "experts", TWICE, EXPERTS,
        bytes_min=lambda s: 8 * s["M"] + linear_activations(s) + 4 * s["E"] * elements(s),
        ops_min=linear_ops,
        like=lambda grad_MN, x_MK, experts_M, num_groups, dtype: sums(
            x_MK, num_groups * grad_MN.shape[-1], x_MK.shape[-1], dtype=dtype
        ),
    ),
    OpRow(
        "weigh_ranks", "experts", TWICE, RANKS,
        bytes_min=weighed_bytes,
        ops_min=lambda s: s["M"] * (s["top_k"] * s["R"] + 4 * s["E"]),
        like=lambda ranks, logits, experts, chosen_only: ranks.new_empty(ranks.shape),
    ),
    OpRow(
        "weigh_ranks_grads", "experts", TWICE, RANKS,
        bytes_min=lambda s: weighed_bytes(s) + s["M"] * s["float_bytes"] * (s["top_k"] * s["R"] + s["E"]),
        ops_min=lambda s: s["M"] * (3 * s["top_k"] * s["R"] + 8 * s["E"]),
        like=lambda grad, ranks, logits, experts, chosen_only: (
            ranks.new_empty(ranks.shape), logits.new_empty(logits.shape)
        ),
    ),
    OpRow(
        "expert_load", "experts", EXACT, LOADS,
        bytes_min=lambda s: 8 * (s["M"] + s["E"]),
        ops_min=lambda s: s["M"],
    ),
    OpRow(
        "balance_experts", "experts", EXACT, LOADS,
        bytes_min=lambda s: 8 * s["M"] + 20 * s["E"],
        ops_min=lambda s: s["M"] + 8 * s["E"],
    ),
)
# fmt: on
