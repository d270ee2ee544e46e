"""Edges by torch: a CSR matrix times the nodes, index_add of messages, a gather and a product.

Legend: as in bench/inputs; E = M * J edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Arguments, Sizes
from bench.peers import Peer


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return edges as a CSR matrix. On a CPU, where torch has no such product in bfloat16, in float32."""
    order = rows.sort(stable=True).indices
    starts = torch.searchsorted(rows[order], torch.arange(shape[0] + 1, device=rows.device))
    values = values if values.is_cuda else values.float()
    parts = (starts.to(torch.int32), columns[order].to(torch.int32), values[order])
    return torch.sparse_csr_tensor(*parts, shape, check_invariants=False)


def _product(matrix: Tensor, vectors: Tensor) -> Callable[[], Any]:
    """Return the call that multiplies, in the dtype of the vectors."""
    if vectors.is_cuda:
        return lambda: matrix @ vectors
    return lambda: (matrix @ vectors.float()).to(vectors.dtype)


def _entries(neighbours: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, node and value of each edge; an empty slot is an entry of 0 at node 0."""
    rows = torch.arange(neighbours.shape[0], device=neighbours.device).repeat_interleave(neighbours.shape[1])
    values = torch.where(neighbours < 0, 0.0, signs).reshape(-1)
    return rows, neighbours.clamp(min=0).reshape(-1).to(torch.int64), values


def _csr(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    h, neighbours, signs = arguments[0]
    rows, nodes, values = _entries(neighbours, signs)
    return _product(_matrix(rows, nodes, values, (neighbours.shape[0], h.shape[0])), h)


def _gather(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    h, neighbours, signs = arguments[0]
    ids, used = neighbours.clamp(min=0).to(torch.int64), torch.where(neighbours < 0, 0.0, signs)
    return lambda: torch.bmm(used[:, None], h[ids])[:, 0]


def _csr_back(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, neighbours, signs), options = arguments
    rows, nodes, values = _entries(neighbours, signs)
    return _product(_matrix(nodes, rows, values, (options["num_nodes"], neighbours.shape[0])), grad)


def _index_add(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, neighbours, signs), options = arguments
    ids, used = neighbours.clamp(min=0).reshape(-1), torch.where(neighbours < 0, 0.0, signs)
    shape = (options["num_nodes"], grad.shape[1])

    def run() -> Tensor:
        messages = (used[..., None] * grad[:, None]).flatten(0, 1)
        return torch.zeros(shape, dtype=grad.dtype, device=grad.device).index_add_(0, ids, messages)

    return run


def _products(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, h, neighbours = arguments[0]
    ids, used = neighbours.clamp(min=0).to(torch.int64), neighbours >= 0
    return lambda: torch.bmm(h[ids], grad[..., None])[..., 0] * used


def _edges(s: Sizes) -> int:
    return s["M"] * s["J"]


def _csr_bytes(s: Sizes) -> int:
    nodes = min(s["N"], _edges(s))
    return _edges(s) * (4 + s["float_bytes"]) + 4 * s["M"] + s["float_bytes"] * s["K"] * (s["M"] + nodes)


def _back_bytes(s: Sizes) -> int:
    return _edges(s) * (4 + s["float_bytes"]) + s["float_bytes"] * s["K"] * (s["M"] + s["N"])


def _messages(s: Sizes) -> int:
    """Return the bytes of messages written and read once, one for each edge."""
    return 2 * s["float_bytes"] * s["K"] * _edges(s)


_GIVEN = "the matrix is made before the clock starts"
_ATOMICS = "adds bfloat16 by atomics: other bits on every run"

PEERS = {
    "edge_sum": (
        Peer("CSR product bf16", _csr, _csr_bytes, note=_GIVEN),
        Peer("gather + bmm bf16", _gather, lambda s: _csr_bytes(s) + _messages(s)),
    ),
    "edge_sum_input_grad": (
        Peer("CSR product bf16", _csr_back, _back_bytes, note=_GIVEN + ", transposed"),
        Peer("index_add bf16", _index_add, lambda s: _back_bytes(s) + _messages(s), note=_ATOMICS),
    ),
    "edge_sum_sign_grad": (
        Peer("gather + bmm bf16", _products, lambda s: _csr_bytes(s) + _messages(s), note="writes bfloat16"),
    ),
}
"""Peers by op."""
