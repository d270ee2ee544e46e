"""Rotary turns: positions in queries and keys, so that their products depend on the distance alone. `ops.rotate` turns.

Legend: B batch, P positions, K columns of a row, R rotary width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference.ops import activations

ROTARY_BASE = 10_000.0
"""Base of the geometric series of rotary wavelengths, in positions."""

Turns = tuple[Tensor, Tensor]
"""Cosine and sine."""


def rotary_turns(positions: int, rotary_dim: int, *, device: torch.device) -> Turns:
    """Return cosine and sine of the angles of positions 0, 1, ..., float32 [P, 1, R / 2], as `turns_at` gives them."""
    return turns_at(torch.arange(positions, device=device), rotary_dim)


def turns_at(positions: Tensor, rotary_dim: int) -> Turns:
    """Return cosine and sine of the angles of positions int64 [..., P], float32 [..., P, 1, R / 2].

    Math:    angle[p, i] = p * base**(-2 i / R), in float64, because a ledger may hold a million positions
    """
    steps = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angles = positions[..., None, None].to(torch.float64) * ROTARY_BASE**-steps
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def turns_of_pass(x_BPD: Tensor, first_B: Tensor | None, rotary_dim: int) -> Turns:
    """Return the turns of the positions of a pass over x, which follow the position `first_B` of each sequence, int64 [B]; or 0."""
    positions = torch.arange(x_BPD.shape[1], device=x_BPD.device)
    return turns_at(positions if first_B is None else positions + first_B[:, None], rotary_dim)


def with_turned_key(rows_BPK: Tensor, turns: Turns) -> Tensor:
    """Return rows of summaries with a turned copy of their first R columns, a rotary key, appended.

    Passes and ledgers share it, and a ledger has no op set. So the reference turns, for every op set.
    """
    key_BP1R = rows_BPK[..., None, : 2 * turns[0].shape[-1]]
    return torch.cat([rows_BPK, activations.rotate(key_BP1R, *turns)[..., 0, :]], dim=-1)
