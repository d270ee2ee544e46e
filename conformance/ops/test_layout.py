"""Laws of layouts: a device layout holds the same weight, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from arbitor.reference import ops as reference_ops
from arbitor.reference.types import TernaryWeight

from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..poison import PATTERNS
from ..refusal import refuses_nothing
from ..report import skip
from ..subject import Subject

mutant = mutants_of("layout")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("from_spec", "to_spec")
def from_spec_calls(draw: st.DrawFn) -> Case:
    return Case((draw(ss.weights()),))


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


LAYOUT_NEGATES = mutant(
    "layout_negates",
    "def from_spec(weight: TernaryWeight) -> TernaryWeight:",
    "def from_spec(weight: TernaryWeight) -> TernaryWeight:\n"
    "    return weight.with_tensors(exponents=weight.exponents.clamp(max=14))\n\n\n"
    "def _unused(weight: TernaryWeight) -> TernaryWeight:",
    compared="from_spec",
)


@law(
    weight=ss.weights(),
    rejects=[
        mutant(
            "layout_forgets_residues",
            "def to_spec(weight: TernaryWeight) -> TernaryWeight:",
            "def to_spec(weight: TernaryWeight) -> TernaryWeight:\n"
            "    return weight.with_tensors(exponent_accum=weight.exponent_accum * 0)\n\n\n"
            "def _unused(weight: TernaryWeight) -> TernaryWeight:",
            compared="to_spec",
        ),
        LAYOUT_NEGATES,
    ],
)
def test_layout_roundtrip(ops: Subject, weight: TernaryWeight) -> None:
    """All four tensors survive the way to the device layout and back, whatever the new memory held before."""
    for pattern in PATTERNS:
        there = ops.call_with("from_spec", (weight,), {}, pattern, device_layout=False)
        exact(there, weight, "from_spec, then to_spec")
        back = ops.call_with("to_spec", (weight,), {}, pattern, device_layout=True)
        exact(back, weight, "to_spec of a device layout")


@law(weight=ss.weights(limit=70), rejects=[LAYOUT_NEGATES])
def test_layout_does_not_show(ops: Subject, weight: TernaryWeight) -> None:
    """Ops give the same weight in both layouts."""
    for op, kwargs in (("apply_step", {"theta": 2, "theta_e": 2}), ("dequantize", {})):
        results = [
            ops.call_with(op, (weight,), kwargs, PATTERNS[0], device_layout=flag) for flag in (False, True)
        ]
        exact(results[0], results[1], op)


def test_layouts_share_no_memory(subject: Subject) -> None:
    """A weight that was converted and what it was converted to are two weights: an update in place moves one of them."""
    canonical = reference_ops.initial_weight((7, 31), std=0.1, seed=1, tensor_id=2).to(subject.device)
    device_weight = subject.raw("from_spec")(canonical)
    if device_weight is canonical:
        skip("shared memory of layouts", f"{subject.name} has one layout: from_spec is the identity")
    before = subject.to_cpu(canonical.clone())
    _update_in_place(subject, device_weight)
    exact(subject.to_cpu(canonical), before, "the weight given to from_spec")

    returned = subject.raw("to_spec")(device_weight)
    before = subject.to_cpu(returned.clone())
    _update_in_place(subject, device_weight)
    exact(subject.to_cpu(returned), before, "the weight that to_spec returned")
    after = subject.to_cpu(subject.raw("to_spec")(device_weight))
    for name, tensor in after.tensors().items():
        assert not torch.equal(tensor, before.tensors()[name]), f"the update left {name} as it was"


def test_unused_slots_touch_no_row_before_the_weight(subject: Subject) -> None:
    """A weight on part of a larger memory is updated in its own rows alone, though a row of -1 would lie before them."""
    whole = subject.raw("from_spec")(
        reference_ops.initial_weight((8, 40), std=0.1, seed=1, tensor_id=2).to(subject.device)
    )
    if not hasattr(whole, "words"):
        skip("a weight on part of a memory", f"{subject.name} has no layout whose rows lie apart")
    for tensor in whole.tensors().values():
        tensor[:4] = 99
    before = whole.clone()
    part = replace(whole, **{name: tensor[4:] for name, tensor in whole.tensors().items()}, shape=(4, 40))
    rows = torch.tensor([-1, 2, -1], device=subject.device)
    clock = {"seed": 1, "step": 3, "tensor_id": 2, "rows": rows, "out": part}
    votes = torch.full((3, 40), 20, dtype=torch.int8, device=subject.device)
    subject.raw("accumulate")(part, votes, **clock)
    subject.raw("accumulate_gradient")(part, votes.to(torch.float32), 6.0, **clock)
    subject.raw("apply_step")(part, theta=1, theta_e=1, on_flip="carry", rows=rows, out=part)
    for name, tensor in whole.tensors().items():
        same = tensor == before.tensors()[name]
        assert same[:6].all() and same[7:].all() and not same[6].all(), name


def _update_in_place(subject: Subject, weight: Any) -> None:
    """Change all four tensors of a weight."""
    votes = torch.full(weight.shape, 20, dtype=torch.int8, device=subject.device)
    votes[:, ::2] = -7
    for step in range(2):
        subject.raw("accumulate")(weight, votes, seed=1, step=step, tensor_id=2, out=weight)
        subject.raw("apply_step")(weight, theta=16, theta_e=3, out=weight)


# --- what is refused -------------------------------------------------------------------------------------------------

refuses_nothing("from_spec", "to_spec", because="any weight converts")
