"""The slots of experts in any number and memory have the same bits, and compile no kernel again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops

from .. import strategies as ss
from ..compare import exact
from ..subject import Subject, needs_cuda, weight_of


@pytest.mark.parametrize("shape", [(19, 30), (19, 300), (150, 30)])
def test_few_slots_have_the_same_bits_however_many_they_are(subject: Subject, shape: tuple[int, int]) -> None:
    """Generated text should not depend on what else is generated."""
    num_rows, num_columns = shape
    # Laid out once: in the interpreter that takes longer than all the products.
    weight = weight_of(subject, 8 * num_rows, num_columns)
    experts, options = torch.tensor([3, 0, 7, 5, 1, 2, 6]), {"num_groups": 8}
    x, dy = (
        ss.float_values((7, width), "normal", width).to(torch.bfloat16) for width in (num_columns, num_rows)
    )
    for name, rows in (("grouped_linear", x), ("grouped_linear_input_grad", dy)):
        together = subject.call(name, rows, weight, experts, **options)
        for slot in range(7):
            own = slice(slot, slot + 1)
            exact(subject.call(name, rows[own], weight, experts[own], **options), together[own], name)


@pytest.mark.parametrize("positions", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_share_a_row_have_the_bits_of_slots_with_copies(
    subject: Subject, positions: int, dtype: torch.dtype
) -> None:
    """And slots of several dimensions those of the same slots in one, whether few or many."""
    experts = torch.arange(3 * positions).remainder(8).reshape(positions, 3)
    weight = weight_of(subject, 8 * 5, 13)
    x, dy = (ss.float_values((positions, width), "normal", width).to(dtype) for width in (13, 5))
    shared = {width: each.unsqueeze(1).expand(-1, 3, -1) for width, each in ((13, x), (5, dy))}
    copies = {width: each.contiguous().flatten(0, 1) for width, each in shared.items()}
    options = {"num_groups": 8}
    for name, width in (("grouped_linear", 13), ("grouped_linear_input_grad", 5)):
        got = subject.call(name, shared[width], weight, experts, **options)
        exact(
            got.flatten(0, 1), subject.call(name, copies[width], weight, experts.flatten(), **options), name
        )
    got = subject.call("grouped_linear_weight_grad", shared[5], shared[13], experts, **options)
    want = subject.call("grouped_linear_weight_grad", copies[5], copies[13], experts.flatten(), **options)
    exact(got, want, "grouped_linear_weight_grad")


@pytest.mark.parametrize("count", [200, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_an_expert_is_its_own(subject: Subject, count: int, dtype: torch.dtype) -> None:
    """It has the same bits whatever slots the others have: what an expert votes is its own affair."""
    own = torch.zeros(count, dtype=torch.int64)
    dy, x = (ss.float_values((count + 900, width), "normal", width).to(dtype) for width in (3, 5))
    alone = subject.call("grouped_linear_weight_grad", dy[:count], x[:count], own, num_groups=2)
    for other in (1, -1):
        experts = torch.cat([own, torch.full((900,), other)])
        beside = subject.call("grouped_linear_weight_grad", dy, x, experts, num_groups=2)
        exact(beside[:3], alone[:3], f"beside slots of {other}")


def test_experts_compile_no_kernel_again(subject: Subject) -> None:
    """No kernel is compiled again for another number of slots or another spread over experts, at aligned widths and ragged ones."""
    needs_cuda(subject, "recompilation of expert kernels")
    import triton

    compiled: list[str] = []
    makes = ((48, 64), (25, 36))
    made = [reference_ops.initial_weight((8 * n, k), std=0.1, seed=1, tensor_id=2) for n, k in makes]
    weights = [subject.raw("from_spec")(weight.to(subject.device)) for weight in made]

    def everything(count: int, experts: Tensor) -> None:
        for stack, (num_rows, num_columns) in zip(weights, makes, strict=True):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(count, num_columns, dtype=dtype, device=subject.device)
                dy = torch.ones(count, num_rows, dtype=dtype, device=subject.device)
                subject.raw("grouped_linear")(x, stack, experts, num_groups=8)
                subject.raw("grouped_linear_input_grad")(dy, stack, experts, num_groups=8)
                subject.raw("grouped_linear_weight_grad")(dy, x, experts, num_groups=8)

    # These counts are few slots, and one count for each height of a tile.
    for count in (1, 2, 64, 512, 1024, 4096):
        everything(count, torch.arange(count, device=subject.device) % 8)
    hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr") or kwargs.get("key")))  # noqa: E731
    previous, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, hook
    try:
        for count in (3, 4, 5, 15, 128, 129, 1000, 3072):
            for experts in (torch.arange(count) % 8, torch.full((count,), 5), torch.full((count,), -1)):
                everything(count, experts.to(subject.device))
    finally:
        triton.knobs.runtime.jit_cache_hook = previous
    assert not compiled, f"compiled again: {compiled}"
