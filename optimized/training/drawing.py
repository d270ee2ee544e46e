"""Bytes drawn from logits, on the device that has the logits, so that a step need not wait for the host.

Shape legend: B sequences, V ids of the vocabulary, R the 256 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from arbitor.optimized.training.readers import Reader
from arbitor.optimized.training.recording import Readout
from arbitor.reference.config import NUM_BYTES

STEPS_AHEAD = 1
"""Steps that a GPU is given beyond the one whose bytes are waited for. So it goes on while the host looks at bytes, and a text that
ends early has cost a step more."""

NOT_FINITE = -1
"""In the place of a byte: the logits of the sequence were not finite."""

LEAST_NOISE = torch.finfo(torch.float64).tiny
"""What random numbers are at least. A weight of 0 over 0 would be the largest of all."""

LEAST_TEMPERATURE = 1e-300
"""What logits are divided by at least. A GPU multiplies by the reciprocal, and that of a smaller number may be infinite."""


class Likely(NamedTuple):
    """Which bytes may be drawn, and how likely each is.

    Fields:
        temperature: 0 takes the likeliest byte, the lowest of several; otherwise logits are divided by it.
        top_k: only so many of the likeliest bytes; None: all.
        top_p: only the likeliest bytes, as few as have this probability together; None: all.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None


class Chooser:
    """Draws a byte for each sequence. All of a draw but its random numbers is work of the device, and can be recorded.

    A byte is drawn as `torch.multinomial` draws it: a weight over an exponential random number, and the largest quotient. A
    generator of the host gives the numbers of a sequence. So a sequence has the numbers that it would have alone.

    Attributes:
        drawn_B: int64 [B] on the device, the bytes that were drawn last, or `NOT_FINITE`. Every draw writes here.
    """

    def __init__(
        self, likely: Likely, generators: Sequence[torch.Generator], *, device: torch.device
    ) -> None:
        """Begin with a generator for each sequence, which every draw but those at temperature 0 advances."""
        self._likely, self._generators = likely, list(generators)
        num_sequences = len(self._generators)
        self.drawn_B = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        # At temperature 0 no numbers are drawn, which the host would have to pin memory for.
        num_numbers = NUM_BYTES if likely.temperature else 0
        self._noise_BR = torch.empty(num_sequences, num_numbers, dtype=torch.float64, device=device)
        # A copy may be on its way from one of them while the next is filled.
        self._room = [
            torch.empty_like(self._noise_BR, device="cpu", pin_memory=device.type == "cuda")
            for _ in range(STEPS_AHEAD + 1)
        ]
        self._upper_RR = None
        if likely.top_p is not None:
            ones_RR = torch.ones(NUM_BYTES, NUM_BYTES, dtype=torch.float64, device=device)
            self._upper_RR = ones_RR.triu(diagonal=1)

    def prepare(self, step: int) -> None:
        """Send the random numbers of the next draw. `STEPS_AHEAD` steps before this one may still be on their way."""
        if self._likely.temperature == 0:
            return
        room_BR = self._room[step % len(self._room)]
        for noise_R, generator in zip(room_BR, self._generators, strict=True):
            noise_R.exponential_(generator=generator)
        self._noise_BR.copy_(room_BR.clamp_(min=LEAST_NOISE), non_blocking=True)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Return the bytes that follow, int64 [B], and write them to `drawn_B`. Where logits are not finite, 0 is returned."""
        logits_BR = logits_BV[:, :NUM_BYTES].to(torch.float64)
        if self._likely.temperature == 0:
            bytes_B = logits_BR.argmax(dim=1)
        else:
            # The largest logit is 0 after the shift, so that no temperature can overflow.
            shifted_BR = logits_BR - logits_BR.amax(dim=1, keepdim=True)
            temperature = max(self._likely.temperature, LEAST_TEMPERATURE)
            weights_BR = self._likeliest((shifted_BR / temperature).exp())
            bytes_B = (weights_BR / self._noise_BR).argmax(dim=1)
        is_finite_B = logits_BR.isfinite().all(dim=1)
        self.drawn_B.copy_(bytes_B.where(is_finite_B, NOT_FINITE))
        return self.drawn_B.clamp(min=0)

    def _likeliest(self, weights_BR: Tensor) -> Tensor:
        """Return the weights with 0 for all that may not be drawn, the lower byte first among equals. One is always left."""
        top_k, top_p = self._likely.top_k, self._likely.top_p
        if top_k is None and top_p is None:
            return weights_BR
        sorted_BR, bytes_BR = weights_BR.sort(dim=1, descending=True, stable=True)
        if top_k is not None:
            sorted_BR[:, top_k:] = 0
        if top_p is not None:
            assert self._upper_RR is not None
            # A byte is left where those before it do not have the probability yet, so that the first always is.
            before_BR = sorted_BR @ self._upper_RR
            sorted_BR = sorted_BR.where(before_BR < top_p * sorted_BR.sum(dim=1, keepdim=True), 0.0)
        # A sum of running order may not be asked for where torch is to be deterministic, and neither may a write by places.
        return sorted_BR.gather(1, bytes_BR.argsort(dim=1))


class Drawn:
    """The bytes that follow one another, as a reader and a chooser come to them.

    On a GPU `STEPS_AHEAD` steps are launched before the bytes of the step before them are looked at.
    """

    def __init__(self, reader: Reader, choose: Chooser, *, num_steps: int) -> None:
        """Begin with a reader whose ledger has one unread id of each sequence. It takes so many steps at most."""
        self._reader, self._choose, self._num_steps = reader, choose, num_steps
        self._ahead = STEPS_AHEAD if choose.drawn_B.is_cuda else 0
        self._readouts = [Readout(choose.drawn_B) for _ in range(self._ahead + 1)]
        self._begun = self._taken = 0

    def bytes_of_next(self) -> list[int]:
        """Return the bytes of the next step, one for each sequence.

        To be called without gradients and under `values_vouched_for`.

        Raises:
            ValueError: the logits of a sequence are not finite.
        """
        while self._begun < min(self._taken + 1 + self._ahead, self._num_steps):
            self._choose.prepare(self._begun)
            self._reader.step(self._choose)
            self._readouts[self._begun % len(self._readouts)].begin()
            self._begun += 1
        drawn = self._readouts[self._taken % len(self._readouts)].numbers()
        self._taken += 1
        return finite(drawn)


def finite(drawn: Sequence[float]) -> list[int]:
    """Return bytes that were drawn, as `Chooser` writes them.

    Raises:
        ValueError: the logits of a sequence are not finite.
    """
    if NOT_FINITE in drawn:
        raise ValueError("the model's logits are not finite, so no byte can be drawn from them")
    return [int(byte) for byte in drawn]
