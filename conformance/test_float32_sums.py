"""What torch is told of the sums of bfloat16 products: that no part is rounded, for as long as somebody asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from arbitor.optimized.float32_sums import CUTS, SETTING, float32_sums
from arbitor.optimized.training.runtime import deterministic
from conformance import strategies
from conformance.compare import same_sums
from conformance.subject import Subject, needs_ours


def found(name: str = SETTING) -> bool:
    """Return a setting as torch has it; True where torch does not have it."""
    value: bool = getattr(torch.backends.cuda.matmul, name, True)
    return value


@contextmanager
def told(*values: bool) -> Iterator[None]:
    """Tell torch within the block whether parts of sums may be rounded, and by a second value whether there may be parts."""
    matmul, before = torch.backends.cuda.matmul, (found(), found(CUTS))
    setattr(matmul, SETTING, values if len(values) > 1 else values[0])
    try:
        yield
    finally:
        setattr(matmul, SETTING, before if hasattr(matmul, CUTS) else before[0])


@pytest.mark.parametrize("block", [float32_sums, deterministic])
@pytest.mark.parametrize(("rounds", "cuts"), [(True, True), (False, True), (False, False)])
def test_settings_are_left_as_they_were_found(block: type, rounds: bool, cuts: bool) -> None:
    """Both of them, since torch sets the second where it is told the first, and also where the block raises."""
    cuts = cuts or not hasattr(torch.backends.cuda.matmul, CUTS)
    with told(rounds) if cuts else told(rounds, cuts):
        with pytest.raises(KeyError), block():
            assert (found(), found(CUTS)) == (False, cuts)
            with float32_sums():
                assert not found()
            assert not found()
            raise KeyError
        assert (found(), found(CUTS)) == (rounds, cuts)


def test_a_thread_does_not_end_the_block_of_another() -> None:
    """Autograd runs backward passes in threads of its own."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with float32_sums():
            inside.set()
            leave.wait()

    with told(True):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        with float32_sums():
            leave.set()
            thread.join()
            assert not found()
        assert found()


@pytest.mark.parametrize("may_round", [True, False])
def test_a_long_sum_of_a_weight_gradient_is_rounded_once(subject: Subject, may_round: bool) -> None:
    """A library cuts long sums of small matrices into parts. No part is rounded, whatever torch is told.

    The sums are whole numbers that float32 holds in any order.
    """
    needs_ours(subject, "settings of torch around a product")
    rng = strategies.generator(5)
    dy, x = (torch.randint(-8, 9, (16_384, width), generator=rng).to(torch.bfloat16) for width in (64, 72))
    want = dy.to(torch.float64).T @ x.to(torch.float64)
    with told(may_round):
        got = subject.call("linear_weight_grad", dy, x, dtype=torch.bfloat16)
        assert found() == may_round
    same_sums(got, want.to(torch.bfloat16))
