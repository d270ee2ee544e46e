"""Layers in graphs of torch.compile: no break, no second graph, and the numbers and votes of eager calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arbitor.nn import Embedding, Linear, RMSNorm, Ternary, swap_linears
from arbitor.reference.graph import rule, voting
from arbitor.reference.graph.adapters import attach
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject

IDS = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(3))
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Let no test see what another one compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Net(nn.Module):
    """Every layer of `arbitor.nn`, float layers between them, a layer that is used twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = Embedding(20, 32, seed=3), RMSNorm(32, frozen=False)
        self.first, self.twice = Linear(32, 40, bias=True, seed=1), Linear(40, 40, seed=2)
        self.frozen = Linear(40, 40, seed=5).requires_grad_(False)
        self.head = nn.Linear(40, 20)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.first(self.norm(self.table(ids))).relu()
        return self.head(self.frozen(self.twice(h) + self.twice(h)).tanh())


def made() -> Ternary:
    torch.manual_seed(0)
    return Ternary(Net())


def trained(model: Ternary, call: Callable[[Tensor], Tensor], ids: Tensor = IDS) -> dict[str, Tensor]:
    """Return the state after two steps, and the losses."""
    adam, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(2):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(call(ids).flatten(0, -2), ids.flatten())
        assert model.backward(loss, rate=9.0, step=step)
        model.step()
        adam.step()
        losses.append(loss.detach())
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        "losses": torch.stack(losses),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        exact(tensor, other[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_net_trains_as_in_eager_calls(backend: str) -> None:
    model, twin = made(), made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = trained(twin, twin)
    same(trained(model, torch.compile(model, backend=backend, fullgraph=True)), want)
    still = {name for name, tensor in before.items() if torch.equal(tensor, want[name])}
    assert not any(name.endswith("trit_accum") and "frozen" not in name for name in still), (
        "some weight never voted"
    )


def test_a_net_is_one_graph() -> None:
    """Also the module within, which is the user's own."""
    found = torch._dynamo.explain(made().module)(IDS)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found


def test_inductor_leaves_kernels_and_votes_alone() -> None:
    """Without float layers it has nothing to fuse, so that all numbers are those of eager calls."""
    states = []
    for compiles in (False, True):
        model = Ternary(nn.Sequential(Linear(12, 24, seed=1), Linear(24, 24, seed=2)))
        call = torch.compile(model, fullgraph=True) if compiles else model
        x = torch.linspace(-1, 1, 36).view(3, 12)
        for step in range(2):
            assert model.backward(call(x).square().mean(), rate=9.0, step=step)
            model.step()
        states.append(copy.deepcopy(model.state_dict()))
    same(*states)


def test_equal_uses_of_a_layer_all_vote() -> None:
    """The compiler merges equal calculations, but two votes are not one."""
    grads: list[int] = []
    for backend in (None, *BACKENDS):
        torch._dynamo.reset()
        layer = Linear(12, 12, seed=1)
        model = Ternary(layer)
        use = lambda x, layer=layer: layer(x) + layer(x)  # noqa: E731
        call = torch.compile(use, backend=backend, fullgraph=True) if backend else use
        notes_before = len(model.voting.notes)
        model.backward(call(torch.ones(2, 12)).square().sum(), rate=3.0, step=0)
        grads.append(len(model.voting.notes) - notes_before)
    assert grads == [2, 2, 2]


def test_several_forward_passes_before_one_backward_pass() -> None:
    states = []
    for compiles in (False, True):
        model = made()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        loss = call(IDS).square().mean() + call(IDS.flip(0)).mean()
        assert model.backward(loss, rate=9.0, step=0)
        model.step()
        states.append(copy.deepcopy(model.state_dict()))
    same(*states)


@pytest.mark.parametrize("inner", ["blocks", "checkpoints"])
def test_blocks_that_are_compiled_share_a_graph(inner: str) -> None:
    """Each block is compiled by itself, as large models are, or is computed again in the backward pass."""
    states = []
    for compiles in (False, True):
        blocks = nn.Sequential(*(nn.Sequential(Linear(12, 12, seed=seed), nn.Tanh()) for seed in range(3)))
        model: Any = Ternary(blocks)
        call: Any = model
        if compiles and inner == "blocks":
            for block in blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        elif compiles:
            again = lambda x, blocks=blocks: checkpoint(blocks, x, use_reentrant=False)  # noqa: E731
            call = torch.compile(again, backend="aot_eager", fullgraph=True)
        # Inputs of later blocks have gradients, too.
        x = torch.linspace(-1, 1, 36).view(3, 12).requires_grad_()
        for step in range(2):
            assert model.backward(call(x).square().mean(), rate=9.0, step=step)
            model.step()
        states.append(copy.deepcopy(model.state_dict()))
    same(*states)


def test_one_graph_serves_all_batches() -> None:
    model = made()
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for ids in (IDS, IDS[:3, :7].contiguous(), IDS[:2]):
            exact(call(ids), model(ids))


def test_a_llama_is_one_graph() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    states = []
    for compiles in (False, True):
        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=20, tie_word_embeddings=False, **sizes)
        )
        swap_linears(llama, lambda name, linear: name != "lm_head")
        model = Ternary(llama)
        call = torch.compile(model, backend="eager", fullgraph=True) if compiles else model
        states.append(trained(model, lambda ids, call=call: call(input_ids=ids, use_cache=False).logits))
    same(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_narrow_activations(dtype: torch.dtype) -> None:
    """In a graph, too, a layer computes in the dtype of what it is given."""
    model = Ternary(nn.Sequential(nn.Linear(12, 12), Linear(12, 24, seed=1), RMSNorm(24)))
    x = torch.randn(3, 12)
    if dtype is torch.bfloat16:
        model.to(dtype)
        x = x.to(dtype)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.float32):
        want, got = model(x), call(x)
    assert got.dtype is torch.bfloat16
    exact(got.detach(), want.detach())


def test_adapters_learn_in_graphs() -> None:
    states = []
    for compiles in (False, True):
        model = Ternary(nn.Sequential(Linear(12, 24, seed=1), nn.Tanh(), Linear(24, 12, seed=2)))
        attach(model, rank=2, seed=1)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            adam.zero_grad()
            assert model.backward(call(torch.ones(2, 12)).square().mean(), rate=9.0, step=step)
            adam.step()
        states.append(copy.deepcopy(model.state_dict()))
    same(*states)


def test_layers_of_any_op_set_are_in_graphs(subject: Subject) -> None:
    """In the layout of the op set, where it runs."""
    states = []
    for compiles in (False, True):
        form: dict[str, Any] = {"ops": subject.ops, "device": subject.device}
        layers = (
            Embedding(9, 24, seed=1, **form),
            RMSNorm(24, frozen=False, **form),
            Linear(24, 36, seed=2, **form),
        )
        model = Ternary(nn.Sequential(*layers))
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        ids = torch.tensor([[1, 2, 3], [3, 8, 0]], device=subject.device)
        for step in range(2):
            assert model.backward(call(ids).square().mean(), rate=9.0, step=step)
            model.step()
        states.append({name: tensor.cpu().clone() for name, tensor in model.state_dict().items()})
    same(*states)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_votes_for_itself(copied: Callable[[Ternary], Ternary]) -> None:
    model, twin = (Ternary(Linear(12, 24, seed=1)) for _ in range(2))
    before, other = copy.deepcopy(model.state_dict()), copied(model)
    calls: list[tuple[Ternary, Any]] = [
        (twin, twin),
        (other, torch.compile(other, backend="aot_eager", fullgraph=True)),
    ]
    for of, call in calls:
        of.backward(call(torch.ones(2, 12)).square().mean(), rate=9.0, step=0)
        of.step()
    same(dict(other.state_dict()), dict(twin.state_dict()))
    same(dict(model.state_dict()), before)


X = torch.linspace(-1, 1, 24).view(2, 12)


def test_a_pass_that_is_recorded_as_a_whole_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph replays the votes with the kernels. The byte transformer that `bench` times is compiled and recorded so."""
    for module in (rule, voting):
        monkeypatch.setattr(module, "is_recorded", lambda tensor: True)
    states = []
    for compiled in (False, True):
        model = Ternary(Linear(12, 3, seed=1))
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        before = copy.deepcopy(model.state_dict())
        with model.voting.taking(rate=torch.tensor(9.0), step=torch.tensor(0), undo=False):
            call(X).sum().backward()
        model.step()
        states.append(dict(model.state_dict()))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in states[-1].items())
    same(*states)


def stale(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    loss = call(X).sum()
    model.backward(call(X).sum(), rate=3.0, step=0)
    model.step()
    model.backward(loss, rate=3.0, step=1)


def stray(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    call(X).sum().backward()
    model.step()


def of_another_state(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swapped = lambda x: torch.func.functional_call(model, state, (x,))  # noqa: E731
    model.backward(torch.compile(swapped, backend="aot_eager")(X).sum(), rate=3.0, step=0)


def alone(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    layer = Linear(12, 3)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(X).sum().backward()


def gone(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    rule.holder_of(torch.tensor(-1))


def recorded(model: Ternary, call: Callable[[Tensor], Tensor]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "is_recorded", lambda grad: True)
        model.backward(call(X).sum(), rate=3.0, step=0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (stale, "modified by an inplace operation"),
        (stray, "gradients came through the weights outside of model.backward"),
        (of_another_state, "the loss was computed with another state than the module holds"),
        (gone, "a graph names a ternary layer that is not here"),
        (recorded, "is being recorded as a CUDA graph"),
        (alone, "belongs to no model"),
    ],
)
def test_wrong_uses_are_named(wrong: Callable[..., None], sentence: str) -> None:
    """As in eager calls. A weight that changed since the forward pass is noticed by torch itself."""
    model = Ternary(Linear(12, 3, seed=1))
    with pytest.raises(RuntimeError, match=sentence):
        wrong(model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_a_whole_model_says_why_it_is_in_no_graph() -> None:
    model, ids = models.nano(), models.random_ids(2, 12, seed=5)
    says = r"an ArbModel, .*, run outside of graphs of torch\.compile: compile without fullgraph=True"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=says):
        torch.compile(model, backend="eager", fullgraph=True)(ids)
    exact(torch.compile(model, backend="eager")(ids).detach(), model(ids).detach())


def test_a_compiled_training_step_takes_its_pass_outside() -> None:
    """Of a function that trains, the compiler takes the forward pass alone."""
    states = []
    for compiles in (False, True):
        model = Ternary(nn.Sequential(Linear(12, 24, seed=1), nn.Tanh(), Linear(24, 12, seed=2)))

        def train(number: int, model: Ternary = model) -> bool:
            accepted = model.backward(model(X).square().mean(), rate=9.0, step=number)
            model.step()
            return accepted

        counter = torch._dynamo.testing.CompileCounter()
        call = torch.compile(train, backend=counter) if compiles else train
        # It is compiled once more when the number turns out to be none that is always the same.
        with torch._dynamo.config.patch(error_on_recompile=False):
            assert all(call(number) for number in range(3))
        # Two layers, tanh, square and mean.
        assert counter.op_count == 5 * counter.frame_count
        states.append(copy.deepcopy(model.state_dict()))
    same(*states)


@pytest.mark.parametrize("asked", [False, True])
def test_fakes_are_like_results(asked: bool) -> None:
    """What the compiler is told of shapes, dtypes and strides is what comes out, also for strided inputs."""
    net = made().module
    inputs = {
        net.first: torch.randn(2, 32, 3).transpose(1, 2),
        net.norm: torch.randn(32, 5).T,
        net.table: IDS.T,
        net.frozen: torch.randn(0, 40),
    }
    for layer, x in inputs.items():
        x.requires_grad_(asked and x.is_floating_point())
        ops, kind = (
            torch.ops.arbitor,
            {Linear: "linear", RMSNorm: "rms_norm", Embedding: "embedding"}[type(layer)],
        )
        worth = (layer.weight.packed, layer.weight.exponents)
        args = (
            x,
            None if layer.frozen else rule.ANCHOR,
            layer.ticket,
            *worth,
            list(layer.weight.shape),
            torch.float32,
        )
        torch.library.opcheck(
            getattr(ops, f"{kind}_layer").default, args, test_utils=("test_schema", "test_faketensor")
        )
        layer.requires_grad_(False)
        grad, x = torch.randn_like(layer(x)), x.detach()
        args = (grad, x, layer.ticket, *worth, asked and x.is_floating_point())
        backward = getattr(ops, f"{kind}_layer_backward").default
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))
