"""The library's grouped product, which makes some gradients of stacked matrices: its results, and which calls take it.

On a CPU torch multiplies expert by expert in the place of the library. So a CPU shows that rows are brought in order and that ends
are right, and a Hopper GPU alone what the library makes of them.

Legend: E experts, N outputs of an expert, K inputs, M slots.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.optimized.cuda import compiler
from arbitor.optimized.kernels.slots import Plan, rows_by_expert
from arbitor.optimized.ops import paths
from arbitor.reference import ops as reference_ops
from conformance import strategies
from conformance.case import Case
from conformance.compare import exact, same_sums
from conformance.families import compare
from conformance.poison import PATTERNS, poisoned
from conformance.report import skip
from conformance.subject import Subject, move, needs_cuda, needs_ours

# Not by name: `ops` has ops of the names of its files.
expert_ops = import_module("arbitor.optimized.ops.experts")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

SPREADS = {
    "any": lambda draws, e, m: torch.randint(-1, e, (m,), generator=draws),
    "all on one": lambda draws, e, m: torch.full((m,), e - 1),
    "the first and the last have none": lambda draws, e, m: torch.arange(m) % max(e - 2, 1) + min(e - 1, 1),
    "none": lambda draws, e, m: torch.full((m,), -1),
}
"""Experts of slots, by what is special about them."""


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "the library's grouped product")


def needs_hopper(subject: Subject, what: str) -> None:
    """Leave a test out on GPUs that keep to the kernel, and say so in the summary."""
    if subject.device.type == "cuda" and torch.cuda.get_device_capability(subject.device) != compiler.HOPPER:
        skip(what, "the library's grouped product is for Hopper alone")


def spread_of(kind: str, num_groups: int, num_slots: int) -> Tensor:
    """Return the experts of slots of a kind."""
    return SPREADS[kind](strategies.generator(num_slots), num_groups, num_slots)


def wholes(*shape: int, seed: int) -> Tensor:
    """Return whole numbers in bfloat16, of which a sum of a thousand products is exact in float32."""
    return torch.randint(-64, 65, shape, generator=strategies.generator(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("num_groups", [1, 5, 70])
@pytest.mark.parametrize("row_slots", [1, 2])
@pytest.mark.parametrize("stride", [300, 344, 1000])
def test_rows_are_in_the_order_of_experts_with_zeros_between(
    subject: Subject, kind: str, num_groups: int, row_slots: int, stride: int
) -> None:
    """A row of zeros ends each expert, also one without a slot. Unused slots are left out. Rows may lie apart."""
    experts = spread_of(kind, num_groups, 130)
    wider = wholes(130 // row_slots, stride, seed=1)
    rows = wider[:, -300:]
    plan = Plan.of(experts.to(subject.device), num_groups)
    with poisoned(PATTERNS[0]):
        got = rows_by_expert(wider.to(subject.device)[:, -300:], plan, num_groups, row_slots).cpu()
    ends = plan.ends_with_zeros(num_groups).cpu()
    of_slots = rows.repeat_interleave(row_slots, dim=0)
    want = [each for e in range(num_groups) for each in (of_slots[experts == e], torch.zeros(1, 300))]
    exact(got[: ends[-1]], torch.cat(want).to(torch.bfloat16))
    counts = torch.tensor([int((experts == e).sum()) + 1 for e in range(num_groups)])
    exact(ends, counts.cumsum(0).to(torch.int32))
    assert ends[-1] < len(got)


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("sharing", ["nothing", "inputs", "gradients"])
@pytest.mark.parametrize("before", [0, 8])
def test_the_grouped_product_is_that_of_the_reference(
    subject: Subject, kind: str, num_groups: int, sharing: str, before: int
) -> None:
    """Every sum is rounded once. Experts without a slot have zeros, and a NaN in an unused slot shows nowhere.

    A part of a gradient is some columns of a matrix, with others `before` them.
    """
    needs_hopper(subject, "results of the library's grouped product")
    experts = spread_of(kind, num_groups, 650)
    pairs, is_unused = experts.reshape(-1, 2), experts.reshape(-1, 2, 1) < 0
    grad, x = wholes(325, 2, before + 24, seed=2), wholes(325, 2, 40, seed=3)
    if sharing == "inputs":
        x = x[:, :1].expand(-1, 2, -1)
    elif sharing == "gradients":
        grad = grad[:, :1].expand(-1, 2, -1)
    else:
        x, grad = (torch.where(is_unused, torch.nan, each) for each in (x, grad))
    grad = grad[..., before:]
    how: dict[str, Any] = {"num_groups": num_groups, "dtype": torch.bfloat16}
    want = reference_ops.grouped_linear_weight_grad(grad, x, pairs, **how)
    grad, x = (move(each, subject.device) for each in (grad, x))
    (grad, grad_slots), (x, x_slots) = (expert_ops.rows_of_slots(each, apart=True) for each in (grad, x))
    assert (grad_slots, x_slots) == {"nothing": (1, 1), "inputs": (1, 2), "gradients": (2, 1)}[sharing]
    assert not (before and grad.is_contiguous())
    plan = Plan.of(experts.to(subject.device), num_groups)
    slots = {"grad_slots": grad_slots, "x_slots": x_slots}
    for pattern in PATTERNS:
        with poisoned(pattern):
            got = expert_ops.library_weight_grad(grad, x, plan, num_groups, **slots)
        same_sums(got.cpu(), want)


def fits(
    num_outputs: int, num_inputs: int, slots: int, groups: int, dtype: torch.dtype = torch.bfloat16
) -> bool:
    """Return what `library_fits` says of rows without memory."""
    grad, x = (torch.empty(1, width, dtype=dtype, device="meta") for width in (num_outputs, num_inputs))
    found: bool = expert_ops.library_fits(grad, x, slots, groups)
    return found


def test_rows_whose_elements_lie_apart_are_copied(subject: Subject) -> None:
    """As those of a transposed gradient. Rows that lie apart, each by itself, are read where they are."""
    wider = wholes(130, 48, seed=6).to(subject.device)
    rows, slots = expert_ops.rows_of_slots(wider[:, 8:], apart=True)
    assert slots == 1 and rows.data_ptr() == wider[:, 8:].data_ptr()
    turned = wholes(40, 130, seed=7).to(subject.device).T
    experts = spread_of("any", 5, 130)
    plan = Plan.of(experts.to(subject.device), 5)
    rows, slots = expert_ops.rows_of_slots(turned, apart=True)
    got = rows_by_expert(rows, plan, 5, slots)[: int((experts == 0).sum())]
    exact(got.cpu(), turned.cpu()[experts == 0])


def test_which_calls_the_grouped_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices of many slots an expert, whose rows begin at multiples of 16 bytes."""
    assert fits(3536, 1192, 32_768, 32)
    assert fits(1024, 1024, 512, 1) and not fits(1024, 1016, 512, 1)
    assert not fits(3536, 1192, 32 * 512 - 1, 32)
    assert not fits(3532, 1192, 32_768, 32) and not fits(3536, 1196, 32_768, 32)
    assert not fits(3536, 1192, 32_768, 32, torch.float32)
    assert fits(3536, 1192, 512 * 512, 512) and not fits(3536, 1192, 1024 * 513, 513)
    assert fits(3536, 1192, 2**31 - 33, 32) is fits(3536, 1192, 2**31 - 33, 1) is True
    assert not fits(3536, 1192, 2**31 - 32, 32)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert not fits(3536, 1192, 32_768, 32)


def test_the_path_of_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARB_PATH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert paths.takes_library(True, CUDA, only=(9, 0))
    assert not paths.takes_library(False, CUDA, only=(9, 0)) and not paths.takes_library(
        True, CPU, only=(9, 0)
    )
    assert not paths.takes_library(True, CUDA, only=(8, 0))
    monkeypatch.setenv("ARB_PATH", "cuda")
    assert paths.takes_library(True, CUDA, only=(9, 0))
    monkeypatch.setenv("ARB_PATH", "triton")
    assert not paths.takes_library(True, CUDA, only=(9, 0))
    monkeypatch.setenv("ARB_PATH", "ptx")
    with pytest.raises(ValueError, match="ARB_PATH is 'ptx', but must be one of cuda, triton"):
        paths.takes_library(True, CUDA, only=(9, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_op_asks_for_the_path(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A call that fits goes to the library where the path is open, and a gradient in float32 never does."""
    needs_hopper(subject, "a call of the library's grouped product")
    taken: list[bool] = []
    by_library = expert_ops.library_weight_grad

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        taken.append(True)
        return by_library(*args, **kwargs)

    monkeypatch.setattr(expert_ops, "library_weight_grad", watched)
    monkeypatch.setattr(expert_ops, "LIBRARY_SLOTS", 8)
    monkeypatch.setattr(expert_ops, "LIBRARY_ELEMENTS", 1)
    case = Case(
        (wholes(100, 16, seed=4), wholes(100, 24, seed=5), spread_of("any", 5, 100)),
        {"num_groups": 5, "dtype": dtype},
        sums_exact=True,
    )
    for is_open in (True, False):
        monkeypatch.setattr(
            expert_ops, "takes_library", lambda fits, *_, is_open=is_open, **how: fits and is_open
        )
        taken.clear()
        compare(subject, "grouped_linear_weight_grad", case)
        assert any(taken) == (is_open and dtype is torch.bfloat16)


@pytest.mark.parametrize("kind", SPREADS)
def test_a_large_call_on_a_gpu(subject: Subject, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As the trainer calls it, recorded in a CUDA graph and played again with other slots. The same call leaves the same bits."""
    needs_cuda(subject, "the library's grouped product of a large call")
    needs_hopper(subject, "the library's grouped product of a large call")
    monkeypatch.delenv("ARB_PATH", raising=False)
    num_groups, num_slots = 5, 5 * 600
    wider, x = (
        strategies.float_values((num_slots, width), "normal", width).to(torch.bfloat16)
        for width in (1056, 1192)
    )
    # As a part of the outputs of each expert.
    grad = wider[:, 16:]
    how: dict[str, Any] = {"num_groups": num_groups, "dtype": torch.bfloat16}
    experts = spread_of(kind, num_groups, num_slots)
    called = []
    by_library = F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda *args, **kwargs: called.append(1) or by_library(*args, **kwargs)
    )
    compare(subject, "grouped_linear_weight_grad", Case((grad, x, experts), how))
    assert called, "the kernel made the gradient"
    op = subject.raw("grouped_linear_weight_grad")
    grad_there, x_there, experts_there = (move(each, subject.device) for each in (grad, x, experts))
    want = op(grad_there, x_there, experts_there, **how)
    exact(op(grad_there, x_there, experts_there, **how).cpu(), want.cpu(), "again")
    slots = torch.arange(num_slots, device=subject.device) % num_groups
    monkeypatch.setenv("ARB_VALUE_CHECKS", "0")
    op(grad_there, x_there, slots, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = op(grad_there, x_there, slots, **how)
    slots.copy_(experts_there)
    graph.replay()
    exact(made.cpu(), want.cpu(), "played again")
