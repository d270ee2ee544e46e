"""Calls to compare of the family attention.

Legend: B batch, H heads, S slots, K columns of a slot, L value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance import strategies as ss
from conformance.cases.case import Case

COUNTS = st.sampled_from((1, 2, 5, 17))
"""Numbers of heads worth trying: below, beside and above a tile of them."""

SLOTS = st.sampled_from((0, 1, 2, 15, 64, 65, 130, 300))
"""Numbers of slots worth trying: none, and those at the edges of tiles and splits."""

SCALES = st.sampled_from((1.0, 0.25, 0.1))


@st.composite
def biases(draw: st.DrawFn, batch: int, slots: int) -> Tensor:
    """Draw what slots add to their score: nothing, ln n of a summary, or -inf; some sequences may see nothing at all."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    choice = torch.randint(0, 4, (batch, slots), generator=rng)
    kind = draw(st.sampled_from(("all", "some", "few", "one row none")), label="visible")
    bias = torch.tensor([0.0, math.log(4), math.log(64), -40.0])[choice]
    hidden = {"all": 0.0, "some": 0.5, "few": 0.95, "one row none": 0.3}[kind]
    bias[torch.rand(batch, slots, generator=rng) < hidden] = -torch.inf
    if kind == "one row none":
        bias[:1] = -torch.inf
    return bias


@st.composite
def decode_attention(draw: st.DrawFn) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    batch, heads = draw(st.integers(0, 3), label="B"), draw(COUNTS, label="H")
    slots = draw(SLOTS, label="S")
    latent, rotary = draw(st.sampled_from((1, 5, 16, 33, 48))), draw(st.sampled_from((0, 2, 16)))
    options = {"value_width": latent, "scale": draw(SCALES, label="scale")}
    # Squares of the wild ones fit float32, and their scores leave one slot with all the weight.
    kinds = ("normal", "constant", "wild")
    q = draw(ss.activations((batch, heads, latent + rotary), dtype, exact=False, kinds=kinds))
    keys = draw(ss.activations((batch, slots, latent + rotary), dtype, exact=exact_sums, kinds=kinds))
    bias = draw(biases(batch, slots))
    if exact_sums:  # equal scores, a power of two of them: every share is a power of two
        visible = 1 << draw(st.integers(0, max(slots, 1).bit_length() - 1), label="visible")
        order = torch.rand(batch, slots, generator=ss.generator(draw(ss.GENERATOR_SEEDS))).argsort(dim=1)
        q, bias = torch.zeros_like(q), torch.where(order < visible, 0.0, -torch.inf)
    return Case((q, keys, bias), options, sums_exact=exact_sums)


def magnitude_of_decode_attention(op: Callable[..., Any], case: Case) -> Tensor:
    """Return the terms of each element, with what the errors of the scores move.

    A score is a sum whose terms add up to m_s; an error of eps m_s in it changes the share a_s by that part of itself, and
    by the mean of all such errors. So the terms are sum a_s |v_s| (1 + m_s) and (sum a_s |v_s|) (sum a_s m_s).
    """
    q, keys, bias = (value.to(torch.float64) for value in case.args)
    width, scale = case.kwargs["value_width"], case.kwargs["scale"]
    visible = bias > -torch.inf
    keys = torch.where(visible[:, :, None], keys, 0.0)
    terms = q.abs() @ keys.abs().mT * scale + torch.where(visible, bias.abs(), 0.0)[:, None]
    shares = (q @ keys.mT * scale + bias[:, None]).softmax(dim=-1).nan_to_num(0.0)
    values = keys[:, :, :width].abs()
    return (shares * (1 + terms)) @ values + (shares @ values) * (shares * terms).sum(dim=-1, keepdim=True)


CASES: dict[str, SearchStrategy[Case]] = {"decode_attention": decode_attention()}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {"decode_attention": magnitude_of_decode_attention}
"""Sums of absolute terms of the ops that subtract."""
