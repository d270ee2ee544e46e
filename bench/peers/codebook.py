"""Chunked matrix product and argmin in torch: what finds the nearest row of a table that has been decoded.

Legend: as in bench/inputs; M vectors, N codes, K code width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Arguments, Sizes
from bench.peers import Peer, dense

CHUNK = 1 << 26
"""Scores of a chunk: 256 MiB."""


def _query(z: Tensor) -> Tensor:
    """Return z in whole sixteenths, exact in bfloat16: the same numbers that the op compares."""
    return (z.float() * 16).clamp(-127, 127).round().to(torch.bfloat16)


def _decoded(weight: Any) -> tuple[Tensor, Tensor]:
    """Return the table as the search sees it in bfloat16, which is exact, and 8 |c|^2."""
    table = dense(weight.with_tensors(exponents=weight.exponents.clamp(-5, 2)), torch.bfloat16)
    halves = torch.cat([8 * part.float().square().sum(dim=1) for part in table.split(1 << 20)])
    return table, halves


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a product with float32 sums written out."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def _nearest(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    z, weight = arguments[0]
    table, halves = _decoded(weight)
    rows = max(1, CHUNK // z.shape[0])

    def search() -> Tensor:
        query = _query(z)
        best = torch.full((z.shape[0],), -torch.inf, device=z.device)
        ids = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        for first in range(0, table.shape[0], rows):
            scores = _product(query, table[first : first + rows].T).sub_(halves[first : first + rows])
            top, place = scores.max(dim=1)
            ids = torch.where(top > best, place + first, ids)
            best = torch.maximum(top, best)
        return ids

    return search


def _among(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    z, weight, candidates = arguments[0]
    table, halves = _decoded(weight)
    more = torch.iinfo(torch.int64).max

    def search() -> Tensor:
        named, query = candidates.clamp(min=0), _query(z)[:, :, None]
        if z.device.type == "cuda":
            products = torch.bmm(table[named], query, out_dtype=torch.float32).squeeze(2)
        else:
            products = (table[named].float() @ query.float()).squeeze(2)
        scores = (products - halves[named]).masked_fill(candidates < 0, -torch.inf)
        return torch.where(scores == scores.amax(dim=1, keepdim=True), candidates, more).amin(dim=1)

    return search


def _candidates(s: Sizes) -> int:
    return s["M"] * s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])


def _scatter(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    counts, ids = arguments[0][0].clone(), arguments[0][1]
    ones = torch.ones_like(ids, dtype=torch.int16)
    return lambda: counts.scatter_add_(0, ids, ones)


_DECODED = "needs the decoded table, 2 bytes a weight"

PEERS = {
    "nearest_codes": (
        Peer(
            "decoded table, chunks",
            _nearest,
            lambda s: s["N"] * (2 * s["K"] + 4) + s["M"] * (s["float_bytes"] * s["K"] + 8),
            note=_DECODED + "; writes and reads the scores of a chunk",
        ),
    ),
    "nearest_candidates": (
        Peer(
            "decoded table, gather",
            _among,
            lambda s: _candidates(s) * (8 + 2 * s["K"] + 4) + s["M"] * (s["float_bytes"] * s["K"] + 8),
            note=_DECODED,
        ),
    ),
    "count_codes": (
        Peer(
            "scatter_add",
            _scatter,
            lambda s: s["M"] * (8 + 4),
            note="with atomics; wraps where the op saturates",
        ),
    ),
}
"""Peers by op."""
