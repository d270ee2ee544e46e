"""What users do to a torch module either works on a model or is refused in a sentence."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arbitor.reference.constants import level_range
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from conformance.compare import alike, exact
from conformance.graph import models

IDS = models.random_ids(3, 24, seed=5)

State = dict[str, Tensor]


def held(model: nn.Module) -> State:
    """Return a copy of all tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differences(one: State, other: State) -> list[str]:
    """Return the names of tensors that are not equal."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def trained(model: ArbModel, losses: Callable[[Tensor], Any] | None = None) -> State:
    """Return the state after two more steps."""
    for step in (2, 3):
        model.backward((losses or model.losses)(IDS), rate=models.RATE, step=step)
        model.step()
    return held(model)


@functools.cache
def start() -> State:
    """The state of a model of every module after two steps. Not to be written to."""
    return held(models.whole())


@functools.cache
def wanted() -> State:
    """The state after two more steps, of a model to which nothing was done. Not to be written to."""
    return trained(models.whole())


def reloaded(model: ArbModel) -> ArbModel:
    """Return a model that torch saved and loaded."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, ArbModel)
    return loaded


def assigned(model: ArbModel) -> ArbModel:
    """Return a model without memory that was given the tensors of another."""
    empty = ArbModel(models.WHOLE, seed=3, device="meta")
    empty.load_state_dict(held(model), assign=True)
    assert empty.voting.faults.device == model.voting.faults.device
    return empty


COPIES: dict[str, Callable[[ArbModel], ArbModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "assign": assigned,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_as_the_model_and_apart_from_it(how: str) -> None:
    model = models.whole()
    other = COPIES[how](model)
    assert other.context is not model.context and other.layers[0].context is other.context
    assert not differences(trained(other), wanted())
    assert not differences(held(model), start())
    assert not differences(trained(model), wanted())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_between_pass_and_step_takes_the_step(how: str) -> None:
    model = models.whole()
    model.backward(model.losses(IDS), rate=models.RATE, step=2)
    other = COPIES[how](model)
    for each in (model, other):
        each.step()
    assert not differences(held(other), held(model))
    assert differences(held(model), start())


def test_an_op_set_without_a_name_is_not_pickled() -> None:
    model = models.nano(ops=models.ops_with())
    with pytest.raises(TypeError, match="ops is 'exchanged_ops', which cannot be imported by that name"):
        pickle.dumps(model)
    assert copy.deepcopy(model).ops is model.ops


def test_no_copy_while_a_pass_is_open() -> None:
    model = models.nano()
    with (
        model.voting.taking(rate=1.0, step=0),
        pytest.raises(RuntimeError, match="a pass is open, but must end"),
    ):
        copy.deepcopy(model)


def test_a_functional_call_computes_with_the_state_given() -> None:
    model, other = ArbModel(models.WHOLE, seed=9), models.whole()
    own, before = model(IDS), held(model)
    got = torch.func.functional_call(model, held(other), (IDS,))
    exact(got, other(IDS))
    assert not torch.equal(got, own)
    exact(model(IDS), own)
    with pytest.raises(RuntimeError, match="computed with another state than the module holds"):
        model.backward(got.square().mean(), rate=1.0, step=0)
    assert not differences(held(model), before)


LOADS: dict[str, Callable[[ArbModel], object]] = {
    "a state dict": lambda model: model.load_state_dict(held(models.whole())),
    "a state dict, assigned": lambda model: model.load_state_dict(held(models.whole()), assign=True),
    "a state": lambda model: model.load_state(models.whole().state()),
}
"""Ways to load the state of the model that `models.whole` returns."""


@pytest.mark.parametrize("what", LOADS)
def test_a_state_is_loaded_and_computed_with(what: str) -> None:
    model = ArbModel(models.WHOLE, seed=9)
    loss = model.loss(IDS)
    model.backward(model.losses(IDS), rate=models.RATE, step=0)
    LOADS[what](model)
    exact(model(IDS), models.whole()(IDS))
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        model.backward(loss, rate=1.0, step=0)
    # Votes of the state before are forgotten, so there is nothing to step.
    model.step()
    assert not differences(held(model), start())


def forged(name: str, value: Any) -> State:
    """Return a state dict with one element of a tensor, or a whole tensor, exchanged."""
    state = {key: tensor.clone() for key, tensor in start().items()}
    if isinstance(value, int):
        state[name].view(-1)[-1] = value
    else:
        state[name] = value
    return state


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("byte_head.gate.packed", 255, ValueError, "byte_head.gate.packed holds 255"),
    ("byte_head.gate.trit_accum", -128, ValueError, "trit_accum holds -128"),
    ("byte_head.gate.exponent_accum", -128, ValueError, "exponent_accum holds -128"),
    ("byte_head.gate.exponents", 64, ValueError, "exponents holds 64"),
    ("shared_vq.bridge.tables.text.exponents", -100, ValueError, "exponents holds -100"),
    ("graph.edges.neighbours", 10**6, ValueError, "neighbours holds 1000000"),
    ("memory.structure.strengths", -1, ValueError, "strengths holds -1"),
    ("byte_head.gate.packed", torch.zeros(3, dtype=torch.uint8), ValueError, r"packed has shape \(3,\)"),
    ("byte_head.gate.exponents", torch.zeros(36, 2), TypeError, "exponents has dtype float32"),
    ("byte_head.gate.exponents", "no tensor", TypeError, "exponents is a str"),
    ("zzz", torch.zeros(1), RuntimeError, "state_dict has 'zzz', but the module has no tensor of that name"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"), BAD, ids=[f"{case[0]} {case[3]}" for case in BAD]
)
def test_a_bad_state_dict_changes_nothing(
    name: str, value: Any, error: type[Exception], message: str, assign: bool
) -> None:
    model = ArbModel(models.WHOLE, seed=9)
    before = held(model)
    with pytest.raises(error, match=message):
        model.load_state_dict(forged(name, value), assign=assign)
    assert not differences(held(model), before)
    if error is not RuntimeError:
        wrapper = nn.Sequential(model)
        with pytest.raises(error, match=message):
            wrapper.load_state_dict({f"0.{key}": tensor for key, tensor in forged(name, value).items()})
        module, _, field = name.rpartition(".")
        assert torch.equal(model.get_submodule(module).get_buffer(field), before[name])


def test_a_state_dict_with_a_name_missing_changes_nothing_unless_it_may() -> None:
    model, state = ArbModel(models.WHOLE, seed=9), forged("byte_head.gate.packed", 0)
    before = held(model)
    del state["embedding.table.packed"]
    with pytest.raises(RuntimeError, match=r"state_dict has no 'embedding\.table\.packed'"):
        model.load_state_dict(state)
    assert not differences(held(model), before)
    assert model.load_state_dict(state, strict=False).missing_keys == ["embedding.table.packed"]
    assert (
        differences(held(model), {**state, "embedding.table.packed": before["embedding.table.packed"]}) == []
    )


@pytest.mark.parametrize("more", [5, torch.zeros(1), "text"])
def test_an_unknown_name_in_a_state_is_refused(more: Any) -> None:
    model = models.nano()
    before = held(model)
    with pytest.raises(
        ValueError, match="state has 'zzz', but the model has no weight or table of that name"
    ):
        model.load_state({**models.nano(seed=9).state(), "zzz": more})
    with pytest.raises(
        TypeError, match=r"byte_head\.gate is a (int|Tensor|str), but must be a TernaryWeight"
    ):
        model.load_state({**models.nano(seed=9).state(), "byte_head.gate": more})
    assert not differences(held(model), before)


def test_a_weight_of_another_format_is_not_loaded() -> None:
    """With other mantissa bits every scale would be misread. With the weight's own bits the error is that of the rounding alone."""
    layer = models.nano().byte_head.gate
    before, low = layer.weight.clone(), level_range(0)[0]
    plain = weight_of_trits(trits_of(before), before.exponents >> 2, before.group_size)
    with pytest.raises(ValueError, match="weight has mantissa_bits 0, but must have 2"):
        layer.load(plain)
    with pytest.raises(ValueError, match=r"weight has shape \(297, 24\)"):
        layer.load(models.nano().byte_head.vocabulary.weight)
    with pytest.raises(ValueError, match=r"weight\.packed holds 243"):
        layer.load(before.with_tensors(packed=torch.full_like(before.packed, 243)))
    exact(layer.weight, before)
    layer.load(plain.with_mantissa(2))
    alike(dequantize(layer.weight), dequantize(plain))
    assert low == -32


def test_a_part_that_is_frozen_does_not_move() -> None:
    """Votes, counts, neighbours and revival of codes move no frozen part. A part that is thawed moves again, but for norms."""
    model = models.whole()
    model.get_buffer("shared_vq.bridge.tables.text.usage").zero_()
    before = held(model)
    for part in (model.shared_vq, model.graph, model.memory, model.layers[0]):
        part.requires_grad_(False)
    moved = differences(trained(model), before)
    frozen = ("shared_vq.", "graph.", "memory.", "layers.0.")
    assert moved and not [name for name in moved if name.startswith(frozen)]
    model.requires_grad_(True)
    moved = differences(trained(model), before)
    assert all(any(name.startswith(part) for name in moved) for part in frozen)
    assert not [name for name in moved if "norm" in name]


def test_a_frozen_codebook_is_not_revived() -> None:
    model = models.whole()
    table = model.shared_vq.bridge.tables["text"]
    table.usage.zero_()
    before = held(table)
    model.backward(model.losses(IDS), rate=models.RATE, step=2)
    # A part that was frozen after the pass has votes, but does not step.
    table.frozen = True
    model.step()
    assert not set(differences(held(table), before)) - {"trit_accum", "exponent_accum"}


def test_a_model_of_frozen_weights_has_no_loss_to_vote_with() -> None:
    model = models.nano()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="loss has no graph"):
        model.backward(model.loss(IDS), rate=1.0, step=0)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (nn.Module.bfloat16, torch.bfloat16),
        (nn.Module.double, torch.float64),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda model: model.bfloat16().float(), torch.float32),
    ],
)
def test_a_model_changes_the_dtype_of_its_activations(
    change: Callable[[ArbModel], ArbModel], dtype: torch.dtype
) -> None:
    """It then is the model that was built in that dtype, which the first two steps here cannot tell from float32."""
    built = ArbModel(models.WHOLE, seed=3, dtype=dtype)
    model = change(ArbModel(models.WHOLE, seed=3))
    for each in (model, built):
        assert each.embedding(IDS).dtype is each.new_ledger().dtype is each.dtype is dtype
        each.backward(each.losses(IDS), rate=models.RATE, step=0)
        each.step()
    assert not differences(held(model), held(built))
    exact(model(IDS), built(IDS))


def test_notes_move_with_the_model() -> None:
    model, plain = models.whole(), models.whole()
    for each in (model, plain):
        each.backward(each.losses(IDS), rate=models.RATE, step=torch.tensor(2))
    model.to("cpu").to(torch.bfloat16)
    assert torch.equal(model.voting.step, torch.tensor(2))
    assert {
        t.dtype for note in model.voting.notes for t in note.seen if t is not None and t.is_floating_point()
    } == {torch.bfloat16}
    model.to("meta")
    assert all(t.is_meta for note in model.voting.notes for t in note.seen if t is not None)
    assert model.voting.faults.is_meta and model.voting.step.is_meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: model.half(), ValueError, r"dtype is torch\.float16"),
        (lambda model: model.byte_head.half(), TypeError, "a ByteHead cannot become"),
        (lambda model: model.layers.bfloat16(), TypeError, "a PartList cannot become"),
        (lambda model: nn.Sequential(model).half(), ValueError, r"dtype is torch\.float16"),
        (lambda model: model.type(torch.float32), TypeError, "must stay the integers that they are"),
    ],
)
def test_a_dtype_that_cannot_be_is_refused(
    change: Callable[[ArbModel], Any], error: type[Exception], message: str
) -> None:
    model = models.nano()
    before = held(model)
    with pytest.raises(error, match=message):
        change(model)
    assert not differences(held(model), before) and model.dtype is torch.float32


def test_an_op_set_without_float64_refuses_it() -> None:
    def linear(x: Tensor, weight: Any) -> Tensor:
        if x.dtype is torch.float64:
            raise TypeError("x has dtype float64, but must be float32 or bfloat16")
        raise AssertionError

    ops = models.ops_with(linear=linear)
    says = r"dtype is torch\.float64, but must be torch\.float32 or torch\.bfloat16 for exchanged_ops"
    with pytest.raises(TypeError, match=says):
        models.nano(ops=ops, dtype=torch.float64)
    model = models.nano(ops=ops)
    with pytest.raises(TypeError, match=says):
        model.double()
    assert model.dtype is torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_trains_alike(backend: str) -> None:
    """Votes, uses, loads, neighbours and scores are no tensors that a compiler sees."""
    model = models.whole()
    assert not differences(trained(model, torch.compile(model.losses, backend=backend)), wanted())
    exact(torch.compile(model, backend=backend)(IDS), model(IDS))


def test_a_compiled_part_votes_alike() -> None:
    states = []
    for compiles in (False, True):
        model = models.nano()
        head = model.byte_head.forward
        model.byte_head.forward = torch.compile(head, backend="eager") if compiles else head
        model.backward(model.loss(IDS), rate=models.RATE, step=0)
        states.append(held(model))
    assert not differences(*states)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_alike(use_reentrant: bool) -> None:
    model = models.whole()
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    assert not differences(trained(model), wanted())


def test_under_autocast_the_model_keeps_its_dtype_and_says_so_once() -> None:
    # The model of `wanted` would warn as well, if it were made under autocast.
    model, want = models.whole(), wanted()
    with warnings.catch_warnings(record=True) as said, torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("always")
        assert not differences(trained(model), want)
        with torch.no_grad():
            logits = model(IDS)
            tokens = model.talker_head.token_logits(torch.ones(1, 2, model.config.width))
    assert [str(warning.message) for warning in said] == [
        "torch.autocast is on, but ternary layers compute as if it were off: for another dtype, call "
        ".to(torch.bfloat16) of the model"
    ]
    exact(logits.detach(), model(IDS).detach())
    exact(tokens, model.talker_head.token_logits(torch.ones(1, 2, model.config.width)).detach())


def test_no_optimizer_takes_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW(models.nano().parameters())


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model: 3.0, TypeError, "loss is a float, but must be a torch.Tensor"),
        (lambda model: {"bytes": 3.0}, TypeError, r"loss\['bytes'\] is a float"),
        (lambda model: torch.tensor(3), TypeError, "loss has dtype int64"),
        (lambda model: model.loss(IDS).detach(), ValueError, "loss has no graph"),
        (lambda model: models.nano(seed=1).loss(IDS), ValueError, "loss was not computed with this model"),
        (
            lambda model: torch.ones((), requires_grad=True) * 2,
            ValueError,
            "loss was not computed with this model",
        ),
    ],
)
def test_what_is_no_loss_of_the_model_is_refused(
    loss: Callable[[ArbModel], Any], error: type[Exception], message: str
) -> None:
    model = models.nano()
    before = held(model)
    for rate in (0.0, 1.0):
        with pytest.raises(error, match=message):
            model.backward(loss(model), rate=rate, step=0)
    model.step()
    assert not differences(held(model), before)


def test_gradients_outside_of_a_pass_are_not_stepped_with() -> None:
    model = models.nano()
    before = held(model)
    model.loss(IDS).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(
        RuntimeError, match=r"did not vote, but model.backward\(loss, rate=..., step=...\) must take"
    ):
        model.step()
    with pytest.raises(RuntimeError, match="did not vote"):
        model.backward(model.loss(IDS), rate=1.0, step=0)
    assert not differences(held(model), before)
    model.drop_gradients()
    assert not model.backward(model.loss(IDS) * torch.inf, rate=1.0, step=0)
    model.step()
    assert not differences(held(model), before)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"image_BNF": torch.zeros(2, 5, 10)},
            ValueError,
            "image_BNF has a batch of 2, but must have that of ids_BT, 3",
        ),
        (
            {"audio_BNF": torch.zeros(1, 5, 7)},
            ValueError,
            "audio_BNF has a batch of 1, but must have that of ids_BT, 3",
        ),
        ({"image_BNF": [1.0]}, TypeError, "image_BNF is a list"),
        ({"image_BNF": torch.zeros(3, 2, 10)}, ValueError, "with at least 3 vectors"),
        ({"audio_BNF": torch.zeros(3, 5, 6)}, ValueError, r"audio has shape \(3, 5, 6\)"),
    ],
)
def test_media_that_do_not_fit_are_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = ArbModel(models.WHOLE, seed=3)
    for call in (model, model.losses, model.respond):
        with pytest.raises(error, match=message):
            call(IDS, **given)


def test_a_batch_without_a_sequence_is_refused() -> None:
    model = ArbModel(models.WHOLE, seed=3)
    for call in (model, model.losses, model.loss, model.respond):
        with pytest.raises(
            ValueError, match=r"ids_BT has shape \(0, 24\), but must be .* at least one sequence"
        ):
            call(IDS[:0])


def test_the_weight_of_a_module_is_its_buffers() -> None:
    """The weight is made of the buffers, whoever exchanges them. There is no second copy to compute with."""
    module = models.nano().byte_head.gate
    assert isinstance(module, TernaryModule)
    first = module.weight
    assert module.weight is first
    module.packed = module.packed.clone()
    assert module.weight.tensors()["packed"] is module.packed
    assert module.weight.tensors()["exponents"] is first.tensors()["exponents"]
