"""Attention over a long past is what the spec's formula says, with a ledger, without one, and absorbed.

Legend: B batch, P positions, D width, H heads, C head width, R rotary width, L latent width.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import GraphContext, LatentAttention
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.scheduler import ContextAttentionScheduler
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.graph.test_scheduler import by_hand, log_order
from conformance.graph.twin import norm, turned
from conformance.subject import Subject

SMALL = {"window": 6, "block": 2, "num_summaries": 1}


def layer(
    ops: ModuleType = reference_ops,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> tuple[LatentAttention, GraphContext]:
    config = models.nano(num_layers=1, **{**SMALL, **fields}).config
    context = GraphContext(ops, config, device=device, dtype=dtype, seed=11)
    return LatentAttention(context), context


def inputs(batch: int, positions: int, width: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(batch, positions, width, generator=torch.Generator().manual_seed(seed)).to(
        torch.float64
    )


def read(attention: LatentAttention, ledger: KVLedger, x_BPD: Tensor) -> Tensor:
    """Return the attention of some more positions, whatever their bytes are."""
    count = x_BPD.shape[1] + (0 if len(ledger) else 2)
    ledger.begin(torch.zeros(ledger.batch, count, dtype=torch.int64, device=ledger.device))
    y_BPD = attention(x_BPD, ledger.layer(0))
    ledger.end(torch.zeros(ledger.batch, dtype=torch.int64, device=ledger.device))
    ledger.retract()
    return y_BPD


def by_formula(matrices: dict[str, Tensor], config: Any, x_PD: Tensor) -> Tensor:
    """Return the attention of one sequence, position by position and head by head, on dense matrices."""
    head, rotary, latent_width = config.head_dim, config.rotary_dim, config.kv_latent
    shape = (config.window, config.block, config.num_summaries)
    queries = norm(x_PD @ matrices["query_down"].T, matrices["query_norm"]) @ matrices["query_up"].T
    both = x_PD @ matrices["latent_down"].T
    latents, shared = norm(both[:, :latent_width], matrices["latent_norm"]), both[:, latent_width:]
    outputs = []
    for position in range(len(x_PD)):
        rows = [slice(start, start + size) for size, start in by_hand(position, *shape)]
        middles = [start + size // 2 for size, start in by_hand(position, *shape)]
        sizes = torch.tensor([float(size) for size, _ in by_hand(position, *shape)], dtype=x_PD.dtype)
        mean_latents = torch.stack([latents[row].mean(dim=0) for row in rows])
        mean_keys = torch.stack(
            [turned_to(shared[row].mean(dim=0), to) for row, to in zip(rows, middles, strict=True)]
        )
        heads = []
        for place in range(config.num_heads):
            q = queries[position, place * head : (place + 1) * head]
            w_key = matrices["key_up"][place * (head - rotary) : (place + 1) * (head - rotary)]
            w_value = matrices["value_up"][place * head : (place + 1) * head]
            scores = mean_keys @ turned_to(q[:rotary], position) + mean_latents @ w_key.T @ q[rotary:]
            shares = (scores / head**0.5 + sizes.log()).softmax(dim=0)
            heads.append(shares @ mean_latents @ w_value.T)
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ matrices["output"].T


def turned_to(x_R: Tensor, position: int) -> Tensor:
    """Return a vector turned to a position."""
    return turned(x_R.expand(position + 1, -1))[position]


def dense(attention: LatentAttention) -> dict[str, Tensor]:
    weights: dict[str, TernaryWeight] = {name: each.weight for name, each in attention.named_children()}
    return {name: dequantize(weight, dtype=torch.float64) for name, weight in weights.items()}


@pytest.mark.parametrize("positions", [1, 6, 7, 60])
def test_attention_by_the_formula(positions: int) -> None:
    """Output and gradient are those of causal attention up to a window. Beyond it they are those of attention to blocks too."""
    attention, context = layer()
    x_BPD = inputs(2, positions).requires_grad_()
    grad = inputs(2, positions, seed=1)
    got = attention(x_BPD)
    (got_grad,) = torch.autograd.grad(got, x_BPD, grad)
    want = torch.stack([by_formula(dense(attention), context.config, x) for x in x_BPD])
    (want_grad,) = torch.autograd.grad(want, x_BPD, grad)
    alike(got, want, "attention")
    alike(got_grad, want_grad, "its gradient")


def test_a_window_that_holds_all_is_causal_attention() -> None:
    """A window just long enough gives the numbers of a far longer one. In one shorter by one the oldest are summaries."""
    x_BPD = inputs(1, 16).to(torch.float32)
    results = [layer(dtype=torch.float32, window=window)[0](x_BPD) for window in (16, 512, 14)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0][:, -1], results[2][:, -1])


def test_blocks_of_one_position_are_no_blocks() -> None:
    """A summary of a single position is the position, so that enough of them lose nothing."""
    x_BPD = inputs(1, 30)
    alike(layer(window=3, block=1, num_summaries=40)[0](x_BPD), layer(window=512)[0](x_BPD))


@pytest.mark.parametrize(
    "pieces", [[75], [1] * 75, [4, 1, 1, 30, 1, 38], [40, 5, 30]], ids=["one", "steps", "mixed", "pieces"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_ledger_changes_nothing(pieces: list[int], dtype: torch.dtype) -> None:
    """Text read in any pieces, single positions absorbed, gives what reading it at once gives."""
    attention, context = layer(dtype=dtype)
    x_BPD = inputs(2, 75).to(dtype)
    ledger = KVLedger(context.config, 2, dtype=dtype)
    ends = torch.tensor([0, *pieces]).cumsum(0).tolist()
    with torch.no_grad():
        got = torch.cat([read(attention, ledger, x_BPD[:, a:b]) for a, b in pairwise(ends)], dim=1)
        alike(got, attention(x_BPD))


def test_sequences_of_different_lengths_do_not_see_each_other() -> None:
    attention, context = layer()
    lengths = (3, 31, 64)
    with torch.no_grad():
        ledgers = [KVLedger(context.config, dtype=torch.float64) for _ in lengths]
        for ledger, length in zip(ledgers, lengths, strict=True):
            read(attention, ledger, inputs(1, length, seed=length))
        stacked = KVLedger.stack(ledgers)
        for step in range(20):
            x_BPD = inputs(3, 1 if step % 3 else 9, seed=step)
            alone = [read(attention, ledger, x_BPD[b : b + 1]) for b, ledger in enumerate(ledgers)]
            alike(read(attention, stacked, x_BPD), torch.cat(alone))


def test_every_row_that_is_seen_counts_and_no_other() -> None:
    """A change to a row of the ledger changes the output of the positions that see it, exactly."""
    attention, context = layer()
    with torch.no_grad():
        ledger = KVLedger(context.config, dtype=torch.float64)
        read(attention, ledger, inputs(1, 40))
        x_BPD = inputs(1, 1, seed=3)
        plain = read(attention, ledger.copy(), x_BPD)
        seen = set(by_hand(40, 6, 2, 1))
        for place, row in enumerate(log_order(2, 40)):
            changed = ledger.copy()
            changed.layer(0).log.rows[:, place] += 1.0
            assert torch.equal(read(attention, changed, x_BPD), plain) == (row not in seen), f"row {row}"


def test_a_gradient_reaches_the_positions_of_the_pass() -> None:
    """With a ledger the past is a constant. The gradient is that of the same attention with the past detached."""
    attention, context = layer(window=64, block=2)
    past, x_BPD, grad = inputs(1, 20), inputs(1, 5, seed=1).requires_grad_(), inputs(1, 5, seed=2)
    ledger = KVLedger(context.config, dtype=torch.float64)
    with torch.no_grad():
        read(attention, ledger, past)
    (got,) = torch.autograd.grad(read(attention, ledger, x_BPD), x_BPD, grad)
    (want,) = torch.autograd.grad(attention(torch.cat([past, x_BPD], dim=1))[:, 20:], x_BPD, grad)
    alike(got, want)


def test_weights_vote_once_however_long_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, context = layer(dtype=torch.float32)
    voted: list[int] = []
    monkeypatch.setattr(context.voting, "cast", lambda voter, _: voted.append(voter.tensor_id))
    with context.voting.taking(rate=1.0, step=0):
        attention(inputs(2, 50).to(torch.float32)).sum().backward()
    trained = [each.tensor_id for name, each in attention.named_children() if not name.endswith("norm")]
    assert sorted(voted) == trained


def test_a_position_is_seen_at_bounded_cost() -> None:
    """The rows that one more position reads are as many after 100,000 positions as after 100."""
    scheduler = ContextAttentionScheduler(layer(window=512, block=64, num_summaries=16)[1].config)
    sizes = {scheduler.seen(torch.tensor([first]), 1).places_BS.shape for first in (100, 100_000)}
    assert sizes == {(1, 512 + 64 - 1 + 8 * 19)}


def test_absorbed_attention_on_the_op_set_under_test(subject: Subject) -> None:
    """Positions one by one, on the kernels under test, give what the reference gets in float64 all at once."""
    attention, _ = layer()
    x_BPD = inputs(2, 12)
    tested, context = layer(
        models.drawn_by_the_reference(subject.ops), subject.device, torch.float32, window=4, block=2
    )
    small, _ = layer(window=4, block=2)
    ledger = KVLedger(context.config, 2, device=subject.device)
    with torch.no_grad():
        x_device = x_BPD.to(subject.device, torch.float32)
        got = [read(tested, ledger, x_device[:, :9])]
        got += [read(tested, ledger, x_device[:, place : place + 1]) for place in range(9, 12)]
        alike(torch.cat(got, dim=1).cpu(), small(x_BPD))
    exact(subject.ops.to_spec(tested.key_up.weight).to("cpu"), attention.key_up.weight)
