"""Calls of the family edges that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.ops.refusals.refusal import F16, I8, Refusal, ids, meta, ones, refused, weight

_BF16, _I32, _I64 = torch.bfloat16, torch.int32, torch.int64


def _slots(*values: int, dtype: torch.dtype = _I32) -> Callable[[], Tensor]:
    """Return a maker of one row of neighbours."""
    return lambda: torch.tensor([values], dtype=dtype)


def _out(*makers: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    """Return a maker of tables to write into."""
    return lambda: tuple(make() for make in makers)


_H, _ROW = ones(4, 5), ones(1, 2)
_TABLE, _SCORES = ones(3, 14, dtype=_I32), ones(3, 14, dtype=I8)
_PAIRS = (ids(0, 1), ids(2, 0))

REFUSALS: tuple[Refusal, ...] = (
    refused("edge_sum", "neighbour N", ValueError, "neighbours_RJ", _H, _slots(0, 4), _ROW),
    refused("edge_sum", "neighbour -2", ValueError, "neighbours_RJ", _H, _slots(0, -2), _ROW),
    refused("edge_sum", "int8 neighbours", TypeError, "neighbours_RJ", _H, _slots(0, 1, dtype=I8), _ROW),
    refused("edge_sum", "one dimension", ValueError, "neighbours_RJ", _H, ids(0, 1), ones(2)),
    refused("edge_sum", "no slots", ValueError, "neighbours_RJ", _H, ones(1, 0, dtype=_I32), ones(1, 0)),
    refused("edge_sum", "signs of another shape", ValueError, "signs_RJ", _H, _slots(0, 1), ones(2, 1)),
    refused("edge_sum", "signs of another dtype", TypeError, "signs_RJ", _H, _slots(0, 1), ones(1, 2, dtype=_BF16)),
    refused("edge_sum", "float16", TypeError, "h_ND", ones(4, 5, dtype=F16), _slots(0, 1), ones(1, 2, dtype=F16)),
    refused("edge_sum", "no columns", ValueError, "h_ND", ones(4, 0), _slots(0, 1), _ROW),
    refused("edge_sum", "no nodes", ValueError, "h_ND", ones(0, 5), _slots(-1, -1), _ROW),
    refused("edge_sum", "another device", ValueError, "neighbours_RJ", _H, meta(1, 2, dtype=_I32), _ROW),
    refused("edge_sum", "signs elsewhere", ValueError, "signs_RJ", _H, _slots(0, 1), meta(1, 2)),
    refused("edge_sum_input_grad", "neighbour N", ValueError,
            "neighbours_RJ", ones(1, 5), _slots(0, 4), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "no nodes", ValueError,
            "num_nodes", ones(1, 5), _slots(-1, -1), _ROW, num_nodes=0),
    refused("edge_sum_input_grad", "nodes that are no integer", TypeError,
            "num_nodes", ones(1, 5), _slots(0, 1), _ROW, num_nodes=4.0),
    refused("edge_sum_input_grad", "other rows", ValueError,
            "grad_RD", ones(2, 5), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "a vector", ValueError, "grad_RD", ones(1), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "float16", TypeError,
            "grad_RD", ones(1, 5, dtype=F16), _slots(0, 1), _ROW, num_nodes=4),
    refused("edge_sum_input_grad", "signs of another dtype", TypeError,
            "signs_RJ", ones(1, 5), _slots(0, 1), ones(1, 2, dtype=_BF16), num_nodes=4),
    refused("edge_sum_sign_grad", "neighbour -2", ValueError, "neighbours_RJ", ones(1, 5), _H, _slots(0, -2)),
    refused("edge_sum_sign_grad", "other columns", ValueError, "grad_RD", ones(1, 6), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "two dtypes", TypeError, "h_ND", ones(1, 5, dtype=_BF16), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "other rows", ValueError, "grad_RD", ones(2, 5), _H, _slots(0, 1)),
    refused("edge_sum_sign_grad", "two devices", ValueError, "h_ND", ones(1, 5), meta(4, 5), _slots(0, 1)),
    refused("update_neighbours", "source N", ValueError, "sources_M", _TABLE, _SCORES, weight, ids(0, 3), ids(1, 1)),
    refused("update_neighbours", "source -2", ValueError, "sources_M", _TABLE, _SCORES, weight, ids(-2), ids(1)),
    refused("update_neighbours", "target N", ValueError, "targets_M", _TABLE, _SCORES, weight, ids(0), ids(3)),
    refused("update_neighbours", "target 2**31", ValueError,
            "targets_M", _TABLE, _SCORES, weight, ids(0), ids(2**31), allow_loops=True),
    refused("update_neighbours", "target -2", ValueError,
            "targets_M", _TABLE, _SCORES, weight, ids(0), ids(-2), allow_loops=True),
    refused("update_neighbours", "more targets", ValueError, "targets_M", _TABLE, _SCORES, weight, ids(0), ids(1, 2)),
    refused("update_neighbours", "a matrix of pairs", ValueError,
            "sources_M", _TABLE, _SCORES, weight, ones(1, 1, dtype=_I64), ones(1, 1, dtype=_I64)),
    refused("update_neighbours", "int32 pairs", TypeError,
            "sources_M", _TABLE, _SCORES, weight, ones(1, dtype=_I32), ids(1)),
    refused("update_neighbours", "int64 neighbours", TypeError,
            "neighbours_NJ", ones(3, 14, dtype=_I64), _SCORES, weight, *_PAIRS),
    refused("update_neighbours", "17 slots", ValueError,
            "neighbours_NJ", ones(3, 17, dtype=_I32), ones(3, 17, dtype=I8), lambda: weight(3, 17), *_PAIRS),
    refused("update_neighbours", "scores of another shape", ValueError,
            "scores_NJ", _TABLE, ones(3, 13, dtype=I8), weight, *_PAIRS),
    refused("update_neighbours", "int16 scores", TypeError,
            "scores_NJ", _TABLE, ones(3, 14, dtype=torch.int16), weight, *_PAIRS),
    refused("update_neighbours", "signs of another shape", ValueError,
            "signs", _TABLE, _SCORES, lambda: weight(3, 13), *_PAIRS),
    refused("update_neighbours", "a number for a flag", TypeError,
            "allow_loops", _TABLE, _SCORES, weight, *_PAIRS, allow_loops=1),
    refused("update_neighbours", "pairs elsewhere", ValueError,
            "sources_M", _TABLE, _SCORES, weight, meta(2, dtype=_I64), meta(2, dtype=_I64)),
    refused("update_neighbours", "out that is no tuple", TypeError,
            "out", _TABLE, _SCORES, weight, *_PAIRS, out=weight),
    refused("update_neighbours", "out of another shape", ValueError,
            "out[1]", _TABLE, _SCORES, weight, *_PAIRS, out=_out(_TABLE, ones(3, 13, dtype=I8), weight)),
    refused("update_neighbours", "signs to write into that do not fit", ValueError,
            "out", _TABLE, _SCORES, weight, *_PAIRS, out=_out(_TABLE, _SCORES, lambda: weight(4))),
)  # fmt: skip
"""Every call that must be refused."""
