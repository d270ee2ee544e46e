"""Experts. See `arbitor.reference.ops.experts`.

Legend: E experts, N outputs of an expert, K inputs, M slots, in one dimension or several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.optimized.cuda import compiler, many_rows
from arbitor.optimized.kernels import ranks as rank_kernels
from arbitor.optimized.kernels import router
from arbitor.optimized.kernels.experts import weight_grad
from arbitor.optimized.kernels.launch import different, values_between
from arbitor.optimized.kernels.products import packed_product
from arbitor.optimized.kernels.slots import Plan, rows_by_expert
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import deliver_table, on_device, table_target
from arbitor.optimized.ops.linear import matrix_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.paths import takes_cuda, takes_library
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = [
    "balance_experts",
    "choose_experts",
    "expert_load",
    "grouped_linear",
    "grouped_linear_input_grad",
    "grouped_linear_weight_grad",
    "weigh_ranks",
    "weigh_ranks_grads",
]


LIBRARY_SLOTS = 512
"""Least slots an expert, on average, for which the library makes a bfloat16 gradient of the weight.

With 1,024 slots of 3,536 x 1,192 an H200 took 527 us, and 180 us to gather rows, where the kernel took 927 us. Fewer slots were not
timed in bfloat16.
"""

LIBRARY_ELEMENTS = 2**20
"""Least elements of an expert's matrix for which it does. Smaller ones were not timed."""

LIBRARY_GROUPS = 512
"""Most experts for which it does. A program that gathers rows looks at the ends of all of them."""

LIBRARY_MULTIPLE = 8
"""Number that divides the outputs and the inputs of a matrix that the library takes: a row begins at a multiple of 16 bytes."""


def _x_grad(grad: Tensor, *, weight: AnyWeight, experts_M: Tensor, num_groups: int, **_: Any) -> Tensor:
    """Return the gradient of `grouped_linear` with respect to x."""
    return grouped_linear_input_grad(grad, weight, experts_M, num_groups=num_groups)


@op(x_MK=_x_grad)
def grouped_linear(x_MK: Tensor, weight: AnyWeight, experts_M: Tensor, *, num_groups: int) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("x_MK", x_MK, DTYPES)
    checks.last_dim("x_MK", x_MK, weight.shape[1], DTYPES)
    checks.expert_slots(experts_M, x_MK.shape[:-1], weight=weight.exponents, x_MK=x_MK)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    return _product(x_MK, on_device(weight), experts_M, (num_groups, num_rows), transposed=False)


@op()
def grouped_linear_input_grad(
    grad_MN: Tensor, weight: AnyWeight, experts_M: Tensor, *, num_groups: int
) -> Tensor:
    """See reference; float64 is not supported."""
    num_rows = checks.expert_rows(weight, num_groups)
    checks.expert_matrix("grad_MN", grad_MN, DTYPES)
    checks.last_dim("grad_MN", grad_MN, num_rows, DTYPES)
    checks.expert_slots(experts_M, grad_MN.shape[:-1], weight=weight.exponents, grad_MN=grad_MN)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    return _product(grad_MN, on_device(weight), experts_M, (num_groups, num_rows), transposed=True)


@op()
def grouped_linear_weight_grad(
    grad_MN: Tensor,
    x_MK: Tensor,
    experts_M: Tensor,
    *,
    num_groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.expert_pair(grad_MN, x_MK, DTYPES)
    checks.expert_slots(experts_M, grad_MN.shape[:-1], grad_MN=grad_MN, x_MK=x_MK)
    checks.float_dtype("dtype", dtype, checks.GRADIENT_DTYPES)
    values_between("experts_M", experts_M, -1, num_groups - 1)
    plan = Plan.of(experts_M.flatten(), num_groups)
    fits = dtype is torch.bfloat16 and library_fits(grad_MN, x_MK, experts_M.numel(), num_groups)
    by_library = takes_library(fits, x_MK.device, only=compiler.HOPPER)
    (grad, grad_slots), (x, x_slots) = (rows_of_slots(each, apart=by_library) for each in (grad_MN, x_MK))
    slots = {"grad_slots": grad_slots, "x_slots": x_slots}
    if by_library:
        return library_weight_grad(grad, x, plan, num_groups, **slots)
    return weight_grad(grad, x, plan, num_groups, dtype=dtype, **slots)


def _weighed_grads(
    grad: Tensor, *, ranks: Tensor, logits: Tensor, experts: Tensor, chosen_only: bool
) -> Mapping[str, Tensor]:
    """Return the gradients of `weigh_ranks`."""
    of_ranks, of_logits = weigh_ranks_grads(grad, ranks, logits, experts, chosen_only=chosen_only)
    return {"ranks": of_ranks, "logits": of_logits}


@op(ranks=_weighed_grads, logits=_weighed_grads)
def weigh_ranks(ranks: Tensor, logits: Tensor, experts: Tensor, *, chosen_only: bool = False) -> Tensor:
    """See reference; float64 is not supported."""
    checks.weighed_ranks(ranks, logits, experts, chosen_only, DTYPES)
    values_between("experts", experts, 0, logits.shape[-1] - 1)
    different("experts", experts)
    return rank_kernels.weighed(ranks, logits, experts, chosen_only)


@op()
def weigh_ranks_grads(
    grad: Tensor, ranks: Tensor, logits: Tensor, experts: Tensor, *, chosen_only: bool = False
) -> tuple[Tensor, Tensor]:
    """See reference; float64 is not supported. One launch makes both gradients."""
    checks.weighed_ranks(ranks, logits, experts, chosen_only, DTYPES)
    values_between("experts", experts, 0, logits.shape[-1] - 1)
    different("experts", experts)
    checks.same_dtype("grad", grad, "ranks", ranks)
    checks.same_shape("grad", grad, "ranks", ranks)
    checks.same_device(ranks=ranks, grad=grad)
    return rank_kernels.weighed_grads(grad, ranks, logits, experts, chosen_only)


@op()
def choose_experts(x: Tensor, weight: AnyWeight, *, top_k: int, handicap_E: Tensor | None = None) -> Tensor:
    """See reference; float64 is not supported.

    Every sum is exact, in int8 digits, in int64 and in the library's float64, so that neither order nor tiles change a bit.
    """
    checks.router(x, weight, top_k, handicap_E, weight.exponents, DTYPES)
    x_MK, rows = x.reshape(-1, weight.shape[1]).contiguous(), on_device(weight)
    if router.has_program_each(x_MK, rows):
        scores_ME = router.single_scores(x_MK, rows)
    elif router.is_fused(rows):
        return router.chosen_rows(x_MK, rows, top_k, handicap_E).reshape(*x.shape[:-1], top_k)
    else:
        scores_ME = torch.mm(router.whole_sixteenths(x_MK), router.router_rows(rows).T)
    return router.best_rows(scores_ME, top_k, handicap_E).reshape(*x.shape[:-1], top_k)


@op()
def expert_load(experts: Tensor, *, num_groups: int) -> Tensor:
    """See reference. Torch counts in integers, whose sums are the same in any order, and nothing waits for the device."""
    checks.integer("num_groups", num_groups, 1, 2**31 - 1)
    checks.dtype_in("experts", experts, (torch.int64,))
    values_between("experts", experts, -1, num_groups - 1)
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=experts.device)
    slots = experts.flatten() + 1
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:].contiguous()


@op()
def balance_experts(
    chosen: Tensor, load_E: Tensor, handicap_E: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See reference. One program counts and moves, in one launch."""
    checks.balance(chosen, load_E, handicap_E, out)
    values_between("chosen", chosen, -1, load_E.numel() - 1)
    load_out, handicap_out = (None, None) if out is None else out
    load, handicap = table_target(load_E, load_out), table_target(handicap_E, handicap_out)
    router.balance(chosen.contiguous(), load, handicap)
    made = deliver_table(load, load_out), deliver_table(handicap, handicap_out)
    return made if out is None else out


def _product(
    x_MK: Tensor, weight: DeviceWeight, experts_M: Tensor, shape: tuple[int, int], *, transposed: bool
) -> Tensor:
    """Return x W_e^T, or x W_e, of each slot, in the dtype of x; `shape` is (E, N).

    Many slots are sorted first, so that a tile of them shares its matrix.
    """
    num_groups, num_rows = shape
    num_slots, num_outputs = experts_M.numel(), weight.shape[1] if transposed else num_rows
    if num_slots == 0:
        return x_MK.new_zeros(*experts_M.shape, num_outputs)
    x, slots_of_row = rows_of_slots(x_MK)
    fits = not transposed and many_rows.fits_slots(x, weight, num_groups)
    by_cuda = takes_cuda(fits, x.device, only=compiler.HOPPER)
    few = few_slots(num_slots, num_groups)
    experts = experts_M.flatten().contiguous()
    by: dict[str, Any] = {"num_groups": num_groups, "slots_of_row": slots_of_row}
    by |= {"experts_M": experts} if few else {"plan": Plan.of(experts, num_groups)}
    if by_cuda:
        form = many_rows.slot_form_of(num_slots, num_groups)
        y = many_rows.many_rows_product(x, weight, form, **by)
    else:
        y = packed_product(x, weight, transposed=transposed, **by)
    return y.reshape(*experts_M.shape, num_outputs)


def library_fits(grad_MN: Tensor, x_MK: Tensor, num_slots: int, num_groups: int) -> bool:
    """Return whether the library's grouped product takes outputs and inputs of slots, and is worth it for a bfloat16 gradient."""
    num_outputs, num_inputs = grad_MN.shape[-1], x_MK.shape[-1]
    return (
        hasattr(F, "grouped_mm")
        and x_MK.dtype is torch.bfloat16
        and num_outputs % LIBRARY_MULTIPLE == num_inputs % LIBRARY_MULTIPLE == 0
        and num_outputs * num_inputs >= LIBRARY_ELEMENTS
        and num_groups <= LIBRARY_GROUPS
        and num_slots >= LIBRARY_SLOTS * num_groups
        # Ends are counted in 32 bits.
        and num_slots + num_groups < 2**31
    )


def library_weight_grad(
    grad: Tensor, x: Tensor, plan: Plan, num_groups: int, *, grad_slots: int = 1, x_slots: int = 1
) -> Tensor:
    """Return what `weight_grad` returns in bfloat16, by the library's grouped product of rows in the order of their experts.

    Every expert has a row of zeros behind its own, so that none is without rows, of which the library promises nothing. The ends of
    experts stay on the device.

    grad, x:             rows of outputs and of inputs, which may lie apart
    grad_slots, x_slots: neighbouring slots that read one row
    """
    grad_rows = rows_by_expert(grad, plan, num_groups, grad_slots)
    x_rows = rows_by_expert(x, plan, num_groups, x_slots)
    return F.grouped_mm(grad_rows.T, x_rows, offs=plan.ends_with_zeros(num_groups)).flatten(0, 1)


def rows_of_slots(x: Tensor, *, apart: bool = False) -> tuple[Tensor, int]:
    """Return the rows that slots [..., K] read, and how many neighbouring slots read each of them.

    Where `expand` made neighbouring slots of one row in memory, as for the experts of a position, nothing is copied. Rows are
    contiguous, or, if they may lie `apart`, as those of some columns of a matrix do, each by itself.
    """
    is_shared = x.ndim > 2 and x.stride(-2) == 0 and x.shape[-2] > 1
    own, slots = (x.select(-2, 0), x.shape[-2]) if is_shared else (x, 1)
    if apart and own.stride(-1) == 1:
        return own.flatten(0, -2), slots
    return matrix_of(own), slots


def few_slots(num_slots: int, num_groups: int) -> bool:
    """Return whether each slot should read the matrix of its expert for itself: few slots read little, and need no sort."""
    return num_slots <= num_groups
