"""Calls of the family orthogonal that must be refused."""

from __future__ import annotations

import torch

from conformance.ops.refusals.refusal import Refusal, ones, refused

_GRADIENT = ones(4, 3)

# fmt: off
REFUSALS: tuple[Refusal, ...] = (
    refused("orthogonalize", "float16", TypeError, "grad_NK", ones(4, 3, dtype=torch.float16)),
    refused("orthogonalize", "three dimensions", ValueError, "grad_NK", ones(2, 2, 3)),
    refused("orthogonalize", "no columns", ValueError, "grad_NK", ones(4, 0)),
    refused("orthogonalize", "no iterations", ValueError, "iterations", _GRADIENT, iterations=0),
    refused("orthogonalize", "11 iterations", ValueError, "iterations", _GRADIENT, iterations=11),
    refused("orthogonalize", "3.0 iterations", TypeError, "iterations", _GRADIENT, iterations=3.0),
    refused("orthogonalize", "3 matrices of 4 rows", ValueError, "num_groups", _GRADIENT, num_groups=3),
    refused("orthogonalize", "no matrix", ValueError, "num_groups", _GRADIENT, num_groups=0),
)
# fmt: on
"""Every call of the family that must be refused."""
