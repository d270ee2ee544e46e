"""Weights that change within a training pass, which has unpacked them already: products are never of the earlier weight."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized.layouts import DeviceWeight
from conformance.compare import exact
from conformance.report import skip
from conformance.subject import Subject, needs_ours
from conformance.unpacked_weights import floats, unpacked, weight_like


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "weights that are unpacked once")


def counts_are_full(weight: Any) -> Any:
    """Return a weight whose next step moves every trit and every exponent."""
    weight.trit_accum.fill_(100)
    weight.exponent_accum.fill_(-100)
    return weight


def revived(weight: Any) -> None:
    device = weight.words.device
    z_RC = torch.full((2, weight.shape[1]), 3.0, device=device)
    vectors = torch.tensor([1, 0, 1], device=device)
    optimized_ops.revive_codes(weight, z_RC, vectors, first=1, out=weight)


def loaded(weight: Any) -> None:
    other = DeviceWeight(
        weight.words.flip(0), weight.exponents + 1, weight.trit_accum, weight.exponent_accum, weight.shape
    )
    other.into(weight)


def moved(weight: Any) -> None:
    weight.words.data = weight.words.flip(0)


def with_exponents_moved(weight: Any) -> None:
    weight.exponents.data = weight.exponents + 1


def in_inference_mode(weight: Any) -> None:
    with torch.inference_mode():
        weight.exponents.add_(1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a step": lambda weight: optimized_ops.apply_step(counts_are_full(weight), out=weight),
    "a step of rows": lambda weight: optimized_ops.apply_step(
        counts_are_full(weight), rows=torch.tensor([3, 5], device=weight.words.device), out=weight
    ),
    "steps of several": lambda weight: optimized_ops.apply_steps((counts_are_full(weight),), out=(weight,)),
    "a revival": revived,
    "a load": loaded,
    "codes of the user": lambda weight: weight.words.copy_(weight.words.flip(0)),
    "exponents of the user": lambda weight: weight.exponents[4:].sub_(2),
    "another place": moved,
    "another place of exponents": with_exponents_moved,
    "inference mode": in_inference_mode,
}
"""What may change a weight within a pass."""


def products_after(
    subject: Subject, change: Callable[[Any], Any], *, passes: int
) -> list[tuple[Tensor, Tensor]]:
    """Change a weight in the last of some passes, and return its products after that with those of a copy of it."""
    weight, x = weight_like(subject, 24, 36), floats(subject, 5, 36)
    grad, copies = floats(subject, 6, 24), unpacked.Copies()
    for number in range(passes):
        with copies.in_pass({"w": weight}, x.dtype):
            before = optimized_ops.linear(x, weight)
            if number + 1 < passes:
                continue
            change(weight)
            anew = weight.clone()
            found = optimized_ops.linear(x, weight), optimized_ops.linear_input_grad(grad, weight)
            # Of the changed weight there is a copy again.
            again = optimized_ops.linear(x, weight), optimized_ops.linear_input_grad(grad, weight)
    want = optimized_ops.linear(x, anew), optimized_ops.linear_input_grad(grad, anew)
    assert not torch.equal(before, want[0]), "nothing has changed"
    return [*zip(found, want, strict=True), *zip(again, want, strict=True)]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_weight_that_changes_within_a_pass_is_unpacked_anew(
    subject: Subject, name: str, passes: int
) -> None:
    for found, want in products_after(subject, CHANGES[name], passes=passes):
        exact(found, want)


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_that_outlives_a_change_would_be_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The fault is planted: a state that never changes."""
    monkeypatch.setattr(unpacked, "_state", lambda weight: ())
    assert not any(
        torch.equal(found, want) for found, want in products_after(subject, CHANGES[name], passes=1)
    )


@pytest.mark.parametrize("passes", [1, 2])
def test_memory_that_was_unpacked_is_held(subject: Subject, passes: int) -> None:
    """`Tensor.data` exchanges the memory of codes under their version. So no later memory may have the address of the first."""
    if torch.device(subject.device).type != "cpu":
        skip("memory of a copy", "only memory of the CPU can be watched from Python")
    weight, x, copies = weight_like(subject, 24, 36), floats(subject, 5, 36), unpacked.Copies()
    for _ in range(passes):
        memory = weight.words.numpy().copy()
        weight.words.data = torch.from_numpy(memory)
        is_held = weakref.ref(memory)
        del memory
        with copies.in_pass({"w": weight}, x.dtype):
            optimized_ops.linear(x, weight)
            weight.words.data = weight.words.flip(0)
            gc.collect()
            assert is_held() is not None
            exact(optimized_ops.linear(x, weight), optimized_ops.linear(x, weight.clone()))
        gc.collect()
        assert is_held() is None
