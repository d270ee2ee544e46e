"""Both paths of the graph of codes give the same nodes, look at no later byte, and vote by signs, on both op sets.

Legend: B batch, P positions, D width, C code width, N codes, J neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.open_pass import Voter
from arbitor.reference.graph.ranks import Gradient
from arbitor.reference.graph.ternary_graph import FULL_PATH_MAX_CODES, EdgeTable, TernaryGraph
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact, unsigned_zeros
from conformance.graph import models
from conformance.subject import Subject

GRAPH = {"num_codes": 30, "code_dim": 10, "num_hops": 2, "hop_rank": 5, "num_neighbours": 4}


class Codes:
    """Stands in for the codebooks, with vectors of trits from a seed."""

    def __init__(self, context: GraphContext) -> None:
        shape = (context.config.num_codes, context.config.code_dim)
        trits = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(5))
        self.table = trits.to(context.dtype).to(context.device)
        self.num_codes = context.config.num_codes

    def rows(self, ids: Tensor) -> Tensor:
        """Return the vectors of codes."""
        return self.table[ids]


def context(
    ops: Any = reference_ops, device: Any = "cpu", dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    config = replace(models.NANO, **{**GRAPH, **fields})
    return GraphContext(ops, config, device=device, dtype=dtype, seed=7)


def random_codes(*shape: int, seed: int = 0, high: int = 30) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def graph_of(parts: GraphContext) -> TernaryGraph:
    """Return a graph with neighbours, empty slots among them, and signs of all kinds."""
    graph = TernaryGraph(parts, Codes(parts))
    num_codes, num_slots = graph.edges.weight.shape
    neighbours = random_codes(num_codes, num_slots, seed=1, high=num_codes + 4)
    neighbours = torch.where(neighbours >= num_codes, -1, neighbours).to(torch.int32)
    graph.edges.neighbours.copy_(neighbours)
    graph.edges.scores.copy_((neighbours >= 0) * 5)
    trits = random_codes(num_codes, num_slots, seed=2, high=3).to(torch.int8) - 1
    ones = torch.zeros(num_codes, 1, dtype=torch.int8)
    graph.edges.load(weight_of_trits(trits, ones, mantissa_bits=parts.config.mantissa_bits))
    return graph


def step(graph: TernaryGraph) -> None:
    """Do what a model's step does."""
    for module in graph.modules():
        if hasattr(module, "step_weight"):
            module.step_weight()
    graph.edges.step_tables()


def by_hand(graph: TernaryGraph, code: int, hop: int) -> Tensor:
    """Return a node after some hops, from dense matrices, its messages sent one by one."""
    dense = lambda layer: dequantize(layer.weight, dtype=torch.float64)  # noqa: E731
    if hop == 0:
        return dense(graph.node) @ graph.fetch(torch.tensor(code)).to(torch.float64)
    h = by_hand(graph, code, hop - 1)
    m, signs = torch.zeros_like(h), dense(graph.edges)[code]
    for slot, other in enumerate(graph.edges.neighbours[code].tolist()):
        if other >= 0:
            m += signs[slot] * (dense(graph.message) @ by_hand(graph, other, hop - 1))
    adapter = dense(graph.adapter_up[hop - 1]) @ (dense(graph.adapter_down) @ h)
    return h + dense(graph.update) @ norm(m) + adapter


def norm(m: Tensor) -> Tensor:
    return m / (m.square().mean() + 1e-6).sqrt()


@pytest.mark.parametrize("path", ["full", "active"])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_node_by_hand(path: str, hops: int) -> None:
    graph = graph_of(context(dtype=torch.float64, num_hops=hops))
    codes = torch.tensor([[3, 29, 3], [0, 17, 8]])
    want = torch.stack([by_hand(graph, code, hops) for code in codes.flatten().tolist()]).reshape(2, 3, -1)
    alike(graph(codes, path=path), want)


def test_composites_are_heard_in_a_turn_of_their_own() -> None:
    graph = graph_of(context(dtype=torch.float64)).requires_grad_(False)
    codes = torch.tensor([[3, 29, 4]])
    extra = torch.randn(1, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    extra[0, 1] = 0
    for path in ("full", "active"):
        plain = graph(codes, path=path)
        heard = graph(codes, extra.requires_grad_(), path=path)
        node, message, update = (
            dequantize(part.weight, dtype=torch.float64) for part in (graph.node, graph.message, graph.update)
        )
        said = torch.stack([update @ norm(message @ (node @ one)) for one in extra[0].detach()])
        alike(heard, plain + said)
        exact(heard[0, 1], plain[0, 1])
        assert torch.autograd.grad(heard.sum(), extra)[0][0, 0].any()


def gradients(graph: TernaryGraph, codes: Tensor, path: str) -> dict[int, Tensor]:
    """Return the gradients that the weights vote with in one pass, each use added up, by tensor id."""
    found: dict[int, Tensor] = {}

    def record(voter: Voter, gradient: Gradient) -> None:
        grad, rows = gradient.grad_NK, gradient.rows
        total = found.setdefault(voter.tensor_id, torch.zeros(voter.weight.shape, dtype=torch.float64))
        if rows is None:
            total += grad
        else:
            total.index_add_(0, rows.clamp(min=0), grad.to(torch.float64) * (rows >= 0)[:, None])

    graph.voting.cast = record
    with graph.voting.taking(rate=1.0, step=0):
        y = graph(codes, path=path)
        scale = torch.arange(y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape) / y.numel() - 0.4
        (y * scale).sum().backward()
    return found


@pytest.mark.parametrize("hops", [1, 2])
def test_both_paths_vote_with_the_same_gradients(hops: int) -> None:
    """Also where autograd on the dense formula says so, for the signs."""
    graph = graph_of(context(dtype=torch.float64, num_hops=hops))
    codes = random_codes(2, 6)
    full, active = (gradients(graph, codes, path) for path in ("full", "active"))
    votes = {
        module.tensor_id
        for module in graph.modules()
        if isinstance(module, TernaryModule) and not module.frozen
    }
    assert set(full) == set(active) == votes
    for tensor_id, grad in full.items():
        assert grad.any()
        alike(active[tensor_id], grad, f"weight {tensor_id}")


def test_gradients_of_signs_and_matrices_by_autograd() -> None:
    """One hop, told once more in plain torch."""
    graph = graph_of(context(dtype=torch.float64, num_hops=1))
    codes = random_codes(2, 6)
    layers = {
        "edges": graph.edges,
        "node": graph.node,
        "message": graph.message,
        "update": graph.update,
        "down": graph.adapter_down,
        "up": graph.adapter_up[0],
    }
    w = {
        name: dequantize(layer.weight, dtype=torch.float64).requires_grad_() for name, layer in layers.items()
    }
    c, neighbours = graph.fetch(torch.arange(30)), graph.edges.neighbours.to(torch.int64)
    h = c @ w["node"].T
    sent = torch.where((neighbours >= 0)[..., None], h[neighbours.clamp(min=0)], 0.0)
    m = (w["edges"][..., None] * sent).sum(dim=1) @ w["message"].T
    unit = m / (m.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    y = (h + unit @ w["update"].T + h @ w["down"].T @ w["up"].T)[codes]
    scale = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) / y.numel() - 0.4
    (y * scale).sum().backward()
    for path in ("full", "active"):
        found = gradients(graph, codes, path)
        for name, layer in layers.items():
            alike(found[layer.tensor_id], w[name].grad, name)


def test_the_path_is_the_cheaper_one_and_follows_from_shapes() -> None:
    graph = TernaryGraph(context(), Codes(context()))
    assert [graph.cheaper_path(count) for count in (1, 7, 8, 1000)] == ["active", "active", "full", "full"]
    parts = context(device="meta", num_codes=FULL_PATH_MAX_CODES + 1)
    assert TernaryGraph(parts, Codes(parts)).cheaper_path(10**6) == "active"
    with pytest.raises(ValueError, match="path is 'dense'"):
        graph(random_codes(1, 3), path="dense")
    with pytest.raises(ValueError, match="num_neighbours is 17"):
        TernaryGraph(context(num_neighbours=17), Codes(context()))


@pytest.mark.parametrize("path", ["full", "active"])
def test_later_codes_and_other_sequences_change_nothing(path: str) -> None:
    """Bit by bit where shapes are the same, and alike where the batch is smaller."""
    graph = graph_of(context())
    codes = random_codes(3, 8)
    other = codes.clone()
    other[0, 5:], other[1:] = (codes[0, 5:] + 1) % 30, codes[1:].flip(0)
    with torch.no_grad():
        y = graph(codes, path=path)
        exact(graph(other, path=path)[0, :5], y[0, :5])
        alike(graph(codes[:1, :5], path=path), y[:1, :5])


def test_consecutive_codes_become_neighbours_after_an_accepted_pass_and_a_step() -> None:
    graph = TernaryGraph(context(), Codes(context()))
    codes = torch.tensor([[3, 9, 3, 9, 9, 4], [3, 9, 8, 8, 8, 8]])
    for rate in (None, 1.0, 1.0):
        y = graph(codes).square().sum()
        if rate is None:
            # This pass is outside of `taking`, so it votes nothing and leaves no trace.
            y.backward()
            graph.voting.strayed = False
            step(graph)
        else:
            with graph.voting.taking(rate=rate, step=0):
                y.backward()
        assert graph.edges.neighbours.eq(-1).all()
    step(graph)
    want = {3: {9: 6}, 9: {3: 2, 4: 2, 8: 2}}
    for code in range(30):
        held = zip(graph.edges.neighbours[code].tolist(), graph.edges.scores[code].tolist(), strict=True)
        assert {j: score for j, score in held if j >= 0} == want.get(code, {})
    assert dequantize(graph.edges.weight).eq(1).all()
    with graph.voting.taking(rate=1.0, step=1):
        graph(codes).sum().backward()
    graph.edges.load(graph.edges.weight.clone())
    before = graph.edges.scores.clone()
    step(graph)
    exact(graph.edges.scores, before)


@pytest.mark.parametrize("path", ["full", "active"])
def test_only_rows_of_used_codes_change(path: str) -> None:
    """A code changes if it is in the batch, or one hop from it. Its neighbours change only if it is a source."""
    graph = graph_of(context(theta=1, num_codes=30))
    state = {**graph.edges.tables(), "signs": dequantize(graph.edges.weight)}
    before = {name: tensor.clone() for name, tensor in state.items()}
    codes = torch.tensor([[3, 9, 4, 3]])
    with graph.voting.taking(rate=8.0, step=0):
        graph(codes, path=path).square().sum().backward()
    step(graph)
    sources = {3, 9, 4}
    reached = sources | {j for i in sources for j in before["neighbours"][i].tolist()}
    after = {**graph.edges.tables(), "signs": dequantize(graph.edges.weight)}
    changed = {
        name: set((after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()) for name in after
    }
    assert changed["scores"] and changed["scores"] | changed["neighbours"] <= sources
    assert changed["signs"] and changed["signs"] <= reached != set(range(30))


@pytest.mark.parametrize("path", ["full", "active"])
def test_a_changed_table_refuses_an_older_pass(path: str) -> None:
    graph = graph_of(context())
    y = graph(random_codes(2, 6), path=path).sum()
    with graph.voting.taking(rate=1.0, step=0):
        graph(random_codes(2, 6)).sum().backward()
    graph.edges.step_tables()
    with pytest.raises(RuntimeError, match=r"changed between forward and backward|modified by an inplace"):
        y.backward()


@pytest.mark.parametrize("hops", [1, 2])
def test_a_node_starts_at_a_quarter_of_a_unit(hops: int) -> None:
    parts = context(num_hops=hops, width=192, code_dim=64, hop_rank=16, num_neighbours=4)
    graph = graph_of(parts)
    with torch.no_grad():
        rms = graph(random_codes(2, 40)).square().mean().sqrt().item()
    assert 0.15 < rms < 0.4


def test_a_graph_of_millions_needs_no_memory_on_meta() -> None:
    parts = context(device="meta", num_codes=10_000_000, num_neighbours=10)
    graph = TernaryGraph(parts, Codes(parts))
    assert graph.edges.neighbours.shape == (10_000_000, 10)
    assert not list(graph.parameters())
    assert {buffer.dtype for buffer in graph.buffers()} == {torch.uint8, torch.int8, torch.int32}


@pytest.mark.parametrize("path", ["full", "active"])
def test_the_graph_has_the_nodes_of_the_reference(subject: Subject, path: str) -> None:
    few = {"num_codes": 9, "num_neighbours": 2, "width": 12, "code_dim": 6}
    codes = random_codes(1, 4, high=9)
    wide = graph_of(context(dtype=torch.float64, **few))(codes, path=path)
    tested = graph_of(context(models.drawn_by_the_reference(subject.ops), subject.device, **few))
    y = tested(codes.to(subject.device), path=path)
    alike(y.cpu(), wide)
    with tested.voting.taking(rate=1.0, step=0):
        y.square().sum().backward()
    for module in tested.modules():
        if isinstance(module, TernaryModule) and not module.frozen:
            tested.voting.deliver()
            assert module.voted
    step(tested)
    assert tested.voting.faults == 0


def test_an_edge_table_trains_alike(subject: Subject) -> None:
    """Sums, gradients, votes of signs, steps and neighbours, on vectors whose sums are exact."""
    results: list[Any] = []
    tested = models.drawn_by_the_reference(subject.ops)
    for ops, device in ((reference_ops, torch.device("cpu")), (tested, subject.device)):
        graph = graph_of(context(ops, device, theta=3, theta_e=3))
        outputs: list[Any] = []
        for turn in range(2):
            codes = random_codes(2, 9, seed=turn).to(device)
            h = random_codes(30, 9, seed=turn, high=17).to(device).to(torch.float32) - 8
            scale = random_codes(18, 9, seed=9, high=9).to(device).to(torch.float32) - 4
            neighbours = graph.edges.neighbours[codes.flatten()]
            with graph.voting.taking(rate=2.0, step=turn):
                m = graph.gathered(h.requires_grad_(), neighbours, graph.edges(codes.flatten()))
                (m * scale).sum().backward()
            graph.edges.record(codes[:, :-1], codes[:, 1:])
            step(graph)
            outputs += [m.detach().cpu(), h.grad.cpu()]
        tables = tuple(table.cpu() for table in graph.edges.tables().values())
        results.append((unsigned_zeros(tuple(outputs)), tables, ops.to_spec(graph.edges.weight).to("cpu")))
    exact(results[1], results[0])
    assert not torch.equal(results[0][2].packed, graph_of(context()).edges.weight.packed)


def test_a_table_of_another_space_keeps_equal_numbers() -> None:
    """In edges from codes to rows of another table i -> i is no loop."""
    table = EdgeTable(context(), 5, 3, allow_loops=True)
    table.record(torch.tensor([1, 1, 2]), torch.tensor([1, 900, -1]))
    table.step_tables()
    assert table.neighbours[1].tolist() == [1, 900, -1] and table.neighbours[2].eq(-1).all()
