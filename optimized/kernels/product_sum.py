"""Products of bfloat16 matrices that are added to another matrix before they are rounded, once.

Legend: E matrices of a stack, M rows and N columns of the result, K terms of a sum.

A library would round the product to bfloat16 before it adds, or write it out in float32. Here a program keeps the float32 sums of
its tile, adds the tile of the other matrix, and rounds. One program adds all terms of a sum, step by step. So bits follow from
shapes and strides, and not from addresses.

Tiles are read and written by descriptors, which on Hopper and later are bulk copies of the hardware. What lies outside of a matrix
is read as 0 and is not written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.optimized.cuda.compiler import HOPPER
from arbitor.optimized.kernels.common import narrow, widen
from arbitor.optimized.kernels.launch import row_grid, runs_here
from arbitor.optimized.kernels.products import multiplies_wide

MULTIPROCESSORS = 132
"""Of an H100 or H200."""

UNIT = 8
"""What divides the elements between neighbouring rows that a descriptor takes: 16 bytes."""

LINE = 64
"""What divides the elements between neighbouring rows of `room_for`, if there are as many: 128 bytes are a line of the cache."""

GROUP = 8
"""Rows of tiles whose programs run side by side, so that they share the columns of b in the cache."""


@triton.jit(do_not_specialize=["factor", "added_factor", "diagonal", "num_rows", "num_columns", "num_terms"])
def _product_sum_kernel(
    a_descriptor, b_descriptor, added_descriptor, out_descriptor, factor, added_factor, diagonal,
    num_rows, num_columns, num_terms,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADDS: tl.constexpr, SYMMETRIC: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    matrix = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    # A group of rows of tiles is taken column by column.
    first_row_tile = tile // (GROUP * column_tiles) * GROUP
    group_rows = tl.minimum(row_tiles - first_row_tile, GROUP)
    within = tile % (GROUP * column_tiles)
    row_tile, column_tile = first_row_tile + within % group_rows, within // group_rows
    if SYMMETRIC and row_tile > column_tile:
        return
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for term in range(0, num_terms, BLOCK_K):
        if A_TURNED:
            a = a_descriptor.load([matrix, term, row]).reshape(BLOCK_K, BLOCK_M).T
        else:
            a = a_descriptor.load([matrix, row, term]).reshape(BLOCK_M, BLOCK_K)
        if B_TURNED:
            b = b_descriptor.load([matrix, column, term]).reshape(BLOCK_N, BLOCK_K).T
        else:
            b = b_descriptor.load([matrix, term, column]).reshape(BLOCK_K, BLOCK_N)
        if WIDE:
            sums = tl.dot(widen(a), widen(b), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, b, sums)
    values = factor * sums
    if ADDS:
        added = added_descriptor.load([matrix, row, column]).reshape(BLOCK_M, BLOCK_N)
        values += added_factor * widen(added)
        on_diagonal = (row + tl.arange(0, BLOCK_M))[:, None] == (column + tl.arange(0, BLOCK_N))[None, :]
        values += tl.where(on_diagonal, diagonal, 0.0)
    # A GPU has an instruction that rounds two values. The interpreter would truncate them.
    rounded = narrow(values, tl.bfloat16) if WIDE else values.to(tl.bfloat16)
    out_descriptor.store([matrix, row, column], rounded.reshape(1, BLOCK_M, BLOCK_N))
    if SYMMETRIC and row_tile < column_tile:
        out_descriptor.store([matrix, column, row], rounded.T.reshape(1, BLOCK_N, BLOCK_M))


@dataclass(frozen=True)
class Tile:
    """A tile of the result, and how a program computes it.

    Fields:
        block_m, block_n: rows and columns.
        block_k:    terms of a step.
        num_stages: steps that are read ahead.
        num_warps:  warps of the program.
        together:   programs for which a multiprocessor has room.
        speed:      elements that a multiprocessor makes in a time, over those of the largest tile.
        ending:     terms for which the begin and the end of a program take as long. Programs that run together hide them.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    together: int
    speed: float
    ending: int = 0

    def count(self, num_rows: int, num_columns: int) -> int:
        """Return how many tiles a matrix has."""
        return triton.cdiv(num_rows, self.block_m) * triton.cdiv(num_columns, self.block_n)

    def time(
        self, num_matrices: int, num_rows: int, num_columns: int, num_terms: int, *, symmetric: bool
    ) -> float:
        """Return the time of the multiprocessor that has most tiles, in no unit."""
        tiles = self.count(num_rows, num_columns)
        if symmetric:
            tiles = (tiles + triton.cdiv(num_rows, self.block_m)) // 2
        tiles *= num_matrices
        # Programs that have a multiprocessor for themselves do not share its time.
        together = self.together if tiles > MULTIPROCESSORS else 1
        rounds = triton.cdiv(tiles, MULTIPROCESSORS * together)
        elements = rounds * together * self.block_m * self.block_n
        return elements / self.speed * (1 + self.ending / num_terms)


TILES = (
    Tile(128, 256, 64, 3, 8, 1, 1.0, 100),
    Tile(128, 128, 64, 4, 4, 1, 0.975, 350),
    Tile(128, 128, 64, 3, 4, 2, 0.92),
    Tile(64, 128, 64, 4, 4, 2, 0.75),
    Tile(64, 64, 64, 4, 4, 2, 0.5),
)
"""The tiles, largest first. A tensor core of Hopper takes 64 rows at a time.

The numbers let `tile_of` choose among some 40 products that were timed on an H200: with one exception, a tile within a tenth of the
fastest. The second one was timed on symmetric products.
"""

LEAST_TERMS = 32
"""Least terms of a step. See `products.Tiling.within` for what fewer would do."""


def tile_of(
    num_matrices: int, num_rows: int, num_columns: int, num_terms: int, *, symmetric: bool = False
) -> Tile:
    """Return the tile with the least `time`, and of equal ones the largest. A symmetric result takes square tiles.

    A tile of which no matrix would fill more than half is left out.
    """
    return _fastest(TILES, (num_matrices, num_rows, num_columns, num_terms), symmetric)


@lru_cache(maxsize=4096)
def _fastest(tiles: tuple[Tile, ...], sizes: tuple[int, int, int, int], symmetric: bool) -> Tile:
    """Return what `tile_of` says, which each launch asks for."""
    _, num_rows, num_columns, num_terms = sizes
    fitting = [
        tile
        for tile in tiles
        if tile.block_m < 2 * num_rows
        and tile.block_n < 2 * num_columns
        and (tile.block_m == tile.block_n or not symmetric)
    ]
    tile = min(fitting or [tiles[-1]], key=lambda each: each.time(*sizes, symmetric=symmetric))
    return replace(tile, block_k=max(LEAST_TERMS, min(tile.block_k, triton.next_power_of_2(num_terms))))


def copies_in_bulk(device: torch.device) -> bool:
    """Return whether descriptors are read by bulk copies on a device, as since Hopper. Before, Triton does not read tiles ahead.

    True for a CPU, whose interpreter takes descriptors too.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= HOPPER


def has_descriptors(*stacks: Tensor) -> bool:
    """Return whether a descriptor finds the rows, or columns, of stacks of matrices.

    stacks: [E, M, K]; each matrix is contiguous along its rows or its columns
    """
    return all(
        stack.dtype is torch.bfloat16 and not any(stride % UNIT for stride in _unturned(stack).stride()[:-1])
        for stack in stacks
    )


def room_for(num_matrices: int, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    """Return a new stack of matrices, of the dtype of `like`, whose rows lie where descriptors find them fast."""
    unit = UNIT if num_columns < LINE else LINE
    width = triton.cdiv(num_columns, unit) * unit
    return like.new_empty(num_matrices, num_rows, width)[..., :num_columns]


def product_sum(
    a: Tensor,
    b: Tensor,
    *,
    factor: float = 1.0,
    added: Tensor | None = None,
    added_factor: float = 1.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Return factor (a @ b) + added_factor `added` + diagonal I, bfloat16 [E, M, N], rounded once from float32.

    a, b:      [E, M, K] and [E, K, N], not empty, see `has_descriptors`
    added:     [E, M, N], see there, with rows that are contiguous; None adds nothing, and the diagonal must be 0 then
    out:       where the result goes, as `added`, which it may be; None for a new tensor, see `room_for`
    symmetric: whether the result is its own transpose. Only tiles on and above its diagonal are computed
    """
    runs_here(a)
    if diagonal and added is None:
        raise ValueError(f"diagonal is {diagonal}, but must be 0 where nothing is added")
    (num_matrices, num_rows, num_terms), num_columns = a.shape, b.shape[2]
    if out is None:
        out = room_for(num_matrices, num_rows, num_columns, a)
    elif _is_unaligned(out):
        again = partial(product_sum, a, b, added=added, diagonal=diagonal, symmetric=symmetric)
        return out.copy_(again(factor=factor, added_factor=added_factor))
    a, b = _aligned(a), _aligned(b)
    added = None if added is None else _aligned(added)
    a_turned, b_turned = a.stride(2) != 1, b.stride(2) != 1
    tile = tile_of(num_matrices, num_rows, num_columns, num_terms, symmetric=symmetric)
    of_rows, of_columns = (tile.block_m, tile.block_k), (tile.block_k, tile.block_n)
    out_descriptor = _descriptor(out, tile.block_m, tile.block_n)
    _product_sum_kernel[row_grid(num_matrices, tile.count(num_rows, num_columns))](
        _descriptor(a, *of_rows), _descriptor(b, *of_columns),
        out_descriptor if added is None else _descriptor(added, tile.block_m, tile.block_n), out_descriptor,
        factor, added_factor, diagonal, num_rows, num_columns, num_terms,
        A_TURNED=a_turned, B_TURNED=b_turned, ADDS=added is not None, SYMMETRIC=symmetric,
        WIDE=multiplies_wide(a), GROUP=GROUP, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _is_unaligned(stack: Tensor) -> bool:
    """Return whether a stack starts at an address that no descriptor takes: no multiple of 16."""
    return stack.data_ptr() % 16 != 0


def _aligned(stack: Tensor) -> Tensor:
    """Return a stack, or a copy that is turned as it is if its address is one that no descriptor takes."""
    if not _is_unaligned(stack):
        return stack
    # A clone of a stack with room between its rows has none.
    rows = _unturned(stack)
    num_matrices, num_rows, num_columns = rows.shape
    copy = room_for(num_matrices, num_rows, num_columns, rows).copy_(rows)
    return copy if rows is stack else copy.mT


def _unturned(stack: Tensor) -> Tensor:
    """Return a stack of matrices, or of their transposes, with rows that are contiguous."""
    return stack if stack.stride(2) == 1 else stack.mT


def _descriptor(stack: Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    """Return a descriptor of tiles of a stack. Of a transposed stack it is that of what was transposed."""
    turned = stack.stride(2) != 1
    stack = _unturned(stack)
    tile = (num_columns, num_rows) if turned else (num_rows, num_columns)
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), [1, *tile])
