"""Rows of the family codebook. A search reads the packed table once. Candidates and upkeep read only the rows that they name."""

from __future__ import annotations

import torch

from arbitor.reference.op_table.row import EXACT, OpRow, Shape
from arbitor.reference.op_table.work import dither_ops, elements, groups, sizes, state, values

# Sizes: M vectors, candidates of 2**sign_bits buckets, `window` codes that may be revived.
CODES = sizes(
    tiny={"M": 16, "N": 512, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 4, "probes": 2, "window": 16},
    _4096_m16384={
        "M": 16384, "N": 4096, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 6, "probes": 4, "window": 256,
    },
    _34108_m256={
        "M": 256, "N": 34108, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 8, "probes": 8, "window": 16,
    },
    _10M_m16={
        "M": 16, "N": 10_000_000, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 14, "probes": 16, "window": 16,
    },
    _10M_m1024={
        "M": 1024, "N": 10_000_000, "K": 64, "G": 12, "float_bytes": 2, "sign_bits": 14, "probes": 16, "window": 16,
    },
)  # fmt: skip

NEW_CODES = sizes(tiny=CODES["tiny"], _34108=CODES["34108_m256"], _10M=CODES["10M_m16"])


def vectors(s: Shape) -> int:
    """Return the bytes of M vectors and of the id of each."""
    return s["M"] * (s["float_bytes"] * s["K"] + 8)


def candidates(s: Shape) -> int:
    """Return how many candidates M vectors have together."""
    return s["M"] * s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])


# fmt: off
OPS = (
    OpRow(
        "initial_codebook", "codebook", EXACT, NEW_CODES,
        bytes_min=state,
        ops_min=lambda s: dither_ops(groups(s), s["G"]) + 4 * elements(s),
        capturable=False,
    ),
    OpRow(
        "nearest_codes", "codebook", EXACT, CODES,
        bytes_min=lambda s: values(s) + vectors(s),
        ops_min=lambda s: 2 * s["M"] * s["N"] * s["K"],
        like=lambda z, weight: z.new_empty(z.shape[:-1], dtype=torch.int64),
    ),
    OpRow(
        "candidate_codes", "codebook", EXACT, CODES,
        bytes_min=lambda s: s["M"] * s["float_bytes"] * s["sign_bits"] + 8 * candidates(s),
        ops_min=candidates,
    ),
    OpRow(
        "nearest_candidates", "codebook", EXACT, CODES,
        bytes_min=lambda s: vectors(s) + candidates(s) * (8 + values({**s, "N": 1})),
        ops_min=lambda s: 2 * candidates(s) * s["K"],
    ),
    OpRow(
        "count_codes", "codebook", EXACT, CODES,
        bytes_min=lambda s: s["M"] * (8 + 4),
        ops_min=lambda s: s["M"],
    ),
    OpRow(
        "revival_vectors", "codebook", EXACT, CODES,
        bytes_min=lambda s: vectors(s) + s["M"] * values({**s, "N": 1}) + s["window"] * (2 + 8),
        ops_min=lambda s: 4 * s["M"] * s["K"],
    ),
    OpRow(
        "revive_codes", "codebook", EXACT, CODES,
        bytes_min=lambda s: s["window"] * (8 + s["float_bytes"] * s["K"] + state({**s, "N": 1})),
        ops_min=lambda s: 4 * s["window"] * s["K"],
    ),
    OpRow(
        "age_codes", "codebook", EXACT, CODES,
        bytes_min=lambda s: s["window"] * (8 + 4),
        ops_min=lambda s: 2 * s["window"],
    ),
)
# fmt: on
