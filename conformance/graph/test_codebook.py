"""Codebooks of the graph pass gradients, vote, count, revive and share one id space, on both op sets.

Legend: B batch, P positions, D width, C code width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.codebook import MultimodalVQBridge, SharedVQ, TernaryVQCodebook
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.subject import Subject

CODES = {"num_codes": 9, "code_dim": 10}

# As small as the numbers that codes are of.
integers = partial(models.integers, high=3)


def context(
    ops: Any = reference_ops, device: Any = "cpu", dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    config = replace(models.NANO, **{**CODES, **fields})
    return GraphContext(ops, config, device=device, dtype=dtype, seed=7)


def steps(codebook: TernaryVQCodebook) -> None:
    """Do what a model's step does."""
    codebook.step_weight()
    codebook.step_tables()


def train(codebook: TernaryVQCodebook, z: Tensor, *, step: int, rate: float = 1.0) -> Tensor:
    """Run one accepted backward pass and return its codes."""
    z = z.to(codebook.device).requires_grad_()
    with codebook.voting.taking(rate=rate, step=step):
        ids, c, losses = codebook.quantize(z)
        (c.sum() + 64 * losses["codebook"]).backward()
    return ids


def test_gradients_go_straight_through_and_to_both_sides_of_the_losses() -> None:
    parts = context(dtype=torch.float64)
    codebook = TernaryVQCodebook(parts, 9, 10)
    z = torch.randn(
        4, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    ids, through, losses = codebook.quantize(z)
    c = dequantize(codebook.weight, dtype=torch.float64)[ids]
    exact(ids, reference_ops.nearest_codes(z.detach(), codebook.weight))
    exact(through.detach(), c)
    scale = torch.arange(200.0, dtype=torch.float64).reshape(4, 5, 10)
    (grad,) = torch.autograd.grad((through * scale).sum(), z, retain_graph=True)
    exact(grad, scale)
    (grad,) = torch.autograd.grad(losses["commitment"], z, retain_graph=True)
    alike(grad, 2 * (z.detach() - c) / 200)
    alike(losses["commitment"], (z.detach() - c).square().mean())
    alike(losses["codebook"], losses["commitment"])
    assert (
        torch.autograd.grad(losses["codebook"], z, allow_unused=True, materialize_grads=True)[0].eq(0).all()
    )


def test_codes_are_pulled_to_their_vectors() -> None:
    """The gradient that a code votes with is that of the codebook loss alone, summed over its vectors."""
    voted: list[tuple[Tensor, Tensor]] = []

    def record(weight: Any, grad: Tensor, rate: float, *, rows: Tensor, **_: Any) -> Any:
        voted.append((rows, grad))
        return weight

    codebook = TernaryVQCodebook(context(models.ops_with(accumulate_gradient=record)), 9, 10)
    z = integers(6, 10)
    ids = train(codebook, z, step=0)
    ((rows, grad),) = voted
    dense = dequantize(codebook.weight)
    assert rows[rows >= 0].tolist() == sorted(set(ids.tolist()))
    for slot, row in enumerate(rows[rows >= 0].tolist()):
        alike(grad[slot], 64 * 2 * (dense[row] - z[ids == row]).sum(dim=0) / 60)


def test_only_used_rows_change() -> None:
    codebook = TernaryVQCodebook(context(theta=1, theta_e=1), 9, 10)
    before = codebook.weight.clone()
    ids = train(codebook, integers(3, 10), step=0, rate=8.0)
    steps(codebook)
    changed = (dequantize(codebook.weight) != dequantize(before)).any(dim=1).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(ids.tolist()) != set(range(9))


def test_uses_count_after_an_accepted_pass_and_a_step() -> None:
    codebook = TernaryVQCodebook(context(), 9, 10)
    z = integers(3, 10).requires_grad_()
    ids, c, _ = codebook.quantize(z)
    # This pass is outside of `taking`, so it votes nothing.
    c.sum().backward()
    steps(codebook)
    assert codebook.usage.eq(1).all()
    train(codebook, z.detach(), step=0)
    train(codebook, z.detach(), step=1)
    assert codebook.usage.eq(1).all()
    steps(codebook)
    want = 1 + 2 * ids.bincount(minlength=9)
    # The 6 positions of 2 passes look at 6 codes of 9.
    first = 1 * 6 // 2
    window = (first + torch.arange(6)) % 9
    want[window] = want[window] >> 1
    exact(codebook.usage, want.to(torch.int16))
    steps(codebook)
    exact(codebook.usage, want.to(torch.int16))


def test_forgotten_passes_do_not_count() -> None:
    codebook = TernaryVQCodebook(context(), 9, 10)
    train(codebook, integers(200, 10), step=0)
    codebook.load(codebook.weight.clone())
    steps(codebook)
    assert codebook.usage.eq(1).all()


def test_dead_codes_come_back_as_vectors_of_the_batch() -> None:
    """Codes that no vector finds die in two visits and are made anew at the third. Then each code has vectors of its own."""
    codebook = TernaryVQCodebook(context(num_codes=40), 40, 10)
    centres = integers(40, 10, high=1)
    found = []
    for step in range(12):
        z = centres[torch.randperm(40, generator=torch.Generator().manual_seed(step))].repeat(64, 1)
        found.append(train(codebook, z, step=step).unique().numel())
        steps(codebook)
    assert found[-1] > found[0] + 5, found
    assert codebook.usage.dtype == torch.int16 and codebook.usage.ge(0).all()


def test_windows_of_consecutive_steps_cover_the_table() -> None:
    """Also where a step has several passes, each with a number of its own."""
    starts: list[tuple[int, int]] = []

    def record(usage: Tensor, vectors: Tensor, *, first: int, out: Tensor) -> Tensor:
        starts.append((first, vectors.numel()))
        return usage

    codebook = TernaryVQCodebook(context(models.ops_with(age_codes=record)), 9, 10)
    for step in range(12):
        train(codebook, integers(1, 10), step=step)
        if step % 3 == 2:
            steps(codebook)
    assert starts == [(step, 3) for step in (2, 5, 8, 11)]


def test_every_revived_code_is_found_at_once() -> None:
    """Each becomes a vector that no other code has, so that the same vectors find all of them."""
    codebook = TernaryVQCodebook(context(num_codes=40), 40, 10)
    codebook.usage.zero_()
    z = integers(40, 10, high=1, seed=5)
    used = set(train(codebook, z, step=0).tolist())
    steps(codebook)
    revived = set(range(40)) - used
    assert len(used) < 40 and revived <= set(codebook.search(z).tolist())


def test_codes_wait_until_there_are_vectors_for_them() -> None:
    """A step that has vectors of one code alone revives one code, and the others are still at 0 for the next."""
    codebook = TernaryVQCodebook(context(), 9, 10)
    codebook.usage.zero_()
    z = integers(1, 10, seed=3) + 0.25
    train(codebook, z.expand(9, 10), step=0)
    steps(codebook)
    assert codebook.usage.eq(0).sum() == 7


def test_a_revived_table_refuses_an_older_pass() -> None:
    codebook = TernaryVQCodebook(context(), 9, 10)
    _, _, losses = codebook.quantize(integers(64, 10).requires_grad_())
    train(codebook, integers(64, 10), step=0)
    steps(codebook)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        losses["codebook"].backward()


@pytest.mark.parametrize("probes", [1, 4])
def test_the_candidate_search_looks_into_the_buckets(probes: int) -> None:
    config = {"code_search": "candidates", "sign_bits": 3, "num_probes": probes, "num_codes": 40}
    codebook = TernaryVQCodebook(context(**config), 40, 10)
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    candidates = reference_ops.candidate_codes(z, num_codes=40, sign_bits=3, num_probes=probes)
    ids = codebook.search(z)
    exact(ids, reference_ops.nearest_candidates(z, codebook.weight, candidates))
    agree = (ids == reference_ops.nearest_codes(z, codebook.weight)).float().mean()
    assert 0.1 * probes < agree < 1
    # Fewer codes allow fewer buckets.
    assert TernaryVQCodebook(context(**config), 3, 10).search(z).max() < 3


MODALITIES = {"num_codes": 9, "image_features": 4, "image_codes": 6, "audio_features": 4, "audio_codes": 5}


def test_modalities_share_one_space_of_ids() -> None:
    bridge = MultimodalVQBridge(context(**MODALITIES))
    assert (bridge.num_codes, bridge.offsets) == (20, {"text": 0, "image": 9, "audio": 15})
    z, dense = integers(30, 10), [dequantize(table.weight) for table in bridge.tables.values()]
    found = {name: bridge.quantize(z, name)[0] for name in bridge.tables}
    for name, low, high in (("text", 0, 9), ("image", 9, 15), ("audio", 15, 20)):
        assert low <= found[name].min() and found[name].max() < high
    every = torch.randperm(20, generator=torch.Generator().manual_seed(1)).reshape(4, 5)
    exact(bridge.rows(every), torch.cat(dense)[every])
    with pytest.raises(ValueError, match="modality is 'video'"):
        bridge.quantize(z, "video")


@pytest.mark.parametrize("ids", [[0, 8, 3, 8], [15, 19, 9], [9], [0, 9, 15]])
def test_rows_by_global_id_vote_and_no_others(ids: list[int]) -> None:
    bridge = MultimodalVQBridge(context(**MODALITIES, theta=1, on_flip="carry"))
    # A step would move these counts.
    for table in bridge.tables.values():
        table.weight.trit_accum.fill_(100)
    before = torch.cat([trits_of(table.weight) for table in bridge.tables.values()])
    with next(iter(bridge.tables.values())).voting.taking(rate=1.0, step=0):
        bridge.rows(torch.tensor(ids)).square().sum().backward()
    for table in bridge.tables.values():
        table.step_weight()
    after = torch.cat([trits_of(table.weight) for table in bridge.tables.values()])
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == sorted(set(ids))


@pytest.mark.parametrize("residual", [False, True])
def test_shared_vq_by_dense_matrices(residual: bool) -> None:
    parts = context(dtype=torch.float64, motif_residual=residual)
    module = SharedVQ(parts)
    s = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, codes, losses = module({"text": s})
    norm = lambda x: x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    d = s @ dequantize(module.down.weight, dtype=torch.float64).T
    # Column 0 of the position three before counts in column 5 of ten.
    earlier = torch.cat([torch.zeros_like(d[:, :3]), d[:, :2]], dim=1)
    z = norm(d + torch.cat([earlier[..., 5:], earlier[..., :5]], dim=-1))
    text = module.bridge.tables["text"].weight
    exact(codes, reference_ops.nearest_codes(z, text))
    c = dequantize(text, dtype=torch.float64)[codes]
    motif = norm(c @ dequantize(module.up.weight, dtype=torch.float64).T)
    alike(u, s + motif / 4 if residual else motif)
    alike(losses["commitment"], (z - c).square().mean())
    assert set(losses) == {"commitment", "codebook"}
    exact(module.rows(codes), c)


def test_shared_vq_reads_all_modalities_at_once() -> None:
    """Each part gets what it gets alone, losses are means over the parts, and both matrices vote once."""
    noting, rates = models.ops_noting_rates()
    sizes = {"image_features": 4, "image_codes": 20, "audio_features": 4, "audio_codes": 10}
    parts = context(noting, dtype=torch.float64, **sizes)
    module = SharedVQ(parts)
    draw = torch.Generator().manual_seed(1)
    given = {
        name: torch.randn(2, length, 24, dtype=torch.float64, generator=draw)
        for name, length in (("image", 3), ("audio", 2), ("text", 5))
    }
    with parts.voting.taking(rate=1.5, step=0):
        u, codes, losses = module(given)
        (u.square().sum() + sum(losses.values())).backward()
    alone = [module({name: s}) for name, s in given.items()]
    alike(u, torch.cat([each for each, _, _ in alone], dim=1))
    exact(codes, torch.cat([each for _, each, _ in alone], dim=1))
    for name, value in losses.items():
        alike(value, torch.stack([of_part[name] for _, _, of_part in alone]).mean())
    assert rates[module.down.tensor_id] == rates[module.up.tensor_id] == [1.5]
    assert all(len(rates[table.tensor_id]) == 1 for table in module.bridge.codebooks.values())


@pytest.mark.parametrize(
    "media", [{}, {"image_BNF": (2, 4, 10), "audio_BNF": (2, 3, 7)}], ids=["text", "media"]
)
def test_codes_of_a_ledger_are_those_of_one_pass(media: dict[str, tuple[int, ...]]) -> None:
    """Text is read in pieces, the first of them a single position, so that its next ones reach behind it to nothing."""
    model = models.whole(dtype=torch.float64)
    draw = torch.Generator().manual_seed(4)
    features = {name: torch.randn(shape, generator=draw).double() for name, shape in media.items()}
    ids_BT = models.random_ids(2, 30, seed=9)
    with torch.no_grad():
        trunk = model.trunk(ids_BT, **features)
        ledger = model.new_ledger(2)
        for start, end in (
            (0, 3),
            (3, 4),
            (4, 6),
            (6, 7),
            (7, 8),
            (8, 20),
            *((n, n + 1) for n in range(20, 30)),
        ):
            ledger.retract()
            model(ids_BT[:, start:end], ledger=ledger, **(features if start == 0 else {}))
    exact(torch.stack([ledger.codes(0), ledger.codes(1)]), trunk.codes)
    assert len(trunk.codes.unique()) > 10


def test_every_weight_behind_a_code_votes() -> None:
    parts = context()
    module = SharedVQ(parts)
    with parts.voting.taking(rate=1.0, step=0):
        u, _, losses = module({"text": integers(2, 9, 24)})
        (u.square().sum() + sum(losses.values())).backward()
    for layer in (module.down, module.up, module.bridge.tables["text"]):
        parts.voting.deliver()
        assert layer.voted and layer.weight.trit_accum.any()


def test_a_table_of_millions_needs_no_memory_on_meta() -> None:
    parts = context(device="meta", num_codes=10_000_000, code_dim=64)
    table = SharedVQ(parts).bridge.tables["text"]
    assert table.weight.shape == (10_000_000, 64) and table.usage.shape == (10_000_000,)
    assert not list(table.parameters()) and {b.dtype for b in table.buffers()} == {
        torch.uint8,
        torch.int8,
        torch.int16,
    }


def both(subject: Subject, **fields: Any) -> Iterator[GraphContext]:
    """Yield the reference's context and the subject's."""
    yield context(**fields)
    yield context(models.drawn_by_the_reference(subject.ops), subject.device, **fields)


@pytest.mark.parametrize("search", ["exact", "candidates"])
def test_a_codebook_trains_alike(subject: Subject, search: str) -> None:
    """Codes, votes, steps, counts and revivals, on vectors whose sums are exact."""
    results = []
    buckets = {"sign_bits": 2, "num_probes": 2} if search == "candidates" else {}
    for parts in both(subject, code_search=search, **buckets, theta=3, theta_e=3):
        codebook = TernaryVQCodebook(parts, 33, 10)
        codebook.usage.zero_()
        ids = []
        for step in range(3):
            ids.append(train(codebook, integers(12, 10, seed=step), step=step).cpu())
            steps(codebook)
        results.append((*ids, codebook.usage.cpu(), parts.ops.to_spec(codebook.weight).to("cpu")))
    exact(results[1], results[0])
    assert len(results[0][3].unique()) > 1
