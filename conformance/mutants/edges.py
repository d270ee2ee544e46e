"""Broken implementations of the family edges."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
"""Every broken implementation."""
