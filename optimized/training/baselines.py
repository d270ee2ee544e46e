"""What counting alone achieves: bits per byte of models of order 0 to 3, a yardstick for the trained one.

Order k predicts a byte from the k - 1 bytes before it. Every order is interpolated with the one below it by
Witten and Bell's rule (Witten and Bell 1991, method C), down to the uniform distribution, so that an unseen
context costs no more than it must::

    p(w | h) = (c(hw) + t(h) p(w | h')) / (c(h) + t(h))

where c counts in the training bytes, t(h) is the number of distinct bytes seen after h, and h' is h without
its first byte.

Shape legend: W validation windows, T bytes of a window, M predicted bytes (W times T - 3).
"""

from __future__ import annotations

import torch

from arbitor.optimized.training.data import Corpus, Segments
from arbitor.reference.config import NGRAM, NUM_BYTES

UNIFORM_BPB = 8.0
"""Bits per byte of the uniform distribution over byte values: log2 256."""

COUNTED_BYTES = 2**26
"""Training bytes that are counted, at most. More of them change little, and take minutes."""

PIECE_BYTES = 2**20
"""Training bytes that are counted at a time."""

NAMES = ("uniform", "unigram", "bigram", "trigram")
"""The baselines, weakest first."""


def baseline_bpb(corpus: Corpus, train: Segments, validation_WT: torch.Tensor) -> dict[str, float]:
    """Return the bits per byte of each baseline, fitted on the training bytes and judged on what the model is judged on.

    Args:
        corpus: the bytes.
        train: the runs of it to count in, of which the first COUNTED_BYTES count; no pair or triple is counted across the end of
            a run.
        validation_WT: int64 [W, T], bytes; places 3 to T - 1 of each window are predicted.

    Returns:
        ``{"uniform", "unigram", "bigram", "trigram"}`` to bits per byte.

    Raises:
        ValueError: the windows hold no byte to predict.
    """
    if validation_WT.dim() != 2 or validation_WT.shape[0] == 0 or validation_WT.shape[1] <= NGRAM:
        raise ValueError(
            f"validation_WT has shape {tuple(validation_WT.shape)}, but needs a window of four bytes"
        )
    target_M = validation_WT[:, NGRAM:].reshape(-1)
    before_M = validation_WT[:, NGRAM - 1 : -1].reshape(-1)
    earlier_M = validation_WT[:, NGRAM - 2 : -2].reshape(-1)
    bpb = {"uniform": UNIFORM_BPB}
    probability_M = torch.full(target_M.shape, 1.0 / NUM_BYTES, dtype=torch.float64)
    contexts = (torch.zeros_like(target_M), before_M, earlier_M * NUM_BYTES + before_M)
    for order, (name, context_M) in enumerate(zip(NAMES[1:], contexts, strict=True), start=1):
        # Only the rows of the table that are asked for are counted.
        context_R, row_M = context_M.unique(return_inverse=True)
        count_RW = _counts(corpus.data_N, train, order, context_R)
        seen_M = count_RW.sum(1)[row_M]
        types_M = (count_RW > 0).sum(1)[row_M]
        blended_M = (count_RW[row_M, target_M] + types_M * probability_M) / (seen_M + types_M)
        probability_M = torch.where(seen_M > 0, blended_M, probability_M)
        bpb[name] = -probability_M.log2().mean().item()
    return bpb


def _counts(data_N: torch.Tensor, runs: Segments, order: int, context_R: torch.Tensor) -> torch.Tensor:
    """Return how often each byte follows each of R contexts of ``order - 1`` bytes inside the runs: int64 [R, 256]."""
    row_of_context = torch.full((NUM_BYTES ** (order - 1),), -1, dtype=torch.int64)
    row_of_context[context_R] = torch.arange(context_R.numel())
    size = context_R.numel() * NUM_BYTES
    count = torch.zeros(size, dtype=torch.int64)
    left = COUNTED_BYTES
    for start, end in runs.runs:
        end = min(end, start + left)
        left -= end - start
        # A run may be as long as the data, and a byte takes some forty here.
        for begin in range(start, end - order + 1, PIECE_BYTES):
            stop = min(begin + PIECE_BYTES, end - order + 1)
            context = torch.zeros(stop - begin, dtype=torch.int64)
            for place in range(order - 1):
                context = context * NUM_BYTES + data_N[begin + place : stop + place]
            row = row_of_context[context]
            asked = row >= 0
            followers = row * NUM_BYTES + data_N[begin + order - 1 : stop + order - 1]
            count += torch.bincount(followers[asked], minlength=size)
    return count.view(-1, NUM_BYTES)
