"""Passes that are recorded and replayed do what passes launched from Python do: the same bits, the same refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed.world import World
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training import loop
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.recording import LAUNCHED_FIRST, records
from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel, Targets, grouped, layers
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject, needs_cuda
from conformance.training import nano
from conformance.training.nano import WHOLE
from conformance.training.no_graphs import FIRST_BYTES, some_losses_are_not_finite, without_graphs
from conformance.training.runs import options, replays


def test_what_a_pass_leaves_can_be_told_later() -> None:
    """With its notes taken back a pass has left votes alone. With the notes left again the next step is that of any pass."""
    lively = replace(models.WHOLE, theta=1, theta_e=1)
    direct, held = models.whole(lively), models.whole(lively)
    for step in (2, 3):
        ids_BT = models.random_ids(3, 24, seed=step)
        direct.backward(direct.losses(ids_BT), rate=models.RATE, step=step)
        direct.step()
        with held.voting.taking(rate=models.RATE, step=step):
            held.objective(held.losses(ids_BT)).backward()  # type: ignore[no-untyped-call]
        left, held.voting.notes = held.voting.notes, []
        before = held.tables(), {name: w.packed.clone() for name, w in held.weights().items()}
        tables = {name: table.clone() for name, table in before[0].items()}
        # The recording holds nothing.
        held.step()
        assert all(torch.equal(tables[name], table) for name, table in held.tables().items())
        assert all(torch.equal(before[1][name], w.packed) for name, w in held.weights().items())
        held.voting.leave([note.on(torch.clone) for note in left], step=step)
        held.step()
        assert not all(torch.equal(tables[name], table) for name, table in held.tables().items())
        for name, want in direct.state().items():
            exact(held.state()[name], want, name)


STEPS = (
    ["refused", "not a number"],
    ["accepted"],
    ["accepted", "refused"],
    ["accepted"],
    ["accepted", "refused"],
    ["refused", "accepted"],
    ["accepted", "not a number"],
    ["not a number", "accepted"],
    ["refused", "refused"],
    ["accepted", "accepted"],
    ["accepted", "validated"],
    ["accepted", "at rate 0"],
    ["accepted", "counted"],
    ["accepted", "loaded", "launched"],
    ["accepted", "launched"],
    ["loaded"],
    ["strayed", "accepted"],
    ["accepted"],
)
"""What happens before each step: passes of recorded passes, and what else a user does. The first passes are launched,
until two were accepted."""

REPLAYED_PASSES = sum(event in FIRST_BYTES for events in STEPS[3:] for event in events) + 1
"""Passes after the first two accepted ones. The pass that follows them is refused."""

REPLAYED_STEPS = 7
"""Steps of one replayed pass, whose notes still wait for the step, and whose rows nothing has written over."""


def do(passes: Passes, what: str, micro_step: int) -> float | None:
    """Do one thing of STEPS, and return the nats of a pass that was accepted."""
    model = passes.model
    ids_BT = models.random_ids(2, 16, seed=micro_step)
    ids_BT[0, 0] = FIRST_BYTES.get(what, FIRST_BYTES["accepted"])
    if what in FIRST_BYTES or what == "at rate 0":
        rate = 0.0 if what == "at rate 0" else models.RATE
        return passes.take(ids_BT, rate=rate, step=micro_step)
    if what == "loaded":
        model.load_state({name: value.clone() for name, value in model.state().items()})
    elif what == "counted":
        Census(model).before_step()
    elif what == "validated":
        with torch.no_grad():
            return float(model.losses(ids_BT.to(model.voting.faults.device))["bytes"])
    elif what == "strayed":
        ids_BT = ids_BT.to(model.voting.faults.device)
        model.objective(model.losses(ids_BT)).backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match=r"outside of model.backward"):
            passes.take(ids_BT, rate=models.RATE, step=micro_step)
        model.drop_gradients()
    else:
        ids_BT = ids_BT.to(model.voting.faults.device)
        losses = model.losses(ids_BT)
        assert model.backward(losses, rate=models.RATE, step=micro_step, accum=passes.accum)
    return None


def compared_with_launched(
    config: ArbConfig, *, accum: int = 1, **options: Any
) -> tuple[RecordedPasses, list[list[str]]]:
    """Take STEPS with passes that are launched and with recorded ones, and compare the two after each step, bit by bit.

    Returns:
        the recorded passes, and what became of each of STEPS.
    """
    launched, recorded = (
        kind(ArbModel(config, seed=3, **options), accum=accum) for kind in (Passes, RecordedPasses)
    )
    outcomes: list[list[str]] = []
    for step, events in enumerate(STEPS):
        outcomes.append([])
        for place, what in enumerate(events):
            nats, again = (do(each, what, 4 * step + place) for each in (launched, recorded))
            assert again == nats, (step, what)
            outcomes[-1].append("nothing" if nats is None else "nats")
        launched.step()
        recorded.step()
        assert state_sha256(recorded.model.state()) == state_sha256(launched.model.state()), (step, events)
        assert int(recorded.model.voting.faults) == int(launched.model.voting.faults) == 0, (step, events)
    assert recorded.model.embedding.table.steps == launched.model.embedding.table.steps
    assert recorded.model.voting.version == launched.model.voting.version > len(STEPS)
    return recorded, outcomes


def interrupted() -> list[float]:
    """Be interrupted while the host waits for the loss."""
    raise KeyboardInterrupt


LIVELY = replace(WHOLE, theta=1, theta_e=1)
"""A model in which most counts are full at each step."""


@pytest.mark.parametrize("accum", [1, 2])
def test_recorded_passes_and_steps_are_those_that_are_launched(
    monkeypatch: pytest.MonkeyPatch, accum: int
) -> None:
    """All of recorded passes and steps but the graphs, on the CPU: buffers, notes, sums, losses that are not finite.

    The first micro-batches are refused: nothing is recorded before a backward pass has run.
    """
    replayed: list[str] = []
    some_losses_are_not_finite(monkeypatch)
    without_graphs(monkeypatch, replayed)
    passes, outcomes = compared_with_launched(LIVELY, accum=accum)
    assert [
        event for events in STEPS for event in events if event in ("accepted", "at rate 0", "validated")
    ] == [
        event
        for events, seen in zip(STEPS, outcomes, strict=True)
        for event, outcome in zip(events, seen, strict=True)
        if outcome == "nats"
    ]
    assert replayed.count("forward") == replayed.count("backward") == REPLAYED_PASSES
    assert replayed.count("step") == (REPLAYED_STEPS if accum == 1 else 0)
    start = ArbModel(LIVELY, seed=3).tables()
    assert sum(not torch.equal(start[name], table) for name, table in passes.model.tables().items()) > 5
    with pytest.raises(ValueError, match=r"ids_BT has shape \(1, 16\), but must have that of all passes"):
        passes.take(models.random_ids(1, 16), rate=models.RATE, step=99)
    for wrong in ({"rate": 128.0}, {"step": -1}, {"step": 2**32}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
            passes.take(models.random_ids(2, 16), **{"rate": 1.0, "step": 99, **wrong})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes._seen_2, "numbers", interrupted)
        passes.take(models.random_ids(2, 16), rate=models.RATE, step=99)
    # Votes were cast, and their notes were not left.
    for again in (passes.step, lambda: passes.take(models.random_ids(2, 16), rate=models.RATE, step=100)):
        with pytest.raises(RuntimeError, match="the model holds part of a pass or step that raised"):
            again()


def both_kinds(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], Passes, RecordedPasses]:
    """Return the list in which replays are noted, and launched and recorded passes of equal models."""
    replayed: list[str] = []
    without_graphs(monkeypatch, replayed)
    launched, recorded = (kind(ArbModel(LIVELY, seed=3), **options) for kind in (Passes, RecordedPasses))
    return replayed, launched, recorded


@pytest.mark.parametrize("accum", [1, 3])
def test_closed_passes_have_no_graphs_and_may_go_on(monkeypatch: pytest.MonkeyPatch, accum: int) -> None:
    """They are closed between two steps, and within one of several passes."""
    replayed, launched, recorded = both_kinds(monkeypatch, accum=accum)
    for step in range(8):
        for passes in (launched, recorded):
            for place in range(accum):
                do(passes, "accepted", accum * step + place)
                if accum > 1 and step == 2 and place == 1:
                    passes.close()
            passes.step()
            if step == 4:
                graphs = [*getattr(passes, "_graphs", ()), *getattr(passes, "_step_graphs", {}).values()]
                passes.close()
                assert not any(hasattr(graph, "replay") for graph in graphs)
        assert state_sha256(recorded.model.state()) == state_sha256(launched.model.state()), step
    # Two are launched. After they were closed they are recorded at once, but for one pass that makes the memory of sums.
    assert replayed.count("forward") == 8 * accum - 2 - (2 if accum > 1 else 0)
    assert replayed.count("step") == (6 if accum == 1 else 0)


@pytest.mark.parametrize("accum", [1, 2])
def test_passes_are_recorded_anew_where_other_weights_are_frozen(
    monkeypatch: pytest.MonkeyPatch, accum: int
) -> None:
    """Also between the passes of a step: what was added to the sum of a weight that is frozen does not vote."""
    replayed, launched, recorded = both_kinds(monkeypatch, accum=accum)
    for step in range(14):
        for passes in (launched, recorded):
            layer = passes.model.layers[0]
            if step in (4, 8):
                layer.requires_grad_(step == 8)
            if accum > 1:
                # One more layer is frozen between the two passes of a step in which others are.
                do(passes, "accepted", 2 * step)
                passes.model.byte_head.requires_grad_(step != 6)
            do(passes, "accepted", 2 * step + 1)
            # Of the last two steps the first is of fewer weights than voted.
            layer.requires_grad_(step not in (4, 5, 6, 7, 12))
            passes.step()
            layer.requires_grad_(step not in (4, 5, 6, 7))
            passes.model.byte_head.requires_grad_(True)
        assert state_sha256(recorded.model.state()) == state_sha256(launched.model.state()), step
    # Of each four passes the first two are launched, and the step of fewer weights.
    assert (replayed.count("forward"), replayed.count("step")) == ((8, 7) if accum == 1 else (19, 0))


def test_recorded_passes_add_to_sums_to_which_others_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that was launched, a weight that was loaded, and weights that these passes alone do not reach, whose means stay."""
    replayed: list[str] = []
    without_graphs(monkeypatch, replayed)
    averaged = replace(LIVELY, average_gradients=True)
    launched, recorded = (kind(ArbModel(averaged, seed=3), accum=4) for kind in (Passes, RecordedPasses))
    latent = torch.randn(2, WHOLE.video_latent, generator=torch.Generator().manual_seed(1))
    targets = Targets(torch.tensor([1, 1]), latent=latent)
    for step in range(6):
        for passes in (launched, recorded):
            model, number = passes.model, 4 * step
            do(passes, "accepted", number)
            if step % 2:
                losses = model.losses(models.random_ids(2, 16, seed=number), targets=targets)
                assert model.backward(losses, rate=models.RATE, step=number + 1, accum=4)
                gate = model.byte_head.gate
                gate.load(gate.ops.to_spec(gate.weight))
            else:
                do(passes, "accepted", number + 1)
            for place in (2, 3):
                do(passes, "accepted", number + place)
            with pytest.raises(
                ValueError, match=r"^accum is 4, but so many passes were taken since the last step"
            ):
                do(passes, "accepted", number + 4)
            passes.step()
        assert state_sha256(recorded.model.state()) == state_sha256(launched.model.state()), step
    mean = recorded.model.video_head.latent_in.average.get_buffer("mean")
    assert mean.any() and replayed.count("forward") == 3 * 4 + 3 * 3 - 2


def test_a_run_closes_its_passes_before_it_leaves_its_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise NCCL would wait for ever for graphs that exchange. A run that is refused or raises closes them too."""
    nano.register(monkeypatch)
    (tmp_path / "text.txt").write_bytes(nano.TEXT)
    told: list[str] = []

    @contextmanager
    def joined() -> Iterator[World]:
        try:
            yield World()
        finally:
            told.append("left")

    monkeypatch.setattr(loop, "joined", joined)
    monkeypatch.setattr(Passes, "close", lambda passes: told.append("closed"))
    loop.train(options(tmp_path / "text.txt", None, save=False, steps=1))
    assert told == ["closed", "left"]
    told.clear()
    monkeypatch.setattr(Passes, "take", lambda *_, **__: interrupted())
    with pytest.raises(KeyboardInterrupt):
        loop.train(options(tmp_path / "text.txt", None, save=False, steps=1))
    assert told == ["closed", "left"]


def test_what_is_recorded_side_by_side_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of gradients, the weights of a stack, and the steps of weights. Several uses of one weight stay in their order.

    Uses vote by themselves where the batch chooses experts, because it has fewer slots than there are.
    """
    for module in (layers, grouped):
        # So that matrices of several shapes are made orthogonal.
        monkeypatch.setattr(module, "MIN_ORTHOGONAL_RANK", 4)
    config = replace(LIVELY, num_experts=80, num_layers=2)
    in_turn, backwards = (ArbModel(config, seed=3) for _ in range(2))
    most: list[int] = []

    def last_first(pieces: Sequence[Callable[[], None]]) -> None:
        most.append(len(pieces))
        for piece in reversed(pieces):
            piece()

    backwards.voting.apart = last_first
    for step in range(2):
        ids_BT = models.random_ids(2, 16, seed=step)
        for model in (in_turn, backwards):
            # So strong that many counts saturate.
            model.backward(model.losses(ids_BT), rate=100.0, step=step)
        counts = [
            {name: weight.trit_accum for name, weight in model.weights().items()}
            for model in (in_turn, backwards)
        ]
        for name, want in counts[0].items():
            exact(counts[1][name], want, name)
        for model in (in_turn, backwards):
            model.step()
    stacks, of_stacks, steps = most[0], most[1 : 1 + most[0]], most[1 + most[0]]
    # Most weights step in one call.
    assert stacks > 3 and max(of_stacks) > 1 and 1 < steps < len(in_turn.ternary_modules())
    assert state_sha256(backwards.state()) == state_sha256(in_turn.state())


def test_at_rate_zero_a_recorded_pass_moves_nothing() -> None:
    passes = RecordedPasses(models.whole())
    before = {name: table.clone() for name, table in passes.model.tables().items()}
    weights = models.state_of(passes.model)
    # None of them is recorded, as there is no GPU here.
    for step in range(LAUNCHED_FIRST + 2):
        assert passes.take(models.random_ids(3, 24), rate=0.0, step=step) is not None
        passes.step()
    assert not models.changed_tensors(weights, passes.model)
    assert all(torch.equal(before[name], table) for name, table in passes.model.tables().items())


def test_what_can_be_recorded() -> None:
    gpu, no_kernels = (Runtime("cuda", backend, torch.bfloat16) for backend in ("triton", "reference"))
    cpu = Runtime("cpu", "triton", torch.float32)
    assert [records(asked, gpu, vote_rule="stochastic") for asked in (None, True, False)] == [
        True,
        True,
        False,
    ]
    for runtime, rule in ((no_kernels, "stochastic"), (cpu, "stochastic"), (gpu, "sign")):
        assert [records(asked, runtime, vote_rule=rule) for asked in (None, False)] == [False, False]
        said = (
            f"cuda_graph is True, .* device {runtime.device}, backend {runtime.backend} and vote rule {rule}"
        )
        with pytest.raises(ValueError, match=said):
            records(True, runtime, vote_rule=rule)


def test_what_keeps_a_pass_from_being_recorded_is_named() -> None:
    """Whatever the number of reasons, the sentence has each."""
    gpu, cpu = (Runtime(kind, "triton", torch.bfloat16) for kind in ("cuda", "cpu"))
    start = "cuda_graph is True, but must be False or None for device"
    only = "only the triton backend on cuda"
    cases: list[tuple[Runtime, dict[str, Any], str]] = [
        (cpu, {}, f"{start} cpu, backend triton: {only} can be recorded"),
        (
            gpu,
            {"adapted": True},
            f"{start} cuda, backend triton and adapters: {only} without adapters can be recorded",
        ),
        (
            gpu,
            {"vote_rule": "stochastic", "exchange": "ranks over gloo"},
            f"{start} cuda, backend triton and vote rule stochastic and ranks over gloo: {only} with stochastic votes "
            "without ranks over gloo can be recorded",
        ),
        (
            gpu,
            {"exchange": "spread rows", "adapted": True},
            f"{start} cuda, backend triton and spread rows and adapters: {only} without spread rows "
            "without adapters can be recorded",
        ),
    ]
    for runtime, given, sentence in cases:
        assert not records(None, runtime, **given)
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            records(True, runtime, **given)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_of_passes_and_steps_are_those_that_are_launched(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, accum: int
) -> None:
    """As on the CPU, with CUDA graphs."""
    needs_cuda(subject, f"graphs of passes and steps, {dtype}")
    some_losses_are_not_finite(monkeypatch)
    replayed = replays(monkeypatch)
    with values_vouched_for():
        compared_with_launched(LIVELY, accum=accum, ops=subject.ops, device=subject.device, dtype=dtype)
    assert len(replayed) == 2 * REPLAYED_PASSES + (REPLAYED_STEPS if accum == 1 else 0)
