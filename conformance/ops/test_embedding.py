"""Laws of the embedding table: rows gathered exactly, gradients summed first and voted once, other rows untouched."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.ops.packing import trits_of
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls, compare
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, I8, ids, ones, refusals, refused, weight
from ..subject import Subject
from .test_scale import ROWS_IN_ORDER
from .test_update_step import STEP_MOVES_EVERY_ROW

mutant = mutants_of("embedding")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def id_tensors(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw ids with duplicates, in one or two dimensions, none at all among them."""
    shape = draw(st.sampled_from(((), (0,), (1,), (17,), (3, 11), (64,))))
    choice = torch.randint(num_rows, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    return choice // draw(st.sampled_from((1, 3, 1000)), label="duplicates")


@calls("embedding")
def embedding_calls(draw: st.DrawFn) -> Case:
    weight = draw(ss.weights())
    return Case((draw(id_tensors(weight.shape[0])), weight), {"dtype": draw(ss.DTYPES)})


@calls("embedding_row_grads")
def embedding_row_grads_calls(draw: st.DrawFn) -> Case:
    exact_sums = draw(st.booleans(), label="exact")
    ids = draw(id_tensors(draw(st.sampled_from((1, 5, 300, 2**40)))))
    shape = (*ids.shape, draw(st.deferred(ss.sizes)))
    return Case((ids, draw(ss.activations(shape, draw(ss.DTYPES), exact=exact_sums))), sums_exact=exact_sums)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


@law(
    weight=ss.weights(limit=70),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        ROWS_IN_ORDER,
        mutant(
            "embedding_by_position",
            "rows=ids.reshape(-1)",
            "rows=ids.reshape(-1).sort().values",
            compared="embedding",
        ),
    ],
)
def test_embedding_by_row(
    ops: Subject, weight: TernaryWeight, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Each id gives its row: a row starts in the middle of a packed byte, and its groups start at its first column."""
    ids = data.draw(id_tensors(weight.shape[0]))
    want = torch.tensor(oracle.dense(weight), dtype=torch.float64)[ids].to(dtype)
    exact(ops.embedding(ids, weight, dtype=dtype), want + 0.0)


DUPLICATES_KEEP_THE_LAST = mutant(
    "duplicates_keep_the_last",
    "sums.index_add_(0, slots, grad.reshape(-1, grad.shape[-1]).to(torch.float64))",
    "sums[slots] = grad.reshape(-1, grad.shape[-1]).to(torch.float64)",
    compared="embedding_row_grads",
)


@law(
    num_rows=st.sampled_from((1, 5, 300, 2**40)),
    dtype=ss.DTYPES,
    width=st.sampled_from((1, 12, 33)),
    data=st.data(),
    rejects=[
        DUPLICATES_KEEP_THE_LAST,
        mutant(
            "duplicates_averaged",
            "return rows, sums.to(",
            "return rows, (sums / slots.bincount(minlength=max(1, ids.numel()))[: ids.numel(), None].clamp(min=1)).to(",
            compared="embedding_row_grads",
        ),
        mutant(
            "unused_slots_are_row_zero",
            "(ids.numel(),), -1,",
            "(ids.numel(),), 0,",
            compared="embedding_row_grads",
        ),
    ],
)
def test_embedding_row_grads_by_row(
    ops: Subject, num_rows: int, dtype: torch.dtype, width: int, data: st.DataObject
) -> None:
    """Slots hold the used rows in ascending order and the sum of their gradients. Other slots hold -1 and zeros."""
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
    same_sums(ops.embedding_row_grads(ids, grad), (rows, summed.to(torch.float32)))


@law(
    ids=ss.skewed_ids(),
    width=st.sampled_from((1, 12, 33)),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[DUPLICATES_KEEP_THE_LAST],
)
def test_embedding_row_grads_of_frequent_rows(
    ops: Subject, ids: Tensor, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A row that hundreds of positions name, beside rows that a few do."""
    exact_sums = data.draw(st.booleans(), label="exact")
    grad = data.draw(ss.activations((len(ids), width), dtype, exact=exact_sums))
    compare(ops, "embedding_row_grads", Case((ids, grad), sums_exact=exact_sums))


@law(width=st.sampled_from((1, 12, 33)), data=st.data(), rejects=[DUPLICATES_KEEP_THE_LAST])
def test_embedding_row_grads_ignore_the_order(ops: Subject, width: int, data: st.DataObject) -> None:
    ids = data.draw(id_tensors(5)).flatten()
    grad = data.draw(ss.activations((ids.numel(), width), torch.float32, exact=True))
    order = torch.randperm(ids.numel(), generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    first, second = ops.embedding_row_grads(ids, grad), ops.embedding_row_grads(ids[order], grad[order])
    same_sums(first, second)


@law(
    weight=ss.weights(limit=40),
    clock=ss.clocks(),
    data=st.data(),
    rejects=[STEP_MOVES_EVERY_ROW, DUPLICATES_KEEP_THE_LAST],
)
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


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_embedding = refusals(
    "embedding",
    refused("embedding", "id N", ValueError, "ids", ids(3), weight),
    refused("embedding", "id -1", ValueError, "ids", ids(-1), weight),
    refused("embedding", "int32 ids", TypeError, "ids", ones(2, dtype=torch.int32), weight),
    refused("embedding", "float16", TypeError, "dtype", ids(0), weight, dtype=lambda: F16),
    refused("embedding_row_grads", "id -1", ValueError, "ids", ids(-1), ones(1, 4)),
    refused("embedding_row_grads", "int32 ids", TypeError, "ids", ones(2, dtype=torch.int32), ones(2, 4)),
    refused("embedding_row_grads", "no columns", ValueError, "grad", ids(0, 1), ones(2, 0)),
    refused("embedding_row_grads", "other positions", ValueError, "grad", ids(0, 1), ones(3, 4)),
    refused("embedding_row_grads", "int8", TypeError, "grad", ids(0, 1), ones(2, 4, dtype=I8)),
    rejects=[
        mutant("embedding_ids_unchecked", 'checks.values_between("ids", ids, 0, weight.shape[0] - 1)', "pass"),
        mutant("row_grad_ids_unchecked", 'checks.values_between("ids", ids, 0, 2**63 - 1)', "pass"),
    ],
)
# fmt: on
