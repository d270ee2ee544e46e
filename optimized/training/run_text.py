"""The text of a run: what it learns from, what it is judged by, and whether both are still those that it was started with.

Shape legend: B windows of a micro-batch, W windows of validation, T bytes of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arbitor.optimized.training.baselines import baseline_bpb
from arbitor.optimized.training.data import (
    Corpus,
    Split,
    load_corpus,
    split_apart,
    split_by_block,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.options import Settings
from arbitor.optimized.training.shown import nearby, shown


@dataclass(frozen=True)
class RunText:
    """The text of a run, read and cut.

    Attributes:
        settings: of the run.
        corpus: what it learns from.
        judge: what it is judged by: the same corpus, or that of ``val_data``.
        split: the bytes of the two that count.
        windows_WT: what the model is judged by, int64 [W, T].
        baselines: bits per byte of what counting achieves on these windows, by name.
    """

    settings: Settings
    corpus: Corpus
    judge: Corpus
    split: Split
    windows_WT: Tensor
    baselines: Mapping[str, float]

    def batch(self, micro_step: int) -> Tensor:
        """Return the windows of a micro-batch, int64 [B, T] on the CPU; see `data.training_batch`."""
        return training_batch(
            self.corpus,
            self.split,
            batch=self.settings.batch,
            context=self.settings.context,
            seed=self.settings.seed,
            micro_step=micro_step,
        )

    def document(self) -> dict[str, Any]:
        """Return what ``config.json`` and checkpoints record of the bytes."""
        recorded: dict[str, Any] = {
            "data_bytes": self.corpus.data_N.numel(),
            "data_sha256": self.corpus.sha256,
            "validation_sha256": self.split.validation_sha256(),
        }
        if self.settings.val_data is not None:
            recorded["val_data_sha256"] = self.judge.sha256
        return recorded

    def first_lines(self) -> list[str]:
        """Return what is learned from, and what is judged."""
        settings, judge = self.settings, self.split.description()
        if settings.val_data is not None:
            judge = f"{shown(nearby(settings.val_data))}: {self.judge.description()}"
        return [
            f"data: {shown(nearby(settings.data))}: {self.corpus.description()}",
            f"validation: {judge}; judged on {self.windows_WT.shape[0]:,} windows of {settings.context:,}",
        ]


def read_text(settings: Settings, folder: Path | None, recorded: Mapping[str, Any] | None) -> RunText:
    """Return the text of a run, which is what it was when the run was started.

    Args:
        settings: of the run.
        folder: of the run, which is no part of its data; or None where nothing is written.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the bytes cannot be read, are too few, or are not those that the run was started with.
        ValueError: the context is too short.
    """
    corpus = judge = load_corpus(settings.data, folder, stream_bytes=settings.stream_bytes)
    check_same_data(corpus, recorded)
    if settings.val_data is None:
        split = split_corpus(corpus, settings.context)
    else:
        judge = load_corpus(settings.val_data, folder, stream_bytes=settings.stream_bytes)
        check_same_validation(judge, recorded)
        split = split_apart(corpus, judge, settings.context)
    check_same_split(corpus, split, settings.context, recorded)
    windows_WT = validation_windows(judge, split, count=settings.eval_windows, context=settings.context)
    baselines = baseline_bpb(corpus, split.train, windows_WT)
    return RunText(settings, corpus, judge, split, windows_WT, baselines)


def check_same_data(corpus: Corpus, recorded: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other bytes than the run was started with.

    Args:
        corpus: the bytes now.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the digests differ.
    """
    if recorded is not None and recorded["data_sha256"] != corpus.sha256:
        raise TrainingError(
            f"the run was started with data {recorded['data']!r} of {recorded['data_bytes']} bytes with SHA-256 "
            f"{recorded['data_sha256'][:12]}... and cannot go on with data {corpus.source!r} of "
            f"{corpus.data_N.numel()} bytes with SHA-256 {corpus.sha256[:12]}..."
        )


def check_same_split(corpus: Corpus, split: Split, context: int, recorded: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other validation bytes than the run was started with.

    Args:
        corpus, split: the bytes and how they are cut now.
        context: bytes of a window.
        recorded: settings of the run that is resumed, or None for a new one. A run that does not say how its bytes were cut is
            from before folders were cut file by file.

    Raises:
        TrainingError: they differ.
    """
    if recorded is None:
        return
    before = recorded.get("validation_sha256", split_by_block(corpus, context).validation_sha256())
    if before != split.validation_sha256():
        raise TrainingError(
            f"the run was started with other validation bytes of {corpus.source!r}, which was cut by another rule, and cannot "
            "go on with these"
        )


def check_same_validation(judge: Corpus, recorded: Mapping[str, Any] | None) -> None:
    """Refuse to go on with other bytes to be judged by than the run was started with.

    Args:
        judge: the bytes of ``val_data`` now.
        recorded: settings of the run that is resumed, or None for a new one.

    Raises:
        TrainingError: the digests differ, or the run was started without ``val_data``.
    """
    if recorded is None:
        return
    before = recorded.get("val_data_sha256")
    if before != judge.sha256:
        was = "without val_data" if before is None else f"with val_data of SHA-256 {str(before)[:12]}..."
        raise TrainingError(
            f"the run was started {was} and cannot go on with val_data {judge.source!r} of SHA-256 {judge.sha256[:12]}..."
        )
