"""The last word: runs that ended are judged, once, by a text that no choice was made on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arbitor.optimized.training.data import Corpus, Segments, Split, load_corpus, validation_windows
from bench.learning.jobs import Job, architecture_of, data_name, rule_of
from bench.learning.training import judge

SUITE = "best"
"""Runs of this suite are judged. Those of `tune` were made to choose by."""


def judge_runs(
    runs: list[dict[str, Any]],
    source: str,
    piece_of: Callable[[Job], Path],
    identity: Callable[[Job, str], Mapping[str, Any]],
    *,
    device: str,
    windows: int,
) -> None:
    """Add to each run of the suite `best` what its model makes of a text: `held_out`, a name, a digest and bits per byte.

    Args:
        runs: of some results.
        source: the text, a file or a folder.
        piece_of, identity: the file of a run, and what the file must agree with, of a text with a digest.
        device: `cpu` or `cuda`.
        windows: of the text at most, spread evenly over it.

    Raises:
        ValueError: there is no such run, a run was judged before or learned from the text, or a file does not fit.
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
    corpus = load_corpus(source)
    if any(corpus.sha256 == run["data_sha256"] for run in waiting):
        raise ValueError(f"{source!r} is the text that a run learned from, but must be another")
    found = []
    for run in waiting:
        job = Job(
            *(run[name] for name in ("suite", "size", "rule", "seed", "steps", "data", "rate", "decay"))
        )
        architecture = architecture_of(job.size)
        windows_WT = validation_windows(corpus, whole(corpus), count=windows, context=architecture.context)
        bpb = judge(
            architecture, rule_of(job), windows_WT, seed=job.seed, device=device, piece=piece_of(job),
            job=identity(job, run["data_sha256"]),
        )  # fmt: skip
        if not math.isfinite(bpb):
            raise ValueError(f"the model of {job} has a loss of {bpb} on the text")
        found.append({"text": data_name(source), "sha256": corpus.sha256, "bpb": bpb})
    # All of them or none.
    for run, held_out in zip(waiting, found, strict=True):
        run["held_out"] = held_out


def whole(corpus: Corpus) -> Split:
    """Return a split of which all is for validation."""
    return Split(Segments(()), Segments(((0, corpus.data_N.numel()),)))
