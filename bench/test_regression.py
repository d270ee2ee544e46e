"""Tests of the regression gate: a planted slowdown fails the run and names the case, noise does not, and saving keeps the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from arbitor.reference import ops as reference_ops
from bench import cases, regression, runner, stored, timing
from bench.gate import Gate
from bench.regression import MARGINS, SLACK_US, TRIES, Baseline
from bench.report import case_id
from bench.test_bench import PretendFixture, run_cases

CASE = "linear-7168-ours"

NOISE = (
    ("graph", 109.92, 120.006),
    ("graph", 4.64, 5.984),
    ("graph", 5.28, 6.784),
    ("graph", 10.496, 11.808),
    ("eager", 938.797, 1726.022),
    ("eager", 117.984, 209.536),
    ("eager", 6898.97, 11828.851),
)
"""p80 and then p20, in microseconds, of code that did not change between two runs: the furthest that times have moved."""


def times(p50: float) -> dict[str, float]:
    return {"p20_us": p50, "p50_us": p50, "p80_us": p50}


def result(graph: float | None, eager: float, **more: Any) -> dict[str, Any]:
    return {"sizes": {}, "graph": graph and times(graph), "eager": times(eager), "no_graph": None, **more}


def baseline(row: Mapping[str, Any]) -> Baseline:
    return Baseline({"0001_a.json": {CASE: {"extra_info": row}}})


def never(mode: str) -> dict[str, float]:
    raise AssertionError("a case that is within its margin is not timed again")


def same(us: float) -> Callable[[str], dict[str, float]]:
    return lambda mode: times(us)


@pytest.mark.parametrize("mode", MARGINS)
def test_each_mode_has_its_margin(mode: str) -> None:
    then = {"graph": 100.0, "eager": 100.0}
    allowed = MARGINS[mode] * 100.0 + SLACK_US
    within, past = ({**then, mode: allowed * share} for share in (0.999, 1.001))
    assert baseline(result(**then)).why_slower(CASE, result(**within), never) is None
    said = baseline(result(**then)).why_slower(CASE, result(**past), same(allowed * 1.001))
    assert said is not None and CASE in said and regression.NAMES[mode] in said and "0001_a.json" in said


def test_the_bands_of_both_runs_count() -> None:
    """p20 now against p80 then: rounds that are spread widely tell less, so they are given more room."""
    then, now = result(100.0, 100.0), result(130.0, 100.0)
    assert baseline(then).why_slower(CASE, now, same(130.0)) is not None
    then["graph"]["p80_us"] = 120.0
    assert baseline(then).why_slower(CASE, now, never) is None
    then["graph"]["p80_us"], now["graph"]["p20_us"] = 100.0, 105.0
    assert baseline(then).why_slower(CASE, now, never) is None


def test_a_disturbance_that_does_not_come_back_is_no_regression() -> None:
    then, now = result(100.0, 100.0), result(300.0, 100.0)
    asked: list[str] = []

    def again(mode: str) -> dict[str, float]:
        asked.append(mode)
        return times(300.0 if len(asked) < TRIES - 1 else 100.0)

    assert baseline(then).why_slower(CASE, now, again) is None
    assert asked == ["graph"] * (TRIES - 1)


def test_a_call_that_can_no_longer_be_recorded_is_a_regression() -> None:
    now = {**result(None, 100.0), "no_graph": "RuntimeError: it looks at a value"}
    said = baseline(result(100.0, 100.0)).why_slower(CASE, now, never)
    assert said is not None and said.endswith("cannot be now: RuntimeError: it looks at a value")


@pytest.mark.parametrize(("p50", "slower"), [(21_000.0, True), (2_900.0, False)])
def test_a_recorded_train_step_has_the_margin_of_a_graph_where_the_device_decides(
    p50: float, slower: bool
) -> None:
    then, now = result(None, p50), result(None, 1.3 * p50, recorded_passes=True)
    assert (baseline(then).why_slower(CASE, now, same(1.3 * p50)) is not None) == slower


def test_the_newest_result_of_a_case_counts_and_other_sizes_do_not() -> None:
    files = {
        name: {CASE: {"extra_info": result(us, us)}}
        for name, us in (("0001_a.json", 10.0), ("0002_b.json", 90.0))
    }
    found = Baseline(files)
    assert found.why_slower(CASE, result(95.0, 95.0), never) is None
    assert found.results[CASE].file == "0002_b.json"
    assert found.why_slower(CASE, result(900.0, 900.0, sizes={"M": 1}), never) is None
    assert found.why_slower("linear-3072-ours", result(900.0, 900.0), never) is None


@pytest.mark.parametrize(("mode", "then_p80", "now_p20"), NOISE)
def test_noise_as_it_was_seen_is_within_the_margins(mode: str, then_p80: float, now_p20: float) -> None:
    then, now = result(now_p20, now_p20), result(now_p20, now_p20)
    then[mode]["p80_us"] = then_p80
    assert baseline(then).why_slower(CASE, now, never) is None


def saved(folder: Path, which: str, name: str) -> dict[str, Any]:
    """Return what a run of some cases saved."""
    done = run_cases(
        f"({which}) and reference", f"--benchmark-storage=file://{folder}", f"--benchmark-save={name}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob(f"*_{name}.json")
    return json.loads(path.read_text())


def times_changed(path: Path, factor: float) -> None:
    """Make the results of a file faster or slower."""
    data = json.loads(path.read_text())
    for bench in data["benchmarks"]:
        for each in (bench["extra_info"], bench["extra_info"]["eager"]):
            each.update({name: factor * us for name, us in each.items() if name.endswith("_us")})
    path.write_text(json.dumps(data))


def test_a_slowdown_in_any_family_fails_the_run_and_names_the_case(tmp_path: Path) -> None:
    """The family that is slower is not in the newest file. Its stored results are made faster, those of the others slower."""
    saved(tmp_path, "dequantize", "layout")
    saved(tmp_path, "row_exponents", "votes")
    slow, fast = (cases.all_cases()[f"{op}-tiny-reference"].id for op in ("dequantize", "row_exponents"))
    times_changed(tmp_path / "0001_layout.json", 1e-3)
    times_changed(tmp_path / "0002_votes.json", 10)
    which = "(dequantize or row_exponents) and reference"
    done = run_cases(which, f"--benchmark-storage=file://{tmp_path}", "--benchmark-compare", "-rf")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{slow} is slower than in 0001_layout.json" in done.stdout
    assert f"{fast} is slower" not in done.stdout
    assert "against 2 stored results: 2 cases in both, 0 here alone, 1 slower" in done.stdout
    assert "without a number" not in done.stdout, "it has one"
    times_changed(tmp_path / "0001_layout.json", 1e4)
    done = run_cases(which, f"--benchmark-storage=file://{tmp_path}", "--benchmark-compare")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_limit_that_is_asked_for_takes_the_place_of_the_margins(tmp_path: Path) -> None:
    saved(tmp_path, "dequantize", "layout")
    times_changed(tmp_path / "0001_layout.json", 1e-3)
    limit = ("--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    done = run_cases("dequantize", f"--benchmark-storage=file://{tmp_path}", *limit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_saving_one_family_replaces_its_cases_and_leaves_the_others(tmp_path: Path) -> None:
    before = saved(tmp_path, "dequantize or row_exponents", "both")
    now = saved(tmp_path, "row_exponents", "votes")
    left = json.loads((tmp_path / "0001_both.json").read_text())
    names = [[case_id(bench["fullname"]) for bench in each["benchmarks"]] for each in (before, left, now)]
    assert set(names[0]) == {"dequantize-tiny-reference", "row_exponents-tiny-reference"}
    assert names[1:] == [["dequantize-tiny-reference"], ["row_exponents-tiny-reference"]]
    [kept] = [bench for bench in before["benchmarks"] if bench["fullname"] == names[1][0]]
    assert left == {**before, "benchmarks": [kept]}
    saved(tmp_path, "dequantize", "layout")
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0002_votes.json", "0003_layout.json"]


def test_a_reason_for_no_number_goes_when_there_is_one(tmp_path: Path) -> None:
    def file(name: str, measured: list[str], missing: dict[str, str]) -> Path:
        path = tmp_path / name
        benchmarks = [{"fullname": case} for case in measured]
        path.write_text(json.dumps({"benchmarks": benchmarks, "session": {"without_a_number": missing}}))
        return path

    older, newest = (
        file("0001_a.json", ["a"], {"b": "no time", "c": "no memory"}),
        file("0002_b.json", ["b"], {}),
    )
    stored.supersede([older], newest)
    left = json.loads(older.read_text())
    assert left["benchmarks"] == [{"fullname": "a"}]
    assert left["session"]["without_a_number"] == {"c": "no memory"}


class TestAnOpThatSleeps:
    """A whole case on the host, of an op that takes as long as it is told."""

    CASE = "step_from_loss-scalar-reference"
    SECONDS = 0.004

    @pytest.fixture(autouse=True)
    def sleeping(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            reference_ops, "step_from_loss", lambda *args, **options: time.sleep(self.SECONDS)
        )

    def run(self, stored_us: float) -> runner.Session:
        case = cases.all_cases()[self.CASE]
        row = {**result(None, stored_us), "sizes": dict(case.sizes)}
        known = Baseline({"0001_a.json": {self.CASE: {"extra_info": row}}})
        timer = timing.HostTimer()
        session = runner.Session(timer, None, Gate(timer.device), time.monotonic() + 60, baseline=known)
        runner.measure(PretendFixture(), session, self.CASE)
        return session

    def test_fails_where_it_was_fast(self) -> None:
        with pytest.raises(
            pytest.fail.Exception, match=f"{self.CASE} is slower than in 0001_a.json: with its launch"
        ):
            self.run(self.SECONDS * 1e6 / 4)

    def test_passes_where_it_was_as_slow(self) -> None:
        assert self.run(self.SECONDS * 1e6)
