"""Implementations that are broken on purpose, and the laws that must notice. A file a family; mutant.py says how."""

from __future__ import annotations

from conformance.mutants import attention, codebook, core, denoise_loop, edges, experts, memory, orthogonal
from conformance.mutants.mutant import Mutant, build

__all__ = ["MUTANTS", "Mutant", "build"]

_FAMILIES = (core, codebook, edges, experts, attention, memory, denoise_loop, orthogonal)

MUTANTS: tuple[Mutant, ...] = tuple(mutant for family in _FAMILIES for mutant in family.MUTANTS)
"""Every broken implementation."""
