"""The composite proposals keep the right pairs, and have the losses and gradients worked out by hand, on both op sets.

Legend: B batch, P positions, D width, C code width, J slots of a code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.composite import COMPOSITES_PER_CODE, CompositeProposalHead, gate_loss
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact, same_sums, unsigned_zeros
from conformance.graph import models
from conformance.subject import Subject

CODES, COMPOSITES = 9, 13
LOSSES = {"composite_commitment", "composite_codebook", "composite_prediction", "composite_gate"}


def context(
    ops: Any = reference_ops, device: Any = "cpu", dtype: torch.dtype = torch.float32, **fields: Any
) -> GraphContext:
    sizes = {
        "num_codes": CODES,
        "code_dim": 10,
        "num_hops": 1,
        "composite_codes": COMPOSITES,
        "composite_inner": 20,
    }
    config = replace(models.NANO, **{**sizes, **fields})
    return GraphContext(ops, config, device=device, dtype=dtype, seed=7)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2, positions: int = 11) -> tuple[Tensor, ...]:
    """Return a stream, codes, and the motifs of the codes."""
    rng = torch.Generator().manual_seed(1)
    h = torch.randn(batch, positions, 24, generator=rng, dtype=torch.float64).to(dtype)
    codes = torch.randint(0, CODES, (batch, positions), generator=rng)
    motifs = torch.randint(-1, 2, (CODES, 10), generator=rng).to(dtype)
    return h, codes, motifs[codes]


def steps(head: CompositeProposalHead) -> None:
    """Do what a model's step does."""
    for layer in (head.inner, head.code, head.gate, head.codebook, head.edges):
        layer.step_weight()
    for keeper in (head.codebook, head.edges):
        keeper.step_tables()


def train(head: CompositeProposalHead, *, step: int, rate: float = 1.0) -> dict[str, Tensor]:
    """Run one accepted backward pass and return the losses."""
    with head.voting.taking(rate=rate, step=step):
        losses = head(*inputs())
        torch.stack(list(losses.values())).sum().backward()
    return losses


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def by_hand(head: CompositeProposalHead, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gate's logits, the vectors z and their composites."""
    dense = lambda layer: dequantize(layer.weight, dtype=torch.float64)  # noqa: E731
    n = norm(h)
    z = norm(torch.nn.functional.silu(n @ dense(head.inner).T) @ dense(head.code).T)
    return n @ dense(head.gate)[0], z, reference_ops.nearest_codes(z, head.codebook.weight)


def test_losses_by_dense_matrices() -> None:
    head = CompositeProposalHead(context(dtype=torch.float64))
    h, codes, motifs = inputs(torch.float64)
    losses = head(h, codes, motifs)
    logits, z, ids = by_hand(head, h)
    c = dequantize(head.codebook.weight, dtype=torch.float64)[ids]
    distances, errors, opened, gates = [], [], [], []
    for b in range(2):
        for p in range(11):
            if logits[b, p] > 0:
                distances.append((z[b, p] - c[b, p]).square().mean())
            if p < 10:
                errors.append((c[b, p] - motifs[b, p + 1]).square().mean())
                opened.append(logits[b, p] > 0)
    mean = torch.stack(errors).mean()
    gates = [error - mean if is_open else error * 0 for error, is_open in zip(errors, opened, strict=True)]
    assert set(losses) == LOSSES and 0 < len(distances) < 22
    alike(losses["composite_commitment"], torch.stack(distances).mean())
    alike(losses["composite_codebook"], torch.stack(distances).mean())
    alike(losses["composite_prediction"], mean)
    alike(losses["composite_gate"], torch.stack(gates).mean())


def voted_by(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[CompositeProposalHead, dict[str, Tensor]]:
    """Return a head, and the gradients that its weights vote with behind one of its losses, by weight."""
    found: dict[int, Tensor] = {}

    def record(weight: Any, grad: Tensor, rate: float, *, rows: Any, tensor_id: int, **_: Any) -> Any:
        full = torch.zeros(weight.shape)
        if rows is None:
            full += grad
        else:
            full[rows[rows >= 0]] = grad[rows >= 0]
        found[tensor_id] = full
        return weight

    head = CompositeProposalHead(context(models.ops_with(accumulate_gradient=record), dtype=dtype))
    h, codes, motifs = inputs(dtype)
    h.requires_grad_()
    motifs.requires_grad_()
    with head.voting.taking(rate=1.0, step=0):
        head(h, codes, motifs)[name].backward()
    assert h.grad is None and motifs.grad is None
    layers = {"inner": head.inner, "code": head.code, "gate": head.gate, "codebook": head.codebook}
    names = {layer.tensor_id: which for which, layer in layers.items()}
    return head, {names[tensor_id]: grad for tensor_id, grad in found.items() if grad.any()}


@pytest.mark.parametrize(
    ("name", "voters"),
    [
        ("composite_commitment", {"inner", "code"}),
        ("composite_prediction", {"inner", "code"}),
        ("composite_codebook", {"codebook"}),
        ("composite_gate", {"gate"}),
    ],
)
def test_each_loss_trains_its_own(name: str, voters: set[str]) -> None:
    """No loss of the proposals reaches the stream or the motifs, which the proposals are made of."""
    _, voted = voted_by(name)
    assert set(voted) == voters


def test_the_prediction_goes_straight_through() -> None:
    """W_code votes with the gradient of the error at c, as if z had been c."""
    head, voted = voted_by("composite_prediction")
    h, _, motifs = inputs(torch.float64)
    dense = {name: dequantize(getattr(head, name).weight, dtype=torch.float64) for name in ("inner", "code")}
    w = dense["code"].clone().requires_grad_()
    z = norm(torch.nn.functional.silu(norm(h) @ dense["inner"].T) @ w.T)
    c = dequantize(head.codebook.weight, dtype=torch.float64)[
        reference_ops.nearest_codes(z.detach(), head.codebook.weight)
    ]
    at_c = 2 * (c[:, :-1] - motifs[:, 1:]) / (10 * 20)
    (z[:, :-1] * at_c).sum().backward()
    alike(voted["code"], w.grad)


def test_a_gate_opens_where_the_error_is_below_the_mean() -> None:
    logits = torch.tensor([-3.0, 0.5, 2.0, -0.1], dtype=torch.float64).requires_grad_()
    errors = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    loss = gate_loss(logits, errors, Ranks())
    # The open scores are 3 - 3 and 2 - 3.
    alike(loss, torch.tensor((0.0 - 1.0) / 4, dtype=torch.float64))
    loss.backward()
    p = logits.detach().sigmoid()
    alike(logits.grad, (errors - 3) * p * (1 - p) / 4)
    exact(gate_loss(torch.zeros(2, 0), torch.zeros(2, 0), Ranks()), torch.zeros(()))


def test_closed_gates_leave_nothing() -> None:
    head = CompositeProposalHead(context(theta=1, on_flip="carry"))
    bits = head.gate.weight.mantissa_bits
    head.gate.load(reference_ops.constant_weight((1, 24), trit=0, exponent=0).with_mantissa(bits))
    head.codebook.weight.trit_accum.fill_(100)
    before = head.codebook.weight.clone()
    losses = train(head, step=0)
    assert losses["composite_commitment"] == 0 == losses["composite_codebook"]
    head.codebook.step_weight()
    exact(head.codebook.weight, before)
    head.edges.step_tables()
    assert head.edges.neighbours.eq(-1).all()
    # These could open the gate again.
    assert head.gate.weight.trit_accum.any()


def test_pairs_of_open_positions_are_kept_after_an_accepted_pass_and_a_step() -> None:
    head = CompositeProposalHead(context())
    h, codes, motifs = inputs()
    # This pass is outside of `taking`, so it votes nothing.
    torch.stack(list(head(h, codes, motifs).values())).sum().backward()
    steps(head)
    assert head.edges.neighbours.eq(-1).all() and head.codebook.usage.eq(1).all()
    logits, _, ids = by_hand(head, h.to(torch.float64))
    opened = logits > 0
    want = reference_ops.update_neighbours(
        *(head.edges.neighbours.clone(), head.edges.scores.clone(), head.edges.weight.clone()),
        codes[opened].repeat(2),
        ids[opened].repeat(2),
        allow_loops=True,
    )
    train(head, step=0)
    train(head, step=1)
    assert head.edges.neighbours.eq(-1).all()
    steps(head)
    exact((head.edges.neighbours, head.edges.scores), want[:2])
    assert want[0].ge(0).any()
    steps(head)
    exact((head.edges.neighbours, head.edges.scores), want[:2])
    train(head, step=2)
    head.edges.forget()
    head.edges.step_tables()
    exact((head.edges.neighbours, head.edges.scores), want[:2])


def stored(parts: GraphContext) -> CompositeProposalHead:
    """Return a head with composites in some slots, and signs of all kinds."""
    head, rng = CompositeProposalHead(parts), torch.Generator().manual_seed(2)
    shape = (CODES, COMPOSITES_PER_CODE)
    neighbours = torch.randint(-1, COMPOSITES, shape, generator=rng)
    neighbours[3] = -1
    head.edges.neighbours.copy_(neighbours)
    head.edges.scores.copy_(torch.where(neighbours >= 0, 5, 0))
    trits = torch.randint(-1, 2, shape, generator=rng, dtype=torch.int8)
    ones = torch.zeros(CODES, 1, dtype=torch.int8)
    head.edges.load(weight_of_trits(trits, ones, mantissa_bits=parts.config.mantissa_bits))
    return head


def test_a_code_reads_the_composites_it_keeps() -> None:
    head = stored(context(dtype=torch.float64))
    codes = torch.arange(CODES).expand(2, CODES)
    read = head.read(codes)
    rows, signs = (
        dequantize(head.codebook.weight, dtype=torch.float64),
        dequantize(head.edges.weight, dtype=torch.float64),
    )
    for code in range(CODES):
        want = torch.zeros(10, dtype=torch.float64)
        for slot, composite in enumerate(head.edges.neighbours[code].tolist()):
            if composite >= 0:
                want += signs[code, slot] * rows[composite]
        same_sums(read[:, code], want.expand(2, 10))
    assert read[0, 3].eq(0).all() and read.any()


def read_and_vote(parts: GraphContext) -> tuple[Any, ...]:
    """Return what is read, and the state after a vote with gradients of small integers, a step, and a batch of pairs."""
    head = stored(parts)
    codes = torch.tensor([[0, 2, 2, 3], [8, 0, 5, 2]], device=parts.device)
    with parts.voting.taking(rate=2.0, step=0):
        read = head.read(codes)
        scale = torch.arange(read.numel(), device=parts.device).reshape(read.shape) % 7 - 3
        (read * scale).sum().backward()
    head.edges.record(codes, torch.tensor([[1, 1, 4, 12], [-1, 3, 3, 3]], device=parts.device))
    steps(head)
    weights = [parts.ops.to_spec(layer.weight).to("cpu") for layer in (head.edges, head.codebook)]
    return unsigned_zeros(read.detach().cpu()), head.edges.neighbours.cpu(), head.edges.scores.cpu(), *weights


def test_signs_and_composites_vote_behind_what_is_read() -> None:
    """Rows of codes that were not read, and composites that they do not keep, keep every byte."""
    head = stored(context(theta=1, theta_e=127))
    kept = head.edges.neighbours[[0, 2, 3, 5, 8]]
    *_, signs, rows = read_and_vote(context(theta=1, theta_e=127))
    changed = (trits_of(signs) != trits_of(head.edges.weight)).any(dim=1).nonzero().flatten().tolist()
    assert changed and set(changed) <= {0, 2, 3, 5, 8}
    moved = (trits_of(rows) != trits_of(head.codebook.weight)).any(dim=1).nonzero().flatten().tolist()
    assert moved and set(moved) <= set(kept[kept >= 0].tolist())


def op_sets(subject: Subject) -> tuple[tuple[Any, Any], ...]:
    """Return the reference and the subject, with weights that the reference draws for both, and where they run."""
    return (reference_ops, "cpu"), (models.drawn_by_the_reference(subject.ops), subject.device)


def test_edges_train_alike(subject: Subject) -> None:
    """What is read, votes of signs and composites, steps and the table of pairs, on gradients whose sums are exact."""
    fields = {"theta": 3, "theta_e": 3}
    want, got = (read_and_vote(context(ops, device, **fields)) for ops, device in op_sets(subject))
    exact(got, want)


def test_losses_are_alike(subject: Subject) -> None:
    results = []
    for ops, device in op_sets(subject):
        head = CompositeProposalHead(context(ops, device))
        losses = head(*(value.to(device) for value in inputs()))
        results.append(torch.stack([losses[name].detach().cpu() for name in sorted(LOSSES)]))
    alike(results[1], results[0])


def test_proposals_learn_to_foretell() -> None:
    """On codes that take turns the error falls, and what a code then reads is nearer to the next motif than to its own."""
    parts = context(theta=4, num_codes=3)
    head = CompositeProposalHead(parts)
    rng = torch.Generator().manual_seed(1)
    streams, motifs = torch.randn(3, 24, generator=rng), torch.randint(-1, 2, (3, 10), generator=rng).float()
    codes = (torch.arange(24) % 3).expand(4, 24)
    errors = []
    for step in range(60):
        with parts.voting.taking(rate=1.0, step=step):
            losses = head(streams[codes], codes, motifs[codes])
            torch.stack(list(losses.values())).sum().backward()
        steps(head)
        errors.append(float(losses["composite_prediction"].detach()))
    # Revival helps from the first step on, so that the first step is what to compare with.
    assert sum(errors[-10:]) / 10 < 0.6 * errors[0], errors
    with torch.no_grad():
        read = head.read(torch.arange(3)[None])[0]
    told = read.any(dim=1)
    assert told.any() and head.edges.neighbours.ge(0).any()
    similar = torch.nn.functional.cosine_similarity
    assert (similar(read, motifs.roll(-1, 0)) > similar(read, motifs))[told].all()


def test_one_position_has_no_next_motif() -> None:
    losses = CompositeProposalHead(context())(*inputs(batch=1, positions=1))
    assert losses["composite_prediction"] == 0 == losses["composite_gate"]


def test_motifs_of_another_width_are_refused() -> None:
    h, codes, _ = inputs()
    with pytest.raises(ValueError, match="motifs_BPC"):
        CompositeProposalHead(context())(h, codes, torch.zeros(2, 11, 9))


def test_the_largest_head_has_the_weights_that_it_should() -> None:
    """REFACTOR14 gives 329.3 M. Signs of the edges, one a slot of a code, are counted apart."""
    sizes = {"num_codes": 1000, "code_dim": 64, "composite_codes": 5_000_000, "composite_inner": 1280}
    head = CompositeProposalHead(context(device="meta", width=7168, **sizes))
    layers = (head.norm, head.inner, head.code, head.code_norm, head.gate, head.codebook)
    counts = [layer.weight.shape[0] * layer.weight.shape[1] for layer in layers]
    assert counts == [7168, 7168 * 1280, 1280 * 64, 64, 7168, 5_000_000 * 64]
    assert sum(counts) == 329_271_360
    assert head.edges.weight.shape == head.edges.neighbours.shape == (1000, COMPOSITES_PER_CODE)
    assert not list(head.parameters()) and not any(b.is_floating_point() for b in head.buffers())
