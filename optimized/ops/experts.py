"""Experts. See `arbitor.reference.ops.experts`.

Legend: E experts, N outputs of an expert, K inputs, M slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.optimized.kernels import experts as kernels
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.layouts import TRITS_PER_WORD, AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import on_device
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

DENSE_ELEMENTS = 2**27
"""Most elements of a weight that are unpacked at a time: 256 MiB of bfloat16."""

FEW_SLOTS = 2
"""Slots times this are few up to E: they read the packed rows of their own experts, once a slot."""

LIBRARY_ALIGNMENT = 8
"""Columns that the library's grouped product wants both of its operands to be a multiple of: 16 bytes of bfloat16."""

LIBRARY_GROUPS = 1023
"""Most groups of the library's product."""


def grouped_linear(x_MK: Tensor, weight: AnyWeight, experts_M: Tensor, *, num_groups: int) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("x_MK", x_MK, DTYPES)
    checks.last_dim("x_MK", x_MK, weight.shape[1], DTYPES)
    checks.expert_slots(experts_M, x_MK.shape[0], weight=weight.exponents, x_MK=x_MK)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    return _product(x_MK, on_device(weight), experts_M, (num_groups, num_rows), transposed=False)


def grouped_linear_input_grad(
    grad_MN: Tensor, weight: AnyWeight, experts_M: Tensor, *, num_groups: int
) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("grad_MN", grad_MN, DTYPES)
    checks.last_dim("grad_MN", grad_MN, num_rows, DTYPES)
    checks.expert_slots(experts_M, grad_MN.shape[0], weight=weight.exponents, grad_MN=grad_MN)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    return _product(grad_MN, on_device(weight), experts_M, (num_groups, num_rows), transposed=True)


def grouped_linear_weight_grad(
    grad_MN: Tensor, x_MK: Tensor, experts_M: Tensor, *, num_groups: int
) -> Tensor:
    """See reference; float64 is not supported. The library has no such product that writes float32: a kernel of ours."""
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.expert_pair(grad_MN, x_MK, DTYPES)
    checks.expert_slots(experts_M, grad_MN.shape[0], grad_MN=grad_MN, x_MK=x_MK)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    plan = kernels.Plan.of(experts_M, num_groups)
    return kernels.weight_grad(grad_MN.contiguous(), x_MK.contiguous(), plan, num_groups)


def expert_load(experts: Tensor, *, num_groups: int) -> Tensor:
    """See reference. Counted by torch, in integers, whose sums are the same in any order; nothing waits for the device."""
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.dtype_in("experts", experts, (torch.int64,))
    values_between("experts", experts, -1, num_groups - 1)
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=experts.device)
    slots = experts.flatten() + 1
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:].contiguous()


def _product(
    x: Tensor, weight: DeviceWeight, experts_M: Tensor, shape: tuple[int, int], *, transposed: bool
) -> Tensor:
    """Return x W_e^T, or x W_e, of each slot, in the dtype of x; `shape` is (E, N).

    Many slots multiply dense matrices, unpacked a window at a time, so that no dense copy of a large weight ever exists.
    A window takes some outputs of every expert: it needs no look at how the slots fall, and leaves each sum whole.
    """
    num_groups, num_rows = shape
    num_slots, num_columns = x.shape[0], weight.shape[1]
    num_outputs = num_columns if transposed else num_rows
    x = x.contiguous()
    if num_slots == 0:
        return x.new_zeros(0, num_outputs)
    if FEW_SLOTS * num_slots <= num_groups:
        experts_M = experts_M.contiguous()
        if transposed:
            return kernels.few_slots_grad(x, weight, experts_M)
        return kernels.few_slots(x, weight, experts_M, num_rows)
    plan = kernels.Plan.of(experts_M, num_groups)
    by_library = _library_multiplies(x, num_groups, num_rows, num_columns)
    sorted_x = x[plan.order] if by_library else x
    ends = plan.starts[1:-1].to(torch.int32)
    y = torch.empty(num_slots, num_outputs, dtype=x.dtype, device=x.device)
    for window in windows(num_outputs, weight.shape[0] * num_columns // num_outputs):
        rows, columns = (range(num_rows), window) if transposed else (window, range(num_columns))
        w = kernels.dense_window(weight, num_groups, rows, columns, x.dtype)
        part = y[:, window.start : window.stop]
        if by_library:
            part.copy_(F.grouped_mm(sorted_x, w if transposed else w.transpose(1, 2), offs=ends))
        else:
            kernels.grouped_product(x, w, plan, part, transposed=transposed)
        del w  # before the next window is unpacked
    if not by_library:
        return y
    places = torch.empty_like(plan.order).scatter_(0, plan.order, torch.arange(num_slots, device=x.device))
    return torch.where(experts_M[:, None] >= 0, y[places], 0)


def windows(num_outputs: int, elements: int) -> Iterator[range]:
    """Yield ranges of outputs, `elements` of a weight each, that unpack at most DENSE_ELEMENTS; whole words at a time."""
    step = max(DENSE_ELEMENTS // elements // TRITS_PER_WORD, 1) * TRITS_PER_WORD
    for start in range(0, num_outputs, step):
        yield range(start, min(start + step, num_outputs))


def _library_multiplies(x: Tensor, num_groups: int, num_rows: int, num_columns: int) -> bool:
    """Whether torch's grouped product can: bfloat16 on Hopper or newer data centre GPUs, aligned rows.

    Elsewhere it would loop over groups on the host, waiting for the device.
    """
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16 or num_groups > LIBRARY_GROUPS:
        return False
    if num_rows % LIBRARY_ALIGNMENT or num_columns % LIBRARY_ALIGNMENT:
        return False
    return torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))
