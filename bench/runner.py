"""One case: check it, build it, time it, and write down what came out."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from arbitor.reference import ops as reference_ops
from arbitor.reference.config import NUM_BYTES
from arbitor.reference.types import TernaryWeight
from bench import cases, gate, machine, regression, rooflines, timing, train_step
from bench.cases import ALL_OURS, OURS, OURS_ON_TRITON, REFERENCE, TRAIN_FAMILY, Case
from bench.inputs import CLOCK, INPUTS, RATE, Arguments, Maker
from bench.peers import Peer, peers_of

BUDGET_SECONDS = 0.2
"""Device time that the rounds of a case may take."""

PATIENCE_SECONDS = 1.0
"""Device time that 50 rounds may take; a slower case gets fewer."""

REFERENCE_SHARE = 0.3
"""Share of both that the reference gets, for it is the oracle and no competitor; and everything on a CPU."""

EAGER_ROUNDS = 50
"""Rounds of the eager time beside a graph's, at most."""

MEMORY_RESERVE = 2 * 2**30
"""Bytes of GPU memory to leave free."""


@dataclass
class Session:
    """What the cases of a run share.

    Attributes:
        timer:    of this device.
        ceilings: of this device, or None for a CPU.
        gate:     checks before numbers.
        deadline: host time after which no further case starts.
        log:      file that every result is appended to at once, or None.
        baseline: stored results that no case may be slower than, or None where nothing is compared by the suite's own margins.
        rows:     results so far.
    """

    timer: timing.Timer
    ceilings: rooflines.Ceilings | None
    gate: gate.Gate
    deadline: float
    log: Path | None = None
    baseline: regression.Baseline | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(
        cls, *, budget: float, log: Path | None, baseline: regression.Baseline | None = None
    ) -> Session:
        """Return the session of this machine, its ceilings measured."""
        began = time.monotonic()
        # What start-up left is not searched again after every case.
        gc.freeze()
        timer = timing.GpuTimer() if machine.on_gpu() else timing.HostTimer()
        ceilings = rooflines.measure(timer, machine.device_name())
        return cls(timer, ceilings, gate.Gate(timer.device), began + budget, log, baseline)


def measure(benchmark: Any, session: Session, case_id: str) -> None:
    """Time a case with the pytest-benchmark fixture; its `extra_info` is the result."""
    case = cases.all_cases()[case_id]
    if time.monotonic() > session.deadline:
        pytest.skip("the time of --bench-budget is spent")
    benchmark.group = f"{case.row.name} {case.shape}"
    # A result is known by its case, in whichever file and function the case ran.
    benchmark.name = benchmark.fullname = case.id
    try:
        with session.timer.current(), on_path_of(case):
            _measure(benchmark, session, case)
    except gate.Red as red:
        pytest.fail(f"no number: {red}", pytrace=False)
    finally:
        session.timer.free()


@contextmanager
def on_path_of(case: Case) -> Iterator[None]:
    """Keep ops to Triton's kernels within the block, for a case that says so."""
    with pytest.MonkeyPatch.context() as patch:
        if case.implementation == OURS_ON_TRITON:
            patch.setenv("ARB_PATH", "triton")
        yield


def _measure(benchmark: Any, session: Session, case: Case) -> None:
    peer = next((peer for peer in peers_of(case.row.name) if peer.name == case.implementation), None)
    if case.implementation in ALL_OURS:
        for op in case.row.gates():
            session.gate.ours(op, gate.called_with(case, op))
    elif peer is not None:
        session.gate.peer(case.row.name, peer, case.sizes)
    _refuse_without_memory(session, case)
    call = _call(session, case, peer)
    capturable = case.row.capturable and (peer.capturable if peer else case.implementation in ALL_OURS)
    share = REFERENCE_SHARE if case.implementation == REFERENCE or not machine.on_gpu() else 1.0
    if cases.interpreted() and case.implementation in ALL_OURS:
        # That the code runs is all there is to learn.
        share = 0.0
    timed = _time(benchmark, session.timer, call, capturable=capturable, share=share)
    # With --benchmark-disable it ran once, and there is no time.
    if timed is None:
        return
    info = timed.info
    row = {
        "op": case.row.name,
        "family": case.row.family,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "implementation": case.implementation,
        "note": (peer.note if peer else cases.NOTES.get(case.row.name, "")) or None,
        "gate": "passed" if case.implementation in ALL_OURS or (peer and peer.checked) else None,
        "recorded_passes": _replays_passes(case),
        **info,
        **_against_ceilings(session.ceilings, case, peer, info["p50_us"]),
    }
    benchmark.extra_info.update(row)
    session.rows.append(row)
    if session.log is not None:
        with session.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
    # Peers are not ours to keep fast, and no round of an interpreter says anything.
    if session.baseline is None or peer is not None or share == 0.0:
        return
    slower = session.baseline.why_slower(case.id, row, timed.again)
    if slower is not None:
        pytest.fail(slower, pytrace=False)


def _replays_passes(case: Case) -> bool:
    """Whether a case is a train step whose passes are replayed from CUDA graphs, which the host only starts."""
    return machine.on_gpu() and case.row.family == TRAIN_FAMILY and case.implementation != REFERENCE


def _refuse_without_memory(session: Session, case: Case) -> None:
    """Skip a case whose inputs and results alone don't fit."""
    if session.timer.device.type != "cuda" or case.row.family != "update":
        return
    bytes_per_weight = 20 if case.implementation not in (*ALL_OURS, REFERENCE) else 8
    need = bytes_per_weight * case.sizes["N"] * case.sizes["K"] + MEMORY_RESERVE
    free = torch.cuda.mem_get_info()[0]
    if need > free:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free")


def _call(session: Session, case: Case, peer: Peer | None) -> Callable[[], Any]:
    """Return the call to time."""
    if case.row.family == TRAIN_FAMILY:
        ids_BT = _ids(session, case)
        return peer.build(((case.shape, ids_BT), {}), case.sizes) if peer else _train_step(case, ids_BT)
    is_step = case.row.name in ("update_step", cases.ORTHOGONAL)
    name = "accumulate_gradient" if is_step else case.row.name
    arguments = INPUTS[name](Maker(session.timer.device, f"{case.row.name} {case.shape}"), case.sizes)
    if peer is not None:
        return peer.build(arguments, case.sizes)
    ops = op_set(case.implementation)
    if case.implementation in ALL_OURS and name != "from_spec":
        arguments = _in_device_layout(ops, arguments)
    args, kwargs = arguments
    op = getattr(ops, name)
    if is_step:
        return _update_step(ops, args[0], args[1], orthogonal=case.row.name == cases.ORTHOGONAL)
    return lambda: op(*args, **kwargs)


def op_set(implementation: str) -> ModuleType:
    """Return the ops of `ours` or of the `reference`."""
    if implementation == REFERENCE:
        return reference_ops
    from arbitor.optimized import ops

    return ops


def _in_device_layout(ops: ModuleType, arguments: Arguments) -> Arguments:
    """Return arguments with every weight in the layout of an op set; a weight named twice stays one object."""
    moved: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        if not isinstance(value, TernaryWeight):
            return value
        return moved.setdefault(id(value), ops.from_spec(value))

    args, kwargs = arguments
    return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}


def _update_step(ops: ModuleType, weight: Any, grad: torch.Tensor, *, orthogonal: bool) -> Callable[[], Any]:
    """Return what training does with a gradient: count its votes, then step, both in place.

    Args:
        orthogonal: whether the gradient is made orthogonal first, in bfloat16.
    """

    def step() -> Any:
        voting = ops.orthogonalize(grad.to(torch.bfloat16)) if orthogonal else grad
        ops.accumulate_gradient(weight, voting, RATE, **CLOCK, out=weight)
        return ops.apply_step(weight, out=weight)

    return step


def _ids(session: Session, case: Case) -> torch.Tensor:
    """Return random bytes for a train step."""
    shape = (case.sizes["B"], case.sizes["T"])
    return Maker(session.timer.device, "train_step").integers(0, NUM_BYTES - 1, shape, torch.int64)


def _train_step(case: Case, ids_BT: torch.Tensor) -> Callable[[], Any]:
    """Return one step of training: ours on a GPU from recorded passes, else launched from Python."""
    record = case.implementation == OURS and ids_BT.device.type == "cuda"
    ops = op_set(case.implementation)
    step = train_step.step_of(case.row.name, case.shape, ops, ids_BT, record=record)

    def checked() -> None:
        if not step():
            raise gate.Red(f"the loss of {case.row.name} {case.shape} is not finite")

    return checked


@dataclass(frozen=True)
class Timed:
    """The times of a call, and what times it again.

    Attributes:
        info:  modes, quantiles and rounds, as they are stored.
        again: from a mode, p20, p50 and p80 of as many rounds more.
    """

    info: dict[str, Any]
    again: Callable[[str], dict[str, float]]


def _time(
    benchmark: Any, timer: timing.Timer, call: Callable[[], Any], *, capturable: bool, share: float
) -> Timed | None:
    """Return the times of a call: of the device alone where it can be recorded in a graph, and with its launch.

    `share` of the usual time is spent on it; with none, one round and no warm-up.
    """
    if share == 0.0:
        return _once(benchmark, timer, call)
    warm = timing.warm_up(timer, call)
    replay, refused = None, None
    if capturable and timer.device.type == "cuda":
        try:
            replay = timer.record(call)
        except Exception as error:
            # Whatever a peer or torch raises here, the eager time remains.
            refused = f"{type(error).__name__}: {error}".splitlines()[0]
    budget, patience = BUDGET_SECONDS * share, PATIENCE_SECONDS * share
    ways = {"eager": (call, timer.idle, timing.rounds_for(warm, budget=budget, patience=patience))}
    eager = None
    if replay is not None:
        rounds = min(EAGER_ROUNDS, timing.rounds_for(warm, budget=budget, patience=patience / 2))
        ways["eager"] = (call, timer.idle, rounds)
        eager = timing.quantiles_us(timing.sample(timer, call, ready=timer.idle, rounds=rounds))
        warm = timing.warm_up(timer, replay)
        ways["graph"] = (replay, timer.behind, timing.rounds_for(warm, budget=budget, patience=patience))
    mode = "graph" if replay else "eager"
    timed_call, ready, rounds = ways[mode]
    benchmark.pedantic(timed_call, setup=ready, rounds=rounds)
    if benchmark.stats is None:
        return None
    times = timing.quantiles_us(benchmark.stats.stats.data)
    info = {
        "mode": mode,
        **times,
        "reps": rounds,
        "graph": times if replay else None,
        "eager": eager if replay else times,
        "no_graph": refused,
    }

    def again(mode: str) -> dict[str, float]:
        timed_call, ready, rounds = ways[mode]
        return timing.quantiles_us(timing.sample(timer, timed_call, ready=ready, rounds=rounds))

    return Timed(info, again)


def _once(benchmark: Any, timer: timing.Timer, call: Callable[[], Any]) -> Timed | None:
    """Return the time of a single call, cold."""
    benchmark.pedantic(call)
    if benchmark.stats is None:
        return None
    times = timing.quantiles_us(benchmark.stats.stats.data)
    info = {"mode": "eager", **times, "reps": 1, "graph": None, "eager": times, "no_graph": None}
    return Timed(
        info, lambda mode: timing.quantiles_us(timing.sample(timer, call, ready=timer.idle, rounds=1))
    )


def _against_ceilings(
    ceilings: rooflines.Ceilings | None, case: Case, peer: Peer | None, p50_us: float
) -> dict[str, Any]:
    """Return bytes, operations and the rates reached, against what the machine can do at most."""
    row, sizes = case.row, case.sizes
    if row.bytes_min is None or row.ops_min is None:
        tokens = sizes["B"] * sizes["T"]
        return {"tokens_per_s": round(tokens / p50_us * 1e6)}
    num_bytes = (peer.bytes_min if peer else row.bytes_min)(sizes)
    num_ops = (peer.ops_min if peer and peer.ops_min else row.ops_min)(sizes)
    found: dict[str, Any] = {
        "bytes_min": num_bytes,
        "ops_min": num_ops,
        "gbps": round(num_bytes / p50_us / 1e3, 2),
        "tflops": round(num_ops / p50_us / 1e6, 3),
    }
    if ceilings is not None:
        floor, bound = ceilings.floor_us(num_bytes, num_ops)
        share = 100 * floor / p50_us
        found |= {"floor_us": round(floor, 4), "bound": bound, "percent_of_ceiling": round(share, 2)}
    return found
