"""Inputs of the family memory.

Legend: M positions of B sequences, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.inputs.maker import Arguments, Inputs, Maker, Sizes


def ngrams(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `ngram_rows`: sequences of codes, and the codes before each."""
    shape = (s["B"], s["M"] // s["B"])
    codes, before = (
        make.integers(0, 34_107, (s["B"], width), torch.int64) for width in (shape[1], s["order"] - 1)
    )
    return (codes,), {"order": s["order"], "num_rows": s["N"], "salt": 3, "previous": before}


def touch(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `touch_strengths`."""
    strengths = make.integers(0, 127, (s["N"],), torch.int8)
    at = {"gain": 8, "first": s["N"] // 2, "window": s["window"], "shift": 2, "out": strengths}
    return (strengths, make.integers(-1, s["N"] - 1, (s["M"],), torch.int64)), at


INPUTS: Mapping[str, Inputs] = {"ngram_rows": ngrams, "touch_strengths": touch}
