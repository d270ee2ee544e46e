"""The shell around pytest-benchmark: where results go, what they may be compared with, and the table at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, machine, regression, report, stored, timing
from bench.runner import Session

SESSION = pytest.StashKey[Session]()
BEFORE = pytest.StashKey[dict[str, Any]]()
DIFFERING = pytest.StashKey[dict[str, None]]()
"""What differs from the machines of the stored results, each fact once."""

STORED = pytest.StashKey[list[Path]]()
"""Files of stored results before this run."""

CASES = "bench_cases.py"
"""The file of the cases; the others here hold tests of the suite."""

ALL_STORED = "[0-9][0-9][0-9][0-9]_"
"""Every file of a device: what `--benchmark-compare` without a name compares with."""

DEFAULT_STORAGE = "file://./.benchmarks"
DEFAULT_BUDGET_SECONDS = 300.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--bench-budget",
        type=float,
        default=DEFAULT_BUDGET_SECONDS,
        metavar="SECONDS",
        help="Start no further case after this time; what is left out is counted. Default: %(default)s",
    )
    group.addoption(
        "--bench-commit",
        metavar="ID",
        help="The commit that is measured, for a copy of the tree without its history. Default: git's.",
    )
    group.addoption(
        "--bench-log",
        type=Path,
        metavar="FILE",
        help="Append each result to FILE as a line of JSON as soon as there is one, in case the run is cut off.",
    )


# First: before pytest-benchmark reads its options.
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep results in the folder of this device, and refuse what would compare or keep the incomparable."""
    options = config.option
    if cases.interpreted() and (options.benchmark_save or options.benchmark_autosave):
        raise pytest.UsageError(
            "times of Triton's interpreter (TRITON_INTERPRET=1) say nothing about kernels and are not saved"
        )
    if (options.benchmark_save or options.benchmark_autosave) and (
        machine.commit_info(options.bench_commit)["id"] == machine.UNKNOWN
    ):
        raise pytest.UsageError(
            f"{machine.WITHOUT_A_COMMIT}, so saved results would name none: name it with --bench-commit ID"
        )
    folder = machine.RESULTS / machine.slug()
    if options.benchmark_storage == DEFAULT_STORAGE:
        if options.benchmark_compare:
            _refuse_without_results(folder, options.benchmark_compare)
        options.benchmark_storage = f"file://{folder}"
    if options.benchmark_compare is True:
        # By itself pytest-benchmark takes the newest file alone, which holds what ran last and no other family.
        options.benchmark_compare = ALL_STORED
    if not options.benchmark_compare and not options.benchmark_verbose:
        # The table of this suite says more in less.
        options.benchmark_quiet = True
    # A case that gets no number says so itself; and AdamW warns that what a graph needs slows an eager step.
    for ignored in ("Benchmark fixture was not used", "This instance was constructed with capturable"):
        config.addinivalue_line("filterwarnings", f"ignore:{ignored}")
    if options.benchmark_columns is None:
        options.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]
    if not machine.on_gpu():
        torch.set_num_threads(1)
    config.stash[BEFORE] = machine.state()
    config.stash[DIFFERING] = {}


def _refuse_without_results(folder: Path, wanted: str | bool) -> None:
    """Refuse a comparison for which this device has no stored results."""
    pattern = "[0-9]*.json" if wanted is True else f"{str(wanted).rstrip('*')}*.json"
    if "/" in pattern or Path(str(wanted)).is_file():
        # What a file that is given by name holds is checked when it is loaded.
        return
    if not list(folder.glob(pattern)):
        others = sorted(path.name for path in machine.RESULTS.glob("*") if list(path.glob("*.json")))
        raise pytest.UsageError(
            f"there is nothing to compare with: bench/results/{folder.name} holds no results "
            f"{'' if wanted is True else f'named {wanted} '}of {machine.device_name()}, and those of other devices "
            f"({', '.join(others) or 'none stored'}) are never compared; save some with --benchmark-save=NAME"
            f"{'' if machine.on_gpu() else '. ' + regression.NOT_ON_A_CPU}"
        )


# Last: pytest-benchmark has made its session.
@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep results right in the folder of the device, without another one for the Python version."""
    storage = session.config._benchmarksession.storage
    if hasattr(storage, "default_machine_id"):
        storage.default_machine_id = None
        session.config.stash[STORED] = storage.query(ALL_STORED)


# pytest-benchmark saves before others finish.
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let each case be in one file: what was saved now takes its cases out of older files, and leaves all others."""
    older = session.config.stash.get(STORED, None)
    if older is None:
        return
    for path in session.config._benchmarksession.storage.query(ALL_STORED):
        if path not in older:
            stored.supersede(older, path)


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config,
    benchmarksession: Any,
    machine_info: dict[str, Any],
    compared_benchmark: dict[str, Any],
) -> None:
    """Refuse to compare with another device; say what else differs, and name each result by its case."""
    stored = compared_benchmark["machine_info"]
    if any(stored.get(fact) != machine_info.get(fact) for fact in machine.IDENTITY):
        raise pytest.UsageError(
            f"the stored results are of {stored.get('device', 'a device that they do not name')} and this is "
            f"{machine_info['device']}: results of different devices are not compared"
        )
    for name, value in machine_info.items():
        if stored.get(name) != value:
            config.stash[DIFFERING][f"{name} {stored.get(name)} -> {value}"] = None
    # pytest-benchmark would print both as JSON; the summary of this suite says it in one line.
    stored.clear()
    stored.update(machine_info)
    # Results are found by their case. Older files name a test function that has moved since.
    for bench in compared_benchmark["benchmarks"]:
        bench["fullname"] = report.case_id(bench["fullname"])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return dict(machine.machine_info())


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return machine.commit_info(config.getoption("--bench-commit"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add what the session knows, and leave out what is the same for every case."""
    for bench in output_json["benchmarks"]:
        for name in ("options", "params", "param"):
            bench.pop(name, None)
        stats = bench["stats"].items()
        bench["stats"] = {
            k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in stats if k != "data"
        }
    session = config.stash.get(SESSION, None)
    output_json["session"] = {
        "ceilings": session.ceilings.as_json() if session and session.ceilings else None,
        "before": config.stash[BEFORE],
        "after": machine.state(),
        "left_out": cases.left_out(),
        "without_a_number": without_a_number(config),
    }


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every case the clock of the device, and let `-k` find it by its family."""
    if item.path.name != CASES:
        return
    case = cases.all_cases()[report.case_id(item.name)]
    item.extra_keyword_matches.add(case.row.family)
    now = timing.device_now if machine.on_gpu() else timing.host_now
    item.add_marker(pytest.mark.benchmark(timer=now))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the cases first, for `--bench-budget` counts from the first one, and the tests of this suite after them."""
    items.sort(key=lambda item: item.path.name != CASES)


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Return what the cases of this run share; the ceilings are measured first."""
    config = request.config
    session = Session.start(
        budget=config.getoption("--bench-budget"),
        log=config.getoption("--bench-log"),
        baseline=baseline_of(config),
    )
    config.stash[SESSION] = session
    yield session


def baseline_of(config: pytest.Config) -> regression.Baseline | None:
    """Return what no case may be slower than: what a run is compared with, unless --benchmark-compare-fail says another limit."""
    options = config.option
    if not options.benchmark_compare or options.benchmark_compare_fail:
        return None
    return regression.Baseline(config._benchmarksession.compared_mapping or {})


def without_a_number(config: pytest.Config) -> dict[str, str]:
    """Return the cases that failed or were skipped, with the reason; not those that have a number and are slower than stored."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    session = config.stash.get(SESSION, None)
    with_one = {report.id_of(row) for row in session.rows} if session else set()
    found = {}
    for outcome in ("failed", "error", "skipped"):
        for result in reporter.stats.get(outcome, ()) if reporter else ():
            name = report.case_id(result.nodeid.partition("::")[2])
            if name not in with_one:
                found[name] = reason_of(result.longrepr) or outcome
    return found


def reason_of(longrepr: Any) -> str:
    """Return the last line of what a skipped or failed case says; of one that raised, what it said first: it names no file."""
    if isinstance(longrepr, tuple):
        return str(longrepr[2]).strip()
    crash = getattr(longrepr, "reprcrash", None)
    lines = [line.strip() for line in str(longrepr if crash is None else crash.message).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return ""
    return lines[0] if crash is not None else lines[-1].removeprefix("E").strip()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what ran, what was left out and why, and the table."""
    write = terminalreporter.write_line
    terminalreporter.section("bench")
    for reason, count in cases.left_out().items():
        write(f"left out: {count} cases: {reason}")
    missing = without_a_number(config)
    if missing:
        write(f"without a number: {len(missing)} cases, with reasons above and in the saved results")
    if config.stash.get(DIFFERING, None):
        write(f"differs from the machines of the stored results: {'; '.join(config.stash[DIFFERING])}")
    session = config.stash.get(SESSION, None)
    if session is None or not session.rows:
        return
    saved = config.option.benchmark_save or config.option.benchmark_autosave
    if saved:
        write(f"saved as {saved} in bench/results/{machine.slug()}")
    if config.option.benchmark_compare:
        baseline = regression.Baseline(config._benchmarksession.compared_mapping or {})
        for line in report.changes(session.rows, baseline):
            write(line)
    elif not machine.on_gpu():
        write(f"nothing is compared. {regression.NOT_ON_A_CPU}")
    for line in report.session_lines(machine.machine_info(), session.ceilings and session.ceilings.as_json()):
        write(line)
    if cases.interpreted():
        write("ours ran in Triton's interpreter: its times say nothing about kernels")
    for line in (
        *report.text_table(session.rows, skip_tiny=machine.on_gpu()),
        *report.token_rates(session.rows),
    ):
        write(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave no empty folder behind where nothing was saved, and nothing that is never freed."""
    # Triton's bindings would call what a session froze a leak.
    gc.unfreeze()
    folder = machine.RESULTS / machine.slug()
    for path in (folder, machine.RESULTS):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
