"""Embedding: rows of a ternary table, and the gradients of the rows that a batch used. Only those rows get votes.

Legend: N table entries (rows), K width, R = number of ids in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.promises import op
from arbitor.reference.types import TernaryWeight

__all__ = ["embedding", "embedding_row_grads"]


@op
def embedding(ids: Tensor, weight: TernaryWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the table rows that the ids name.

    Math:    y[..., k] = W[id, k]
    Shapes:  ids int64 [...], each in 0 .. N - 1
    Returns: `dtype` [..., K], exact
    Raises:  TypeError or ValueError for a dtype, device or id that is not allowed
    Source:  docs/spec/embedding.md; REFACTOR7 (ByteEmbedding), REFACTOR14 (sparse rows)
    """
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.same_device(weight=weight.packed, ids=ids)
    checks.values_between("ids", ids, 0, weight.shape[0] - 1)
    return dequantize(weight, dtype=dtype, rows=ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


@op
def embedding_row_grads(ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that a batch used, and the gradient of each, summed over all its uses.

    Math:    dW[row] = sum over positions with id = row of dy, in float64, rounded once
    Shapes:  ids int64 [...], each >= 0; grad float32, bfloat16 or float64 [..., K]; R = number of ids
    Returns: rows int64 [R] and float32 [R, K] (float64 for float64 inputs): slot r holds the r-th smallest used row.
             The slots that duplicates leave over hold -1 and zeros, so that output shapes depend on input shapes alone
    Raises:  TypeError or ValueError for a dtype, shape, device or id that is not allowed
    Laws:    permuting positions changes nothing when sums are exact; sums over all slots and all positions agree
    Source:  docs/spec/embedding.md
    """
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.dtype_in("grad", grad, checks.FLOAT_DTYPES)
    checks.same_device(ids=ids, grad=grad)
    checks.last_dim_not_empty("grad", grad)
    checks.leading_dims("grad", grad, ids.shape, "ids", ids)
    checks.values_between("ids", ids, 0, 2**63 - 1)
    used, slots = ids.reshape(-1).unique(sorted=True, return_inverse=True)
    rows = torch.full((ids.numel(),), -1, dtype=torch.int64, device=ids.device)
    rows[: used.numel()] = used
    sums = torch.zeros(ids.numel(), grad.shape[-1], dtype=torch.float64, device=grad.device)
    sums.index_add_(0, slots, grad.reshape(-1, grad.shape[-1]).to(torch.float64))
    return rows, sums.to(wide_dtype(grad))
