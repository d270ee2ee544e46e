"""Kernels of what stands between products: gates, keys of heads, and rotary turns. Arithmetic in float32.

Legend: M rows of K columns, J terms of a row; V vectors (heads of positions), H heads, C columns of a head, R of which are turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here

BLOCK_COLUMNS = 1024
TILE = 2048
"""Elements of the vectors that a program turns, or of the keys that it makes."""


@triton.jit
def sum_of_terms(terms_ptr, row, columns, mask, num_columns, num_terms):
    """Return the float32 sums of the terms of a row at some columns."""
    sums = tl.zeros([columns.shape[0]], dtype=tl.float32)
    row_ptr = terms_ptr + row * num_terms * num_columns
    for _ in range(num_terms):
        sums += widen(tl.load(row_ptr + columns, mask=mask, other=0.0))
        row_ptr += num_columns
    return sums


@triton.jit(do_not_specialize=["num_terms", "row_blocks"])
def _gated_kernel(
    gate_ptr, up_ptr, terms_ptr, out_ptr, num_columns, num_terms, row_blocks, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    places = row * num_columns + columns
    gate = widen(tl.load(gate_ptr + places, mask=mask, other=0.0))
    up = widen(tl.load(up_ptr + places, mask=mask, other=0.0))
    hidden = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    if terms_ptr is not None:
        hidden *= 1.0 + sum_of_terms(terms_ptr, row, columns, mask, num_columns, num_terms)
    tl.store(out_ptr + places, narrow(hidden, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_terms", "row_blocks"])
def _gated_grads_kernel(
    grad_ptr, gate_ptr, up_ptr, terms_ptr, grad_gate_ptr, grad_up_ptr, grad_terms_ptr,
    num_columns, num_terms, row_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // row_blocks).to(tl.int64)
    columns = (tl.program_id(0) % row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    places = row * num_columns + columns
    grad = widen(tl.load(grad_ptr + places, mask=mask, other=0.0))
    gate = widen(tl.load(gate_ptr + places, mask=mask, other=0.0))
    up = widen(tl.load(up_ptr + places, mask=mask, other=0.0))
    open_share = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), 1.0 + tl.exp(-gate))
    silu = gate * open_share
    slope = open_share * (1.0 + gate * (1.0 - open_share))
    factor = grad
    if terms_ptr is not None:
        factor *= 1.0 + sum_of_terms(terms_ptr, row, columns, mask, num_columns, num_terms)
        grad_terms = narrow(grad * (silu * up), grad_terms_ptr.dtype.element_ty)
        tl.store(grad_terms_ptr + places, grad_terms, mask=mask)
    tl.store(grad_gate_ptr + places, narrow(factor * up * slope, grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + places, narrow(factor * silu, grad_up_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_vectors", "num_turns"])
def _rotate_kernel(
    x_ptr, cosine_ptr, sine_ptr, out_ptr, num_vectors, num_turns, position_stride, head_stride,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    vectors = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (vectors < num_vectors)[:, None]
    positions, heads = vectors // HEADS, vectors % HEADS
    x_row = x_ptr + (positions * position_stride + heads * head_stride)[:, None]
    out_row = out_ptr + (vectors * COLUMNS)[:, None]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    mask = inside & (pairs < HALF)
    turn = (positions % num_turns * HALF)[:, None] + pairs
    cosine = tl.load(cosine_ptr + turn, mask=mask, other=0.0)
    sine = tl.load(sine_ptr + turn, mask=mask, other=0.0)
    a = widen(tl.load(x_row + pairs, mask=mask, other=0.0))
    b = widen(tl.load(x_row + HALF + pairs, mask=mask, other=0.0))
    tl.store(out_row + pairs, narrow(a * cosine - b * sine, out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_row + HALF + pairs, narrow(a * sine + b * cosine, out_ptr.dtype.element_ty), mask=mask)
    if COLUMNS > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = inside & (rest < COLUMNS)
        tl.store(out_row + rest, tl.load(x_row + rest, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _head_keys_kernel(
    shared_ptr, own_ptr, out_ptr, num_rows, shared_stride, own_stride, own_head_stride,
    HEADS: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    vectors = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, heads = vectors // HEADS, vectors % HEADS
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    is_shared = columns < SHARED
    shared = tl.load(
        shared_ptr + (rows * shared_stride)[:, None] + columns, mask=inside & is_shared, other=0.0
    )
    own_row = own_ptr + (rows * own_stride + heads * own_head_stride)[:, None]
    own = tl.load(own_row + (columns - SHARED), mask=inside & (columns >= SHARED), other=0.0)
    tl.store(out_ptr + (vectors * COLUMNS)[:, None] + columns, tl.where(is_shared, shared, own), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _head_keys_grads_kernel(
    grad_ptr, shared_ptr, own_ptr, num_rows, grad_stride, grad_head_stride,
    HEADS: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    is_own = columns >= SHARED
    sums = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)
    for head in range(HEADS):
        grad_row = grad_ptr + (rows * grad_stride + head * grad_head_stride)[:, None]
        grad = tl.load(grad_row + columns, mask=inside, other=0.0)
        own_row = own_ptr + ((rows * HEADS + head) * (COLUMNS - SHARED))[:, None]
        tl.store(own_row + (columns - SHARED), grad, mask=inside & is_own)
        sums += widen(grad)
    shared_row = shared_ptr + (rows * SHARED)[:, None]
    tl.store(
        shared_row + columns, narrow(sums, shared_ptr.dtype.element_ty), mask=inside & (columns < SHARED)
    )


def gated(gate: Tensor, up: Tensor, terms: Tensor | None) -> Tensor:
    """Launch `gated`."""
    runs_here(gate)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_gated_kernel, (gate, up), terms, (out,))
    return out


def gated_grads(grad: Tensor, gate: Tensor, up: Tensor, terms: Tensor | None) -> tuple[Tensor, ...]:
    """Launch `gated_grads`."""
    runs_here(gate)
    made = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(3)]
    if terms is None:
        _launch(_gated_grads_kernel, (grad, gate, up), None, (*made[:2], None))
        return tuple(made[:2])
    _launch(_gated_grads_kernel, (grad, gate, up), terms, tuple(made))
    return tuple(made)


def _launch(
    kernel: triton.JITFunction,
    given: tuple[Tensor, ...],
    terms: Tensor | None,
    made: tuple[Tensor | None, ...],
) -> None:
    """Launch a kernel of gates with a program for each tile of a row."""
    size, num_columns = given[0].numel(), given[0].shape[-1]
    if size == 0:
        return
    block, row_blocks = row_tile(num_columns, BLOCK_COLUMNS)
    kernel[row_grid(size // num_columns, row_blocks)](
        *(each.contiguous() for each in given),
        None if terms is None else terms.contiguous(),
        *made,
        num_columns,
        0 if terms is None else terms.shape[-2],
        row_blocks,
        BLOCK=block,
    )


def head_keys(shared: Tensor, own: Tensor) -> Tensor:
    """Launch `head_keys`. Rows and heads may lie apart in memory."""
    runs_here(shared)
    num_heads, num_shared = own.shape[-2], shared.shape[-1]
    num_columns = num_shared + own.shape[-1]
    out = torch.empty(*own.shape[:-1], num_columns, dtype=shared.dtype, device=shared.device)
    if out.numel() == 0:
        return out
    shared_MR, own_MHK = vectors_of(shared, 1), vectors_of(own, 2)
    num_rows, width = shared_MR.shape[0], triton.next_power_of_2(num_columns)
    block = max(1, TILE // width)
    _head_keys_kernel[row_grid(triton.cdiv(num_rows * num_heads, block), 1)](
        shared_MR, own_MHK, out, num_rows, shared_MR.stride(0), own_MHK.stride(0), own_MHK.stride(1),
        HEADS=num_heads, SHARED=num_shared, COLUMNS=num_columns, BLOCK=block, BLOCK_C=width,
    )  # fmt: skip
    return out


def head_keys_grads(grad: Tensor, num_shared: int) -> tuple[Tensor, Tensor]:
    """Launch `head_keys_grads`. A program adds up the heads of its rows, in their order."""
    runs_here(grad)
    num_heads, num_columns = grad.shape[-2:]
    shared = grad.new_empty(*grad.shape[:-2], num_shared)
    own = grad.new_empty(*grad.shape[:-1], num_columns - num_shared)
    if shared.numel() == 0:
        return shared, own
    grad_MHC = vectors_of(grad, 2)
    num_rows, width = grad_MHC.shape[0], triton.next_power_of_2(num_columns)
    block = max(1, TILE // width)
    _head_keys_grads_kernel[row_grid(triton.cdiv(num_rows, block), 1)](
        grad_MHC, shared, own, num_rows, grad_MHC.stride(0), grad_MHC.stride(1),
        HEADS=num_heads, SHARED=num_shared, COLUMNS=num_columns, BLOCK=block, BLOCK_C=width,
    )  # fmt: skip
    return shared, own


def vectors_of(x: Tensor, kept: int) -> Tensor:
    """Return x with all but its last `kept` dimensions as one, and neighbouring columns; a copy only where memory asks for one."""
    flat = x.reshape(x.shape[: x.ndim - kept].numel(), *x.shape[x.ndim - kept :])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Launch `rotate`. Positions and heads may lie apart in memory, as columns of a wider row do."""
    runs_here(x)
    num_heads, num_columns = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x_VHC = vectors_of(x, 2)
    half = cosine.shape[-1]
    rest = num_columns - 2 * half
    num_vectors = x_VHC.shape[0] * num_heads
    block = max(1, TILE // triton.next_power_of_2(num_columns))
    _rotate_kernel[row_grid(triton.cdiv(num_vectors, block), 1)](
        x_VHC, cosine.contiguous(), sine.contiguous(), out, num_vectors, cosine.numel() // half,
        x_VHC.stride(0), x_VHC.stride(1), HEADS=num_heads, COLUMNS=num_columns, HALF=half,
        BLOCK=block, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
    )  # fmt: skip
    return out
