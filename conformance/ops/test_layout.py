"""Laws of layouts: a device layout holds the same weight, to the bit."""

from __future__ import annotations

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


def _update_in_place(subject: Subject, weight: Any) -> None:
    """Change all four tensors of a weight."""
    votes = torch.full(weight.shape, 20, dtype=torch.int8, device=subject.device)
    votes[:, ::2] = -7
    for step in range(2):
        subject.raw("accumulate")(weight, votes, seed=1, step=step, tensor_id=2, out=weight)
        subject.raw("apply_step")(weight, theta=16, theta_e=3, out=weight)


# --- what is refused -------------------------------------------------------------------------------------------------

refuses_nothing("from_spec", "to_spec", because="any weight converts")
