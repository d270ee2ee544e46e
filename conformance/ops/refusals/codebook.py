"""Calls of the family codebook that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from arbitor.reference.types import TernaryWeight
from conformance.ops.refusals.refusal import CLOCK, F16, Refusal, ids, meta, ones, refused, scalar, weight

_START = {"sign_bits": 1, "seed": 0, "tensor_id": 0}
_SEARCH = {"num_codes": 8, "sign_bits": 2, "num_probes": 2}
_WINDOW = {"first": 0, "window": 2}
_REVIVE = {**_WINDOW, **CLOCK}


def wide() -> TernaryWeight:
    """Return codes of 129 columns."""
    return weight(2, 129)


def with_mantissa() -> TernaryWeight:
    """Return codes with a mantissa bit."""
    return replace(weight(), mantissa_bits=1)


def counts(num_codes: int = 3, dtype: torch.dtype = torch.int16) -> Callable[[], torch.Tensor]:
    """Return a maker of counters of use."""
    return ones(num_codes, dtype=dtype)


REFUSALS: tuple[Refusal, ...] = (
    refused("initial_codebook", "129 columns", ValueError, "shape", (4, 129), **_START),
    refused("initial_codebook", "more sign bits than columns", ValueError, "sign_bits", (4, 1), **{**_START, "sign_bits": 2}),
    refused("initial_codebook", "more buckets than codes", ValueError, "sign_bits", (3, 9), **{**_START, "sign_bits": 2}),
    refused("initial_codebook", "group 7", ValueError, "group_size", (4, 9), **_START, group_size=7),
    refused("initial_codebook", "no codes", ValueError, "shape", (0, 9), **_START),
    refused("initial_codebook", "2**33 groups", ValueError, "shape", (2**31, 48), **_START),
    refused("initial_codebook", "seed -1", ValueError, "seed", (4, 9), **{**_START, "seed": -1}),
    refused("nearest_codes", "129 columns", ValueError, "weight", ones(2, 129), wide),
    refused("nearest_codes", "mantissa bits", ValueError, "mantissa_bits", ones(2, 14), with_mantissa),
    refused("nearest_codes", "13 columns", ValueError, "z", ones(2, 13), weight),
    refused("nearest_codes", "a scalar", ValueError, "z", ones(), weight),
    refused("nearest_codes", "float16", TypeError, "z", ones(2, 14, dtype=F16), weight),
    refused("nearest_codes", "another device", ValueError, "z", meta(2, 14), weight),
    refused("candidate_codes", "int64", TypeError, "z", ones(2, 9, dtype=torch.int64), **_SEARCH),
    refused("candidate_codes", "no columns", ValueError, "z", ones(2, 0), **_SEARCH),
    refused("candidate_codes", "no codes", ValueError, "num_codes", ones(2, 9), **{**_SEARCH, "num_codes": 0}),
    refused("candidate_codes", "more buckets than codes", ValueError, "sign_bits", ones(2, 9), **{**_SEARCH, "num_codes": 3}),
    refused("candidate_codes", "sign bits -1", ValueError, "sign_bits", ones(2, 9), **{**_SEARCH, "sign_bits": -1}),
    refused("candidate_codes", "no probes", ValueError, "num_probes", ones(2, 9), **{**_SEARCH, "num_probes": 0}),
    refused("candidate_codes", "5 probes of 4", ValueError, "num_probes", ones(2, 9), **{**_SEARCH, "num_probes": 5}),
    refused("nearest_candidates", "129 columns", ValueError, "weight", ones(1, 129), wide, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "mantissa bits", ValueError,
            "mantissa_bits", ones(1, 14), with_mantissa, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "float16", TypeError, "z", ones(1, 14, dtype=F16), weight, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "int32", TypeError, "candidates", ones(1, 14), weight, ones(1, 2, dtype=torch.int32)),
    refused("nearest_candidates", "other vectors", ValueError,
            "candidates", ones(2, 14), weight, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "one dimension", ValueError, "candidates", ones(2, 14), weight, ids(0, 1)),
    refused("nearest_candidates", "code N", ValueError, "candidates", ones(14), weight, ids(0, 3)),
    refused("nearest_candidates", "code -2", ValueError, "candidates", ones(14), weight, ids(0, -2)),
    refused("nearest_candidates", "another device", ValueError,
            "candidates", ones(1, 14), weight, meta(1, 2, dtype=torch.int64)),
    refused("count_codes", "int32 counters", TypeError, "usage", counts(3, torch.int32), ids(0)),
    refused("count_codes", "no counters", ValueError, "usage", counts(0), ids()),
    refused("count_codes", "two dimensions", ValueError, "usage", ones(3, 1, dtype=torch.int16), ids(0)),
    refused("count_codes", "int32 ids", TypeError, "ids", counts(), ones(2, dtype=torch.int32)),
    refused("count_codes", "id N", ValueError, "ids", counts(), ids(3)),
    refused("count_codes", "id -2", ValueError, "ids", counts(), ids(-2)),
    refused("count_codes", "another device", ValueError, "ids", counts(), meta(2, dtype=torch.int64)),
    refused("count_codes", "out of 4", ValueError, "out", counts(), ids(0), out=counts(4)),
    refused("count_codes", "out int32", TypeError, "out", counts(), ids(0), out=counts(3, torch.int32)),
    refused("revive_codes", "129 columns", ValueError, "weight", wide, counts(2), ones(2, 129), **_REVIVE),
    refused("revive_codes", "mantissa bits", ValueError, "mantissa_bits", with_mantissa, counts(), ones(2, 14), **_REVIVE),
    refused("revive_codes", "counters of 4", ValueError, "usage", weight, counts(4), ones(2, 14), **_REVIVE),
    refused("revive_codes", "int8 counters", TypeError, "usage", weight, counts(3, torch.int8), ones(2, 14), **_REVIVE),
    refused("revive_codes", "13 columns", ValueError, "z_RC", weight, counts(), ones(2, 13), **_REVIVE),
    refused("revive_codes", "three dimensions", ValueError, "z_RC", weight, counts(), ones(1, 2, 14), **_REVIVE),
    refused("revive_codes", "float16", TypeError, "z_RC", weight, counts(), ones(2, 14, dtype=F16), **_REVIVE),
    refused("revive_codes", "another device", ValueError, "z_RC", weight, counts(), meta(2, 14), **_REVIVE),
    refused("revive_codes", "a window of 4", ValueError,
            "window", weight, counts(), ones(2, 14), **{**_REVIVE, "window": 4}),
    refused("revive_codes", "first -1", ValueError, "first", weight, counts(), ones(2, 14), **{**_REVIVE, "first": -1}),
    refused("revive_codes", "first tensor -1", ValueError,
            "first", weight, counts(), ones(2, 14), **{**_REVIVE, "first": scalar(-1)}),
    refused("revive_codes", "step 2**32 - 1", ValueError,
            "step", weight, counts(), ones(2, 14), **{**_REVIVE, "step": 2**32 - 1}),
    refused("revive_codes", "more buckets than codes", ValueError,
            "sign_bits", weight, counts(), ones(2, 14), **_REVIVE, sign_bits=2),
    refused("revive_codes", "out of another shape", ValueError,
            "out", weight, counts(), ones(2, 14), **_REVIVE, out=lambda: weight(4)),
    refused("age_codes", "int32 counters", TypeError, "usage", counts(3, torch.int32), **_WINDOW),
    refused("age_codes", "a window of -1", ValueError, "window", counts(), first=0, window=-1),
    refused("age_codes", "a window of 4", ValueError, "window", counts(), first=0, window=4),
    refused("age_codes", "first 0.5", TypeError, "first", counts(), first=0.5, window=1),
    refused("age_codes", "first of two", ValueError, "first", counts(), first=ids(0, 1), window=1),
    refused("age_codes", "out of 4", ValueError, "out", counts(), **_WINDOW, out=counts(4)),
)  # fmt: skip
"""Every call that must be refused."""
