"""MemGram reads what a hand computes, looks at no later byte, and raises only rows that were read, on both op sets.

Legend: B batch, P positions, D width, M memory width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.memory import MemGram, MemoryTable
from arbitor.reference.graph.tables import when_voting
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.subject import Subject

ROWS = 37
ORDERS = (2, 3, 4, 8)


def context(
    ops: Any = reference_ops, device: Any = "cpu", dtype: torch.dtype = torch.float32, **fields: Any
) -> GraphContext:
    sizes = {"num_codes": 9, "memory_rows": ROWS, "memory_dim": 10}
    config = replace(models.NANO, **{**sizes, **fields})
    return GraphContext(ops, config, device=device, dtype=dtype, seed=7)


def table(parts: GraphContext | None = None) -> MemoryTable:
    return MemoryTable(parts or context(), (2, 3), (8, 2))


def random_codes(*shape: int, seed: int = 0, high: int = 9) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def random_floats(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def steps(*tables: MemoryTable) -> None:
    """Do what a model's step does."""
    for each in tables:
        each.step_weight()
    for each in tables:
        each.step_tables()


def train(each: MemoryTable, codes: Tensor, *, step: int, rate: float = 1.0) -> Tensor:
    """Run one accepted backward pass, with a gradient of small integers, and return the rows."""
    codes = codes.to(each.device)
    with each.voting.taking(rate=rate, step=step):
        rows = each.rows(codes, None)
        values = when_voting(each.rows_or_zeros(rows), each, rows)
        scale = torch.arange(values.numel(), device=each.device).reshape(values.shape) % 7 - 3
        (values * scale).sum().backward()
    return rows


def test_it_adds_what_the_formula_says() -> None:
    parts = context(dtype=torch.float64)
    module = MemGram(parts)
    for number, each in enumerate((module.structure, module.conversation)):
        rng = torch.Generator().manual_seed(number)
        each.strengths.copy_(torch.randint(0, 128, (ROWS,), generator=rng))
    e, codes = random_floats(2, 11, 24), random_codes(2, 11)
    norm = lambda x: x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    want = torch.zeros(2, 11, 24, dtype=torch.float64)
    for b in range(2):
        for p in range(11):
            m = torch.zeros(10, dtype=torch.float64)
            for order in (order for order in ORDERS if p + 1 >= order):
                each = module.structure if order < 4 else module.conversation
                ngram = codes[b, p + 1 - order : p + 1]
                row = int(
                    reference_ops.ngram_rows(ngram[None], order=order, num_rows=ROWS, salt=order)[0, -1]
                )
                m += (
                    (1 + int(each.strengths[row]))
                    / 128
                    * norm(dequantize(each.weight, dtype=torch.float64)[row])
                )
            gate = torch.sigmoid(dequantize(module.gate.weight, dtype=torch.float64)[0] @ norm(e[b, p]))
            want[b, p] = e[b, p] + gate * (dequantize(module.output.weight, dtype=torch.float64) @ m)
    alike(module(e, codes), want)


def test_it_is_causal_and_each_sequence_is_on_its_own() -> None:
    module = MemGram(context(dtype=torch.float64))
    module.structure.strengths.fill_(64)
    e, codes = random_floats(3, 12, 24), random_codes(3, 12)
    whole = module(e, codes)
    changed = codes.clone()
    changed[1, 7] += 1
    other = module(e, changed)
    same = (other == whole).all(dim=-1)
    assert same[[0, 2]].all() and same[1, :7].all() and not same[1, 7:].any()
    alike(module(e[1:2], codes[1:2]), whole[1:2])


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_it_goes_on_from_the_codes_before(cut: int) -> None:
    module = MemGram(context(dtype=torch.float64))
    module.conversation.strengths.fill_(100)
    assert module.codes_before == 7
    e, codes = random_floats(2, 12, 24), random_codes(2, 12)
    before = torch.cat([torch.full((2, 7), -1), codes[:, :cut]], dim=1)[:, -7:]
    parts = (module(e[:, :cut], codes[:, :cut]), module(e[:, cut:], codes[:, cut:], before))
    alike(torch.cat(parts, dim=1), module(e, codes))


def test_positions_without_an_ngram_read_nothing_and_touch_nothing() -> None:
    module = MemGram(context(theta=1, on_flip="carry"))
    for each in (module.structure, module.conversation):
        # A step would move every row that it looks at.
        each.weight.trit_accum.fill_(100)
        each.strengths.fill_(50)
    before = [each.weight.clone() for each in (module.structure, module.conversation)]
    e = random_floats(2, 1, 24, dtype=torch.float32).requires_grad_()
    with module.structure.voting.taking(rate=1.0, step=0):
        out = module(e, random_codes(2, 1))
        exact(out.detach(), e.detach())
        out.square().sum().backward()
    steps(module.structure, module.conversation)
    exact((module.structure.weight, module.conversation.weight), tuple(before))
    # There are two positions, so two strengths decay and none rises.
    for each in (module.structure, module.conversation):
        assert each.strengths.le(50).all() and each.strengths.lt(50).sum() == 2


def test_a_new_row_weighs_little_and_votes_in_full() -> None:
    """At strength 0 a row is read with 1/128. Its votes are as large as others, since votes do not depend on a row's scale."""
    added, votes = [], []
    for strength in (0, 127):
        module = MemGram(context(dtype=torch.float64))
        for each in (module.structure, module.conversation):
            each.strengths.fill_(strength)
        e, codes = random_floats(2, 12, 24), random_codes(2, 12)
        with module.structure.voting.taking(rate=4.0, step=0):
            out = module(e, codes)
            (out * e.flip(0)).sum().backward()
        added.append(out.detach() - e)
        votes.append(module.structure.weight.trit_accum)
    alike(added[1], 128 * added[0])
    exact(votes[1], votes[0])
    assert votes[0].any()


def test_only_named_rows_change() -> None:
    each = table(context(theta=1, theta_e=1))
    before = each.weight.clone()
    rows = train(each, random_codes(1, 5), step=0, rate=8.0)
    assert rows.min() == -1
    steps(each)
    touched = torch.zeros(ROWS, dtype=torch.bool)
    touched[rows[rows >= 0]] = True
    assert 0 < touched.sum() < ROWS
    for name, tensor in each.weight.tensors().items():
        if name != "packed":
            exact(tensor[~touched], before.tensors()[name][~touched], f"{name} of unnamed rows")
    exact(trits_of(each.weight)[~touched], trits_of(before)[~touched])
    assert (trits_of(each.weight) != trits_of(before))[touched].any()


def test_the_gradient_of_a_row_named_twice_is_summed() -> None:
    """And that of a slot without a row, here NaN, reaches none."""
    voted: list[tuple[Tensor, Tensor]] = []

    def record(weight: Any, grad: Tensor, rate: float, *, rows: Tensor, **_: Any) -> Any:
        voted.append((rows, grad))
        return weight

    each = table(context(models.ops_with(accumulate_gradient=record)))
    ids, scale = torch.tensor([3, -1, 5, 3]), torch.tensor([1.0, math.nan, 2.0, -4.0])
    with each.voting.taking(rate=1.0, step=0):
        (each.rows_or_zeros(ids) * scale[:, None]).sum().backward()
    ((rows, grad),) = voted
    used = rows >= 0
    assert rows[used].tolist() == [3, 5] and rows.shape == (4,)
    exact(grad[used], torch.tensor([-3.0, 2.0])[:, None].expand(2, 10))


def test_strengths_count_accepted_passes_after_a_step() -> None:
    each, codes = table(), random_codes(2, 9)
    # This pass is outside of `taking`, so it votes nothing.
    each.rows_or_zeros(each.rows(codes, None)).sum().backward()
    steps(each)
    assert each.strengths.eq(0).all()
    rows = train(each, codes, step=0)
    assert each.strengths.eq(0).all()
    train(each, codes, step=1)
    steps(each)
    want = 2 * 8 * rows[rows >= 0].bincount(minlength=ROWS)
    exact(each.strengths, want.clamp(max=127).to(torch.int8))
    kept = each.strengths.clone()
    steps(each)
    exact(each.strengths, kept)
    train(each, codes, step=2)
    each.load(each.weight.clone())
    steps(each)
    exact(each.strengths, kept)


def test_windows_of_consecutive_steps_cover_the_table() -> None:
    starts: list[tuple[int, int]] = []

    def record(strengths: Tensor, rows: Tensor, *, first: int, window: int, **_: Any) -> Tensor:
        starts.append((first, window))
        return strengths

    each = table(context(models.ops_with(touch_strengths=record)))
    for step in range(9):
        train(each, random_codes(1, 4), step=step)
        if step % 3 == 2:
            steps(each)
    assert [window for _, window in starts] == [12, 12, 12]
    assert all(one + 12 == other for (one, _), (other, _) in pairwise(starts))


def test_frequent_rows_grow_strong_and_forgotten_ones_fade() -> None:
    each = table()
    for step in range(60):
        train(each, torch.tensor([[1, 2] * 8]), step=step)
        steps(each)
    strong = each.strengths.clone()
    assert strong.max() > 90
    for step in range(60, 200):
        train(each, torch.tensor([[3, 4] * 8]), step=step)
        steps(each)
    forgotten = (strong > 90) & ~torch.isin(torch.arange(ROWS), each.rows(torch.tensor([[3, 4] * 8]), None))
    assert forgotten.any() and each.strengths[forgotten].eq(0).all()


def test_every_weight_of_it_votes() -> None:
    parts = context()
    module = MemGram(parts)
    with parts.voting.taking(rate=1.0, step=0):
        module(random_floats(2, 12, 24, dtype=torch.float32), random_codes(2, 12)).square().sum().backward()
    for layer in (module.structure, module.conversation, module.output, module.gate):
        parts.voting.deliver()
        assert layer.voted and layer.weight.trit_accum.any()


def test_a_model_reads_its_memory_by_the_codes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is part of the stream, and with a ledger an n-gram may begin in an earlier pass."""
    model, asked = models.whole(), []
    assert model.memory is not None

    def forward(h_BPD: Tensor, codes_BP: Tensor, previous: Tensor | None = None) -> Tensor:
        asked.append((codes_BP, previous))
        return torch.zeros_like(h_BPD)

    ids_BT, ledger = models.random_ids(1, 12), model.new_ledger()
    with torch.no_grad():
        read = model(ids_BT)
        monkeypatch.setattr(model.memory, "forward", forward)
        assert not torch.equal(model(ids_BT), read)
        for piece in (ids_BT[:, :7], ids_BT[:, 7:]):
            ledger.retract()
            model(piece, ledger=ledger)
    (whole, none), (first, before), (second, between) = asked
    assert none is None
    exact(torch.cat([first, second], dim=1), whole)
    count = model.memory.codes_before
    exact(before, torch.full((1, count), -1))
    exact(between, torch.cat([before, first], dim=1)[:, -count:])


def test_large_tables_need_no_memory_on_meta() -> None:
    module = MemGram(context(device="meta", memory_rows=10_000_000, memory_dim=64))
    assert module.structure.strengths.shape == (10_000_000,)
    assert not list(module.parameters()) and {b.dtype for b in module.buffers()} == {torch.uint8, torch.int8}


def both(subject: Subject, **fields: Any) -> tuple[GraphContext, GraphContext]:
    """Return the reference's context and the subject's."""
    return context(**fields), context(models.drawn_by_the_reference(subject.ops), subject.device, **fields)


def test_a_memory_table_trains_alike(subject: Subject) -> None:
    """Rows, votes, steps, strengths, on gradients whose sums are exact."""
    results = []
    for parts in both(subject, theta=3, theta_e=3):
        each = table(parts)
        rows = [train(each, random_codes(2, 9, seed=step, high=4), step=step).cpu() for step in range(2)]
        steps(each)
        rows.append(train(each, random_codes(2, 9, high=4), step=2).cpu())
        steps(each)
        results.append((*rows, each.strengths.cpu(), parts.ops.to_spec(each.weight).to("cpu")))
    exact(results[1], results[0])
    assert len(results[0][3].unique()) > 2


def test_the_stream_is_alike(subject: Subject) -> None:
    outputs = []
    for parts in both(subject):
        module = MemGram(parts)
        module.structure.strengths.fill_(77)
        e = random_floats(2, 9, 24, dtype=torch.float32).to(parts.device)
        outputs.append(module(e, random_codes(2, 9).to(parts.device)).detach().cpu())
    alike(outputs[1], outputs[0])
