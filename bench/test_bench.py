"""Tests of the benchmarks themselves: that every op is timed, that the timer and the tables are right, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized import settings
from arbitor.optimized.ops import paths
from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import FAMILIES, OP_TABLE
from arbitor.reference.ops.packing import trits_of
from bench import cases, gate, goals, inputs, machine, regression, report, rooflines, runner, timing
from bench.conftest import pytest_configure, reason_of
from bench.peers import peers_of
from bench.sessions import session
from conformance import cuda_calls

CEILINGS = rooflines.Ceilings(copy_gbps=4000.0, matmul_tflops=800.0, overhead_us=2.0)


class PretendGpuTimer(timing.HostTimer):
    """A timer that takes the paths of a GPU on the host: it records calls, and counts what it was asked."""

    device = torch.device("cuda")

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.asked = refuses, []

    @contextmanager
    def current(self) -> Any:
        yield

    def idle(self) -> None:
        self.asked.append("idle")

    def behind(self) -> None:
        self.asked.append("behind")

    def record(self, call: timing.Call) -> timing.Call:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call


class PretendFixture:
    """What the runner uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.stats = self
        self.data: list[float] = []
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: timing.Call, *, setup: timing.Call, rounds: int) -> None:
        self.stats.data = timing.sample(timing.HostTimer(), target, ready=setup, rounds=rounds)
        self.stats.stats = self


def row(op: str, implementation: str, p50: float, **more: Any) -> dict[str, Any]:
    times = {"p20_us": p50 * 0.99, "p50_us": p50, "p80_us": p50 * 1.01}
    found = {"op": op, "family": "linear", "shape": "7168", "implementation": implementation, "mode": "graph"}
    return {**found, **times, "graph": times, "eager": {**times, "p50_us": p50 + 10}, **more}


def test_every_op_has_inputs() -> None:
    faults = list(inputs.faults())
    assert not faults, "\n".join(faults)


def test_what_is_missing_from_the_inputs_is_named() -> None:
    table = {"linear": OP_TABLE["linear"]}
    assert list(inputs.faults(table, {})) == [
        "bench/inputs/linear.py is missing, or holds no INPUTS: it makes the arguments of linear"
    ]
    assert list(inputs.faults(table, {"linear": {}})) == [
        "bench/inputs/linear.py has no inputs of linear: INPUTS needs an entry of that name"
    ]
    elsewhere = {**inputs.FAMILIES, "norm": {"linear": inputs.INPUTS["linear"]}}
    assert list(inputs.faults(table, {"linear": elsewhere["linear"], "norm": elsewhere["norm"]})) == [
        "bench/inputs/linear.py has inputs of linear_input_grad, but the op table has no such op in linear",
        "bench/inputs/linear.py has inputs of linear_weight_grad, but the op table has no such op in linear",
        "bench/inputs/norm.py has inputs of linear, but the op table has no such op in norm",
    ]


def test_every_family_runs_and_what_a_train_step_uses_runs_first() -> None:
    families = cases.families()
    assert sorted(families) == sorted({*FAMILIES, cases.TRAIN_FAMILY})
    place = {family: at for at, family in enumerate(families)}
    used = {OP_TABLE[op].family for op in cases.rows()["train_step"].gates()} | {cases.TRAIN_FAMILY}
    assert {place[family] for family in used} == set(range(len(used)))
    assert place["codebook"] < place["attention"], "every module uses codes; only generation decodes"
    ran = list(dict.fromkeys(case.row.family for case in cases.all_cases().values()))
    assert tuple(ran) == families


def test_every_stored_result_is_of_a_case() -> None:
    """A result is compared and shown by the id of its case, so no id may change while results of it are stored."""
    for file in machine.RESULTS.glob("*/[0-9]*.json"):
        for bench in json.loads(file.read_text())["benchmarks"]:
            assert report.case_id(bench["fullname"]) in cases.all_cases(), f"{file.name}: {bench['fullname']}"


def test_linears_are_timed_at_every_width_and_number_of_tokens() -> None:
    for op in ("linear", "linear_input_grad", "linear_weight_grad"):
        found = {(s["M"], s["N"], s["K"]) for s in cases.rows()[op].shapes.values()}
        assert {(m, n, n) for m in (1, 8, 16, 64, 256, 512, 4096) for n in (3072, 7168)} <= found
    found = {(s["M"], s["N"], s["K"]) for s in cases.rows()["linear"].shapes.values()}
    assert {(m, 16384, 15360) for m in (1, 8, 16, 64, 256, 512)} <= found


def test_goals_are_those_of_cases() -> None:
    for goal in goals.GOALS:
        assert len(goal.figures) == len(goal.before) == len(goal.goals)
        assert len({(type(each), each.unit) for each in goal.figures}) == 1
        for each in goal.figures:
            if not isinstance(each, goals.Figure):
                for name in ("ours", getattr(each, "peer", "ours")):
                    assert f"{each.op}-{each.shape}-{name}".replace(" ", "_") in cases.all_cases()


def goals_by_work(results: dict[tuple[str, str, str], Any], scripts: dict[str, Any]) -> dict[str, list[str]]:
    """Return the cells behind the first of the table of goals, by the first. A ratio is 0.5."""
    stored = goals.Stored(results, scripts, lambda ours, peer: 0.5)
    lines = [line.strip("| ").split(" | ") for line in goals.table(stored)[2:]]
    return {cells[0]: cells[1:4] for cells in lines}


def test_goals_show_what_is_stored() -> None:
    names = [("linear", "7168", name) for name in ("ours", goals.CUBLAS)]
    results: dict[tuple[str, str, str], Any] = {name: {} for name in names}
    results["orthogonalize", "7168x21216", "ours"] = {"percent_of_ceiling": 68.25}
    r12 = {"model": "r12", "windows": 1, "context": 4, "peak_bytes": 2820 * 2**20 + 2**18}
    cold = {"cold_forward_seconds": 5.5, "cold_update_seconds": 7.0}
    scripts = {
        "large": {"rows": [{**r12, "context": 128, "peak_bytes": 1}, r12]},
        "large-cold": {"cold": True, "rows": [{**r12, **cold}]},
    }
    cells = goals_by_work(results, scripts)
    assert cells["`linear` 7168 x 7168, 4,096 rows, against cuBLAS bf16"] == ["0.94x", "0.5x", "0.98x"]
    share = cells["orthogonalizing a 7168 x 21216 gradient, share of the product limit"]
    assert share == ["not measured", "68.2 %", "90 %"]
    assert cells["peaks of a step of 4 bytes, of r12 and without codes and graph"] == [
        "2,820 MiB, 2,786 MiB",
        "2,820.25 MiB, not measured",
        "1,734.90 MiB, 1,638.54 MiB",
    ]
    r12["peak_bytes"] = 999 * 2**20 + 3 * 2**18
    assert goals_by_work(results, scripts)["peaks of a step of 4 bytes, of r12 and without codes and graph"][
        1
    ] == ("999.75 MiB, not measured")
    first = "first step of r12, with no compiled kernel"
    assert cells[first] == ["22 s", "12.5 s", "10 s"]
    scripts["large-cold"]["cold"] = False
    assert goals_by_work(results, scripts)[first][1] == "not measured"
    failed = {**r12, "peak_bytes": None, "failed": "out of memory"}
    scripts["large-cold"] = {"cold": True, "rows": [failed]}
    assert goals_by_work(results, scripts)[first][1] == "not measured"
    # The row of a second try stands behind that of the first.
    scripts["large-cold"]["rows"].append({**r12, **cold})
    assert goals_by_work(results, scripts)[first][1] == "12.5 s"
    assert len(cells) == len(goals.GOALS), "each kind of work has a name of its own"
    assert sum(now == "not measured" for _, now, _ in cells.values()) > len(cells) / 2


def test_what_has_cuda_kernels_is_timed_on_triton_too(monkeypatch: pytest.MonkeyPatch) -> None:
    on_triton = [case for case in cases.all_cases().values() if case.implementation == cases.OURS_ON_TRITON]
    timed = {op for case in on_triton for op in case.row.gates()}
    assert timed == {op for op, _ in cuda_calls.calls()}
    monkeypatch.delenv("ARB_PATH", raising=False)
    for case in (on_triton[0], cases.all_cases()["linear-7168_m16-ours"]):
        with runner.on_path_of(case):
            assert settings.path() == ("triton" if case is on_triton[0] else None)
        assert settings.path() is None
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    monkeypatch.setattr(paths, "why_not", lambda device: None)
    assert cases.why_left_out(on_triton[0]) is None
    monkeypatch.setattr(paths, "why_not", lambda device: "cuda-core is missing")
    assert cases.why_left_out(on_triton[0]) == "ours runs on Triton's kernels alone"
    monkeypatch.setattr(paths, "why_not", lambda device: None)
    monkeypatch.setenv("ARB_PATH", "triton")
    assert cases.why_left_out(on_triton[0]) == "ours runs on Triton's kernels alone"


def test_an_op_is_checked_on_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str | None] = []
    checks = gate.Gate(torch.device("cpu"))
    monkeypatch.setattr(checks, "_compare", lambda op, sizes: compared.append(settings.path()))
    monkeypatch.delenv("ARB_PATH", raising=False)
    sizes = OP_TABLE["linear"].shapes["tiny"]
    for path in (None, None, "triton", "triton"):
        if path is not None:
            monkeypatch.setenv("ARB_PATH", path)
        checks.ours("linear", sizes)
    assert compared == [None, "triton"]


def test_what_is_left_out_is_counted() -> None:
    assert len(cases.ids()) + sum(cases.left_out().values()) == len(cases.all_cases())


def test_inputs_do_not_depend_on_who_asks() -> None:
    sizes = OP_TABLE["linear"].shapes["tiny"]
    one, two = (inputs.INPUTS["linear"](inputs.Maker("cpu", "x"), sizes)[0] for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1].packed, two[1].packed)
    assert trits_of(one[1]).float().std() > 0.5


def test_quantiles() -> None:
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    assert timing.quantiles_us([1e-6] * 5) == {"p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0}


def test_rounds() -> None:
    assert timing.rounds_for(1e-6, budget=0.2, patience=1.0) == timing.MAX_ROUNDS
    assert timing.rounds_for(0.01, budget=0.2, patience=1.0) == timing.ENOUGH_ROUNDS
    assert timing.rounds_for(0.05, budget=0.2, patience=1.0) == 20
    assert timing.rounds_for(9.0, budget=0.2, patience=1.0) == timing.MIN_ROUNDS


def test_a_recorded_call_is_timed_both_ways() -> None:
    timer, fixture = PretendGpuTimer(), PretendFixture()
    timed = runner._time(fixture, timer, lambda: sum(range(1000)), capturable=True, share=1.0)
    assert timed is not None
    found = timed.info
    assert found["mode"] == "graph" and found["no_graph"] is None
    assert found["graph"]["p50_us"] == found["p50_us"] and found["eager"]["p50_us"] > 0
    assert timer.asked.count("idle") <= runner.EAGER_ROUNDS and timer.asked.count("behind") == found["reps"]


def test_a_call_that_cannot_be_recorded_keeps_its_eager_time() -> None:
    timer = PretendGpuTimer(refuses=True)
    timed = runner._time(PretendFixture(), timer, lambda: sum(range(1000)), capturable=True, share=1.0)
    assert timed is not None
    found = timed.info
    assert found["mode"] == "eager" and "capturing" in found["no_graph"]
    assert found["graph"] is None and found["eager"]["p50_us"] == found["p50_us"]
    assert "behind" not in timer.asked


class PretendEvent:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = timing.host_now()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: PretendEvent) -> float:
        return (later.at - self.at) * 1e3


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> timing.GpuTimer:
    """Return a GpuTimer whose CUDA is the host, so that its code runs everywhere."""

    @contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Any:
        yield

    for name, value in {
        "Event": PretendEvent,
        "Stream": lambda: None,
        "stream": nothing,
        "graph": nothing,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**24, 2**24),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=2**16),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "MIN_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(rooflines, "MATMUL_SIZE", 64)
    return timing.GpuTimer("cpu")


def test_the_gpu_timer_and_the_ceilings(pretend_cuda: timing.GpuTimer) -> None:
    assert pretend_cuda.buffer.nbytes == timing.FLUSH_FACTOR * 2**16
    pretend_cuda.behind()
    assert pretend_cuda.largest == pretend_cuda.buffer[-1]
    assert timing.warm_up(pretend_cuda, lambda: None) > 0
    assert len(timing.sample(pretend_cuda, lambda: None, ready=pretend_cuda.idle, rounds=7)) == 7
    ceilings = rooflines.measure(pretend_cuda, "a device that has no data sheet here")
    assert ceilings is not None and ceilings.copy_gbps > 0 and ceilings.overhead_us > 0
    assert rooflines.measure(timing.HostTimer(), "CPU") is None


def test_floors_are_the_larger_of_two() -> None:
    assert CEILINGS.floor_us(4e9, 0) == (pytest.approx(1000.0), "bytes")
    assert CEILINGS.floor_us(1, 8e14) == (pytest.approx(1e6), "ops")


def test_ceilings_that_cannot_be_are_refused() -> None:
    found = rooflines._checked("NVIDIA H200", 4.3e12, 788e12, 2.0)
    assert (found.copy_of_vendor, found.matmul_of_vendor) == (0.896, 0.797)
    assert rooflines._checked("another", 1.0, 1.0, 2.0).copy_of_vendor is None
    with pytest.raises(RuntimeError, match=r"large copy is 1\.25 of the data sheet's of NVIDIA H200"):
        rooflines._checked("NVIDIA H200", 6e12, 788e12, 2.0)
    with pytest.raises(RuntimeError, match=r"matrix product is 0\.30"):
        rooflines._checked("NVIDIA H100 80GB HBM3", 3e12, 300e12, 2.0)


@pytest.mark.parametrize("op", [op for op in OP_TABLE if peers_of(op)])
def test_a_wrong_peer_gets_no_number(op: str) -> None:
    for peer in (peer for peer in peers_of(op) if peer.checked):
        sizes = OP_TABLE[op].shapes["tiny"]
        gate.Gate(torch.device("cpu")).peer(op, peer, sizes)
        wrong = type(peer)(
            **{**vars(peer), "build": lambda a, s, peer=peer: lambda: _doubled(peer.build(a, s)())}
        )
        with pytest.raises(gate.Red, match="is off by"):
            gate.Gate(torch.device("cpu")).peer(op, wrong, sizes)


def _doubled(value: Any) -> Any:
    return tuple(map(_doubled, value)) if isinstance(value, tuple) else value * 2


def test_a_wrong_op_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = OP_TABLE["sign_votes"].shapes["tiny"]
    checks = gate.Gate(torch.device("cpu"))
    monkeypatch.setattr("arbitor.optimized.ops.sign_votes", reference_ops.sign_votes)
    checks.ours("sign_votes", sizes)
    monkeypatch.setattr(
        "arbitor.optimized.ops.sign_votes", lambda grad, size: -reference_ops.sign_votes(grad, size)
    )
    with pytest.raises(gate.Red, match="sign_votes differs from the reference"):
        gate.Gate(torch.device("cpu")).ours("sign_votes", sizes)


def test_gates_keep_what_chooses_a_kernel() -> None:
    linear, conv = cases.all_cases()["linear-7168_m16-ours"], cases.all_cases()["conv1d-7168-ours"]
    kept = {"M": 16, "N": 7168, "K": 2352, "G": 12, "float_bytes": 2}
    assert {**gate.small(linear.row, linear.sizes)} == kept
    assert gate.small(conv.row, conv.sizes)["stride"] == 2 and gate.small(conv.row, conv.sizes)["N"] == 7168


def test_ratios_compare_like_with_like() -> None:
    ours = row("linear", "ours", 10.0, floor_us=5.0, percent_of_ceiling=50.0)
    peer = row("linear", "cuBLAS bf16", 40.0, floor_us=35.0)
    line = report.lines_of([ours, peer])[0]
    assert report.cells(line)[-3:] == ("4.00x", "7.00x", "50")
    line = report.lines_of([ours, {**peer, "graph": None, "mode": "eager"}])[0]
    # 50 over 20: both with the launch.
    assert report.cells(line)[-3] == "2.50x"


def test_a_change_needs_bands_that_are_apart() -> None:
    before = regression.Baseline({"0001": {"linear-7168-ours": {"extra_info": row("linear", "ours", 10.0)}}})
    assert "1 slower" in report.changes([row("linear", "ours", 11.0)], before)[0]
    assert "0 slower, 0 faster" in report.changes([row("linear", "ours", 10.4)], before)[0]
    wide = {**row("linear", "ours", 11.0), "p20_us": 9.0}
    assert "0 slower" in report.changes([wide], before)[0]
    assert "0 cases in both, 1 here alone" in report.changes([row("conv1d", "ours", 11.0)], before)[0]


def test_machine_info_names_no_host() -> None:
    text = json.dumps(machine.machine_info())
    assert "node" not in machine.machine_info() and "/" not in text.replace("n/a", "")
    assert machine.slug_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cases("step_from_loss", *arguments)


def run_cases(which: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return session("bench/bench_cases.py", "-k", which, *arguments)


def test_results_of_another_device_are_refused(tmp_path: Path) -> None:
    stored = {
        "machine_info": {"device": "NVIDIA X1"},
        "commit_info": {},
        "benchmarks": [],
        "datetime": "2026",
    }
    path = tmp_path / "0001_x.json"
    path.write_text(json.dumps(stored))
    done = run_pytest(f"--benchmark-compare={path}")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "the stored results are of NVIDIA X1 and this is" in done.stderr


def test_a_comparison_with_nothing_is_refused() -> None:
    done = run_pytest("--benchmark-compare=9999_no_such_run")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "there is nothing to compare with" in done.stderr and "NVIDIA X1" not in done.stderr


def test_a_copy_in_the_folder_of_another_repository_has_no_known_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results named the commit of the repository around the copy."""
    # A hook of git tells its children of its own repository.
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    file = "bench/machine.py"
    for root in (tmp_path, tmp_path / "copy"):
        (root / "bench").mkdir(parents=True)
        (root / file).write_text("")
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", file], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    known = machine.commit_name(None)
    assert re.fullmatch(r"[0-9a-f]{40}, changed", known) and machine.commit_info(None)["dirty"]
    monkeypatch.setattr(machine, "ROOT", tmp_path / "copy")
    assert machine.commit_name("abc") == "abc" and capsys.readouterr().err == ""
    assert machine.commit_name(None) == "unknown"
    assert capsys.readouterr().err == (
        "git cannot tell of which commit the files here are: results name none, unless --commit does\n"
    )


@pytest.mark.parametrize("how", ["benchmark_save", "benchmark_autosave"])
def test_results_of_no_known_commit_are_not_saved(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Before anything is measured."""
    option = SimpleNamespace(benchmark_save=None, benchmark_autosave=False, bench_commit=None)
    setattr(option, how, "first")
    monkeypatch.setattr(cases, "interpreted", lambda: False)
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    config: Any = SimpleNamespace(option=option)
    sentence = (
        "git cannot tell of which commit the files here are, so saved results would name none: name it with"
    )
    with pytest.raises(pytest.UsageError, match=sentence):
        pytest_configure(config)


def test_results_are_stored_and_compared(tmp_path: Path) -> None:
    storage = f"--benchmark-storage=file://{tmp_path}"
    saved = run_pytest(storage, "--benchmark-save=first", "--bench-commit=abc")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    stored = json.loads((tmp_path / "0001_first.json").read_text())
    assert stored["commit_info"]["id"] == "abc" and stored["machine_info"]["device"] == machine.device_name()
    result = stored["benchmarks"][0]["extra_info"]
    median_us = stored["benchmarks"][0]["stats"]["median"] * 1e6
    assert result["op"] == "step_from_loss" and result["p50_us"] == pytest.approx(median_us, rel=0.01)
    again = run_pytest(storage, "--benchmark-compare=0001")
    assert "1 cases in both" in again.stdout, again.stdout + again.stderr


def test_a_stored_result_is_found_by_its_case_in_whichever_file_it_ran(tmp_path: Path) -> None:
    """As a file of an older layout, with a time that is far too short: that the case is slower now must be said and refused."""
    storage = f"--benchmark-storage=file://{tmp_path}"
    assert run_pytest(storage, "--benchmark-save=now", "--bench-commit=abc").returncode == 0
    path = tmp_path / "0001_now.json"
    stored = json.loads(path.read_text())
    for bench in stored["benchmarks"]:
        assert bench["fullname"] == bench["name"] in cases.all_cases()
        bench["fullname"] = f"bench/bench_votes.py::test_votes[{bench['fullname']}]"
        bench["stats"]["median"] /= 1000
    path.write_text(json.dumps(stored))
    done = run_pytest(storage, "--benchmark-compare=0001", "--benchmark-compare-fail=median:10%")
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr


def test_a_family_is_selected_by_its_name() -> None:
    """`-k` matches the family of a case, which is no part of its id."""
    done = run_cases("layout", "--collect-only", "-q")
    found = {report.case_id(line) for line in done.stdout.splitlines() if "::" in line}
    of_family = {case.id for case in cases.all_cases().values() if case.row.family == "layout"}
    assert found == of_family & set(cases.ids()) != set(), done.stdout + done.stderr


def test_no_result_names_a_path() -> None:
    runs = machine.ROOT / "docs" / "runs"
    for file in (*machine.RESULTS.glob("*/*"), *runs.glob("*/*")):
        # Bytes, for a picture holds text too.
        found = re.search(rb"/(home|opt|root|tmp|usr|work)/\S*", file.read_bytes())
        assert found is None, f"{file}: {found and found[0]!r}"


def test_a_case_that_raises_is_stored_with_what_it_said() -> None:
    """Not with the file that said it, which is of one machine."""
    raised = SimpleNamespace(reprcrash=SimpleNamespace(message="RuntimeError: no memory\nand more"))
    assert reason_of(raised) == "RuntimeError: no memory"
    assert reason_of(("/home/file.py", 3, "Skipped: no time")) == "Skipped: no time"
    assert reason_of("E   no number: ours is wrong\n") == "no number: ours is wrong"


def test_a_case_is_shown_as_it_was_measured_last() -> None:
    stored = [
        {"file": file, "benchmarks": [{"extra_info": {"op": case[0], "shape": case[1]}} for case in cases_of]}
        for file, cases_of in (("1", ("ax", "ay", "bx")), ("2", ("ax",)), ("3", ("bx", "bx")))
    ]
    shown = [
        (
            each["file"],
            [bench["extra_info"]["op"] + bench["extra_info"]["shape"] for bench in each["benchmarks"]],
        )
        for each in report.current_results(stored)
    ]
    assert shown == [("3", ["bx", "bx"]), ("2", ["ax"]), ("1", ["ay"])]


def test_generated_pages_are_fresh() -> None:
    stale = [
        path.name for path, text in report.pages().items() if not path.exists() or path.read_text() != text
    ]
    assert not stale, f"{', '.join(stale)}: run python -m bench.report"
