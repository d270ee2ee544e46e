"""Broken implementations of the family codebook."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
"""Every broken implementation."""
