"""Laws of layouts: a device layout holds the same weight, to the bit."""

from __future__ import annotations

from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.compare import exact
from conformance.law import law
from conformance.poison import PATTERNS
from conformance.subject import Subject


@law(weight=ss.weights())
def test_layout_roundtrip(ops: Subject, weight: TernaryWeight) -> None:
    """All four tensors survive the way to the device layout and back, whatever the new memory held before."""
    for pattern in PATTERNS:
        there = ops.call_with("from_spec", (weight,), {}, pattern, device_layout=False)
        exact(there, weight, "from_spec, then to_spec")
        back = ops.call_with("to_spec", (weight,), {}, pattern, device_layout=True)
        exact(back, weight, "to_spec of a device layout")


@law(weight=ss.weights(limit=70))
def test_layout_does_not_show(ops: Subject, weight: TernaryWeight) -> None:
    """Ops give the same weight in both layouts."""
    for op, kwargs in (("apply_step", {"theta": 2, "theta_e": 2}), ("dequantize", {})):
        results = [
            ops.call_with(op, (weight,), kwargs, PATTERNS[0], device_layout=flag) for flag in (False, True)
        ]
        exact(results[0], results[1], op)
