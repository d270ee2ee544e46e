"""Generation: deterministic, bytes only, and never beyond the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch

from arbitor.optimized.training.generate import first_window, generate
from arbitor.reference.config import SPECIAL_IDS
from arbitor.reference.graph import ArbModel
from conformance.graph.models import nano

BOS, PAD = SPECIAL_IDS["BOS"], SPECIAL_IDS["PAD"]


class Scripted:
    """Stands for a model: logits are a function of the window, and the windows are kept."""

    def __init__(self, logits_of: Callable[[list[int]], torch.Tensor]) -> None:
        self.logits_of = logits_of
        self.windows: list[list[int]] = []

    def __call__(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.windows.append(ids_BT[0].tolist())
        logits = torch.full((1, ids_BT.shape[1] - 2, 297), -50.0)
        logits[0, -1] = self.logits_of(self.windows[-1])
        return logits

    def buffers(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])


def run(script: Scripted, prompt: bytes, num_bytes: int, **options: float) -> bytes:
    settings = {"temperature": 0.0, "seed": 0, "context": 8, **options}
    return generate(cast(ArbModel, script), prompt, num_bytes, **settings)


def next_byte(window: list[int]) -> torch.Tensor:
    """Logits for the byte after the last one; an id that is no byte is likelier still."""
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


def test_generate_slides_its_window_and_takes_the_likeliest_byte() -> None:
    script = Scripted(next_byte)
    assert run(script, b"ab", 7) == b"cdefghi"
    assert script.windows[0] == [BOS, *b"ab"]
    assert script.windows[5] == [BOS, *b"abcdefg"]
    assert script.windows[6] == [*b"abcdefgh"]


def test_generate_sees_the_end_of_a_long_prompt_only() -> None:
    script = Scripted(next_byte)
    assert run(script, b"0123456789abcdef", 1) == b"g"
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
    assert len(set(drawn)) > 150  # all 256 bytes are equally likely


def test_generate_follows_the_temperature() -> None:
    def two(window: list[int]) -> torch.Tensor:
        logits = torch.full((297,), -1000.0)
        logits[65], logits[66] = 1.0, 0.0
        return logits

    shares = {t: run(Scripted(two), b"abc", 2000, temperature=t).count(b"A") / 2000 for t in (0.25, 1.0, 4.0)}
    for (
        temperature,
        share,
    ) in shares.items():  # the odds of A are exp(1 / t); five standard deviations are 0.056
        expected = 1 / (1 + torch.tensor(-1 / temperature).exp().item())
        assert abs(share - expected) < 0.056
    assert run(Scripted(two), b"abc", 50, temperature=1e-30) == b"A" * 50


def test_generate_is_deterministic() -> None:
    model = nano()

    def text(seed: int, temperature: float = 1.0) -> bytes:
        return generate(model, b"one two", 24, temperature=temperature, seed=seed, context=12)

    first = text(5)
    torch.manual_seed(1)
    torch.rand(3)
    assert text(5) == first
    assert text(6) != first
    assert text(5, 0.0) == text(6, 0.0)
    assert len(first) == 24
    assert generate(model, b"one", 0, temperature=1.0, seed=0, context=12) == b""


def test_generate_changes_no_weight() -> None:
    model = nano()
    before = {name: weight.clone() for name, weight in model.weights().items()}
    generate(model, b"", 5, temperature=1.0, seed=0, context=12)
    for name, weight in model.weights().items():
        assert all(torch.equal(t, before[name].tensors()[part]) for part, t in weight.tensors().items())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_bytes": -1}, "num_bytes"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"context": 2}, "context"),
    ],
)
def test_generate_refuses(options: dict[str, float], named: str) -> None:
    settings = {"num_bytes": 1, "temperature": 1.0, "seed": 0, "context": 8, **options}
    with pytest.raises(ValueError, match=f"^{named} is"):
        generate(nano(), b"abc", **settings)


def test_generate_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="logits are not finite"):
        run(Scripted(lambda window: torch.full((297,), float("nan"))), b"abc", 1)
