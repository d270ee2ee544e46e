"""Laws of attention to a cache of latents: torch's own attention, what is hidden stays hidden, n equal slots count as n.

Legend: B batch, H heads, S slots, K columns of a slot, L value width.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.op_table import OP_TABLE
from conformance import strategies as ss
from conformance.cases.attention import COUNTS, SLOTS, biases, magnitude_of_decode_attention
from conformance.cases.case import Case
from conformance.compare import exact, no_worse, unsigned_zeros
from conformance.law import law
from conformance.subject import Subject

LATENT, ROTARY = 33, 6
OPTIONS = {"value_width": LATENT, "scale": 0.25}
SOME_SLOTS = SLOTS.filter(bool)


def _draw(data: st.DataObject, *shape: int, dtype: torch.dtype) -> Tensor:
    return data.draw(ss.activations((*shape, LATENT + ROTARY), dtype, exact=False, kinds=("normal",)))


def _by_torch(q: Tensor, keys: Tensor, bias: Tensor, to: torch.dtype) -> Tensor:
    """Return the same by torch's attention: one key head, its values the first columns of the keys, expanded."""
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


@law(batch=st.integers(1, 3), heads=COUNTS, slots=SOME_SLOTS, dtype=ss.DTYPES, data=st.data())
def test_decode_attention_by_torch(
    ops: Subject, batch: int, heads: int, slots: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    q, keys = _draw(data, batch, heads, dtype=dtype), _draw(data, batch, slots, dtype=dtype)
    bias = data.draw(biases(batch, slots))
    bias[:, -1] = 0.0
    _no_worse_than_torch(ops.decode_attention(q, keys, bias, **OPTIONS), q, keys, bias)


@law(heads=COUNTS, slots=SOME_SLOTS, dtype=ss.DTYPES, data=st.data())
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
    exact(unsigned_zeros(ops.decode_attention(q, keys, bias, **OPTIONS)), unsigned_zeros(want))


@law(heads=COUNTS, slots=SOME_SLOTS, dtype=ss.DTYPES, data=st.data())
def test_decode_attention_of_one_visible_slot(
    ops: Subject, heads: int, slots: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Its value comes out exactly, whatever its score; a sequence that sees nothing gets zeros."""
    q, keys = _draw(data, 2, heads, dtype=dtype), _draw(data, 2, slots, dtype=dtype)
    bias = torch.full((2, slots), -torch.inf)
    place = data.draw(st.integers(0, slots - 1), label="visible")
    bias[0, place] = data.draw(st.sampled_from((0.0, math.log(64), -1e30)), label="bias")
    got = ops.decode_attention(q, keys, bias, **OPTIONS)
    exact(unsigned_zeros(got[0]), unsigned_zeros(keys[0, place, :LATENT].expand(heads, -1)))
    exact(unsigned_zeros(got[1]), torch.zeros(heads, LATENT, dtype=dtype))


@law(
    heads=COUNTS,
    slots=st.sampled_from((1, 5, 20)),
    count=st.sampled_from((2, 4, 7)),
    dtype=ss.DTYPES,
    data=st.data(),
)
def test_decode_attention_counts_a_summary_as_many(
    ops: Subject, heads: int, slots: int, count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """A slot with a bias of ln n gives what n slots with its key give: half of the slots stand for n."""
    q, keys = _draw(data, 2, heads, dtype=dtype), _draw(data, 2, slots, dtype=dtype)
    many = slots // 2 + 1
    repeated = torch.cat([keys[:, :many].repeat(1, count, 1), keys[:, many:]], dim=1)
    bias = torch.zeros(2, slots)
    bias[:, :many] = math.log(count)
    got = ops.decode_attention(q, keys, bias, **OPTIONS)
    _no_worse_than_torch(got, q, repeated, torch.zeros(2, repeated.shape[1]))


@law(dtype=ss.DTYPES, batch=st.integers(0, 2), heads=st.integers(0, 2))
def test_decode_attention_of_no_slots(ops: Subject, dtype: torch.dtype, batch: int, heads: int) -> None:
    """Nothing to see, nobody to see it: zeros of the right shape."""
    q, keys = torch.ones(batch, heads, 5, dtype=dtype), torch.ones(batch, 0, 5, dtype=dtype)
    got = ops.decode_attention(q, keys, torch.ones(batch, 0), value_width=3, scale=1.0)
    exact(unsigned_zeros(got), torch.zeros(batch, heads, 3, dtype=dtype))
