"""Grouped linears: only experts in use vote, large weights are taken in parts, and a product is one launch.

Legend: M slots (rows of activations), N outputs, K inputs, E experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import TernaryLinear, layers
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.grouped import TernaryGroupedLinear, numbered
from conformance.compare import exact, unsigned_zeros
from conformance.graph import models
from conformance.graph.models import integers, on, quick_context
from conformance.report import skip
from conformance.subject import Subject, weight_of


def test_numbered_names_each_expert_in_use_once() -> None:
    experts = torch.tensor([7, -1, 3, 7, 900])
    groups, used = numbered(experts)
    assert groups.tolist() == [1, -1, 0, 1, 2] and used.tolist() == [3, 7, 900, -1, -1]
    assert numbered(torch.tensor([-1, -1]))[1].tolist() == [-1, -1]
    assert numbered(experts[:0])[0].tolist() == []


@pytest.mark.parametrize(
    ("vote_rule", "experts"),
    [("stochastic", [2]), ("stochastic", [5, -1, 5, 0]), ("sign", [4, 4, 0, 1, -1, 0, 5, 4, 2])],
    ids=["1", "4", "9"],
)
def test_a_grouped_linear_votes_and_steps_alike(subject: Subject, vote_rule: str, experts: list[int]) -> None:
    """With fewer slots than experts and with more, the op set under test leaves what the reference leaves."""
    results = []
    for ops, device in ((reference_ops, torch.device("cpu")), on(subject)):
        config = models.nano(theta=5, theta_e=3, vote_rule=vote_rule).config
        parts = GraphContext(ops, config, device=device, dtype=torch.float32, seed=7)
        layer = TernaryGroupedLinear(parts, 6, 13, 5)
        slots, outputs = torch.tensor(experts, device=device), []
        for step in range(2):
            x = integers(len(experts), 13, seed=step).to(device).requires_grad_()
            y = layer(x, slots)
            with parts.voting.taking(rate=2.0, step=step, size=2):
                (y * integers(len(experts), 5, seed=9).to(device)).sum().backward()
            outputs += [y.detach().cpu(), x.grad.cpu()]
            layer.step_weight()
        weight = ops.to_spec(layer.weight).to("cpu")
        voted = weight.trit_accum.reshape(6, -1).any(dim=1) | weight.exponent_accum.reshape(6, -1).any(dim=1)
        assert set(voted.nonzero().flatten().tolist()) <= set(experts)
        results.append((unsigned_zeros(tuple(outputs)), weight))
    exact(results[1], results[0])
    assert results[0][1].trit_accum.any()


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
@pytest.mark.parametrize("count", [3, 9])
def test_large_weights_vote_in_parts(monkeypatch: pytest.MonkeyPatch, vote_rule: str, count: int) -> None:
    """However many rows vote at a time, the state is the same, before the step and after it."""
    experts, states = torch.arange(count) % 4, []
    for most in (2**27, 100, 1):
        monkeypatch.setattr(layers, "VOTE_ELEMENTS", most)
        made: list[Tensor] = []

        def watched(op: Any, made: list[Tensor] = made) -> Any:
            def run(*args: Any, **kwargs: Any) -> Tensor:
                made.append(op(*args, **kwargs))
                return made[-1]

            return run

        ops = models.ops_with(
            linear_weight_grad=watched(reference_ops.linear_weight_grad),
            grouped_linear_weight_grad=watched(reference_ops.grouped_linear_weight_grad),
        )
        parts = quick_context(ops=ops, vote_rule=vote_rule)
        plain, grouped = TernaryLinear(parts, 14, 20), TernaryGroupedLinear(parts, 5, 20, 6)
        found: list[Any] = []
        for step in range(2):
            x = integers(count, 14, seed=step)
            with parts.voting.taking(rate=2.0, step=step, size=3):
                (grouped(plain(x), experts) * integers(count, 6, seed=5)).sum().backward()
            found += [plain.weight.clone(), grouped.weight.clone()]
            plain.step_weight()
            grouped.step_weight()
        states.append((*found, plain.weight, grouped.weight))
        # One output of every expert is the least part.
        row = 20 * min(count, 5)
        assert max(grad.numel() for grad in made) <= max(most, row)
        assert (len(made) == 4) == (most == 2**27)
    exact(states[1], states[0])
    exact(states[2], states[0])


def test_large_weights_are_unpacked_in_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op set's own bound on dense copies changes no bit of sums that are exact, and is kept."""
    try:
        linear = importlib.import_module(f"{subject.ops.__name__}.linear")
        limit = linear.DENSE_ELEMENTS
    except (ImportError, AttributeError):
        skip("dense copies in parts", f"{subject.name} has no bound on them")
    weight = reference_ops.initial_weight((40, 36), std=0.2, seed=1, tensor_id=2)
    calls = (("linear", integers(5, 36, seed=1)), ("linear_input_grad", integers(5, 40, seed=2)))
    for dtype in (torch.float32, torch.bfloat16):
        for name, values in calls:
            results = []
            for most in (limit, 1):
                monkeypatch.setattr(linear, "DENSE_ELEMENTS", most)
                results.append(unsigned_zeros(subject.call(name, values.to(dtype), weight)))
            exact(results[1], results[0], name)
    assert len(linear.row_ranges(40, 36)) == 3


class Work(TorchDispatchMode):
    """Notes what is asked of the device while it is active: launches of Triton, and ops of torch with the shapes they return.

    asked:    all of it in its order, as comparable values.
    launches: of these the kernels, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Any]] = []
        self.launches: list[str] = []
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What the interpreter does with torch is no work of a GPU.
        if not self.launching:
            made = result if isinstance(result, (tuple, list)) else (result,)
            self.asked.append((str(func), [tuple(each.shape) for each in made if isinstance(each, Tensor)]))
        return result

    def launch(self, kernel: Any, grid: Any, run: Any) -> Any:
        """Note a launch, then have it run."""
        self.asked.append((kernel.fn.__name__, grid))
        self.launches.append(kernel.fn.__name__)
        self.launching = True
        try:
            return run()
        finally:
            self.launching = False


@contextmanager
def watched_work() -> Iterator[Work]:
    """Note the work of the device, kernels included, compiled or interpreted."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def noting(run: Any, work: Work) -> Any:
        return lambda kernel, *args, grid, **kwargs: work.launch(
            kernel, grid, lambda: run(kernel, *args, grid=grid, **kwargs)
        )

    with pytest.MonkeyPatch.context() as patch, Work() as work:
        patch.setenv("ARB_VALUE_CHECKS", "0")
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", noting(kind.run, work))
        yield work


def needs_launches(subject: Subject) -> None:
    """Leave a test of launches out where they are not Triton's."""
    if subject.name != "arbitor.optimized.ops":
        skip("launches of experts", f"it counts those of arbitor.optimized.ops, not of {subject.name}")


WAITING = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select")
"""Parts of the names of torch's ops that wait for the device. They return a number, or a shape that values decide."""

SORTING = ("_count_slots_kernel", "_place_slots_kernel")
"""The launches that bring slots in the order of their experts, before the launch that multiplies."""

SPREADS = {
    "sorted": (4, [[0] * 9, [3] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 0], [2, 0, 2, -1, 0, 0, -1, 2, 2], [-1] * 9]),
    "few": (16, [[7, 7], [0, 15], [15, -1], [-1, -1]]),
}
"""Spreads of slots over experts: all on one, even, some experts and slots unused, none used. Slots of `few` are not sorted."""


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_is_one_launch_however_slots_fall(
    subject: Subject, kind: str, dtype: torch.dtype
) -> None:
    """And nothing else that is asked of the device depends on it either."""
    needs_launches(subject)
    num_groups, spreads = SPREADS[kind]
    num_rows, num_columns, count = 5, 13, len(spreads[0])
    weight = weight_of(subject, num_groups * num_rows, num_columns)
    x = integers(count, num_columns, seed=1).to(subject.device, dtype)
    grad = integers(count, num_rows, seed=2).to(subject.device, dtype)
    for name, operands in (
        ("grouped_linear", (x, weight)),
        ("grouped_linear_input_grad", (grad, weight)),
        ("grouped_linear_weight_grad", (grad, x)),
    ):
        done = []
        for spread in spreads:
            experts = torch.tensor(spread, device=subject.device)
            with watched_work() as work:
                subject.raw(name)(*operands, experts, num_groups=num_groups)
            products = [launch for launch in work.launches if launch not in SORTING]
            assert len(products) == 1, f"{name} of slots {spread}: {work.launches}"
            done.append(work)
        same_work(done, name)


def test_a_gate_is_one_launch_forward_and_one_backward(subject: Subject) -> None:
    """One launch makes the gradients of gate, up and terms. All terms have one gradient, and no copy of it is made."""
    needs_launches(subject)
    gate, up, grad = (integers(3, 5, seed=seed).to(subject.device) for seed in range(3))
    terms = integers(3, 2, 5, seed=3).to(subject.device)
    leaves = [each.requires_grad_() for each in (gate, up, terms)]
    with watched_work() as work:
        found = torch.autograd.grad(subject.raw("gated")(*leaves), leaves, grad)
    assert work.launches == ["_gated_kernel", "_gated_grads_kernel"]
    exact(found[:2], subject.raw("gated_grads")(grad, *(leaf.detach() for leaf in leaves))[:2])
    assert found[2].stride(1) == 0 and found[2].shape == terms.shape


@pytest.mark.parametrize("count", [3, 9])
def test_votes_of_experts_take_one_launch_a_part(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With fewer slots than experts and with more, parts follow from the shape of the weight, and other work from shapes too."""
    needs_launches(subject)
    # A part is two of six outputs of each of five experts.
    monkeypatch.setattr(layers, "VOTE_ELEMENTS", 2 * 5 * 14)
    layer = TernaryGroupedLinear(
        quick_context(ops=models.drawn_by_the_reference(subject.ops), device=subject.device), 5, 14, 6
    )
    x, grad = (integers(count, width, seed=width).to(subject.device) for width in (14, 6))
    places, done = torch.arange(count, device=subject.device), []
    for experts in (places * 0, places % 5, places % 2 * 4 - 1, places * 0 - 1):
        leaf = x.clone().requires_grad_()
        with layer.voting.taking(rate=2.0, step=0), watched_work() as work:
            layer(leaf, experts).backward(grad)
        assert work.launches.count("_grouped_weight_grad_kernel") == 3, work.launches
        assert work.launches.count("_packed_product_kernel") == 2, work.launches
        done.append(work)
    same_work(done, "a pass of a grouped linear")


def same_work(done: list[Work], what: str) -> None:
    """Fail unless all of some work is the same, and none of it waits for the device."""
    for index, work in enumerate(done):
        waits = [name for name, _ in work.asked if any(part in name for part in WAITING)]
        assert not waits, f"{what}, spread {index}, waits in {waits}"
        assert work.asked == done[0].asked, f"{what}: spreads {index} and 0 ask for other work"
