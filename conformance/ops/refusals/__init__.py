"""What must be refused, one line a case. A file a family; refusal.py says how."""

from __future__ import annotations

from conformance.ops.refusals import (
    attention,
    codebook,
    core,
    denoise_loop,
    edges,
    experts,
    memory,
    orthogonal,
)
from conformance.ops.refusals.refusal import Refusal, bad_weight, check

__all__ = ["REFUSALS", "Refusal", "bad_weight", "check"]

_FAMILIES = (core, codebook, edges, experts, attention, memory, denoise_loop, orthogonal)

REFUSALS: tuple[Refusal, ...] = tuple(case for family in _FAMILIES for case in family.REFUSALS)
"""Every call that must be refused."""
