"""Text from a model: one byte at a time, each drawn from what all bytes before it make likely.

The model keeps a ledger of what it read, so that a byte costs the same however many came before it.
Shape legend: B sequences, T bytes, V ids of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.options import MOST_BYTES
from arbitor.optimized.training.readers import Reader, RecordedReader
from arbitor.reference.config import NGRAM, NUM_BYTES, SPECIAL_IDS
from arbitor.reference.graph.ledger import KVLedger

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel

PIECE = 4096
"""Bytes of a prompt that are read in one pass: activations of no more are held at a time."""


def generate(
    model: ArbModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float,
    seed: int,
    context: int | None = None,
    cuda_graph: bool = False,
) -> bytes:
    """Return the continuation of a prompt: `generate_batch` of one."""
    [added] = generate_batch(
        model,
        [prompt],
        num_bytes,
        temperature=temperature,
        seeds=[seed],
        context=context,
        cuda_graph=cuda_graph,
    )
    return added


def generate_batch(
    model: ArbModel,
    prompts: Sequence[bytes],
    num_bytes: int,
    *,
    temperature: float,
    seeds: Sequence[int],
    context: int | None = None,
    cuda_graph: bool = False,
) -> list[bytes]:
    """Continue several prompts of any lengths, in lockstep.

    Each prompt is read on its own, then all go on together. Only bytes are drawn: specials and marks have no
    chance. A prompt of fewer than three bytes is filled up from the left: BOS stands right before it, and PAD
    before BOS. A sequence sees nothing of the others, and its bytes are drawn with a generator of its own: it
    is continued as it would be alone. (Its logits are alike, not equal in bits: libraries add up in another
    order when there are more rows. A draw on the very edge between two bytes may then fall to the other side.)

    Args:
        model: a model; its weights are only read.
        prompts: bytes to continue; may be empty.
        num_bytes: how many bytes to add to each, 0 to `MOST_BYTES`.
        temperature: 0 takes the likeliest byte (the lowest of several); otherwise logits are divided by it.
        seeds: of the CPU generators that draw, one a prompt; the same seed gives the same bytes on the same device. At
            temperature 0 nothing is drawn.
        context: bytes at the end of a prompt that are read, at least 3; None: all.
        cuda_graph: whether steps are recorded and replayed, see `recording.records`; the bytes are the same.

    Returns:
        The added bytes, without the prompts.

    Raises:
        ValueError: an argument is out of range, or the model's logits are not finite.
    """
    if not 0 <= num_bytes <= MOST_BYTES:
        raise ValueError(f"num_bytes is {num_bytes}, but must be from 0 to {MOST_BYTES}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, but must be finite and at least 0")
    if context is not None and context < NGRAM:
        raise ValueError(f"context is {context}, but must be at least {NGRAM}")
    if len(seeds) != len(prompts):
        raise ValueError(
            f"seeds has {len(seeds)} entries, but must have one for each of {len(prompts)} prompts"
        )
    if not prompts or not num_bytes:
        return [b""] * len(prompts)
    draws = [_drawer(temperature, seed) for seed in seeds]
    with torch.no_grad(), values_vouched_for():
        ledger = KVLedger.stack(
            [
                read_prompt(model, first_window(prompt)[-(context or 0) :], choose=_chooser([draw]))
                for prompt, draw in zip(prompts, draws, strict=True)
            ]
        )
        # With all the room it will need, a step is recorded once.
        ledger.reserve(num_bytes - 1)
        reader = RecordedReader(model, ledger) if cuda_graph else Reader(model, ledger)
        choose = _chooser(draws)
        for _ in range(num_bytes - 1):
            reader.step(choose)
    return [bytes(ledger.ids(row)[-num_bytes:].tolist()) for row in range(len(prompts))]


def read_prompt(model: ArbModel, ids: list[int], *, choose: Callable[[Tensor], Tensor]) -> KVLedger:
    """Return a ledger that has read some ids, a piece at a time, and to which the chosen next one was appended."""
    ledger = model.new_ledger()
    device = next(model.buffers()).device
    for start in range(0, len(ids), PIECE):
        # What was predicted after the piece before is known.
        ledger.retract()
        piece_1T = torch.tensor([ids[start : start + PIECE]], dtype=torch.int64, device=device)
        is_last = start + PIECE >= len(ids)
        model(piece_1T, ledger=ledger, choose=choose if is_last else None)
    return ledger


def first_window(prompt: bytes) -> list[int]:
    """Return the ids that the model sees first: the prompt, led by BOS and PAD where it is shorter than three bytes."""
    missing = NGRAM - len(prompt)
    lead = [SPECIAL_IDS["PAD"]] * (missing - 1) + [SPECIAL_IDS["BOS"]] if missing > 0 else []
    return lead + list(prompt)


def _chooser(draws: Sequence[Callable[[Tensor], int]]) -> Callable[[Tensor], Tensor]:
    """Return what draws a byte for each sequence from logits [B, V]."""

    def choose(logits_BV: Tensor) -> Tensor:
        bytes_BV = logits_BV[:, :NUM_BYTES].to("cpu", torch.float64)
        if not bool(bytes_BV.isfinite().all()):
            raise ValueError("the model's logits are not finite, so no byte can be drawn from them")
        return torch.tensor([draw(logits_V) for draw, logits_V in zip(draws, bytes_BV, strict=True)])

    return choose


def _drawer(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """Return what draws a byte from its logits, with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(logits_V: Tensor) -> int:
        if temperature == 0:
            return int(logits_V.argmax())
        # The largest logit is 0 after the shift, so that no temperature can overflow.
        weights_V = ((logits_V - logits_V.max()) / temperature).exp()
        return int(torch.multinomial(weights_V, 1, generator=generator))

    return draw
