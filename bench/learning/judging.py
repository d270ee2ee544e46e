"""The last word: runs that ended are judged, once, by a text that no choice was made on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from arbitor.optimized.training.data import Corpus, Segments, Split, load_corpus, validation_windows
from bench.learning.copies import copied
from bench.learning.jobs import architecture_in, data_name, rule_in
from bench.learning.training import judge

SUITE = "best"
"""Runs of this suite are judged. Those of `tune` were made to choose by."""


def judge_runs(
    runs: list[dict[str, Any]],
    source: str,
    learned: Mapping[str, Corpus],
    piece_of: Callable[[Mapping[str, Any]], Path],
    identity: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    *,
    device: str,
    windows: int,
) -> None:
    """Add to each run of the suite `best` what its model makes of a text: `held_out`, a name, a digest and bits per byte, or None.

    Windows of which the text that a run learned from holds a copy are left out, whether the run learned from that place or was
    chosen by it.

    Args:
        runs: of some results.
        source: the text, a file or a folder.
        learned: by digest, the texts that the runs learned from.
        piece_of, identity: the file of a run, and what the file must agree with.
        device: `cpu` or `cuda`.
        windows: of the text at most, spread evenly over it.

    Raises:
        ValueError: there is no such run, a run was judged before or learned from the text, the text that it learned from is not
            at hand or holds all windows, or a file does not fit.
        TrainingError: the text cannot be read.
    """
    waiting = [run for run in runs if run["suite"] == SUITE and "failed" not in run]
    if not waiting:
        raise ValueError(f"there is no run of the suite {SUITE!r}, but these are judged")
    before = next((run["held_out"] for run in waiting if "held_out" in run), None)
    if before is not None:
        raise ValueError(
            f"these runs were judged by {before['text']!r}, but a held-out text is read once, "
            "since later choices would be made on it"
        )
    for run in waiting:
        if run["data_sha256"] not in learned:
            raise ValueError(
                f"the runs learned from {run['data']!r}, which --data must name too, since the held-out text may hold none of it"
            )
    corpus = load_corpus(source)
    if any(corpus.sha256 == run["data_sha256"] for run in waiting):
        raise ValueError(f"{source!r} is the text that a run learned from, but must be another")
    found, kept = [], {}
    for run in waiting:
        architecture = architecture_in(run)
        of = (run["data_sha256"], architecture.context)
        if of not in kept:
            kept[of] = _windows(corpus, learned[of[0]], count=windows, context=of[1])
        windows_WT, left_out = kept[of]
        bpb = judge(
            architecture, rule_in(run), windows_WT, seed=run["seed"], device=device, piece=piece_of(run), job=identity(run)
        )  # fmt: skip
        text: dict[str, Any] = {"text": data_name(source), "sha256": corpus.sha256}
        # A model that lost its way has no number, and the others are judged all the same.
        text["bpb"] = bpb if math.isfinite(bpb) else None
        found.append({**text, "windows": windows_WT.shape[0], "left_out": left_out})
    # All of them or none.
    for run, held_out in zip(waiting, found, strict=True):
        run["held_out"] = held_out


def _windows(corpus: Corpus, learned: Corpus, *, count: int, context: int) -> tuple[Tensor, int]:
    """Return windows of a text that another text has no copy of, int64 [W, T], and how many of `count` at most were left out."""
    windows_WT = validation_windows(corpus, whole(corpus), count=count, context=context)
    fresh_WT = windows_WT[~copied(windows_WT, learned.data_N)]
    if not fresh_WT.shape[0]:
        raise ValueError(
            f"all {windows_WT.shape[0]} windows of {corpus.source!r} stand in the text that a run learned from"
        )
    return fresh_WT, windows_WT.shape[0] - fresh_WT.shape[0]


def whole(corpus: Corpus) -> Split:
    """Return a split of which all is for validation."""
    return Split(Segments(()), Segments(((0, corpus.data_N.numel()),)))
