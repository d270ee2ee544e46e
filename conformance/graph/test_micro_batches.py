"""The micro-batches of a step vote as one batch: their gradients are summed, and the sum votes once with the step.

Legend: M rows of activations, N outputs, K inputs.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops
from arbitor.reference.config import SIGN_VOTES, with_fields
from arbitor.reference.graph import ArbModel, TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from conformance.compare import alike, exact
from conformance.distributed.oracle import watch_totals
from conformance.graph import models
from conformance.graph.test_voting_torn import failing_ops

RATE = models.RATE

SUMMED = replace(models.WHOLE, composite_codes=0, composite_inner=1280, width=36, head_inner=36)
"""Every module but composites, whose losses are means over chosen positions. Some matrices are made orthogonal."""


def ids(number: int) -> Tensor:
    """Return the windows of a micro-batch."""
    return models.random_ids(2, 24, seed=number)


def take(model: ArbModel, number: int, *, accum: int, rate: float = RATE, **options: Any) -> bool:
    """Take the pass of a micro-batch."""
    return model.backward(model.losses(ids(number)), rate=rate, step=number, accum=accum, **options)


def same_state(one: ArbModel, other: ArbModel) -> None:
    """Compare all state of two models, and their faults, bit by bit."""
    exact(tuple(one.state().values()), tuple(other.state().values()))
    assert int(one.voting.faults) == int(other.voting.faults)


def made_by_hand(kind: str, **context: Any) -> tuple[Any, Callable[[Tensor], Tensor], tuple[int, int]]:
    """Return a layer, what it computes, and the widths of its input and its output. Its products are exact for whole numbers."""
    parts = models.quick_context(**context)
    if kind == "linear":
        return (layer := TernaryLinear(parts, 33, 40)), layer, (33, 40)
    if kind == "plain linear":
        return (layer := TernaryLinear(parts, 29, 17)), layer, (29, 17)
    if kind == "norm":
        # Of rows of one magnitude the root mean square is a power of two.
        return (norm := TernaryRMSNorm(parts, 24, frozen=False)), lambda x: norm(x.sign() * 4), (24, 24)
    stack = TernaryGroupedLinear(parts, 2, 33, 34)
    return stack, lambda x: stack(x, torch.arange(len(x)) % 2), (33, 34)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average_gradients", [False, True])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("kind", ["linear", "plain linear", "norm", "experts"])
def test_where_sums_are_exact_micro_batches_are_one_batch(
    kind: str, dtype: torch.dtype, *, average_gradients: bool, undo: bool
) -> None:
    """To the bit, over three steps, a mean of gradients among it: it is led once a step."""

    def trained(batches: Sequence[Sequence[Tensor]]) -> tuple[Any, ...]:
        layer, compute, _ = made_by_hand(kind, dtype=dtype, average_gradients=average_gradients)
        voting = layer.voting
        for step in range(3):
            for place, (x, grad) in enumerate(batches):
                # The votes draw with the number of the last micro-batch.
                number = 3 * step + 2 - (len(batches) - 1 - place)
                with voting.taking(rate=2.0, step=number, accum=len(batches), undo=undo):
                    compute(x.to(dtype)).backward(grad.to(dtype))
            voting.vote_sums()
            layer.step_weight()
        average = getattr(layer, "average", None)
        return layer.weight, tuple(average.tables().values()) if average else ()

    _, _, (num_inputs, num_outputs) = made_by_hand(kind)
    x = models.integers(12, num_inputs, seed=1, high=2)
    x = torch.where(x == 0, 1.0, x) if kind == "norm" else x
    grad = models.integers(12, num_outputs, seed=2, high=2)
    whole, parts = trained([(x, grad)]), trained(list(zip(x.chunk(3), grad.chunk(3), strict=True)))
    exact(parts, whole)
    assert whole[0].trit_accum.any()
    assert bool(whole[1]) is (average_gradients and kind in ("linear", "experts"))


def test_gradients_of_micro_batches_are_alike_those_of_one_batch() -> None:
    """In a model of every module. Losses are means over windows, so that the sum of A of them is A times that of the batch."""
    whole, parts = models.whole(SUMMED), models.whole(SUMMED)
    totals, of_parts = watch_totals(whole), watch_totals(parts)
    whole.backward(whole.losses(torch.cat([ids(number) for number in range(2, 6)])), rate=RATE, step=5)
    for number in range(2, 6):
        take(parts, number, accum=4)
    parts.voting.vote_sums()
    assert totals.keys() == of_parts.keys()
    for name, total in totals.items():
        alike(of_parts[name] / 4, total, name)


def test_a_weight_votes_once_a_step_and_chosen_rows_in_each_pass() -> None:
    """At the rate of the step, and at what each micro-batch has of it, whatever the uses of a weight in a pass."""
    noting, rates = models.ops_noting_rates()
    model = models.whole(with_fields(models.WHOLE, orthogonal_steps=0, max_moe_iters=3), ops=noting)
    rates.clear()
    for number in range(2, 6):
        take(model, number, accum=4)
    tables = {m.tensor_id for m in model.ternary_modules().values() if isinstance(m, TernaryEmbedding)}
    assert rates and rates.keys() <= tables
    assert all(set(of) == {RATE / 2} and len(of) % 4 == 0 for of in rates.values())
    model.step()
    matrices = {tensor_id: of for tensor_id, of in rates.items() if tensor_id not in tables}
    assert len(matrices) > 30 and all(of == [RATE] for of in matrices.values())


def test_experts_that_a_batch_chose_have_their_part_in_each_pass() -> None:
    """Three uses of a pass, of which some have fewer slots than experts, and what all others leave."""
    noting, rates = models.ops_noting_rates()
    model = models.whole(ops=noting)
    experts = TernaryGroupedLinear(model.context, 4, 16, 8)
    experts.uses = 3
    rates.clear()
    for number, slots in enumerate(([1, 5, 5], [1, 1, 5], [1, 1, 1])):
        with model.voting.taking(rate=RATE, step=number, accum=3):
            for count in slots:
                experts(torch.ones(count, 16), torch.arange(count) % 4).sum().backward()
    part = torch.tensor(torch.tensor(RATE).item() / (3 * math.sqrt(3)), dtype=torch.float32).item()
    rate = [torch.tensor(each, dtype=torch.float32).item() for each in rates[experts.tensor_id]]
    assert rate == [part] * 6
    rates.clear()
    model.voting.vote_sums()
    # The most that the others had in a pass.
    assert rates[experts.tensor_id] == [RATE * 2 / 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("undo", [False, True])
def test_every_sum_is_rounded_to_the_dtype_of_the_gradients(dtype: torch.dtype, *, undo: bool) -> None:
    made: list[Tensor] = []

    def note(grad_NK: Tensor, **options: Any) -> Tensor:
        made.append(grad_NK.clone())
        return ops.orthogonalize(grad_NK, **options)

    parts = models.quick_context(dtype=dtype, ops=models.ops_with(orthogonalize=note))
    layer = TernaryLinear(parts, 32, 32)
    # To 1 bfloat16 can add none of the others, of which each is half of its last place. Their sum it could.
    sizes = [1.0, 2**-8, 2**-8, 2**-8]
    for number, size in enumerate(sizes):
        with parts.voting.taking(rate=1.0, step=number, accum=4, undo=undo):
            layer(torch.ones(1, 32, dtype=dtype)).backward(torch.full((1, 32), size, dtype=dtype))
    parts.voting.vote_sums()
    (grad,) = made
    want = 1.0 if dtype is torch.bfloat16 else sum(sizes)
    exact(grad, torch.full((32, 32), want, dtype=dtype))


@pytest.mark.parametrize("refused", [0, 1, 2])
@pytest.mark.parametrize("undo", [False, True])
def test_a_loss_that_is_not_finite_adds_nothing(refused: int, *, undo: bool) -> None:
    """The sum of the others votes, also where the last one is refused."""
    model, plain = models.whole(SUMMED), models.whole(SUMMED)
    for number in range(3):
        if number == refused:
            loss = model.loss(ids(number)) * math.nan
            assert not model.backward(loss, rate=RATE, step=number, accum=3, undo=undo)
        else:
            for each in (model, plain):
                assert take(each, number, accum=3, undo=undo)
    for each in (model, plain):
        each.step()
    same_state(model, plain)


@pytest.mark.parametrize("average_gradients", [False, True])
def test_a_step_to_which_no_micro_batch_has_added_changes_nothing(*, average_gradients: bool) -> None:
    model = models.whole(replace(SUMMED, average_gradients=average_gradients))
    before = deepcopy(tuple(model.state().values()))
    for number, rate in enumerate((RATE, 0.0)):
        broken = math.nan if rate else 1.0
        assert model.backward(model.loss(ids(number)) * broken, rate=rate, step=number, accum=2) is (not rate)
    model.step()
    exact(tuple(model.state().values()), before)


def test_a_pass_at_rate_0_adds_nothing_and_the_sum_votes_at_the_rate_of_the_others() -> None:
    model, plain = models.whole(SUMMED), models.whole(SUMMED)
    for each in (model, plain):
        take(each, 0, accum=3)
    for rate in (0.0, torch.tensor(0.0)):
        model.backward(model.losses(ids(1)), rate=rate, step=1, accum=3)
    # A rate on the device counts as the number.
    model.backward(model.losses(ids(2)), rate=torch.tensor(RATE), step=2, accum=3)
    take(plain, 2, accum=3)
    for each in (model, plain):
        each.step()
    same_state(model, plain)


def test_a_row_that_is_not_finite_is_one_fault_of_the_step() -> None:
    """It casts no votes in the sum, whichever pass it came in, and the other rows do."""
    parts = models.quick_context()
    layer = TernaryLinear(parts, 12, 4)
    for number in range(3):
        grad = torch.ones(5, 4)
        if number < 2:
            grad[:, 1] = math.inf
        with parts.voting.taking(rate=1.0, step=number, accum=3):
            layer(torch.ones(5, 12)).backward(grad)
        assert parts.voting.faults == 0
    parts.voting.vote_sums()
    assert parts.voting.faults == 1
    assert [bool(row.any()) for row in layer.weight.trit_accum] == [True, False, True, True]


def test_the_memory_of_sums_is_freed_with_the_step() -> None:
    """There is a sum for each matrix and norm that votes, of the size of its weight, and none after the step."""
    model = models.whole(SUMMED)
    take(model, 2, accum=2)
    take(model, 3, accum=2, undo=False)
    held = model.voting.sums
    assert held is not None and held.count == 2 and model.voting.waits
    size = sum(total.grad_NK.numel() for _, total in held.totals.values())
    tables = sum(m.weight.packed.numel() * 5 for m in model.ternary_modules().values())
    assert size > 0 and size < tables
    seen = [weakref.ref(total.grad_NK) for _, total in held.totals.values()]
    del held
    model.step()
    gc.collect()
    assert model.voting.sums is None and not any(each() is not None for each in seen)


def test_a_pass_that_can_be_undone_leaves_earlier_sums_alone() -> None:
    """Each call of an op in the second pass raises once. Then the pass is taken as if none had raised."""
    failing, calls = failing_ops()
    config = replace(SUMMED, num_layers=1)
    model = models.whole(config, ops=failing)
    plain = models.whole(config)
    for each in (model, plain):
        take(each, 2, accum=3)
    loss = model.objective(model.losses(ids(3)))
    held = model.voting.sums
    assert held is not None
    before = {key: total.grad_NK.clone() for key, (_, total) in held.totals.items()}
    raised = 0
    for fail in range(10_000):
        calls.update(made=0, fail=fail)
        try:
            with model.voting.taking(rate=RATE, step=3, accum=3):
                loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        except (RuntimeError, KeyboardInterrupt):
            raised += 1
        else:
            break
        assert model.voting.sums is held and held.count == 1 and not model.voting.torn
        for key, (_, total) in held.totals.items():
            exact(total.grad_NK, before[key])
    assert raised > 30
    calls["fail"] = -1
    take(plain, 3, accum=3)
    for each in (model, plain):
        each.step()
    same_state(model, plain)


def failing(fail: int) -> tuple[Any, dict[str, int]]:
    """Return reference ops of which the call of `linear_weight_grad` numbered `fail` raises."""
    calls = {"made": 0, "fail": fail}

    def run(*args: Any, **kwargs: Any) -> Any:
        calls["made"] += 1
        if calls["made"] - 1 == calls["fail"]:
            raise RuntimeError("planted")
        return ops.linear_weight_grad(*args, **kwargs)

    return models.ops_with(linear_weight_grad=run), calls


@pytest.mark.parametrize(("fail", "torn"), [(0, False), (5, True)])
def test_a_pass_that_cannot_be_undone_leaves_the_model_torn_once_it_has_added(
    fail: int, *, torn: bool
) -> None:
    """A model of which nothing was changed goes on. A torn one forgets its sums when a state is loaded."""
    config = with_fields(models.NANO, orthogonal_steps=0)
    failing_ops, calls = failing(-1)
    model, plain = ArbModel(config, ops=failing_ops, seed=3), ArbModel(config, seed=3)
    start = deepcopy(model.state())
    take(model, 0, accum=2)
    calls.update(made=0, fail=fail)
    with pytest.raises(RuntimeError, match="planted"):
        take(model, 1, accum=2, undo=False)
    calls["fail"] = -1
    assert model.voting.torn is torn
    if torn:
        with pytest.raises(RuntimeError, match="must be loaded anew"):
            model.step()
        model.load_state(start)
        assert not model.voting.waits
        take(model, 0, accum=2)
    take(model, 1, accum=2)
    for number in range(2):
        take(plain, number, accum=2)
    for each in (model, plain):
        each.step()
    same_state(model, plain)


def test_votes_of_sums_that_raise_leave_the_model_torn() -> None:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    model = models.nano(ops=models.ops_with(accumulate_gradients=raises), width=36, head_inner=36)
    take(model, 0, accum=2)
    with pytest.raises(RuntimeError, match="planted"):
        model.step()
    for again in (model.step, lambda: take(model, 1, accum=2)):
        with pytest.raises(RuntimeError, match="must be loaded anew"):
            again()


def test_what_is_loaded_takes_the_sums_away() -> None:
    """All of them with a model, and that of a weight with the weight."""
    model = models.whole(SUMMED)
    state = deepcopy(model.state())
    take(model, 2, accum=3)
    gate = model.byte_head.gate
    held = model.voting.sums
    assert held is not None and (gate.tensor_id, 0) in held.totals
    gate.load(ops.to_spec(gate.weight))
    assert model.voting.sums is not None
    assert held.totals.keys() - model.voting.sums.totals.keys() == {(gate.tensor_id, 0)}
    model.load_state(state)
    assert model.voting.sums is None
    model.step()
    exact(tuple(model.state().values()), tuple(state.values()))
    # Nor do they say any more what the next passes must be.
    take(model, 2, accum=2)


def test_a_model_that_was_moved_or_copied_goes_on_with_its_sums() -> None:
    """Its weights lie elsewhere then."""
    plain = models.whole(SUMMED)
    take(plain, 2, accum=2)
    moved, copied = deepcopy(plain), deepcopy(plain)
    moved._apply(torch.clone)
    for each in (plain, moved, copied):
        take(each, 3, accum=2)
        each.step()
    same_state(moved, plain)
    same_state(copied, plain)
    last = deepcopy(plain)
    for each in (plain, last):
        take(each, 4, accum=2)
    last._apply(torch.clone)
    for each in (plain, last):
        each.step()
    same_state(last, plain)


def test_the_sign_rule_counts_each_micro_batch() -> None:
    """Its votes have no rate to share, and their sums no size."""
    config = with_fields(models.NANO, **SIGN_VOTES)
    several, single = ArbModel(config, seed=3), ArbModel(config, seed=3)
    for number in range(3):
        take(several, number, accum=3)
        take(single, number, accum=1)
    assert not several.voting.totals
    for each in (several, single):
        each.step()
    same_state(several, single)


def test_passes_that_do_not_make_a_step_are_refused() -> None:
    """Before anything ran: with them gone the step is what it would have been."""
    model, plain = models.nano(), models.nano()
    for each in (model, plain):
        take(each, 0, accum=2)
    for wrong in (1, 3):
        with pytest.raises(
            ValueError, match=f"^accum is {wrong}, but must be 2, as in the passes since the last step"
        ):
            take(model, 1, accum=wrong)
    # One at rate 0 is none of them.
    assert take(model, 1, accum=1, rate=0.0)
    for wrong, error in ((0, ValueError), (2**32, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^accum is"):
            take(model, 1, accum=wrong)  # type: ignore[arg-type]
    for each in (model, plain):
        take(each, 1, accum=2)
    with pytest.raises(ValueError, match=r"^accum is 2, but so many passes were taken since the last step"):
        take(model, 2, accum=2)
    for each in (model, plain):
        each.step()
        # The next step may have another number.
        take(each, 3, accum=1)
        each.step()
    same_state(model, plain)


def test_passes_that_added_to_no_sum_make_a_step_too() -> None:
    """Those that voted by themselves, those of rows that the batch chose alone, and those whose sums have voted already."""
    by_itself, chosen, voted, signs = models.nano(), models.nano(), models.nano(), models.nano(**SIGN_VOTES)
    for module in chosen.ternary_modules().values():
        module.requires_grad_(isinstance(module, TernaryEmbedding))
    for model, accum in ((by_itself, 1), (chosen, 2), (voted, 2), (signs, 2)):
        for number in range(2):
            take(model, number, accum=accum)
        if model is voted:
            assert model.voting.totals
            model.voting.vote_sums()
        assert not model.voting.totals
        before = deepcopy(tuple(model.state().values()))
        with pytest.raises(ValueError, match=f"^accum is 3, but must be {accum}, as in the passes since"):
            take(model, 2, accum=3)
        if accum == 2:
            with pytest.raises(
                ValueError, match=r"^accum is 2, but so many passes were taken since the last"
            ):
                take(model, 2, accum=2)
        exact(tuple(model.state().values()), before)
        if model is by_itself:
            # There may be any number of these.
            take(model, 2, accum=1)
        model.step()
        take(model, 3, accum=3)


@pytest.mark.parametrize("undo", [False, True])
def test_an_interrupt_loses_no_votes_of_a_pass(monkeypatch: pytest.MonkeyPatch, *, undo: bool) -> None:
    """Even when all has voted: a pass is undone, or the model is torn, so that no vote stays of which a step does not know."""
    model, plain = models.nano(), models.nano()
    for each in (model, plain):
        take(each, 0, accum=2)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for method in ("leave", "hold"):
        with monkeypatch.context() as patch:
            patch.setattr(model.voting, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                take(model, 1, accum=2, undo=undo)
        if not undo:
            assert model.voting.torn
            return
    for each in (model, plain):
        take(each, 1, accum=2)
        each.step()
    same_state(model, plain)


def test_sums_do_not_vote_twice_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last vote was counted."""
    model = models.nano()
    take(model, 0, accum=2)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.voting, "leave", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.step()
    with pytest.raises(RuntimeError, match="must be loaded anew"):
        model.step()


def test_a_weight_that_was_frozen_before_the_step_stays_as_it_is() -> None:
    """Its sum is dropped, for good. One that moves again before the step votes."""
    model, plain = models.whole(SUMMED), models.whole(SUMMED)
    for each in (model, plain):
        take(each, 2, accum=2)
    before, head = deepcopy(model.state()), model.byte_head
    model.layers[0].requires_grad_(False)
    head.requires_grad_(False)
    head.requires_grad_(True)
    for each in (model, plain):
        each.step()
    model.layers[0].requires_grad_(True)
    model.step()
    expected = {
        name: before[name] if name.startswith("layers.0.") else state for name, state in plain.state().items()
    }
    exact(tuple(model.state().values()), tuple(expected.values()))
    assert any(
        name.startswith("layers.0.") and bool(part.trit_accum.any()) for name, part in plain.weights().items()
    )
