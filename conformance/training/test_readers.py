"""Steps of generation that are recorded and replayed do what steps launched from Python do: the same bits of all that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training import readers
from arbitor.optimized.training.generate import first_window, generate_batch, read_prompt
from arbitor.optimized.training.readers import Reader, RecordedReader
from arbitor.optimized.training.recording import LAUNCHED_FIRST
from arbitor.optimized.training.runtime import deterministic
from arbitor.reference.config import with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.voting import in_turn
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject, needs_cuda
from conformance.training.runs import replays

PROMPTS = (b"", b"one two three four five six seven", b"0123456789")
"""Prompts on both sides of a window of 8, whose blocks of 4 are complete at different steps."""

STEPS = 40
"""Past blocks of the third level, and twice past the memory that a ledger of these prompts has."""


def read(model: ArbModel) -> KVLedger:
    """Return a ledger that has read the prompts."""
    return KVLedger.stack(
        [
            read_prompt(model, first_window(prompt), choose=lambda logits_BV: logits_BV.argmax(-1))
            for prompt in PROMPTS
        ]
    )


class Chooses:
    """Keeps logits, and chooses ids by them that do not settle into a cycle, on the device alone.

    Attributes:
        logits_BV: those of the newest step.
    """

    def __init__(self, ledger: KVLedger) -> None:
        self.logits_BV = torch.zeros(0)
        self._count_1 = torch.zeros(1, dtype=torch.int64, device=ledger.device)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        self.logits_BV = logits_BV.detach().clone()
        self._count_1 += 1
        return logits_BV[:, :256].topk(4).indices.index_select(1, self._count_1 % 4)[:, 0]


def same(got: KVLedger, want: KVLedger) -> None:
    """Fail unless two ledgers hold the same, in every row that is written."""
    assert (got.lengths, got.positions, got.unread) == (want.lengths, want.positions, want.unread)
    for sequence, positions in enumerate(want.positions):
        exact(got.ids(sequence), want.ids(sequence), "ids")
        exact(got.codes(sequence), want.codes(sequence), "codes")
        used = want.scheduler.log_size(positions)
        for index in range(want.config.num_layers):
            rows = [ledger.layer(index).log.rows[sequence, :used].cpu() for ledger in (got, want)]
            exact(*rows, what=f"rows of layer {index}")


def compare(model: ArbModel, launched: KVLedger, replayed: KVLedger) -> None:
    """Take the same steps over two ledgers that hold the same, and fail where a logit or a row differs."""
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    both = [
        (reader, Chooses(reader.ledger))
        for reader in (Reader(model, launched), RecordedReader(model, replayed))
    ]
    for _ in range(STEPS):
        for (reader, choose), seen in zip(both, logits, strict=True):
            reader.step(choose)
            seen.append(choose.logits_BV.cpu())
    for step, (want, got) in enumerate(zip(*logits, strict=True)):
        exact(got, want, f"logits of step {step}")
    assert len({tuple(each.argmax(-1).tolist()) for each in logits[0]}) > 5, "the text goes on"
    same(replayed, launched)


class Launches:
    """Stands in for a CUDA graph where there is none: a replay launches what was recorded.

    It reads the numbers of the host anew, where a graph would have those of its recording: that is left to the tests on CUDA.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def replay(self) -> None:
        self.run()


def test_a_reader_keeps_the_ledger_as_a_pass_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a recorded step but the graph, on the CPU: counters, summaries, and memory that grows."""
    recorded_at: list[list[tuple[int, int]]] = []

    def recorded(run: Callable[[], None]) -> list[Any]:
        ledger = run.__self__.ledger  # type: ignore[attr-defined]
        recorded_at.append(ledger.places())
        # Launched first, so that its kernels are compiled.
        assert run.__self__._launched == LAUNCHED_FIRST  # type: ignore[attr-defined]
        return [Launches(run)]

    monkeypatch.setattr(readers, "recorded", recorded)
    model = models.whole()
    with torch.no_grad():
        launched = read(model)
        compare(model, launched, launched.copy())
    assert 2 <= len(recorded_at) <= 4, "once for each memory"
    assert all(one != other for one, other in pairwise(recorded_at))


def test_pieces_of_a_step_come_in_any_order() -> None:
    """A recorded step has them side by side: products of one input, the tables of the memory, the graph, the choice of experts."""
    model, counts = models.whole(), []

    def last_first(pieces: Sequence[Callable[[], None]]) -> None:
        counts.append(len(pieces))
        for piece in reversed(pieces):
            piece()

    with torch.no_grad():
        in_order = read(model)
        readers_of_both = [Reader(model, ledger) for ledger in (in_order, in_order.copy())]
        chosen = [Chooses(reader.ledger) for reader in readers_of_both]
        for _ in range(3):
            for reader, choose, apart in zip(readers_of_both, chosen, (in_turn, last_first), strict=True):
                model.voting.reads_apart = apart
                reader.step(choose)
            exact(*(choose.logits_BV for choose in chosen))
    same(*(reader.ledger for reader in readers_of_both))
    assert len(counts) > 3 * 2 * model.config.num_layers
    assert set(counts) >= {2, 3}


@pytest.mark.parametrize(
    "fields", [{}, {"num_codes": 0, "num_hops": 0, "memory_rows": 0, "composite_codes": 0}]
)
def test_room_that_was_reserved_is_enough(fields: dict[str, int]) -> None:
    """No step needs new memory, and what is read is as without."""
    bytes_only = {
        "image_features": 0,
        "image_codes": 0,
        "audio_features": 0,
        "audio_codes": 0,
        "talker_tokens": 0,
    }
    model = models.whole(
        with_fields(
            models.WHOLE, **(fields and {**bytes_only, "video_latent": 0, "router_inner": 0} | fields)
        )
    )
    with torch.no_grad():
        ledger = read(model)
        other = ledger.copy()
        ledger.reserve(STEPS)
        places = ledger.places()
        for each in (ledger, other):
            choose = Chooses(each)
            for _ in range(STEPS):
                Reader(model, each).step(choose)
    assert ledger.places() == places != other.places()
    same(ledger, other)


def test_a_replay_reads_one_id_after_others() -> None:
    model = models.nano()
    ledger = model.new_ledger()
    with pytest.raises(ValueError, match="has 0 unread ids after 0 positions, but a replay must read one id"):
        ledger.replay()
    with torch.no_grad():
        model(models.random_ids(1, 5), ledger=ledger)
    ledger.replay()
    ledger.retract()
    with pytest.raises(ValueError, match="has 0 unread ids after 3 positions"):
        ledger.replay()


VARIANTS: dict[str, dict[str, Any]] = {
    "every module": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "a graph of which only what is needed is read": {
        "num_codes": 3000,
        "code_search": "candidates",
        "sign_bits": 6,
        "num_probes": 3,
    },
    "every expert of every position": {"dense_dispatch_max_tokens": 10_000},
}
"""Fields of the model that take other paths, and its dtype."""


@pytest.mark.parametrize("in_order", [False, True], ids=["free", "deterministic"])
@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_steps_give_the_same_bits(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, name: str, in_order: bool
) -> None:
    """Logits, ids, codes and rows are equal, past blocks and growing memory, also with torch's deterministic algorithms."""
    needs_cuda(subject, f"recorded steps of generation: {name}")
    replayed = replays(monkeypatch)
    changes = dict(VARIANTS[name])
    options = {"ops": subject.ops, "device": subject.device, "dtype": changes.pop("dtype", torch.float32)}
    model = models.whole(replace(models.WHOLE, **changes), **options)
    with deterministic() if in_order else nullcontext(), torch.no_grad(), values_vouched_for():
        launched = read(model)
        compare(model, launched, launched.copy())
    assert STEPS - 4 * LAUNCHED_FIRST <= len(replayed) < STEPS


def test_the_same_text_from_recorded_steps(subject: Subject) -> None:
    needs_cuda(subject, "text from recorded steps")
    model = models.whole(ops=subject.ops, device=subject.device)
    for how in ({"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 2.0, "top_k": 9, "top_p": 0.7}):
        options: dict[str, Any] = {**how, "seeds": [1, 2, 3]}
        want = generate_batch(model, PROMPTS, 60, **options)
        assert generate_batch(model, PROMPTS, 60, cuda_graph=True, **options) == want
        assert generate_batch(model, PROMPTS, 1, cuda_graph=True, **options) == [text[:1] for text in want]
        # Of which a step is launched that nobody asks for.
        options["stop"] = [text[20:22] for text in want]
        assert generate_batch(model, PROMPTS, 60, cuda_graph=True, **options) == generate_batch(
            model, PROMPTS, 60, **options
        )
