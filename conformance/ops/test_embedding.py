"""Laws of the embedding table: rows gathered exactly, gradients summed first and voted once, other rows untouched."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.ops.packing import trits_of
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.cases import compare
from conformance.cases.case import Case
from conformance.cases.core import id_tensors
from conformance.compare import exact, unsigned_zeros
from conformance.law import law
from conformance.subject import Subject


@law(weight=ss.weights(limit=70), dtype=ss.DTYPES, data=st.data())
def test_embedding_by_row(
    ops: Subject, weight: TernaryWeight, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Each id gives its row: a row starts in the middle of a packed byte, and its groups start at its first column."""
    ids = data.draw(id_tensors(weight.shape[0]))
    want = torch.tensor(oracle.dense(weight), dtype=torch.float64)[ids].to(dtype)
    exact(ops.embedding(ids, weight, dtype=dtype), want + 0.0)


@law(
    num_rows=st.sampled_from((1, 5, 300, 2**40)),
    dtype=ss.DTYPES,
    width=st.sampled_from((1, 12, 33)),
    data=st.data(),
)
def test_embedding_row_grads_by_row(
    ops: Subject, num_rows: int, dtype: torch.dtype, width: int, data: st.DataObject
) -> None:
    """Slots hold the used rows in ascending order and the sum of their gradients; the rest hold -1 and zeros."""
    ids = data.draw(id_tensors(num_rows))
    grad = data.draw(ss.activations((*ids.shape, width), dtype, exact=True))
    sums: dict[int, Tensor] = {}
    for row, values in zip(
        ids.flatten().tolist(), grad.reshape(ids.numel(), width).to(torch.float64), strict=True
    ):
        sums[row] = sums.get(row, torch.zeros(width, dtype=torch.float64)) + values
    unused = ids.numel() - len(sums)
    rows = torch.tensor(sorted(sums) + [-1] * unused, dtype=torch.int64)
    summed = torch.zeros(ids.numel(), width, dtype=torch.float64)
    for slot, row in enumerate(sorted(sums)):
        summed[slot] = sums[row]
    exact(
        unsigned_zeros(ops.embedding_row_grads(ids, grad)), (rows, unsigned_zeros(summed.to(torch.float32)))
    )


@law(ids=ss.skewed_ids(), width=st.sampled_from((1, 12, 33)), dtype=ss.DTYPES, data=st.data())
def test_embedding_row_grads_of_frequent_rows(
    ops: Subject, ids: Tensor, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A row that hundreds of positions name, beside rows that a few do."""
    exact_sums = data.draw(st.booleans(), label="exact")
    grad = data.draw(ss.activations((len(ids), width), dtype, exact=exact_sums))
    compare(ops, "embedding_row_grads", Case((ids, grad), sums_exact=exact_sums))


@law(width=st.sampled_from((1, 12, 33)), data=st.data())
def test_embedding_row_grads_ignore_the_order(ops: Subject, width: int, data: st.DataObject) -> None:
    ids = data.draw(id_tensors(5)).flatten()
    grad = data.draw(ss.activations((ids.numel(), width), torch.float32, exact=True))
    order = torch.randperm(ids.numel(), generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    first, second = ops.embedding_row_grads(ids, grad), ops.embedding_row_grads(ids[order], grad[order])
    exact(unsigned_zeros(first), unsigned_zeros(second))


@law(weight=ss.weights(limit=40), clock=ss.clocks(), data=st.data())
def test_embedding_update_is_the_dense_update(
    ops: Subject, weight: TernaryWeight, clock: dict[str, Any], data: st.DataObject
) -> None:
    """Duplicates are summed before they vote: the sparse update equals the dense one, which sums by position.

    Rows that no id names have a gradient of zero in the dense update, and cast no votes: they keep every byte in both.
    """
    ids = data.draw(id_tensors(weight.shape[0]))
    grad = data.draw(ss.activations((*ids.shape, weight.shape[1]), torch.float32, exact=True))
    if not ids.numel():
        return
    rows, row_grads = ops.embedding_row_grads(ids, grad)
    sparse = ops.accumulate_gradient(weight, row_grads, 1.0, rows=rows, **clock)
    total = torch.zeros(weight.shape).index_add_(0, ids.flatten(), grad.reshape(-1, weight.shape[1]))
    exact(sparse, ops.accumulate_gradient(weight, total, 1.0, **clock))
    untouched = torch.ones(weight.shape[0], dtype=torch.bool)
    untouched[ids.flatten()] = False
    stepped = ops.apply_step(sparse, theta=1, theta_e=1, rows=rows)
    for name in ("exponents", "trit_accum", "exponent_accum"):
        exact(
            stepped.tensors()[name][untouched], weight.tensors()[name][untouched], f"{name} of untouched rows"
        )
    exact(trits_of(stepped)[untouched], trits_of(weight)[untouched], "trits of untouched rows")
