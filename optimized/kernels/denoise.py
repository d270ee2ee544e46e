"""Denoise kernels: a step over the latents, forward and backward, and the parts of the whole loop. Arithmetic in float32.

Legend: B samples, L numbers of a latent, P tokens, D width, n a unit row, q a query, m the input that the noise is predicted from.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, row_tile, runs_here
from arbitor.optimized.kernels.norm import TAMING_POWER, inverse_rms, taming_power
from arbitor.reference.constants import DEFAULT_EPS

BLOCK = 1024
BLOCK_TOKENS = 2
BLOCK_COLUMNS = 2048
BLOCK_MIXED = 32
BLOCK_MIXED_TOKENS = 128


@triton.jit
def denoised_value(latent, pred, noise_share, inverse_root):
    """Return (latent - noise_share pred) / root, of float32 values."""
    return (latent - noise_share * pred) * inverse_root


@triton.jit
def load_block(ptr, index, size, FULL: tl.constexpr):
    """Return values as float32; a full block has no mask, so that its loads can be wide."""
    if FULL:
        values = tl.load(ptr + index)
    else:
        values = tl.load(ptr + index, mask=index < size, other=0.0)
    return widen(values)


@triton.jit
def store_block(ptr, index, values, size, FULL: tl.constexpr):
    """Store float32 values in the pointer's dtype."""
    rounded = narrow(values, ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr + index, rounded)
    else:
        tl.store(ptr + index, rounded, mask=index < size)


@triton.jit
def step_block(latent_ptr, pred_ptr, out_ptr, size, noise_share, inverse_root, index, FULL: tl.constexpr):
    """Store a block after one step."""
    latent = load_block(latent_ptr, index, size, FULL)
    pred = load_block(pred_ptr, index, size, FULL)
    store_block(out_ptr, index, denoised_value(latent, pred, noise_share, inverse_root), size, FULL)


@triton.jit(do_not_specialize=["size"])
def _denoise_step_kernel(latent_ptr, pred_ptr, out_ptr, size, noise_share, inverse_root, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= size:
        step_block(latent_ptr, pred_ptr, out_ptr, size, noise_share, inverse_root, index, True)
    else:
        step_block(latent_ptr, pred_ptr, out_ptr, size, noise_share, inverse_root, index, False)


@triton.jit
def backward_block(
    grad_ptr, grad_latent_ptr, grad_pred_ptr, size, factor, inverse_root, index, FULL: tl.constexpr
):
    """Store both gradients of a block."""
    grad = load_block(grad_ptr, index, size, FULL)
    store_block(grad_latent_ptr, index, grad * inverse_root, size, FULL)
    store_block(grad_pred_ptr, index, grad * factor, size, FULL)


@triton.jit(do_not_specialize=["size"])
def _denoise_step_backward_kernel(
    grad_ptr, grad_latent_ptr, grad_pred_ptr, size, factor, inverse_root, BLOCK: tl.constexpr
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= size:
        backward_block(grad_ptr, grad_latent_ptr, grad_pred_ptr, size, factor, inverse_root, index, True)
    else:
        backward_block(grad_ptr, grad_latent_ptr, grad_pred_ptr, size, factor, inverse_root, index, False)


@triton.jit
def _unit_rows_kernel(x_ptr, n_ptr, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    inverse, power = inverse_rms(x_ptr, row, num_columns, num_columns, eps, BLOCK)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        x = tl.load(x_ptr + row * num_columns + columns, mask=mask, other=0.0)
        tl.store(n_ptr + row * num_columns + columns, x * inverse * power, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "token_blocks", "step"])
def _token_scores_kernel(
    q_ptr, rows_ptr, tokens_ptr, scores_ptr, step, num_tokens, token_blocks, num_columns, root,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // token_blocks).to(tl.int64)
    tokens = (tl.program_id(0) % token_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    places = (sample * num_tokens + tokens) * num_columns
    sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = columns < num_columns
        q = tl.load(q_ptr + sample * num_columns + columns, mask=mask, other=0.0)
        q += tl.load(rows_ptr + step * num_columns + columns, mask=mask, other=0.0)
        both = (tokens < num_tokens)[:, None] & mask[None, :]
        values = widen(tl.load(tokens_ptr + places[:, None] + columns[None, :], mask=both, other=0.0))
        sums += tl.sum(values * q[None, :], axis=1)
    tl.store(scores_ptr + sample * num_tokens + tokens, tl.div_rn(sums, root), mask=tokens < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _mix_kernel(
    scores_ptr, tokens_ptr, n_ptr, m_ptr, num_tokens, num_columns, column_blocks,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < num_columns
    most = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_P):
        tokens = start + tl.arange(0, BLOCK_P)
        scores = tl.load(
            scores_ptr + sample * num_tokens + tokens, mask=tokens < num_tokens, other=float("-inf")
        )
        most = tl.maximum(most, scores)
    top = tl.max(most, axis=0)
    shares = tl.zeros([BLOCK_P], dtype=tl.float32)
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_P):
        tokens = start + tl.arange(0, BLOCK_P)
        scores = tl.load(
            scores_ptr + sample * num_tokens + tokens, mask=tokens < num_tokens, other=float("-inf")
        )
        share = tl.exp(scores - top)
        places = (sample * num_tokens + tokens) * num_columns
        both = (tokens < num_tokens)[:, None] & mask[None, :]
        values = widen(tl.load(tokens_ptr + places[:, None] + columns[None, :], mask=both, other=0.0))
        shares += share
        sums += tl.sum(share[:, None] * values, axis=0)
    u = tl.load(n_ptr + sample * num_columns + columns, mask=mask, other=0.0)
    u += tl.div_rn(sums, tl.sum(shares, axis=0))
    # This form of silu does not overflow, because it takes exp of a negative number, whatever the sign of u.
    decay = tl.exp(-tl.abs(u))
    m = tl.div_rn(tl.where(u < 0, u * decay, u), 1.0 + decay)
    tl.store(m_ptr + sample * num_columns + columns, m, mask=mask)


@triton.jit
def _loop_step_kernel(
    latent_ptr, pred_ptr, out_ptr, energies_ptr, noise_share, inverse_root, num_columns, column_blocks,
    HALTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // column_blocks).to(tl.int64)
    block = tl.program_id(0) % column_blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    latent = tl.load(latent_ptr + sample * num_columns + columns, mask=mask, other=0.0)
    pred = tl.load(pred_ptr + sample * num_columns + columns, mask=mask, other=0.0)
    latent = denoised_value(latent, pred, noise_share, inverse_root)
    tl.store(out_ptr + sample * num_columns + columns, latent, mask=mask)
    if HALTS:
        energies = energies_ptr + (sample * column_blocks + block) * 4
        tl.store(energies, tl.sum(latent * latent, axis=0))
        tl.store(energies + 1, tl.sum(pred * pred, axis=0))
        # The other blocks of the sample decide, too, whether it is huge.
        latent, pred = latent * TAMING_POWER, pred * TAMING_POWER
        tl.store(energies + 2, tl.sum(latent * latent, axis=0))
        tl.store(energies + 3, tl.sum(pred * pred, axis=0))


@triton.jit
def sums_of_energies(energies_ptr, column_blocks, BLOCK_PARTS: tl.constexpr):
    """Return the sums of squares of a latent and of a prediction, from those of their blocks."""
    signals = tl.zeros([BLOCK_PARTS], dtype=tl.float32)
    noises = tl.zeros([BLOCK_PARTS], dtype=tl.float32)
    for start in range(0, column_blocks, BLOCK_PARTS):
        blocks = start + tl.arange(0, BLOCK_PARTS)
        signals += tl.load(energies_ptr + blocks * 4, mask=blocks < column_blocks, other=0.0)
        noises += tl.load(energies_ptr + blocks * 4 + 1, mask=blocks < column_blocks, other=0.0)
    return tl.sum(signals, axis=0), tl.sum(noises, axis=0)


@triton.jit
def _loop_halt_kernel(
    latent_ptr, total_ptr, left_ptr, left_after_ptr, energies_ptr, threshold, eps, num_columns, column_blocks,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // column_blocks).to(tl.int64)
    block = tl.program_id(0) % column_blocks
    energies = energies_ptr + sample * column_blocks * 4
    signal, noise = sums_of_energies(energies, column_blocks, BLOCK_PARTS)
    power = taming_power(signal + noise)
    if power < 1.0:
        signal, noise = sums_of_energies(energies + 2, column_blocks, BLOCK_PARTS)
    signal, noise, eps = signal / num_columns, noise / num_columns, eps * power * power
    p = tl.div_rn(signal + eps, signal + noise + eps)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    latent = tl.load(latent_ptr + sample * num_columns + columns, mask=mask, other=0.0)
    # This is the number 1 as a tensor, whatever p is.
    left = tl.where(p == p, 1.0, 1.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if not FIRST:
        left = tl.load(left_ptr + sample)
        total = tl.load(total_ptr + sample * num_columns + columns, mask=mask, other=0.0)
    share = left
    if not LAST:
        goes_on = 1.0 - left + p < threshold
        share = tl.where(goes_on, p, left)
        tl.store(left_after_ptr + sample, tl.where(goes_on, left - p, 0.0), mask=block == 0)
    total = tl.where(left > 0, total + share * latent, total)
    tl.store(total_ptr + sample * num_columns + columns, total, mask=mask)


def denoised(latent: Tensor, pred: Tensor, alpha: float) -> Tensor:
    """Launch `denoise_step` on two tensors of one shape and dtype."""
    runs_here(latent)
    out = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device)
    if out.numel():
        _denoise_step_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            latent.contiguous(),
            pred.contiguous(),
            out,
            out.numel(),
            1.0 - alpha,
            1.0 / math.sqrt(alpha),
            BLOCK=BLOCK,
        )
    return out


def denoised_backward(grad: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Launch `denoise_step_backward`."""
    runs_here(grad)
    grad_latent = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    grad_pred = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        root = math.sqrt(alpha)
        _denoise_step_backward_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
            grad.contiguous(),
            grad_latent,
            grad_pred,
            grad.numel(),
            -(1.0 - alpha) / root,
            1.0 / root,
            BLOCK=BLOCK,
        )
    return grad_latent, grad_pred


class DenoiseLoop:
    """The parts of `denoise_loop` between its products, and the buffers that they share; float32 but for the tokens.

    Args:
        latent_BL:  float32, contiguous, at least one sample.
        tokens_BPD: float32 or bfloat16, contiguous.
        rows_TD:    float32, one row a step.
    """

    def __init__(self, latent_BL: Tensor, tokens_BPD: Tensor, rows_TD: Tensor) -> None:
        runs_here(latent_BL)
        self.tokens, self.rows = tokens_BPD, rows_TD
        num_samples, size = latent_BL.shape
        self.block, self.blocks = row_tile(size, BLOCK)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=latent_BL.device)  # noqa: E731
        self.new = new
        # Of the latent and of the prediction, first as they are and then times a power of two.
        self.energies = new(num_samples, self.blocks, 4)
        self.total, self.left = new(num_samples, size), new(num_samples)

    def unit_rows(self, x_BD: Tensor) -> Tensor:
        """Return x with rows of root mean square 1."""
        n_BD = self.new(*x_BD.shape)
        block = min(BLOCK, triton.next_power_of_2(x_BD.shape[1]))
        _unit_rows_kernel[(x_BD.shape[0],)](x_BD, n_BD, x_BD.shape[1], DEFAULT_EPS, BLOCK=block)
        return n_BD

    def mixed(self, n_BD: Tensor, q_BD: Tensor, step: int) -> Tensor:
        """Return silu(n + c), c the mean of the tokens weighted by their fit to the query of a step."""
        num_samples, num_tokens, width = self.tokens.shape
        scores_BP, m_BD = self.new(num_samples, num_tokens), self.new(num_samples, width)
        token_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
        block = min(BLOCK_COLUMNS, triton.next_power_of_2(width))
        _token_scores_kernel[row_grid(num_samples, token_blocks)](
            q_BD, self.rows, self.tokens, scores_BP, step, num_tokens, token_blocks, width, math.sqrt(width),
            BLOCK_P=BLOCK_TOKENS, BLOCK_D=block,
        )  # fmt: skip
        block, column_blocks = row_tile(width, BLOCK_MIXED)
        _mix_kernel[row_grid(num_samples, column_blocks)](
            scores_BP, self.tokens, n_BD, m_BD, num_tokens, width, column_blocks,
            BLOCK_P=BLOCK_MIXED_TOKENS, BLOCK_D=block,
        )  # fmt: skip
        return m_BD

    def step(self, latent_BL: Tensor, pred_BL: Tensor, alpha: float, *, halts: bool) -> Tensor:
        """Return the latent after a step; with `halts`, keep the energy of the latent and that of the prediction."""
        num_samples, size = latent_BL.shape
        out = self.new(num_samples, size)
        _loop_step_kernel[row_grid(num_samples, self.blocks)](
            latent_BL, pred_BL, out, self.energies, 1.0 - alpha, 1.0 / math.sqrt(alpha), size, self.blocks,
            HALTS=halts, BLOCK=self.block,
        )  # fmt: skip
        return out

    def halt(self, latent_BL: Tensor, threshold: float, *, first: bool, last: bool) -> Tensor:
        """Return the mean of the steps after a step's share was added to it."""
        num_samples, size = latent_BL.shape
        # This is not in place, because all blocks of a sample read the shares that one of them writes.
        left_after = self.new(num_samples)
        _loop_halt_kernel[row_grid(num_samples, self.blocks)](
            latent_BL, self.total, self.left, left_after, self.energies, threshold, DEFAULT_EPS, size, self.blocks,
            FIRST=first, LAST=last, BLOCK=self.block, BLOCK_PARTS=min(64, triton.next_power_of_2(self.blocks)),
        )  # fmt: skip
        self.left = left_after
        return self.total
