"""Text from a model: one byte at a time, each drawn from what all bytes before it make likely.

The model keeps a ledger of what it read, so that a byte costs the same however many came before it.
Shape legend: B sequences, T bytes, V ids of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.drawing import Chooser, Drawn, Likely, finite
from arbitor.optimized.training.media import Features, lead_of
from arbitor.optimized.training.options import MOST_BYTES
from arbitor.optimized.training.readers import Reader, RecordedReader
from arbitor.reference import checks
from arbitor.reference.config import NGRAM, NUM_BYTES, SPECIAL_IDS
from arbitor.reference.graph.ledger import KVLedger

if TYPE_CHECKING:
    from arbitor.reference.graph import ArbModel

MOST_CONTEXT = 2**31 - 1
"""Bytes of a prompt that are read, at most."""

MOST_SEED = 2**64 - 1
"""The largest seed that torch's generator takes."""

PIECE = 4096
"""Bytes of a prompt that are read in one pass: activations of no more are held at a time."""


class Drawing(TypedDict, total=False):
    """How `stream_batch` draws, reads and ends; it says what each of these is."""

    temperature: Required[float]
    top_k: int | None
    top_p: float | None
    stop: Sequence[bytes]
    context: int | None
    cuda_graph: bool


def generate(
    model: ArbModel,
    prompt: bytes,
    num_bytes: int,
    *,
    seed: int,
    media: Features | None = None,
    **how: Unpack[Drawing],
) -> bytes:
    """Return the continuation of a prompt: `generate_batch` of one."""
    before = None if media is None else [media]
    [added] = generate_batch(model, [prompt], num_bytes, seeds=[seed], media=before, **how)
    return added


def generate_batch(
    model: ArbModel,
    prompts: Sequence[bytes],
    num_bytes: int,
    *,
    seeds: Sequence[int],
    media: Sequence[Features] | None = None,
    **how: Unpack[Drawing],
) -> list[bytes]:
    """Return the continuations of several prompts: all that `stream_batch`, which see, yields for each of them."""
    added = [bytearray() for _ in prompts]
    for pieces in stream_batch(model, prompts, num_bytes, seeds=seeds, media=media, **how):
        for whole, piece in zip(added, pieces, strict=True):
            whole += piece
    return [bytes(whole) for whole in added]


def stream_batch(
    model: ArbModel,
    prompts: Sequence[bytes],
    num_bytes: int,
    *,
    temperature: float,
    seeds: Sequence[int],
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[bytes] = (),
    context: int | None = None,
    media: Sequence[Features] | None = None,
    cuda_graph: bool = False,
) -> Iterator[list[bytes]]:
    """Return what continues several prompts of any lengths in lockstep, a byte of each at a time.

    Each prompt is read on its own, then all go on together. Only bytes are drawn: specials and marks have no
    chance. A prompt of fewer than three bytes is filled up from the left: BOS stands right before it, and PAD
    before BOS. A sequence sees nothing of the others, and its bytes are drawn with a generator of its own: it
    is continued as it would be alone. (Its logits are alike, not equal in bits: libraries add up in another
    order when there are more rows. A draw on the very edge between two bytes may then fall to the other side.)

    Args:
        model: a model; its weights are only read, and must not change before the last piece was taken.
        prompts: bytes to continue; may be empty.
        num_bytes: how many bytes to add to each at most, 0 to `MOST_BYTES`.
        temperature: 0 takes the likeliest byte (the lowest of several); otherwise logits are divided by it.
        seeds: of the CPU generators that draw, one a prompt, 0 .. 2^64 - 1; the same seed gives the same bytes on the same
            device. At temperature 0 nothing is drawn.
        top_k: only so many of the likeliest bytes may be drawn, 1 .. 256; None: all.
        top_p: only the likeliest bytes may be drawn, as few as have this probability together, above 0 and at most 1. It is
            asked of what `top_k` leaves; None: all.
        stop: where one of these would end, a sequence ends before it; each has at least one byte.
        context: bytes at the end of a prompt that are read, at least 3; None: all.
        media: features that stand before each prompt, by their names in `ArbModel.trunk`, of one sample; None: none. A prompt with
            media is led by marks, as captions are in training, and these count among the `context`.
        cuda_graph: whether steps are recorded and replayed, see `recording.records`; the bytes are the same.

    Returns:
        An iterator over lists with a piece for each prompt. A piece is empty while it may still be the beginning of a `stop`,
        and after one. The iterator ends when every sequence has.

    Raises:
        TypeError or ValueError: an argument is of another type or out of range, at once; or, from the iterator, the model's
            logits are not finite.
    """
    checks.integer("num_bytes", num_bytes, 0, MOST_BYTES)
    checks.number("temperature", temperature, 0.0, math.inf)
    if top_k is not None:
        checks.integer("top_k", top_k, 1, NUM_BYTES)
    if top_p is not None:
        checks.number("top_p", top_p, 0.0, 1.0, open_low=True)
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise ValueError(
                f"{name} is {value}, but must be None at temperature 0, which takes the likeliest byte"
            )
    if b"" in stop:
        raise ValueError("stop holds an empty string, but each must have at least one byte")
    if context is not None:
        checks.integer("context", context, NGRAM, MOST_CONTEXT)
    for place, seed in enumerate(seeds):
        checks.integer(f"seeds[{place}]", seed, 0, MOST_SEED)
    if len(seeds) != len(prompts):
        raise ValueError(
            f"seeds has {len(seeds)} entries, but must have one for each of {len(prompts)} prompts"
        )
    if media is not None and len(media) != len(prompts):
        raise ValueError(
            f"media has {len(media)} entries, but must have one for each of {len(prompts)} prompts"
        )
    likely = Likely(temperature, top_k, top_p)
    before: Sequence[Features] = media or [{} for _ in prompts]
    windows = [
        _Window(_window(prompt, context, features), features)
        for prompt, features in zip(prompts, before, strict=True)
    ]
    if not prompts or not num_bytes:
        return iter(())
    return _streamed(model, windows, num_bytes, likely, seeds, [_Ending(stop) for _ in prompts], cuda_graph)


class _Window(NamedTuple):
    """What a model reads before it continues: ids, and features that stand before them."""

    ids: list[int]
    media: Features


def _window(prompt: bytes, context: int | None, media: Features) -> list[int]:
    """Return the ids that are read of a prompt, its end where it is longer than the context."""
    if not media:
        return first_window(prompt)[-(context or 0) :]
    room = len(prompt) if context is None else min(context - NGRAM, len(prompt))
    return [*lead_of(media), *prompt[len(prompt) - room :]]


def _streamed(
    model: ArbModel,
    windows: Sequence[_Window],
    num_bytes: int,
    likely: Likely,
    seeds: Sequence[int],
    endings: Sequence[_Ending],
    cuda_graph: bool,
) -> Iterator[list[bytes]]:
    """Yield the pieces of `stream_batch`. What holds for a step is left before a piece is handed out."""
    device = next(model.buffers()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _reading():
        ledgers, first = [], []
        for window, generator in zip(windows, generators, strict=True):
            choose = Chooser(likely, [generator], device=device)
            choose.prepare(0)
            ledgers.append(read_prompt(model, window.ids, media=window.media, choose=choose))
            first += finite(choose.drawn_B.tolist())
        ledger = KVLedger.stack(ledgers)
        # With all the room it will need, a step is recorded once.
        ledger.reserve(num_bytes - 1)
        reader = RecordedReader(model, ledger) if cuda_graph else Reader(model, ledger)
        drawn = Drawn(reader, Chooser(likely, generators, device=device), num_steps=num_bytes - 1)
    following = first
    for left in reversed(range(num_bytes)):
        pieces = [ending.feed(byte) for ending, byte in zip(endings, following, strict=True)]
        if left == 0:
            pieces = [piece + ending.rest() for piece, ending in zip(pieces, endings, strict=True)]
        yield pieces
        if left == 0 or all(ending.over for ending in endings):
            return
        with _reading():
            following = drawn.bytes_of_next()


def _reading() -> ExitStack:
    """Return what a model reads under: no gradients, and no looks at the values of ids that are bytes."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(values_vouched_for())
    return stack


class _Ending:
    """Hands on the bytes of a sequence until the first of some endings, and holds back what may be the beginning of one.

    Attributes:
        over: whether an ending was found; bytes after it are dropped.
    """

    def __init__(self, endings: Sequence[bytes]) -> None:
        self._endings = tuple(endings)
        self._held = b""
        self.over = False

    def feed(self, byte: int) -> bytes:
        """Return the bytes that can be handed on after the next one."""
        if self.over:
            return b""
        held = self._held + bytes([byte])
        # The longest of those that end here, as it begins first.
        found = max((len(ending) for ending in self._endings if held.endswith(ending)), default=0)
        if found:
            self.over, self._held = True, b""
            return held[:-found]
        longest = max((len(ending) for ending in self._endings), default=1)
        first = max(0, len(held) - longest + 1)
        while first < len(held) and not any(ending.startswith(held[first:]) for ending in self._endings):
            first += 1
        self._held = held[first:]
        return held[:first]

    def rest(self) -> bytes:
        """Return what is held back when no byte follows."""
        rest, self._held = self._held, b""
        return rest


def read_prompt(
    model: ArbModel, ids: list[int], *, choose: Callable[[Tensor], Tensor], media: Features | None = None
) -> KVLedger:
    """Return a ledger that has read media and then some ids, a piece at a time, and to which the chosen next one was appended."""
    ledger = model.new_ledger()
    device = next(model.buffers()).device
    for start in range(0, len(ids), PIECE):
        # What was predicted after the piece before is known.
        ledger.retract()
        piece_1T = torch.tensor([ids[start : start + PIECE]], dtype=torch.int64, device=device)
        is_last = start + PIECE >= len(ids)
        before = {} if start else {name: value.to(device) for name, value in (media or {}).items()}
        model(piece_1T, ledger=ledger, choose=choose if is_last else None, **before)
    return ledger


def first_window(prompt: bytes) -> list[int]:
    """Return the ids that the model sees first: the prompt, led by BOS and PAD where it is shorter than three bytes."""
    missing = NGRAM - len(prompt)
    lead = [SPECIAL_IDS["PAD"]] * (missing - 1) + [SPECIAL_IDS["BOS"]] if missing > 0 else []
    return lead + list(prompt)
