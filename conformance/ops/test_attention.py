"""Laws of attention to a cache of latents: torch's own attention, what is hidden stays hidden, n equal slots count as n.

Legend: B batch, H heads, S slots, K columns of a slot, L value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.op_table import OP_TABLE

from .. import strategies as ss
from ..case import Case, calls, magnitude
from ..compare import exact, no_worse, same_sums
from ..families import compare
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ids, meta, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("attention")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


COUNTS = st.sampled_from((1, 2, 5, 17, 33))
"""Numbers of heads worth trying: below, beside and above the tiles of them."""


SLOTS = st.sampled_from((0, 1, 2, 15, 64, 65, 130, 300))
"""Numbers of slots worth trying: none, and numbers at the edges of tiles and parts."""


SCALES = st.sampled_from((1.0, 0.25, 0.1))


@st.composite
def biases(draw: st.DrawFn, batch: int, slots: int) -> Tensor:
    """Draw what slots add to their score: nothing, ln n of a summary, or -inf. Some sequences may see nothing at all."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    choice = torch.randint(0, 4, (batch, slots), generator=rng)
    kind = draw(st.sampled_from(("all", "some", "few", "one row none")), label="visible")
    bias = torch.tensor([0.0, math.log(4), math.log(64), -40.0])[choice]
    hidden = {"all": 0.0, "some": 0.5, "few": 0.95, "one row none": 0.3}[kind]
    bias[torch.rand(batch, slots, generator=rng) < hidden] = -torch.inf
    if kind == "one row none":
        bias[:1] = -torch.inf
    return bias


@calls("decode_attention")
def decode_attention_calls(draw: st.DrawFn) -> Case:
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
    # A power of two of slots have equal scores, so every share is a power of two.
    if exact_sums:
        visible = 1 << draw(st.integers(0, max(slots, 1).bit_length() - 1), label="visible")
        order = torch.rand(batch, slots, generator=ss.generator(draw(ss.GENERATOR_SEEDS))).argsort(dim=1)
        q, bias = torch.zeros_like(q), torch.where(order < visible, 0.0, -torch.inf)
    if draw(st.booleans(), label="from a log"):
        rng = ss.generator(draw(ss.GENERATOR_SEEDS))
        places = torch.rand(batch, slots + 3, generator=rng).argsort(dim=1)[:, :slots]
        log = torch.full((batch, slots + 3, latent + rotary + 5), 7.0, dtype=dtype)
        each = torch.arange(batch)[:, None]
        log[..., 5:][each, places] = keys
        keys, options["places_BS"] = log[..., 5:], places
    return Case((q, keys, bias), options, sums_exact=exact_sums)


@magnitude("decode_attention")
def magnitude_of_decode_attention(op: Callable[..., Any], case: Case) -> Tensor:
    """Return the terms of each element, with what the errors of the scores move.

    A score is a sum whose terms add up to m_s; an error of eps m_s in it changes the share a_s by that part of itself, and
    by the mean of all such errors. So the terms are sum a_s |v_s| (1 + m_s) and (sum a_s |v_s|) (sum a_s m_s).
    """
    q, keys, bias = (value.to(torch.float64) for value in case.args)
    width, scale, places = (case.kwargs.get(name) for name in ("value_width", "scale", "places_BS"))
    keys = keys if places is None else keys[torch.arange(len(places))[:, None], places]
    visible = bias > -torch.inf
    keys = torch.where(visible[:, :, None], keys, 0.0)
    terms = q.abs() @ keys.abs().mT * scale + torch.where(visible, bias.abs(), 0.0)[:, None]
    shares = (q @ keys.mT * scale + bias[:, None]).softmax(dim=-1).nan_to_num(0.0)
    values = keys[:, :, :width].abs()
    return (shares * (1 + terms)) @ values + (shares @ values) * (shares * terms).sum(dim=-1, keepdim=True)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


LATENT, ROTARY = 33, 6
OPTIONS = {"value_width": LATENT, "scale": 0.25}
SOME_SLOTS = SLOTS.filter(bool)


def _draw(data: st.DataObject, *shape: int, dtype: torch.dtype) -> Tensor:
    return data.draw(ss.activations((*shape, LATENT + ROTARY), dtype, exact=False, kinds=("normal",)))


def _by_torch(q: Tensor, keys: Tensor, bias: Tensor, to: torch.dtype) -> Tensor:
    """Return the result of torch's attention with one key head, expanded. Its values are the first columns of the keys."""
    heads = keys.to(to)[:, None].expand(-1, q.shape[1], -1, -1)
    values = heads[..., : OPTIONS["value_width"]]
    mask = bias.to(to)[:, None, None].expand(-1, q.shape[1], 1, -1)
    scale = OPTIONS["scale"]
    return F.scaled_dot_product_attention(q.to(to)[:, :, None], heads, values, attn_mask=mask, scale=scale)[
        :, :, 0
    ]


def _no_worse_than_torch(got: Tensor, q: Tensor, keys: Tensor, bias: Tensor) -> None:
    wide = _by_torch(q, keys, bias, torch.float64)
    no_worse(
        got,
        twin=_by_torch(q, keys, bias, torch.float32).to(got.dtype),
        wide=wide,
        magnitude=magnitude_of_decode_attention(F.softmax, Case((q, keys, bias), OPTIONS)),
        k=OP_TABLE["decode_attention"].output.k,
        what="decode_attention",
    )


BIAS_SCALED_WITH_THE_SCORE = mutant(
    "bias_scaled_with_the_score",
    "keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :]",
    "keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :] * scale",
    compared="decode_attention",
)
VALUES_FROM_THE_END = mutant(
    "values_from_the_end",
    "keys_BSK[:, :, :value_width]",
    "keys_BSK[:, :, -value_width:]",
    compared="decode_attention",
)
SUMMARIES_COUNT_ONCE = mutant(
    "summaries_count_once",
    "+ bias_BS[:, None, :]\n",
    "+ bias_BS[:, None, :].clamp(max=0)\n",
    compared="decode_attention",
)
SOFTMAX_OVER_HEADS = mutant(
    "softmax_over_heads",
    "scores_BHS.softmax(dim=-1)",
    "scores_BHS.softmax(dim=1)",
    compared="decode_attention",
)


@law(
    batch=st.integers(1, 3),
    heads=COUNTS,
    slots=SOME_SLOTS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "scores_not_scaled",
            "keys_BSK.transpose(1, 2) * scale + bias",
            "keys_BSK.transpose(1, 2) + bias",
            compared="decode_attention",
        ),
        BIAS_SCALED_WITH_THE_SCORE,
        mutant(
            "rotary_key_left_out",
            "q_BHK.to(wide) @ keys_BSK.transpose(1, 2)",
            "q_BHK.to(wide)[:, :, :value_width] @ keys_BSK[:, :, :value_width].transpose(1, 2)",
            compared="decode_attention",
        ),
        VALUES_FROM_THE_END,
        SUMMARIES_COUNT_ONCE,
        mutant(
            "shares_rounded",
            "scores_BHS.softmax(dim=-1), 0.0)",
            "scores_BHS.softmax(dim=-1), 0.0).to(torch.bfloat16).to(wide)",
            compared="decode_attention",
        ),
        SOFTMAX_OVER_HEADS,
    ],
)
def test_decode_attention_by_torch(
    ops: Subject, batch: int, heads: int, slots: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    q, keys = _draw(data, batch, heads, dtype=dtype), _draw(data, batch, slots, dtype=dtype)
    bias = data.draw(biases(batch, slots))
    bias[:, -1] = 0.0
    _no_worse_than_torch(ops.decode_attention(q, keys, bias, **OPTIONS), q, keys, bias)


@law(
    heads=COUNTS,
    slots=SOME_SLOTS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant("hidden_slots_read", "torch.where(visible_BS1, keys_BSK.to(wide), 0.0)", "keys_BSK.to(wide)"),
    ],
)
def test_decode_attention_reads_only_what_is_visible(
    ops: Subject, heads: int, slots: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """NaN and infinity in a slot that is not visible change not one bit."""
    q, keys = _draw(data, 2, heads, dtype=dtype), _draw(data, 2, slots, dtype=dtype).clone()
    bias = data.draw(biases(2, slots))
    bias[:, slots // 2] = -torch.inf
    want = ops.decode_attention(q, keys, bias, **OPTIONS)
    assert want.isfinite().all()
    keys[bias == -torch.inf] = data.draw(st.sampled_from((math.nan, math.inf, -3.0)), label="hidden")
    same_sums(ops.decode_attention(q, keys, bias, **OPTIONS), want)


@law(
    heads=COUNTS,
    slots=SOME_SLOTS,
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        VALUES_FROM_THE_END,
        mutant(
            "nothing_visible_is_nan",
            "torch.where(visible_BS1.transpose(1, 2), scores_BHS.softmax(dim=-1), 0.0)",
            "scores_BHS.softmax(dim=-1)",
            compared="decode_attention",
        ),
        mutant(
            "nothing_visible_is_a_mean", "+ bias_BS[:, None, :]\n", "+ bias_BS[:, None, :].clamp(min=-1e4)\n"
        ),
        SOFTMAX_OVER_HEADS,
    ],
)
def test_decode_attention_of_one_visible_slot(
    ops: Subject, heads: int, slots: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """The value of a single slot comes out exactly, whatever its score. A sequence that sees nothing gets zeros."""
    q, keys = _draw(data, 2, heads, dtype=dtype), _draw(data, 2, slots, dtype=dtype)
    bias = torch.full((2, slots), -torch.inf)
    place = data.draw(st.integers(0, slots - 1), label="visible")
    bias[0, place] = data.draw(st.sampled_from((0.0, math.log(64), -1e30)), label="bias")
    got = ops.decode_attention(q, keys, bias, **OPTIONS)
    same_sums(got[0], keys[0, place, :LATENT].expand(heads, -1))
    same_sums(got[1], torch.zeros(heads, LATENT, dtype=dtype))


@law(
    heads=COUNTS,
    slots=st.sampled_from((1, 5, 20)),
    count=st.sampled_from((2, 4, 7)),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[BIAS_SCALED_WITH_THE_SCORE, SUMMARIES_COUNT_ONCE],
)
def test_decode_attention_counts_a_summary_as_many(
    ops: Subject, heads: int, slots: int, count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A slot with a bias of ln n gives what n slots with its key give. Half of the slots stand for n."""
    q, keys = _draw(data, 2, heads, dtype=dtype), _draw(data, 2, slots, dtype=dtype)
    many = slots // 2 + 1
    repeated = torch.cat([keys[:, :many].repeat(1, count, 1), keys[:, many:]], dim=1)
    bias = torch.zeros(2, slots)
    bias[:, :many] = math.log(count)
    got = ops.decode_attention(q, keys, bias, **OPTIONS)
    _no_worse_than_torch(got, q, repeated, torch.zeros(2, repeated.shape[1]))


@law(
    dtype=ss.DTYPES,
    batch=st.integers(0, 2),
    heads=st.integers(0, 2),
    rejects=[
        mutant(
            "no_slots_no_width",
            "    wide = wide_dtype(q_BHK)",
            "    if not keys_BSK.shape[1]:\n        return torch.zeros_like(q_BHK)\n"
            "    wide = wide_dtype(q_BHK)",
        ),
    ],
)
def test_decode_attention_of_no_slots(ops: Subject, dtype: torch.dtype, batch: int, heads: int) -> None:
    """No slots, or no sequences, give zeros of the right shape."""
    q, keys = torch.ones(batch, heads, 5, dtype=dtype), torch.ones(batch, 0, 5, dtype=dtype)
    got = ops.decode_attention(q, keys, torch.ones(batch, 0), value_width=3, scale=1.0)
    same_sums(got, torch.zeros(batch, heads, 3, dtype=dtype))


def test_decode_attention_of_parts_far_apart(subject: Subject) -> None:
    """Scores of later slots may be hundreds above those of the first, which then weigh nothing."""
    keys = torch.cat([torch.zeros(1, 300, 2), torch.ones(1, 1, 2), torch.zeros(1, 20, 2)], dim=1)
    q, values = torch.full((1, 3, 3), 150.0), torch.arange(321.0)[None, :, None]
    slots = torch.cat([values, keys], dim=2)
    q[..., 0] = 0.0
    got = subject.call("decode_attention", q, slots, torch.zeros(1, 321), value_width=1, scale=1.0)
    exact(got, torch.full((1, 3, 1), 300.0))


# --- long sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "slots"), [(2, 1025), (3, 1700)])
def test_long_sequences(subject: Subject, heads: int, slots: int) -> None:
    """An implementation may cut a sequence into parts, of other sizes the further it goes. The sum is the same."""
    draws = ss.generator(slots)
    q, keys = (torch.randn(2, count, 22, generator=draws).to(torch.bfloat16) for count in (heads, slots))
    bias = torch.where(torch.rand(2, slots, generator=draws) < 0.5, 0.0, -torch.inf)
    bias[1, :1030] = -torch.inf
    compare(subject, "decode_attention", Case((q, keys, bias), {"value_width": 16, "scale": 0.25}))


@law(
    slots=SOME_SLOTS,
    dtype=ss.DTYPES,
    seed=ss.GENERATOR_SEEDS,
    data=st.data(),
    rejects=[
        mutant("rows_of_the_first_log", "keys_BSK[torch.arange(len(places_BS), device=places_BS.device)[:, None], places_BS]",
               "keys_BSK[:1].expand_as(keys_BSK)[torch.arange(len(places_BS))[:, None], places_BS]",
               compared="decode_attention"),
    ],
)  # fmt: skip
def test_decode_attention_from_a_log(
    ops: Subject, slots: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """Slots that are named rows of a log give the bits of the slots themselves."""
    q, log = _draw(data, 2, 3, dtype=dtype), _draw(data, 2, slots + 4, dtype=dtype)
    places = torch.rand(2, slots + 4, generator=ss.generator(seed)).argsort(dim=1)[:, :slots]
    keys, bias = log[torch.arange(2)[:, None], places], torch.zeros(2, slots)
    exact(
        ops.decode_attention(q, log, bias, places_BS=places, **OPTIONS),
        ops.decode_attention(q, keys, bias, **OPTIONS),
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def bias(value: float, *shape: int) -> Callable[[], Tensor]:
    """Return a maker of biases that are 0 but for the last."""
    return lambda: torch.zeros(shape).index_fill_(-1, torch.tensor([shape[-1] - 1]), value)


BF16, F64 = torch.bfloat16, torch.float64
Q, KEYS, BIAS = ones(2, 3, 5), ones(2, 4, 5), ones(2, 4)
AT = {"value_width": 3, "scale": 0.5}


# fmt: off
test_refusals_of_attention = refusals(
    "attention",
    refused("decode_attention", "float16", TypeError, "q_BHK", ones(2, 3, 5, dtype=F16), KEYS, BIAS, **AT),
    refused("decode_attention", "two dimensions", ValueError, "q_BHK", ones(3, 5), KEYS, BIAS, **AT),
    refused("decode_attention", "no columns", ValueError, "q_BHK", ones(2, 3, 0), ones(2, 4, 0), BIAS, **AT),
    refused("decode_attention", "two dtypes", TypeError, "keys_BSK", Q, ones(2, 4, 5, dtype=BF16), BIAS, **AT),
    refused("decode_attention", "another width", ValueError, "keys_BSK", Q, ones(2, 4, 6), BIAS, **AT),
    refused("decode_attention", "another batch", ValueError, "keys_BSK", Q, ones(1, 4, 5), BIAS, **AT),
    refused("decode_attention", "keys in a list", TypeError, "keys_BSK", Q, lambda: [1.0], BIAS, **AT),
    refused("decode_attention", "keys of one head", ValueError, "keys_BSK", Q, ones(2, 1, 4, 5), BIAS, **AT),
    refused("decode_attention", "a bias a head", ValueError, "bias_BS", Q, KEYS, ones(2, 3, 4), **AT),
    refused("decode_attention", "bfloat16 bias", TypeError, "bias_BS", Q, KEYS, ones(2, 4, dtype=BF16), **AT),
    refused("decode_attention", "float64 bias", TypeError, "bias_BS", Q, KEYS, ones(2, 4, dtype=F64), **AT),
    refused("decode_attention", "NaN in the bias", ValueError, "bias_BS", Q, KEYS, bias(float("nan"), 2, 4), **AT),
    refused("decode_attention", "+inf in the bias", ValueError, "bias_BS", Q, KEYS, bias(float("inf"), 2, 4), **AT),
    refused("decode_attention", "int32 places", TypeError,
            "places_BS", Q, KEYS, BIAS, places_BS=ones(2, 4, dtype=torch.int32), **AT),
    refused("decode_attention", "places of one sequence", ValueError,
            "places_BS", Q, KEYS, BIAS, places_BS=ids(0, 1, 2, 3), **AT),
    refused("decode_attention", "row N of a log", ValueError,
            "places_BS", Q, KEYS, BIAS, places_BS=lambda: torch.full((2, 4), 4), **AT),
    refused("decode_attention", "a bias of all rows of a log", ValueError,
            "bias_BS", Q, KEYS, BIAS, places_BS=lambda: torch.zeros(2, 3, dtype=torch.int64), **AT),
    refused("decode_attention", "places elsewhere", ValueError,
            "places_BS", Q, KEYS, BIAS, places_BS=meta(2, 4, dtype=torch.int64), **AT),
    refused("decode_attention", "another device", ValueError, "keys_BSK", Q, meta(2, 4, 5), BIAS, **AT),
    refused("decode_attention", "no values", ValueError, "value_width", Q, KEYS, BIAS, value_width=0, scale=0.5),
    refused("decode_attention", "6 of 5 columns", ValueError, "value_width", Q, KEYS, BIAS, value_width=6, scale=0.5),
    refused("decode_attention", "width 2.0", TypeError, "value_width", Q, KEYS, BIAS, value_width=2.0, scale=0.5),
    refused("decode_attention", "scale 0", ValueError, "scale", Q, KEYS, BIAS, value_width=3, scale=0.0),
    refused("decode_attention", "scale NaN", ValueError, "scale", Q, KEYS, BIAS, value_width=3, scale=float("nan")),
    refused("decode_attention", "a scale in words", TypeError, "scale", Q, KEYS, BIAS, value_width=3, scale="1"),
    rejects=[
        mutant("slot_bias_unchecked", "checks.slot_bias(bias_BS)", "pass"),
    ],
)
# fmt: on
