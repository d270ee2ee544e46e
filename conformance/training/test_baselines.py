"""Counting models, against values worked out by hand and against a plain-Python twin."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from arbitor.optimized.training.baselines import NAMES, baseline_bpb
from arbitor.optimized.training.data import Corpus, Segments


def corpus_of(text: bytes) -> Corpus:
    return Corpus("made", torch.tensor(list(text), dtype=torch.uint8), "", 1)


def windows_of(*texts: bytes) -> torch.Tensor:
    return torch.tensor([list(text) for text in texts])


def test_baseline_bpb_by_hand() -> None:
    """Train on ``abab``, predict the ``b`` of ``xyab`` (``yab`` was never seen, ``ab`` was).

    unigram: two a, two b, so t = 2 and c = 4: (2 + 2/256) / 6 = 257/768.
    bigram:  after a came b twice: c = 2, t = 1: (2 + 257/768) / 3 = 1793/2304.
    trigram: ``ya`` was never seen, so the bigram's value stands.
    """
    bpb = baseline_bpb(corpus_of(b"abab"), Segments(((0, 4),)), windows_of(b"xyab"))
    assert tuple(bpb) == NAMES
    assert bpb["uniform"] == 8
    assert bpb["unigram"] == pytest.approx(-math.log2(257 / 768), abs=1e-12)
    assert bpb["bigram"] == pytest.approx(-math.log2(1793 / 2304), abs=1e-12)
    assert bpb["trigram"] == pytest.approx(bpb["bigram"], abs=1e-12)


def test_baseline_bpb_of_a_seen_triple_by_hand() -> None:
    """As above for ``xbab``: after ``ba`` came b once, so the trigram says (1 + 1793/2304) / 2 = 4097/4608."""
    bpb = baseline_bpb(corpus_of(b"abab"), Segments(((0, 4),)), windows_of(b"xbab"))
    assert bpb["trigram"] == pytest.approx(-math.log2(4097 / 4608), abs=1e-12)


def test_baseline_bpb_counts_nothing_across_runs() -> None:
    """``ab|ab``: the pair ``ba`` and every triple lie across the gap, so no trigram context was seen."""
    corpus = corpus_of(b"ab!!ab")
    bpb = baseline_bpb(corpus, Segments(((0, 2), (4, 6))), windows_of(b"xbab"))
    assert bpb["trigram"] == bpb["bigram"] == pytest.approx(-math.log2(1793 / 2304), abs=1e-12)


def test_baseline_bpb_against_plain_python() -> None:
    """Random bytes of a small alphabet, three runs, several windows: exact fractions, no code shared."""
    generator = torch.Generator().manual_seed(5)
    text = bytes(torch.randint(97, 103, (400,), generator=generator).tolist()) + bytes(range(250, 256))
    runs = ((0, 150), (160, 161), (170, 406))
    windows = [text[i : i + 9] for i in (3, 151, 165, 220)] + [bytes(range(248, 256)) + b"a", b"\0" * 9]
    bpb = baseline_bpb(corpus_of(text), Segments(runs), windows_of(*windows))

    counts: Counter[bytes] = Counter()
    for start, end in runs:
        for order in (1, 2, 3):
            counts.update(text[i : i + order] for i in range(start, end - order + 1))

    def probability(history: bytes, byte: int) -> Fraction:
        follow = {k[-1]: n for k, n in counts.items() if len(k) == len(history) + 1 and k.startswith(history)}
        lower = probability(history[1:], byte) if history else Fraction(1, 256)
        if not follow:
            return lower
        return (follow.get(byte, 0) + len(follow) * lower) / Fraction(sum(follow.values()) + len(follow))

    for order, name in ((0, "unigram"), (1, "bigram"), (2, "trigram")):
        logs = [
            -math.log2(probability(window[i - order : i], window[i]))
            for window in windows
            for i in range(3, 9)
        ]
        assert bpb[name] == pytest.approx(sum(logs) / len(logs), abs=1e-9), name


@pytest.mark.parametrize("shape", [(0, 8), (2, 3), (8,)])
def test_baseline_bpb_refuses_windows_without_a_byte_to_predict(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="validation_WT has shape"):
        baseline_bpb(corpus_of(b"abab"), Segments(((0, 4),)), torch.zeros(shape, dtype=torch.int64))
