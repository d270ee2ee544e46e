"""A pass or a step that raises leaves no vote behind, or leaves a model that says that it is torn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from arbitor.reference import ops
from arbitor.reference.graph import TernaryEmbedding
from conformance.compare import exact
from conformance.graph import models
from conformance.graph.test_voting import context


def failing_ops() -> tuple[Any, dict[str, int]]:
    """Return the reference ops, and a counter of their calls. The call numbered `fail` raises after it ran."""
    calls = {"made": 0, "fail": -1}

    def watched(op: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            calls["made"] += 1
            if calls["made"] - 1 == calls["fail"]:
                raise (KeyboardInterrupt if calls["fail"] % 2 else RuntimeError)("planted")
            return result

        return run

    return models.ops_with(**{name: watched(getattr(ops, name)) for name in ops.__all__}), calls


@pytest.mark.parametrize("vote_rule", ["stochastic", "sign"])
def test_a_pass_that_raises_leaves_nothing_wherever_it_raises(vote_rule: str) -> None:
    """Every call of an op in a backward pass raises once, also after it has written. Then a pass is taken as if none had raised."""
    small = models.WHOLE if vote_rule == "stochastic" else replace(models.NANO, max_moe_iters=2)
    config = replace(small, num_layers=1, vote_rule=vote_rule)
    failing, calls = failing_ops()
    model, plain = (models.whole(config, ops=each) for each in (failing, ops))
    ids_BT = models.random_ids(1, 8)
    for each in (model, plain):
        # The votes and notes of an earlier micro-batch must stay.
        each.backward(each.losses(models.random_ids(2, 12, seed=1)), rate=models.RATE, step=2)
    model.voting.faults += 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    notes = list(model.voting.notes)
    loss = model.objective(model.losses(ids_BT))

    def vote() -> None:
        with model.voting.taking(rate=models.RATE, step=3, size=2):
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]

    raised = 0
    for fail in range(10_000):
        calls.update(made=0, fail=fail)
        try:
            vote()
        except (KeyboardInterrupt, RuntimeError) as error:
            assert str(error) == "planted"
            raised += 1
        else:
            break
        changed = [
            name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        assert not changed, f"call {fail} raised"
        assert model.voting.faults == 3 and model.voting.notes == notes and not model.voting.active
    assert raised > 30
    with plain.voting.taking(rate=models.RATE, step=3, size=2):
        plain.objective(plain.losses(ids_BT)).backward()  # type: ignore[no-untyped-call]
    calls["fail"] = -1
    for each in (model, plain):
        each.step()
    exact(tuple(model.state().values()), tuple(plain.state().values()))


@pytest.mark.parametrize("fail", [0, 40])
def test_a_pass_that_cannot_be_undone_leaves_the_model_torn(fail: int) -> None:
    """A model is torn unless nothing had voted, when there is nothing to undo. Loading a state makes it whole."""
    failing, calls = failing_ops()
    model = models.nano(ops=failing)
    ids_BT, start = models.random_ids(2, 12), {name: value.clone() for name, value in model.state().items()}
    weights, loss = models.state_of(model), model.loss(ids_BT)
    calls.update(made=0, fail=fail)
    with pytest.raises(RuntimeError, match="planted"):
        model.backward(loss, rate=models.RATE, step=0, undo=False)
    calls["fail"] = -1
    assert bool(models.changed_tensors(weights, model)) is model.voting.torn is (fail > 0)
    if model.voting.torn:
        for call in (
            model.step,
            lambda: model.backward(model.loss(ids_BT), rate=1.0, step=0),
            lambda: model.voting.taking(rate=1.0, step=0).__enter__(),
        ):
            with pytest.raises(RuntimeError, match="must be loaded anew"):
                call()
        model.load_state(start)
    assert model.backward(model.loss(ids_BT), rate=models.RATE, step=0)
    model.step()


def test_a_step_that_raises_leaves_the_model_torn() -> None:
    failing, calls = failing_ops()
    model = models.nano(ops=failing)
    start = model.state_dict()
    model.backward(model.loss(models.random_ids(2, 12)), rate=models.RATE, step=0)
    calls.update(made=0, fail=2)
    with pytest.raises(RuntimeError, match="planted"):
        model.step()
    with pytest.raises(RuntimeError, match="must be loaded anew"):
        model.step()
    model.load_state_dict(start)
    model.step()


def test_passes_do_not_nest() -> None:
    voting = models.nano().voting
    with (
        voting.taking(rate=1.0, step=0),
        pytest.raises(RuntimeError, match="a pass is open"),
        voting.taking(rate=1.0, step=1),
    ):
        pass
    assert not voting.active


def test_a_pass_copies_a_weight_twice_at_most() -> None:
    """However often rows of it vote."""
    parts = context()
    table = TernaryEmbedding(parts, 20, 12)
    with parts.voting.taking(rate=1.0, step=0) as taken:
        for turn in range(30):
            table(torch.arange(turn % 4, 20, 4)).sum().backward()  # type: ignore[no-untyped-call]
        copied = sum(copy.numel() for tensor, _, copy in taken._kept if tensor is table.weight.trit_accum)
    assert 20 * 12 <= copied <= 2 * 20 * 12
