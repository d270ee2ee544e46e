"""Text from a model: one byte at a time, each drawn from what the last bytes make likely.

Shape legend: T bytes of a window, P = T - 2 positions, V ids of the vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from arbitor.reference.config import NGRAM, NUM_BYTES, SPECIAL_IDS

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel


def generate(
    model: ArbModel, prompt: bytes, num_bytes: int, *, temperature: float, seed: int, context: int
) -> bytes:
    """Continue a prompt.

    The model sees a window that slides over the last ``context`` bytes, and draws bytes only: specials and
    marks have no chance. Before it has seen three, the window is filled from the left: BOS stands right
    before the prompt, and PAD before BOS.

    Args:
        model: a model; its weights are only read.
        prompt: bytes to continue; may be empty.
        num_bytes: how many bytes to add, at least 0.
        temperature: 0 takes the likeliest byte (the lowest of several); otherwise logits are divided by it.
        seed: of the CPU generator that draws; the same seed gives the same bytes on the same device.
        context: bytes of the window, at least 3.

    Returns:
        The added bytes, without the prompt.

    Raises:
        ValueError: an argument is out of range, or the model's logits are not finite.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes is {num_bytes}, but must be at least 0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, but must be finite and at least 0")
    if context < NGRAM:
        raise ValueError(f"context is {context}, but must be at least {NGRAM}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.buffers()).device
    ids = first_window(prompt)
    with torch.no_grad():
        for _ in range(num_bytes):
            window_1T = torch.tensor([ids[-context:]], dtype=torch.int64, device=device)
            logits_V = model(window_1T)[0, -1, :NUM_BYTES].to("cpu", torch.float64)
            ids.append(_draw(logits_V, temperature, generator))
    return bytes(ids[len(ids) - num_bytes :])


def first_window(prompt: bytes) -> list[int]:
    """The ids that the model sees first: the prompt, led by BOS and PAD where it is shorter than three bytes."""
    missing = NGRAM - len(prompt)
    lead = [SPECIAL_IDS["PAD"]] * (missing - 1) + [SPECIAL_IDS["BOS"]] if missing > 0 else []
    return lead + list(prompt)


def _draw(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(logits_V.isfinite().all()):
        raise ValueError("the model's logits are not finite, so no byte can be drawn from them")
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest logit is 0 after the shift, so that no temperature can overflow.
    weights_V = ((logits_V - logits_V.max()) / temperature).exp()
    return int(torch.multinomial(weights_V, 1, generator=generator))
