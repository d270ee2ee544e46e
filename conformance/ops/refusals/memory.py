"""Calls of the family memory that must be refused."""

from __future__ import annotations

import torch

from conformance.ops.refusals.refusal import I8, Refusal, ids, meta, ones, refused, scalar

I64 = torch.int64
_NGRAM = {"order": 2, "num_rows": 5, "salt": 0}
_TOUCH = {"gain": 8, "first": 0, "window": 2, "shift": 2}
_CODES = ones(2, 3, dtype=I64)
_TABLE = ones(4, dtype=I8)

# fmt: off
REFUSALS: tuple[Refusal, ...] = (
    refused("ngram_rows", "int32 codes", TypeError, "codes_BP", ones(2, 3, dtype=torch.int32), **_NGRAM),
    refused("ngram_rows", "one dimension", ValueError, "codes_BP", ids(1, 2), **_NGRAM),
    refused("ngram_rows", "code -2", ValueError, "codes_BP", lambda: torch.full((2, 3), -2), **_NGRAM),
    refused("ngram_rows", "code 2**32", ValueError, "codes_BP", lambda: torch.full((2, 3), 2**32), **_NGRAM),
    refused("ngram_rows", "order 0", ValueError, "order", _CODES, **{**_NGRAM, "order": 0}),
    refused("ngram_rows", "order 17", ValueError, "order", _CODES, **{**_NGRAM, "order": 17}),
    refused("ngram_rows", "order 2.0", TypeError, "order", _CODES, **{**_NGRAM, "order": 2.0}),
    refused("ngram_rows", "no rows", ValueError, "num_rows", _CODES, **{**_NGRAM, "num_rows": 0}),
    refused("ngram_rows", "2**31 rows", ValueError, "num_rows", _CODES, **{**_NGRAM, "num_rows": 2**31}),
    refused("ngram_rows", "salt -1", ValueError, "salt", _CODES, **{**_NGRAM, "salt": -1}),
    refused("ngram_rows", "salt 2**32", ValueError, "salt", _CODES, **{**_NGRAM, "salt": 2**32}),
    refused("ngram_rows", "two previous for order 2", ValueError, "previous", _CODES, **_NGRAM, previous=ones(2, 2, dtype=I64)),
    refused("ngram_rows", "previous of another batch", ValueError, "previous", _CODES, **_NGRAM, previous=ones(1, 1, dtype=I64)),
    refused("ngram_rows", "int32 previous", TypeError, "previous", _CODES, **_NGRAM, previous=ones(2, 1, dtype=torch.int32)),
    refused("ngram_rows", "previous elsewhere", ValueError, "previous", _CODES, **_NGRAM, previous=meta(2, 1, dtype=I64)),
    refused("ngram_rows", "previous code -2", ValueError, "previous", _CODES, **_NGRAM, previous=lambda: torch.full((2, 1), -2)),
    refused("touch_strengths", "int16 strengths", TypeError, "strengths", ones(4, dtype=torch.int16), ids(0), **_TOUCH),
    refused("touch_strengths", "two dimensions", ValueError, "strengths", ones(2, 2, dtype=I8), ids(0), **_TOUCH),
    refused("touch_strengths", "no strengths", ValueError, "strengths", ones(0, dtype=I8), ids(), **{**_TOUCH, "window": 0}),
    refused("touch_strengths", "int32 rows", TypeError, "rows", _TABLE, ones(2, dtype=torch.int32), **_TOUCH),
    refused("touch_strengths", "row N", ValueError, "rows", _TABLE, ids(4), **_TOUCH),
    refused("touch_strengths", "row -2", ValueError, "rows", _TABLE, ids(-2), **_TOUCH),
    refused("touch_strengths", "rows elsewhere", ValueError, "rows", _TABLE, meta(2, dtype=I64), **_TOUCH),
    refused("touch_strengths", "gain -1", ValueError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": -1}),
    refused("touch_strengths", "gain 128", ValueError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": 128}),
    refused("touch_strengths", "gain 1.0", TypeError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": 1.0}),
    refused("touch_strengths", "shift 8", ValueError, "shift", _TABLE, ids(0), **{**_TOUCH, "shift": 8}),
    refused("touch_strengths", "window 5 of 4", ValueError, "window", _TABLE, ids(0), **{**_TOUCH, "window": 5}),
    refused("touch_strengths", "first -1", ValueError, "first", _TABLE, ids(0), **{**_TOUCH, "first": -1}),
    refused("touch_strengths", "first tensor -1", ValueError, "first", _TABLE, ids(0), **{**_TOUCH, "first": scalar(-1)}),
    refused("touch_strengths", "another out", ValueError, "out", _TABLE, ids(0), **_TOUCH, out=ones(3, dtype=I8)),
    refused("touch_strengths", "int16 out", TypeError, "out", _TABLE, ids(0), **_TOUCH, out=ones(4, dtype=torch.int16)),
    refused("touch_strengths", "out elsewhere", ValueError, "out", _TABLE, ids(0), **_TOUCH, out=meta(4, dtype=I8)),
)
# fmt: on
"""Every call that must be refused."""
