"""Changes of bytes make one piece into another, whatever changed, and are as long as their formula says."""

from __future__ import annotations

import pytest
import torch

from arbitor.optimized.distributed.changes import BLOCK, Changed, change, changes_bytes, num_blocks
from arbitor.optimized.kernels import changes as kernels
from conformance.subject import Subject, needs_ours


def changes(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return what an owner sends."""
    found = Changed(before, after)
    return found.sent(int(found.number))


SIZES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 20 * BLOCK)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.49, 0.6, 1.0])
def test_changes_make_the_piece_what_it_became(size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(size)
    before = torch.randint(256, (size,), generator=generator).to(torch.uint8)
    differ = torch.rand(size, generator=generator) < share
    after = torch.where(differ, before + 1, before)
    sent, piece = changes(before, after), before.clone()
    change(piece, sent)
    assert torch.equal(piece, after)
    assert sent.dtype is torch.uint8 and len(sent) == changes_bytes(size, int(differ.sum())) <= size


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 6 * BLOCK - 1])
def test_one_change_costs_two_bytes(place: int) -> None:
    before = torch.zeros(6 * BLOCK, dtype=torch.uint8)
    after = before.clone()
    after[place] = 255
    sent = changes(before, after)
    assert sent.tolist() == [int(block == place // BLOCK) for block in range(6)] + [place % BLOCK, 255]
    change(before, sent)
    assert torch.equal(before, after)


def test_a_whole_block_of_changes_is_counted() -> None:
    before = torch.zeros(9 * BLOCK, dtype=torch.uint8)
    after = before.clone()
    after[BLOCK : 2 * BLOCK] = 7
    sent = changes(before, after)
    assert len(sent) == 9 + 2 * BLOCK and sent[1] == BLOCK
    change(before, sent)
    assert torch.equal(before, after)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.49])
def test_kernels_send_and_take_the_same_bytes(subject: Subject, size: int, share: float) -> None:
    """Ranks on GPUs count, write and take changes by kernels. A piece lies anywhere in what arrives."""
    needs_ours(subject, "changes by kernels")
    generator = torch.Generator().manual_seed(size)
    before = torch.randint(256, (size,), generator=generator).to(torch.uint8)
    after = torch.where(torch.rand(size, generator=generator) < share, before + 1, before)
    after[-1] += 1
    piece, stepped = before.to(subject.device), after.to(subject.device)
    counts = kernels.counted(piece, stepped, num_blocks(size), BLOCK)
    found = Changed(before, after)
    ends = counts.cumsum(0)
    number = int(found.number)
    assert counts.dtype is torch.int32 and int(ends[-1]) == number
    if changes_bytes(size, number) == size:
        assert torch.equal(found.sent(number), after)
        return
    got = kernels.written(piece, stepped, ends, BLOCK)[: changes_bytes(size, number)]
    assert torch.equal(got.cpu(), found.sent(number))
    arrived = torch.cat([got[:1], got])[1:]
    kernels.taken(piece, arrived, ends, BLOCK)
    assert torch.equal(piece.cpu(), after)
