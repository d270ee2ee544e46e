"""Calls that CUDA C++ kernels take: every group size, both ends of each tile, rows that start anywhere, rows that are not finite.

Drawn calls seldom have the widths and rows that these kernels ask for. `compile_cuda` compiles what these calls launch, and
`test_paths` compares them with the reference on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from arbitor.optimized.cuda import many_rows
from arbitor.optimized.kernels.together import NARROW_COLUMNS
from arbitor.reference.constants import ACCUM_MAX, EXPONENT_RULES, ON_FLIP, groups_per_row, level_range
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance.case import Case

PRODUCTS = (
    # Rows and columns of the weight, columns of a group, mantissa bits, rows of x. Groups of 64 are for Triton.
    (5, 8, 12, 2, (1, 8)),
    (48, 96, 12, 0, (1, 8)),
    (33, 1536, 12, 1, (3,)),
    (100, 1000, 12, 2, (1, 5, 8)),
    (64, 7168, 12, 2, (1, 8)),
    (50, 1160, 6, 2, (2, 7)),
    (40, 776, 16, 2, (1, 8)),
    (40, 776, 24, 1, (1,)),
    (16, 1160, 32, 0, (4,)),
    (16, 1160, 48, 2, (6,)),
    (17, 1160, 96, 2, (8,)),
    # Tiles enough for larger blocks.
    (4850, 200, 12, 2, (1, 8)),
    (9700, 392, 12, 2, (1, 8)),
    # More rows, on Hopper.
    (100, 1000, 12, 2, (9, 17, 65)),
    (300, 3080, 12, 1, (40, 200, 300)),
    (7000, 392, 12, 2, (300,)),
    (70, 1160, 6, 2, (64,)),
    (40, 776, 16, 0, (33,)),
    (40, 776, 24, 1, (12,)),
    (16, 1160, 48, 2, (70,)),
    (17, 1160, 96, 2, (16,)),
)
GROUPED = (
    # Experts, rows of one, columns, columns of a group, mantissa bits, slots.
    (5, 40, 392, 12, 2, (3, 5, 40, 300)),
    (40, 70, 520, 12, 1, (30, 700)),
    # The last count is of more than 96 slots an expert, which take a form of their own.
    (2, 130, 776, 16, 0, (2, 100, 260)),
)
UPDATES = (
    (5, 144, 12, 2),
    (33, 1536, 12, 1),
    (20, 1008, 12, 2),
    (20, 1168, 6, 2),
    (20, 784, 16, 0),
    (20, 784, 24, 2),
    (16, 1168, 48, 0),
    # Odd multiples of eight columns. Votes of all rows of 88 columns are for Triton.
    (20, 1192, 12, 2),
    (9, 1176, 6, 2),
    (9, 88, 16, 0),
    (9, 200, 24, 1),
    (9, 136, 48, 2),
)
LOOPS = (
    # Samples, numbers of a latent, tokens, width, steps, columns of a group, mantissa bits, dtype, halting.
    (1, 64, 16, 32, 3, 12, 2, torch.float32, None),
    (4, 64, 16, 32, 1, 12, 2, torch.float32, 0.5),
    (1, 1000, 37, 600, 3, 12, 2, torch.float32, 0.99),
    (2, 1000, 37, 600, 2, 12, 2, torch.bfloat16, 0.9),
    (3, 516, 298, 1100, 3, 6, 1, torch.bfloat16, 0.9),
    (4, 36, 70, 28, 8, 16, 0, torch.bfloat16, None),
    (2, 600, 9, 516, 3, 24, 2, torch.float32, 0.99),
    (1, 4, 1, 4, 2, 32, 0, torch.float32, 0.5),
    (3, 520, 5, 2052, 2, 48, 2, torch.float32, None),
    (2, 128, 1000, 64, 3, 48, 1, torch.float32, 0.99),
    (1, 8192, 298, 512, 3, 96, 2, torch.bfloat16, 0.9),
    # More tokens than blocks keep in shared memory.
    (2, 2000, 4000, 1024, 3, 12, 2, torch.float32, 0.99),
)
LOOP_LEVELS = (-4, 1)
RATES = (0.0, 1e-12, 0.7, 5.9, 127.0)


@contextmanager
def of_any_size() -> Iterator[None]:
    """Let kernels take weights within the block that are too small to be worth it, as those of these calls are."""
    with mock.patch.multiple(many_rows, ROWS=((0, 9, 2**20),), LEAST_EXPERT=0, LEAST_SIDE=0):
        yield


def calls() -> Iterator[tuple[str, Case]]:
    """Yield op and call, the same on every run."""
    draws = torch.Generator().manual_seed(1)
    for num_rows, num_columns, group_size, mantissa_bits, counts in PRODUCTS:
        weight = random_weight(draws, num_rows, num_columns, group_size, mantissa_bits)
        for count in counts:
            x = torch.randn(count, num_columns, generator=draws).to(torch.bfloat16)
            if count > 2:
                x[1, -1], x[2, 0] = float("nan"), float("inf")
            yield "linear", Case((x, weight))
    for num_groups, num_rows, num_columns, group_size, mantissa_bits, counts in GROUPED:
        weight = random_weight(draws, num_groups * num_rows, num_columns, group_size, mantissa_bits)
        for count in counts:
            experts = torch.randint(-1, num_groups, (count,), generator=draws)
            x = torch.randn(count, num_columns, generator=draws).to(torch.bfloat16)
            yield "grouped_linear", Case((x, weight, experts), {"num_groups": num_groups})
        # Two slots read one row in memory.
        x = torch.randn(6, 1, num_columns, generator=draws).to(torch.bfloat16).expand(6, 2, num_columns)
        experts = torch.randint(-1, num_groups, (6, 2), generator=draws)
        yield "grouped_linear", Case((x, weight, experts), {"num_groups": num_groups})
    for place, (shape, rule, dtype) in enumerate(
        product(UPDATES, EXPONENT_RULES, (torch.bfloat16, torch.float32))
    ):
        weight = random_weight(draws, *shape)
        grad = random_gradient(draws, *shape[:2]).to(dtype)
        rate: float | Tensor = RATES[place % len(RATES)]
        clock: dict[str, Any] = {"seed": 123456789012 + place, "step": 4000000000, "tensor_id": 77}
        if place % 2:
            rate, clock["step"] = torch.tensor(rate), torch.tensor(clock["step"])
        faults = torch.zeros((), dtype=torch.int64)
        # At its last place in a table, a weight has the last of all group ids.
        first_row = (0, 2**32 // weight.exponents.shape[1] - len(grad))[place // 2 % 2]
        given = {"exponent_rule": rule, "faults": faults, "first_row": first_row, **clock}
        if shape[1] > NARROW_COLUMNS or first_row:
            yield "accumulate_gradient", Case((weight, grad, rate), given)
        rows = torch.randperm(len(grad), generator=draws)
        # An unused slot, here with a gradient that is not finite, votes for no row.
        rows[::3] = -1
        yield "accumulate_gradient", Case((weight, grad, rate), {"rows": rows, **given})
    stepped = [shape for shape in UPDATES if shape[1] % 8 == 0]
    for shape, on_flip, theta in product(stepped, ON_FLIP, (1, 64, 127)):
        yield "apply_step", Case((random_weight(draws, *shape),), {"theta": theta, "on_flip": on_flip})
    for num_samples, size, num_tokens, width, steps, group_size, mantissa_bits, dtype, threshold in LOOPS:
        shapes = ((width, size), (width, width), (steps, width), (size, width))
        weights = [loop_weight(draws, *shape, group_size, mantissa_bits) for shape in shapes]
        # Each sample sees a signal of another size, so that samples halt at different steps.
        loud = torch.arange(num_samples)[:, None] * 2.0
        latent = (torch.randn(num_samples, size, generator=draws) * loud.exp2()).to(dtype)
        tokens = torch.randn(num_samples, num_tokens, width, generator=draws).to(dtype)
        alphas = (0.5, 0.9, 0.7, 0.3, 1.0, 0.8, 0.6, 0.9)[:steps]
        yield (
            "denoise_loop",
            Case((latent, tokens, *weights), {"alphas": alphas, "halt_threshold": threshold}),
        )


def loop_weight(
    draws: torch.Generator, num_rows: int, num_columns: int, group_size: int, mantissa_bits: int
) -> TernaryWeight:
    """Return a weight with every trit, whose scales keep a chain of products within float32."""
    weight = random_weight(draws, num_rows, num_columns, group_size, mantissa_bits)
    low, high = (exponent << mantissa_bits for exponent in LOOP_LEVELS)
    levels = torch.randint(low, high + 1, weight.exponents.shape, generator=draws, dtype=torch.int8)
    return weight.with_tensors(exponents=levels)


def random_weight(
    draws: torch.Generator, num_rows: int, num_columns: int, group_size: int, mantissa_bits: int
) -> TernaryWeight:
    """Return a weight with every trit, level and count."""

    def integers(low: int, high: int, columns: int) -> Tensor:
        return torch.randint(low, high + 1, (num_rows, columns), generator=draws, dtype=torch.int8)

    groups = groups_per_row(num_columns, group_size)
    levels = integers(*level_range(mantissa_bits), groups)
    weight = weight_of_trits(integers(-1, 1, num_columns), levels, group_size, mantissa_bits=mantissa_bits)
    return weight.with_tensors(
        trit_accum=integers(-ACCUM_MAX, ACCUM_MAX, num_columns),
        exponent_accum=integers(-ACCUM_MAX, ACCUM_MAX, groups),
    )


def random_gradient(draws: torch.Generator, num_rows: int, num_columns: int) -> Tensor:
    """Return a gradient whose rows have sizes from one end of float32 to the other, one of zeros and two that are not finite."""
    sizes = torch.randint(-140, 120, (num_rows, 1), generator=draws)
    grad = torch.ldexp(torch.randn(num_rows, num_columns, generator=draws), sizes)
    grad[1], grad[2, 3], grad[3, 1] = 0.0, float("nan"), float("-inf")
    return grad
