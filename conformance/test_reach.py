"""Triton's interpreter stops a kernel that reaches for memory which it was not given, or gives a false hint, as a GPU may."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from conformance.report import skip
from conformance.subject import Subject


@triton.jit
def copying(x_ptr, y_ptr, size, BLOCK: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < LOADS, other=0)
    tl.store(y_ptr + places, x, mask=places < STORES)


@triton.jit
def adding(y_ptr, BLOCK: tl.constexpr, CHANGES: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + places, 1, mask=places < CHANGES)


@triton.jit
def bare(x_ptr, y_ptr, PLACE: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + PLACE))


@triton.jit
def described(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    found = tl.make_tensor_descriptor(x_ptr, shape=[1, size], strides=[size, 1], block_shape=[1, BLOCK]).load(
        [0, 0]
    )
    tl.store(y_ptr + tl.arange(0, BLOCK)[None, :], found)


@triton.jit
def tabled(table_ptr, like_ptr):
    address = tl.load(table_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty))
    tl.store(address, 7)


@triton.jit
def hinting(x_ptr, y_ptr, BLOCK: tl.constexpr):
    size = tl.multiple_of(tl.load(x_ptr), 8)
    places = tl.multiple_of(size + tl.arange(0, BLOCK), 4)
    tl.store(tl.multiple_of(y_ptr, 16) + tl.arange(0, BLOCK), places)


@pytest.fixture(autouse=True)
def interpreted(subject: Subject) -> None:
    if not triton.knobs.runtime.interpret:
        skip("what kernels can reach", "kernels run on CUDA, not in Triton's interpreter")


def numbers(size: int) -> torch.Tensor:
    """Return a tensor whose memory has as many elements as it has."""
    return torch.arange(size, dtype=torch.int32)


@pytest.mark.parametrize(
    ("loads", "stores", "what"), [(5, 5, ""), (6, 5, "load 1 of 6"), (5, 8, "store 3 of 8")]
)
def test_a_mask_that_lets_too_much_through_is_noticed(loads: int, stores: int, what: str) -> None:
    x, y = numbers(5), numbers(5)
    if not what:
        copying[(1,)](x, y, 5, BLOCK=8, LOADS=loads, STORES=stores)
        return
    with pytest.raises(Exception, match=f"copying would {what} elements out of its reach"):
        copying[(1,)](x, y, 5, BLOCK=8, LOADS=loads, STORES=stores)


def test_sums_of_many_programs_are_watched() -> None:
    y = numbers(5)
    adding[(1,)](y, BLOCK=8, CHANGES=5)
    assert y.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(Exception, match="adding would change 1 of 6 elements"):
        adding[(1,)](y, BLOCK=8, CHANGES=6)


@pytest.mark.parametrize("place", [-1, 5, 2**33])
def test_a_load_without_a_mask_is_watched(place: int) -> None:
    x, y = numbers(5), numbers(5)
    bare[(1,)](x, y, PLACE=4)
    assert y[0] == 4
    with pytest.raises(Exception, match="bare would load 1 of 1 elements"):
        bare[(1,)](x, y, PLACE=place)


def test_what_a_descriptor_describes_is_watched() -> None:
    y = numbers(8)
    described[(1,)](numbers(8) + 1, y, 8, BLOCK=8)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(Exception, match="described would load 3 of 8 elements"):
        described[(1,)](numbers(5), y, 8, BLOCK=8)


def test_a_view_reaches_its_memory() -> None:
    """A kernel may be given rows of a larger tensor, and step from them by their stride."""
    whole, y = numbers(8), numbers(5)
    bare[(1,)](whole[3:5], y, PLACE=-3)
    assert y[0] == 0


def test_kernels_that_find_tensors_in_a_table_are_not_watched() -> None:
    """No argument says what these may touch."""
    y = numbers(5)
    tabled[(1,)](torch.tensor([y.data_ptr()]), numbers(1))
    assert y[0] == 7


def test_a_kernel_that_failed_leaves_the_next_one_its_own_reach() -> None:
    x, y = numbers(5), numbers(5)
    with pytest.raises(Exception, match="out of its reach"):
        bare[(1,)](x, y, PLACE=5)
    bare[(1,)](numbers(9), y, PLACE=8)
    assert y[0] == 8


def test_a_false_hint_is_noticed() -> None:
    """Of a number, and of the address of a tensor in bytes. Of a block, the first number counts."""
    y = torch.zeros(9, dtype=torch.int32)
    hinting[(1,)](numbers(5) + 24, y, BLOCK=4)
    assert y[:4].tolist() == [24, 25, 26, 27]
    with pytest.raises(Exception, match="25 is called a multiple of 8"):
        hinting[(1,)](numbers(5) + 25, y, BLOCK=4)
    with pytest.raises(Exception, match=f"{y[1:].data_ptr()} is called a multiple of 16"):
        hinting[(1,)](numbers(5) + 24, y[1:], BLOCK=4)
