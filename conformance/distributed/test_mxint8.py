"""Gradients in eight bits come back as MXINT8 says: near, in known bytes, and NaN where they were not finite.

The kernels of ranks on GPUs leave the same bytes, and the same sums of what the bytes stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from arbitor.optimized.distributed import sums
from arbitor.optimized.kernels import mxint8 as kernels
from arbitor.reference.graph.mxint8 import BLOCK, LEAST_EXPONENT, decoded, encoded, encoded_bytes
from conformance.compare import exact
from conformance.subject import Subject, move, needs_ours

SHAPES = ((0, 7), (1, 1), (3, 1), (2, 31), (2, 32), (3, 33), (2, 96), (2, 1060))
"""Rows of less than a block, of one, of one and a ragged one; a row of more than a tile."""


def through(grad: torch.Tensor) -> torch.Tensor:
    content = encoded(grad)
    assert content.dtype is torch.uint8 and content.numel() == encoded_bytes(*grad.shape)
    return decoded(content, *grad.shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (4, 96), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_values_come_back_within_a_unit_of_their_block(
    shape: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    grad = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    found = through(grad)
    assert found.dtype is torch.float32 and found.shape == shape
    for first in range(0, shape[1], BLOCK):
        block, back = grad[:, first : first + BLOCK].double(), found[:, first : first + BLOCK].double()
        for row, of_row in zip(block, back, strict=True):
            scale_of_block = 2.0 ** math.floor(math.log2(row.abs().max().item()))
            error = (of_row - row).abs()
            clamped = row.abs() > 127.5 / 64 * scale_of_block
            assert bool((error <= torch.where(clamped, 1 / 64, 1 / 128) * scale_of_block).all())


def test_multiples_of_a_unit_come_back_as_they_were() -> None:
    """Bytes that were decoded are encoded to the same bytes, so nothing is lost by a second way."""
    grad = torch.arange(-127, 128, dtype=torch.float32)[None] / 64
    found = through(grad)
    assert torch.equal(found[:, :32], grad[:, :32]) and torch.equal(through(found), found)


def test_special_blocks() -> None:
    grad = torch.ones(3, 3 * BLOCK)
    grad[0, 5], grad[1, BLOCK], grad[2] = math.inf, math.nan, 0.0
    grad[0, 2 * BLOCK :] = 2.0**-140
    found = through(grad)
    assert found[0, :BLOCK].isnan().all() and bool((found[0, BLOCK : 2 * BLOCK] == 1).all())
    assert bool((found[1, :BLOCK] == 1).all()) and found[1, BLOCK : 2 * BLOCK].isnan().all()
    assert bool((found[2] == 0).all()) and bool((found[0, 2 * BLOCK :] == 0).all())
    # The scales come last, and nothing is larger than 0 in the last row.
    assert encoded(grad)[-3:].tolist() == [LEAST_EXPONENT + 127] * 3


@pytest.mark.parametrize("below", range(-1, 7))
def test_blocks_below_the_least_scale_keep_its_unit(below: int) -> None:
    """The unit of the least scale is a 64th of it."""
    grad = torch.full((1, 3), 2.0 ** (LEAST_EXPONENT - below))
    assert torch.equal(through(grad), grad)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 2.0**127, 1.9999, -1.9999])
def test_the_largest_magnitudes_stay_finite(value: float) -> None:
    found = through(torch.full((1, 2), value))
    assert bool(found.isfinite().all())
    assert abs(found[0, 0].item() / value - 1) < 1 / 64


def edges() -> torch.Tensor:
    """Return float32 rows, one for each scale at an edge: numbers halfway between two units of it, and beyond the last."""
    of_unit = torch.tensor([64.0, 127.0, 127.25, 127.5, 127.75, 126.5, 125.5, 0.5, 1.5, 2.5, 0.25, 1.0, 0.0])
    # The last bit of a magnitude decides whether it is halfway.
    near = torch.cat([of_unit, of_unit.nextafter(torch.tensor(0.0)), of_unit.nextafter(torch.tensor(256.0))])
    exponents = [-149, -128, -127, -126, -122, -121, -120, -119, -118, -64, -1, 0, 1, 63, 125, 126, 127]
    rows = torch.stack([torch.ldexp(near.double(), torch.tensor(each - 6)).float() for each in exponents])
    rows[1::2, 1::3] *= -1
    return torch.cat([rows, -rows])


def gradients(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield gradients [N, K] of every kind, some with rows that lie apart, or with columns that do."""
    generator = torch.Generator().manual_seed(1)
    largest = torch.finfo(dtype).max
    yield edges().to(dtype)
    for num_rows, num_columns in SHAPES:
        size = torch.exp2(torch.randint(-140, 126, (num_rows, 1), generator=generator).float())
        grad = (torch.randn(num_rows, num_columns, generator=generator) * size).to(dtype)
        yield grad
        yield torch.cat([grad, grad], dim=1)[:, :num_columns]
        yield grad.t().contiguous().t()
        for special in (math.nan, -math.nan, math.inf, -math.inf, largest, -largest, -0.0, 2.0**-133):
            if num_columns > 1:
                special_grad = grad[:1].clone()
                special_grad[:, num_columns // 2] = special
                yield special_grad
            yield torch.full((min(num_rows, 1), num_columns), special, dtype=dtype)


def check_encoding(module: ModuleType, subject: Subject, dtype: torch.dtype) -> None:
    """Compare the bytes of a kernel, and those that ranks send, with those of the rule."""
    for grad in gradients(dtype):
        want, given = encoded(grad), move(grad, subject.device)
        what = f"{tuple(grad.shape)} in strides {grad.stride()}"
        exact(module.encode(given).cpu(), want, what)
        exact(sums.in_eight_bits(given).cpu(), want, what)


def check_sums(module: ModuleType, subject: Subject, count: int, summed_in: torch.dtype) -> None:
    """Compare the sums of a kernel, and those of ranks, with those of decoded gradients, one addition after the other."""
    generator = torch.Generator().manual_seed(count)
    for grad in gradients(torch.float32):
        # No two orders of these terms give one sum.
        signs = torch.randn(count, *grad.shape, generator=generator)
        parts = torch.stack([encoded(grad * sign) for sign in signs])
        want = torch.empty(grad.shape, dtype=summed_in)
        sums.sum_in_order(torch.stack([decoded(each, *grad.shape) for each in parts]), want)
        for add in (module.add_encoded, sums.sum_eight_bits):
            found = torch.full_like(want, 7.0, device=subject.device)
            add(parts.to(subject.device), found)
            # NaN are of many bits.
            assert found.cpu().isnan().equal(want.isnan())
            exact(
                *(each.nan_to_num(nan=0.5, posinf=math.inf, neginf=-math.inf) for each in (found.cpu(), want))
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_encodes_to_the_bytes_of_the_rule(subject: Subject, dtype: torch.dtype) -> None:
    needs_ours(subject, "gradients in eight bits")
    check_encoding(kernels, subject, dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("summed_in", [torch.float32, torch.bfloat16])
def test_a_kernel_adds_what_ranks_have_encoded_in_their_order(
    subject: Subject, count: int, summed_in: torch.dtype
) -> None:
    needs_ours(subject, "sums of gradients in eight bits")
    check_sums(kernels, subject, count, summed_in)


ENCODES_WRONGLY = {
    "a scale one off": ("scales = tl.maximum(largest >> 23,", "scales = 1 + tl.maximum(largest >> 23,"),
    "a least scale one off": ("LEAST + BIAS)", "LEAST + BIAS - 1)"),
    "no clamp": ("tl.minimum(tl.maximum(units, -127.0), 127.0)", "units"),
    "a clamp to -128": ("-127.0", "-128.0"),
    "halves away from 0": ("round_half_even(tl.min", "tl.floor(0.5 + tl.min"),
    "a NaN that is cast": ("units == units", "units == units + (units - units)"),
    "elements of a block that is not finite": ("largest == INFINITE", "largest < 0"),
    "scales behind one row": ("num_rows.to(tl.int64) * num_columns + row * num_blocks\n    tl.store", "num_columns\n    tl.store"),
    "columns that lie side by side": ("columns.to(tl.int64) * column_stride", "columns"),
    "rows that lie side by side": ("row * row_stride", "row * num_columns"),
}  # fmt: skip
"""Changes to kernels/mxint8.py after which a gradient has other bytes."""


ADDS_WRONGLY = {
    "the last rank first": ("        parts, out_NK", "        parts.flip(0), out_NK"),
    "one rank less": ("range(1, num_parts)", "range(2, num_parts)"),
    "a scale one off": ("power_of_two(scales - BIAS - UNITS)", "power_of_two(scales - BIAS - UNITS + 1)"),
    "no NaN": ("scales == NO_SCALE", "scales < 0"),
    "elements without a sign": (".to(tl.int8, bitcast=True)", ""),
    "scales of the first rank": ("        scales_ptr += part_bytes\n", ""),
    "a sum in bfloat16": ("sums += _decoded(", "sums = widen(narrow(sums, tl.bfloat16)) + _decoded("),
}
"""The same, after which sums are others."""


def broken(folder: Path, old: str, new: str) -> ModuleType:
    """Return the kernels with one piece of their text exchanged. Triton reads the text of a kernel from its file."""
    text = Path(str(kernels.__file__)).read_text()
    assert text.count(old) == 1, f"`{old}` is not once in kernels/mxint8.py: break something else here"
    file = folder / "broken_mxint8.py"
    file.write_text(text.replace(old, new))
    spec = spec_from_file_location("broken_mxint8", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", ENCODES_WRONGLY)
def test_a_kernel_that_encodes_wrongly_is_noticed(subject: Subject, tmp_path: Path, fault: str) -> None:
    needs_ours(subject, "gradients in eight bits")
    module = broken(tmp_path, *ENCODES_WRONGLY[fault])
    with pytest.raises(AssertionError):
        check_encoding(module, subject, torch.float32)


@pytest.mark.parametrize("fault", ADDS_WRONGLY)
def test_a_kernel_that_adds_wrongly_is_noticed(subject: Subject, tmp_path: Path, fault: str) -> None:
    needs_ours(subject, "sums of gradients in eight bits")
    module = broken(tmp_path, *ADDS_WRONGLY[fault])
    with pytest.raises(AssertionError):
        check_sums(module, subject, 3, torch.float32)
