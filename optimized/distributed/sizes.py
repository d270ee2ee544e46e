"""Bytes that ranks keep of a matrix and exchange in a step, by the rule of docs/spec/distributed.md. docs/scaling.md has tables."""

from __future__ import annotations

from arbitor.optimized.distributed.changes import changes_bytes
from arbitor.reference.graph.open_pass import VOTED_IN
from arbitor.reference.types import LaidOutWeight


def kept_bytes(weight: LaidOutWeight, count: int) -> float:
    """Return the bytes that each of `count` ranks keeps of a matrix, on average: trits and scales, and a part of the accumulators.

    Args:
        weight: the matrix in any layout; on the meta device it takes no memory.
        count: ranks.
    """
    return read_bytes(weight) + _bytes(weight, voted=True) / count


def received_bytes(
    weight: LaidOutWeight, count: int, *, gradient_bytes: float, changed: int | None = None, uses: int = 1
) -> float:
    """Return the bytes that all ranks together receive in a step of one micro-batch for a matrix that the batch does not choose.

    Args:
        weight, count: as for `kept_bytes`.
        gradient_bytes: bytes of an element of the gradient: 2 if it is made orthogonal in bfloat16, else 4.
        changed: bytes of trits and scales that the step changed; None if all are sent.
        uses: how often a pass uses the matrix.
    """
    num_rows, num_columns = weight.shape
    read = read_bytes(weight)
    sent = read if changed is None else changes_bytes(read, changed)
    # The owner receives a gradient of every other rank, and every other rank receives what changed of trits and scales.
    return (count - 1) * (uses * gradient_bytes * num_rows * num_columns + sent)


def read_bytes(weight: LaidOutWeight) -> int:
    """Return the bytes of the trits and scales of a weight, which every rank keeps."""
    return _bytes(weight, voted=False)


def _bytes(weight: LaidOutWeight, *, voted: bool) -> int:
    """Return the bytes of the tensors that votes change, or of the others."""
    return sum(tensor.nbytes for name, tensor in weight.tensors().items() if (name in VOTED_IN) == voted)
