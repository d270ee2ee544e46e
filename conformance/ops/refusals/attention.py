"""Calls of the family attention that must be refused."""

from __future__ import annotations

from conformance.ops.refusals.refusal import Refusal

REFUSALS: tuple[Refusal, ...] = ()
"""Every call that must be refused."""
