"""Bytes drawn on the device of the logits: those that torch draws on the host, and no more steps than are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.drawing import LEAST_NOISE, NOT_FINITE, STEPS_AHEAD, Chooser, Drawn, Likely
from arbitor.optimized.training.readers import Reader
from conformance.subject import Subject

BATCH, DRAWS = 3, 40

HOW = (
    Likely(1.0),
    Likely(0.3),
    Likely(5.0, top_k=7),
    Likely(2.0, top_p=0.6),
    Likely(1.5, top_k=20, top_p=0.4),
    Likely(5e-324, top_p=0.5),
    Likely(0.0),
)


def logits_of(draw: int, **to: Any) -> Tensor:
    """Return logits of 297 ids for each sequence, of which some are equal, and those of no byte the largest."""
    generator = torch.Generator().manual_seed(draw)
    logits_BV = torch.randint(-8, 9, (BATCH, 297), generator=generator) / 2
    logits_BV[:, 256:] = 99.0
    return logits_BV.to(**to)


def by_torch(logits_R: Tensor, likely: Likely, generator: torch.Generator) -> int:
    """Draw a byte of 256 float64 logits as torch does, one sequence at a time."""
    if likely.temperature == 0:
        return int(logits_R.argmax())
    weights_R = ((logits_R - logits_R.max()) / likely.temperature).exp()
    order = sorted(range(256), key=lambda byte: (-float(weights_R[byte]), byte))
    kept = order[: likely.top_k]
    if likely.top_p is not None:
        total, before, some = sum(float(weights_R[byte]) for byte in kept), 0.0, []
        for byte in kept:
            if before < likely.top_p * total:
                some.append(byte)
            before += float(weights_R[byte])
        kept = some
    left_R = torch.zeros_like(weights_R)
    left_R[kept] = weights_R[kept]
    return int(torch.multinomial(left_R, 1, generator=generator))


@pytest.mark.parametrize("likely", HOW, ids=str)
def test_draws_are_those_of_torch(subject: Subject, likely: Likely) -> None:
    """Each sequence draws with its own generator as it would alone. Sums of `top_p` are of the host's order up to roundings."""
    ours, theirs = ([torch.Generator().manual_seed(seed) for seed in (5, 6, 5)] for _ in range(2))
    choose = Chooser(likely, ours, device=subject.device)
    for draw in range(DRAWS):
        logits_BV = logits_of(draw, device=subject.device, dtype=torch.float32)
        choose.prepare(draw)
        following_B = choose(logits_BV)
        want = [
            by_torch(logits_V[:256].double(), likely, generator)
            for logits_V, generator in zip(logits_BV.cpu(), theirs, strict=True)
        ]
        assert following_B.tolist() == choose.drawn_B.tolist() == want
    # As many random numbers were taken: at temperature 0 none.
    assert all(
        torch.equal(our.get_state(), their.get_state()) for our, their in zip(ours, theirs, strict=True)
    )


def test_logits_that_are_not_finite_are_told_and_read_as_a_byte() -> None:
    """An id that no table has would be read by the step that is on its way already."""
    logits_BV = logits_of(0, dtype=torch.float32)
    logits_BV[0, 3], logits_BV[1, 200:] = torch.nan, torch.inf
    for likely in HOW:
        choose = Chooser(likely, [torch.Generator().manual_seed(0)] * BATCH, device=torch.device("cpu"))
        choose.prepare(0)
        following_B = choose(logits_BV)
        assert choose.drawn_B[:2].tolist() == [NOT_FINITE] * 2 and choose.drawn_B[2] == following_B[2]
        assert (following_B >= 0).all() and (following_B < 256).all()
    # What is no byte may be anything.
    logits_BV = logits_of(0, dtype=torch.float32)
    logits_BV[:, 270] = torch.inf
    assert NOT_FINITE not in Chooser(Likely(0.0), [torch.Generator()] * BATCH, device=torch.device("cpu"))(
        logits_BV
    )


def test_a_random_number_of_zero_draws_nothing_that_may_not_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 over 0 is not a number, and the largest of all."""
    monkeypatch.setattr(Tensor, "exponential_", lambda self, **_: self.zero_())
    choose = Chooser(Likely(1.0, top_k=1), [torch.Generator()], device=torch.device("cpu"))
    choose.prepare(0)
    assert LEAST_NOISE > 0
    logits_1V = torch.zeros(1, 297)
    logits_1V[0, 7] = 1.0
    assert choose(logits_1V).tolist() == [7]


class Counts(Reader):
    """Stands for a reader: step n has the likeliest byte n, and one step has no likeliest byte."""

    def __init__(self, faulty: int | None = None) -> None:
        self.steps, self.faulty = 0, faulty

    def step(self, choose: Any) -> None:
        logits_1V = torch.zeros(1, 297)
        logits_1V[0, self.steps] = torch.nan if self.steps == self.faulty else 1.0
        choose(logits_1V)
        self.steps += 1


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("faulty", [None, 4])
def test_steps_ahead_change_no_byte_and_are_no_more_than_asked_for(ahead: int, faulty: int | None) -> None:
    reader = Counts(faulty)
    drawn = Drawn(reader, Chooser(Likely(0.0), [torch.Generator()], device=torch.device("cpu")), num_steps=6)
    assert drawn._ahead == 0 and STEPS_AHEAD > 0
    drawn._ahead, drawn._readouts = (
        ahead,
        [type(drawn._readouts[0])(drawn._readouts[0].tensor) for _ in range(ahead + 1)],
    )
    for number in range(6):
        if number == faulty:
            with pytest.raises(ValueError, match="logits are not finite, so no byte can be drawn from them"):
                drawn.bytes_of_next()
            return
        assert drawn.bytes_of_next() == [number]
        assert reader.steps == min(number + 1 + ahead, 6)
