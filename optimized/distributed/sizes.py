"""Bytes that ranks keep of matrices and codebooks and exchange in a step, by docs/spec/distributed.md. Tables: docs/scaling.md."""

from __future__ import annotations

from dataclasses import dataclass

from arbitor.optimized.distributed.changes import changes_bytes
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.types import LaidOutWeight

_VOTE_BYTES, _ID_BYTES = 4, 8
"""Bytes of an element of a gradient that votes as it is, and of the number of a row."""


def kept_bytes(weight: LaidOutWeight, count: int) -> float:
    """Return the bytes that each of `count` ranks keeps of a matrix, on average: trits and scales, and a part of the accumulators.

    Args:
        weight: the matrix in any layout; on the meta device it takes no memory.
        count: ranks.
    """
    return read_bytes(weight) + _bytes(weight, voted=True) / count


def received_bytes(
    weight: LaidOutWeight, count: int, *, gradient_bytes: float, changed: int | None = None
) -> float:
    """Return the bytes that all ranks together receive in a step of one micro-batch for a matrix that the batch does not choose.

    Args:
        weight, count: as for `kept_bytes`.
        gradient_bytes: bytes of an element of the gradient: 2 if it is made orthogonal in bfloat16, 33/32 or a little more if it
            travels in eight bits, else 4.
        changed: bytes of trits and scales that the step changed; None if all are sent.
    """
    num_rows, num_columns = weight.shape
    read = read_bytes(weight)
    sent = read if changed is None else changes_bytes(read, changed)
    # The owner receives a gradient of every other rank, and every other rank receives what changed of trits and scales.
    return (count - 1) * (gradient_bytes * num_rows * num_columns + sent)


def read_bytes(weight: LaidOutWeight) -> int:
    """Return the bytes of the trits and scales of a weight, which every rank keeps."""
    return _bytes(weight, voted=False)


def _bytes(weight: LaidOutWeight, *, voted: bool) -> int:
    """Return the bytes of the tensors that votes change, or of the others."""
    return sum(tensor.nbytes for name, tensor in weight.tensors().items() if (name in VOTED_IN) == voted)


@dataclass(frozen=True)
class CodebookUse:
    """What a pass of one rank asks of a codebook, in rows.

    Fields:
        searched: vectors whose nearest code is looked for, which the step counts too.
        fetched:  rows that are read, each code once a read.
        voted:    rows that vote, each code once a read.
        slots:    rows that vote where a code has a slot for each use, as they are sent without spreading, a number a read.
    """

    searched: int
    fetched: int
    voted: int
    slots: tuple[int, ...]


def codebook_bytes(weight: LaidOutWeight) -> int:
    """Return the bytes of a codebook, or of the rows of one that a rank keeps: its weight, and how often each code was used."""
    return sum(tensor.nbytes for tensor in weight.tensors().values()) + 2 * weight.shape[0]


def codes_received_whole(
    use: CodebookUse, num_codes: int, columns: int, count: int, vector_bytes: int
) -> int:
    """Return the bytes that a rank receives for a codebook in a step of one micro-batch, if every rank has all of its rows.

    Args:
        use: of each rank.
        num_codes, columns: of the codebook.
        count: ranks.
        vector_bytes: bytes of an element of an activation.
    """
    votes = sum(min(slots, num_codes) for slots in use.slots) * (_VOTE_BYTES * columns + _ID_BYTES)
    # The vectors and their codes, which the step counts.
    seen = use.searched * (vector_bytes * columns + _ID_BYTES)
    return (count - 1) * (votes + seen)


def codes_received_spread(use: CodebookUse, columns: int, count: int, *, share: float | None = None) -> float:
    """Return the bytes that a rank receives for a codebook in a step of one micro-batch, if its rows are spread over ranks.

    Left out are the lengths of what is sent, and what revival sends: 16 bytes for each code that a vector far from it has found.

    Args:
        use, columns, count: as for `codes_received_whole`.
        share: of the rows that are read and vote, those that another rank keeps; None for an even share.
    """
    share = (count - 1) / count if share is None else share
    # A search sends vectors in a byte an element, and a score with its code back. The step sends both once more.
    found = (count - 1) * use.searched * 2 * (columns + _ID_BYTES)
    return found + share * (
        use.fetched * (columns + _ID_BYTES) + use.voted * (_VOTE_BYTES * columns + _ID_BYTES)
    )


def slots_received(slots: int, columns: int, num_outputs: int, element_bytes: int) -> int:
    """Return the bytes that slots at another rank cost all ranks in a pass through one matrix of their experts.

    Left out are the lengths of what is sent.

    Args:
        slots: those whose expert another rank keeps.
        columns, num_outputs: of the matrix of an expert.
        element_bytes: bytes of an element of an activation.
    """
    # The input goes there and the output comes back. In the backward pass it is the other way round.
    return slots * (_ID_BYTES + 2 * (columns + num_outputs) * element_bytes)
