"""Generation: deterministic, bytes only, each byte read once, and many prompts as each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training import generate as module
from arbitor.optimized.training.generate import (
    first_window,
    generate,
    generate_batch,
    read_prompt,
    stream_batch,
)
from arbitor.reference.config import SPECIAL_IDS
from arbitor.reference.graph import ArbModel, LatentAttention
from arbitor.reference.graph.ledger import KVLedger
from conformance.compare import alike
from conformance.graph.models import NANO, drawn_by_the_reference, nano, whole
from conformance.subject import Subject

BOS, PAD = SPECIAL_IDS["BOS"], SPECIAL_IDS["PAD"]


class Scripted:
    """Stands for a model: logits are a function of the last bytes, and what each pass read is kept."""

    def __init__(self, logits_of: Callable[[list[int]], torch.Tensor]) -> None:
        self.logits_of = logits_of
        self.windows: list[list[int]] = []

    def __call__(
        self, ids_BT: torch.Tensor | None, *, ledger: KVLedger, choose: Callable[..., torch.Tensor] | None
    ) -> torch.Tensor:
        window_BT = ledger.begin(ids_BT)
        self.windows.append(window_BT[0].tolist())
        logits = torch.full((ledger.batch, window_BT.shape[1] - 2, 297), -50.0)
        for row in range(ledger.batch):
            logits[row, -1] = self.logits_of(window_BT[row].tolist())
        last = logits[:, -1]
        ledger.end(last.argmax(dim=-1) if choose is None else choose(last))
        return logits

    def new_ledger(self, batch: int = 1) -> KVLedger:
        return KVLedger(NANO, batch)

    def buffers(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])


def run(script: Scripted, prompt: bytes, num_bytes: int, **options: Any) -> bytes:
    settings: dict[str, Any] = {"temperature": 0.0, "seed": 0, **options}
    return generate(cast(ArbModel, script), prompt, num_bytes, **settings)


def next_byte(window: list[int]) -> torch.Tensor:
    """Return logits for the byte after the last one. An id that is no byte is likelier still."""
    logits = torch.zeros(297)
    logits[(window[-1] + 1) % 256] = 10
    logits[256:] = 100
    return logits


@pytest.mark.parametrize(
    ("prompt", "window"),
    [(b"", [PAD, PAD, BOS]), (b"a", [PAD, BOS, 97]), (b"ab", [BOS, 97, 98]), (b"abc", [97, 98, 99])],
)
def test_first_window_of_a_short_prompt(prompt: bytes, window: list[int]) -> None:
    assert first_window(prompt) == window


def test_generate_reads_each_byte_once_and_takes_the_likeliest() -> None:
    script = Scripted(next_byte)
    assert run(script, b"ab", 7) == b"cdefghi"
    assert script.windows[0] == [BOS, *b"ab"]
    assert script.windows[1:] == [[*b"abc"], [*b"bcd"], [*b"cde"], [*b"def"], [*b"efg"], [*b"fgh"]]


def test_generate_reads_a_long_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 4)
    script = Scripted(next_byte)
    assert run(script, b"0123456789", 2) == b":;"
    assert script.windows == [[*b"0123"], [*b"234567"], [*b"6789"], [*b"89:"]]


def test_generate_reads_the_end_of_a_prompt_where_that_is_asked_for() -> None:
    script = Scripted(next_byte)
    assert run(script, b"0123456789abcdef", 1, context=8) == b"g"
    assert script.windows == [[*b"89abcdef"]]


def test_generate_breaks_ties_towards_the_lowest_byte() -> None:
    assert run(Scripted(lambda window: torch.zeros(297)), b"abc", 2) == b"\0\0"


def test_generate_never_draws_an_id_that_is_no_byte() -> None:
    def marks(window: list[int]) -> torch.Tensor:
        logits = torch.zeros(297)
        logits[256:] = 80
        return logits

    drawn = run(Scripted(marks), b"abc", 300, temperature=5.0)
    assert len(drawn) == 300
    # All 256 bytes are equally likely.
    assert len(set(drawn)) > 150


def test_generate_follows_the_temperature() -> None:
    def two(window: list[int]) -> torch.Tensor:
        logits = torch.full((297,), -1000.0)
        logits[65], logits[66] = 1.0, 0.0
        return logits

    shares = {t: run(Scripted(two), b"abc", 2000, temperature=t).count(b"A") / 2000 for t in (0.25, 1.0, 4.0)}
    # The odds of A are exp(1 / t). Five standard deviations are 0.056.
    for temperature, share in shares.items():
        expected = 1 / (1 + torch.tensor(-1 / temperature).exp().item())
        assert abs(share - expected) < 0.056
    assert run(Scripted(two), b"abc", 50, temperature=1e-30) == b"A" * 50


def test_generate_is_deterministic() -> None:
    model = nano()

    def text(seed: int, temperature: float = 1.0) -> bytes:
        return generate(model, b"one two", 24, temperature=temperature, seed=seed)

    first = text(5)
    torch.manual_seed(1)
    torch.rand(3)
    assert text(5) == first
    assert text(6) != first
    assert text(5, 0.0) == text(6, 0.0)
    assert len(first) == 24
    assert generate(model, b"one", 0, temperature=1.0, seed=0) == b""


def test_generate_changes_no_weight() -> None:
    model = nano()
    before = {name: weight.clone() for name, weight in model.weights().items()}
    generate(model, b"", 5, temperature=1.0, seed=0)
    for name, weight in model.weights().items():
        assert all(torch.equal(t, before[name].tensors()[part]) for part, t in weight.tensors().items())


PROMPTS = [b"", b"x", b"one two three four five six seven", b"0123456789"]
"""Prompts on both sides of a window of 8."""


def windowed(**options: Any) -> ArbModel:
    """A nano model that sees bytes beyond 8 in summaries."""
    return nano(window=8, block=2, num_summaries=1, **options)


@pytest.mark.parametrize("make", [windowed, whole])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_many_as_each_alone(make: Callable[[], ArbModel], temperature: float) -> None:
    """Texts are equal byte for byte, at temperature 0 and with seeds, also with codes, nodes, memory and a loop."""
    model = make()
    seeds = list(range(len(PROMPTS)))
    together = generate_batch(model, PROMPTS, 16, temperature=temperature, seeds=seeds)
    alone = [
        generate(model, prompt, 16, temperature=temperature, seed=seed)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    assert generate_batch(model, [], 5, temperature=temperature, seeds=[]) == []
    assert generate_batch(model, PROMPTS, 0, temperature=temperature, seeds=seeds) == [b""] * 4


def test_generate_many_as_each_alone_on_the_op_set_under_test(subject: Subject) -> None:
    """On a GPU the model has every module. In the interpreter, where a step takes seconds, it has attention and experts."""
    on_gpu = subject.device.type == "cuda"
    ops = subject.ops if on_gpu else drawn_by_the_reference(subject.ops)
    options: dict[str, Any] = {"ops": ops, "device": subject.device}
    model = whole(**options) if on_gpu else nano(window=4, block=2, num_summaries=1, num_layers=1, **options)
    theirs = ArbModel(model.config, seed=3)
    theirs.load_state({name: held.to("cpu") for name, held in model.state().items()})
    prompts, seeds, count = (b"x", b"0123456"), (0, 1), 32 if on_gpu else 2
    with values_vouched_for():
        together = generate_batch(model, prompts, count, temperature=1.0, seeds=seeds)
    for alone in [theirs, model] if on_gpu else [theirs]:
        for text, prompt, seed in zip(together, prompts, seeds, strict=True):
            assert text == generate(alone, prompt, count, temperature=1.0, seed=seed)


def test_generate_draws_from_the_logits_of_the_whole_text() -> None:
    """The logits of each step, with a ledger and in a batch, are those of one pass over all bytes."""
    model = windowed()
    seen: list[torch.Tensor] = []
    byte_head = model.byte_head.forward
    model.byte_head.forward = lambda h_BPD: seen.append(byte_head(h_BPD)) or seen[-1]  # type: ignore[func-returns-value]
    added = generate_batch(model, PROMPTS, 14, temperature=1.0, seeds=[1, 2, 3, 4])
    for row, (prompt, text) in enumerate(zip(PROMPTS, added, strict=True)):
        drawn_from = torch.stack([seen[row][0, -1], *(logits_BPV[row, -1] for logits_BPV in seen[4:])])
        ids = [*first_window(prompt), *text]
        with torch.no_grad():
            whole = byte_head_of(windowed(), ids)
        alike(drawn_from, whole[-15:-1], f"logits of {prompt!r}")


def byte_head_of(model: ArbModel, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0]


def test_generate_costs_the_same_however_long_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step looks at as many rows after 600 bytes as after 60. The shapes of all that it computes are equal."""
    model = windowed()
    shapes: list[list[tuple[int, ...]]] = []
    ops = model.layers[0].attention.ops

    class Watched:
        def __getattr__(self, name: str) -> Any:
            op = getattr(ops, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                given = list(args)
                if kwargs.get("places_BS") is not None:
                    # Of a log only the rows that are named are read.
                    given[1] = kwargs["places_BS"]
                shapes[-1] += [tuple(value.shape) for value in given if isinstance(value, torch.Tensor)]
                return op(*args, **kwargs)

            return watched

    def read(*args: Any, **kwargs: Any) -> Any:
        ledger = read_prompt(*args, **kwargs)
        shapes[-1].clear()
        return ledger

    # Reading the prompt costs what the prompt is long. What is watched is the step after it.
    monkeypatch.setattr(module, "read_prompt", read)
    monkeypatch.setattr(LatentAttention, "ops", Watched())
    for length in (60, 600):
        shapes.append([])
        generate(model, bytes(range(60)) * (length // 60), 2, temperature=0.0, seed=0)
    assert len(shapes[0]) and shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_bytes": -1}, "num_bytes"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"context": 2}, "context"),
        ({"seeds": [1, 2]}, "seeds"),
    ],
)
def test_generate_refuses(options: dict[str, Any], named: str) -> None:
    settings = {"num_bytes": 1, "temperature": 1.0, "seeds": [0], "context": 8, **options}
    with pytest.raises(ValueError, match=f"^{named} (is|has)"):
        generate_batch(nano(), [b"abc"], **settings)


def test_generate_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="logits are not finite"):
        run(Scripted(lambda window: torch.full((297,), float("nan"))), b"abc", 1)


def drawn(weights: list[float], *, draws: int = 300, **options: Any) -> set[int]:
    """Return the bytes that are drawn from a distribution over the first of them; the others have none of it."""
    logits = torch.full((297,), -torch.inf).clamp(min=-1e4)
    logits[: len(weights)] = torch.tensor(weights).log()
    settings: dict[str, Any] = {"temperature": 1.0, "seeds": [0], **options}
    [added] = generate_batch(cast(ArbModel, Scripted(lambda _: logits)), [b"ab"], draws, **settings)
    return set(added)


@pytest.mark.parametrize(
    ("weights", "options", "left"),
    [
        ([0.4, 0.3, 0.2, 0.1], {}, {0, 1, 2, 3}),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 1}, {0}),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2}, {1, 3}),
        ([0.25, 0.25, 0.25, 0.25], {"top_k": 3}, {0, 1, 2}),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 256, "top_p": 1.0}, {0, 1, 2, 3}),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 1e-9}, {0}),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.39}, {0}),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.41}, {0, 1}),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.8}, {1, 2, 3}),
        # Of what top_k leaves, the first has 4/7.
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.5}, {0}),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.6}, {0, 1}),
        # At a low temperature the first has more than nine parts of ten.
        ([0.4, 0.2, 0.2, 0.2], {"top_p": 0.9, "temperature": 0.2}, {0}),
    ],
)
def test_only_the_likeliest_bytes_are_drawn(
    weights: list[float], options: dict[str, Any], left: set[int]
) -> None:
    assert drawn(weights, **options) == left


def counted(text: bytes, stop: list[bytes], num_bytes: int) -> list[bytes]:
    """Return the pieces for a model that would write a text."""
    place = iter(text)

    def next_of(_: list[int]) -> torch.Tensor:
        logits = torch.zeros(297)
        logits[next(place)] = 10
        return logits

    script = cast(ArbModel, Scripted(next_of))
    stream = stream_batch(script, [b"abc"], num_bytes, temperature=0.0, seeds=[0], stop=stop)
    return [piece for [piece] in stream]


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        (b"abcd", [], [b"a", b"b", b"c", b"d"]),
        (b"abcd", [b"c"], [b"a", b"b", b""]),
        (b"abcd", [b"bc"], [b"a", b"", b""]),
        # What only began like an ending comes once that is known, and at the end of the bytes.
        (b"abxd", [b"bc"], [b"a", b"", b"bx", b"d"]),
        (b"abcb", [b"bx"], [b"a", b"", b"bc", b"b"]),
        (b"aaab", [b"aab"], [b"", b"", b"a", b""]),
        # The ending that comes first counts; of several that end together, the one that began first.
        (b"abcd", [b"bcd", b"c"], [b"a", b"", b"b"]),
        (b"abcd", [b"c", b"bc"], [b"a", b"", b""]),
    ],
)
def test_a_text_ends_before_a_stop(text: bytes, stop: list[bytes], pieces: list[bytes]) -> None:
    assert counted(text, stop, 4) == pieces
