"""Embedding. See `arbitor.reference.ops.embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import embedding as kernels
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.layouts import AnyWeight
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES, dequantize
from arbitor.reference import checks

__all__ = ["embedding", "embedding_row_grads"]


@op()
def embedding(ids: Tensor, weight: AnyWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """See reference; float64 is not supported."""
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.same_device(weight=weight.exponents, ids=ids)
    values_between("ids", ids, 0, weight.shape[0] - 1)
    return dequantize(weight, dtype=dtype, rows=ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


@op()
def embedding_row_grads(ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported."""
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.dtype_in("grad", grad, DTYPES)
    checks.same_device(ids=ids, grad=grad)
    checks.last_dim_not_empty("grad", grad)
    checks.leading_dims("grad", grad, ids.shape, "ids", ids)
    values_between("ids", ids, 0, 2**63 - 1)
    return kernels.row_grads(ids.reshape(-1), grad.reshape(ids.numel(), grad.shape[-1]))
