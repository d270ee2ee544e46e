"""Options, profiles, poisoning and the summary of the suite.

pytest conformance                                  # arbitor.optimized.ops: on CUDA, or in Triton's interpreter
pytest conformance --impl arbitor.reference.ops     # any module with the names of the op table
pytest conformance --family packing --family votes  # what is known of these families; an implementation may lack the others
pytest conformance --device cuda --examples 200 --hypothesis-profile nightly
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from . import report, strategies
from .subject import OURS, Subject

COMMON = {
    # The first call of a kernel compiles it.
    "deadline": None,
    # No database litters the repository. A failure becomes a vector instead.
    "database": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
    "print_blob": False,
}
settings.register_profile("ci", derandomize=True, **COMMON)
settings.register_profile("nightly", derandomize=False, **COMMON)
# Hypothesis prints its counterexamples. This is enough to see, and not pages.
torch.set_printoptions(threshold=40, edgeitems=2)
EXAMPLES = {"interpreter": 10, "torch": 25, "cuda": 60}
"""Examples per op and law, unless `--examples` says how many. The interpreter is a thousand times slower than a GPU."""


# Runs of a second each would start processes that compile for longer. `test_ahead` starts its own.
os.environ.setdefault("ARB_AHEAD", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--impl", default=OURS, metavar="MODULE", help="ops to compare with the reference")
    group.addoption(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where they run (auto: CUDA if any)"
    )
    group.addoption(
        "--path",
        default=None,
        choices=("cuda", "triton"),
        help="kernels of arbitor.optimized.ops (CUDA C++ where there is one, else Triton's)",
    )
    group.addoption(
        "--examples", type=int, default=0, metavar="N", help="examples per op and law (0: by device)"
    )
    group.addoption(
        "--family",
        action="append",
        default=[],
        metavar="NAME",
        help="laws, golden vectors and comparison of this family of ops alone; may be given several times",
    )
    group.addoption(
        "--on-device",
        action="store_true",
        help="the tests alone whose result depends on where they run",
    )
    group.addoption(
        "--failures",
        type=Path,
        metavar="FILE",
        help="append what fails to FILE at once, in case the run is cut off before pytest prints it",
    )


# This runs after hypothesis has loaded the profile of its own option.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the device. Without CUDA, Triton must be told to interpret before anything imports it."""
    config.addinivalue_line(
        "markers", "longest: the test that takes longest of those that wait for no ranks, and comes first"
    )
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # Each worker takes its part of the cores.
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    wanted = config.getoption("--device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
    if device == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise pytest.UsageError("triton was imported before the suite could set TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
    path = config.getoption("--path")
    if path is not None:
        if device == "cpu":
            raise pytest.UsageError(f"--path {path}: Triton's interpreter is the only path on a CPU")
        os.environ["ARB_PATH"] = path
    failures = config.getoption("--failures")
    # What fails in a worker of pytest-xdist is reported to the process that started it.
    if failures is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(report.Failures(failures))
    name = config.getoption("--impl")
    try:
        config.stash[SUBJECT] = Subject(importlib.import_module(name), name, device)
    except Exception as error:
        sentence = f"--impl {name} cannot be imported: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            sentence += ". `python -m pytest` looks for it in the current folder, `pytest` does not"
        # Whoever judges a module of their own has nothing to run without it.
        if name != OURS or not isinstance(error, ImportError):
            raise pytest.UsageError(sentence) from error
        # The tests that need no ops still run. A test that asks for the ops fails with this sentence.
        config.stash[SUBJECT] = sentence
    kind = "cuda" if device == "cuda" else "interpreter" if uses_triton(name) else "torch"
    config.stash[WHERE] = WHERE_IN_WORDS[kind]() + (f", path {path}" if path is not None else "")
    strategies.LIMITS.set_for(kind)
    profile = config.getoption("--hypothesis-profile") or "ci"
    examples = config.getoption("--examples") or EXAMPLES[kind]
    chosen = {"max_examples": examples}
    # Shrinking a failure takes minutes in the interpreter. `--device cuda`, or an `--impl` without Triton, shrinks.
    if kind == "interpreter":
        chosen["phases"] = [Phase.explicit, Phase.generate]
        # Only here: without Triton its interpreter cannot be imported.
        from . import interpreter, reach

        interpreter.spare()
        reach.watch()
    settings.register_profile("sized", settings.get_profile(profile), **chosen)
    settings.load_profile("sized")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the families that were asked for, so that an implementation may have some ops and not others.

    Of these, keep those that run on the device, if that was asked for. The longest test comes first. It would leave the other
    workers idle at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
    if config.getoption("--on-device"):
        keep(config, items, lambda item: not ON_DEVICE.isdisjoint(getattr(item, "fixturenames", ())))
    wanted = config.getoption("--family")
    if not wanted:
        return
    # This imports every file of a family, which pytest must have done first.
    from .families import FAMILIES, FILES

    for family in wanted:
        if family not in FAMILIES:
            raise pytest.UsageError(f"--family is {family!r}, but must be one of {', '.join(FAMILIES)}")
    ops = {op for family in wanted for op in FAMILIES[family]}

    def is_wanted(item: pytest.Item) -> bool:
        if item.path.parent.name == "ops":
            return FILES.get(item.path.stem) in wanted
        values = (
            item.callspec.params.values()
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else ()
        )
        return item.path.stem in OP_BY_OP and any(isinstance(value, str) and value in ops for value in values)

    keep(config, items, is_wanted)


def keep(config: pytest.Config, items: list[pytest.Item], is_wanted: Callable[[pytest.Item], bool]) -> None:
    """Keep the items that are wanted, and tell pytest of the others."""
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the ops whose comparison is left once `--family`, `-k` and names of tests have chosen."""
    report.LEDGER.asked = Counter(
        {
            item.callspec.params["name"]: 1
            for item in session.items
            if item.path.stem == "test_comparison"
            and isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
        }
    )


def pytest_fixture_setup() -> None:
    """Let a fixture draw the same numbers from torch's generator, whichever tests ran before it in this process."""
    torch.manual_seed(0)


def pytest_runtest_call() -> None:
    """Let a test draw the same numbers from torch's generator, whichever tests ran before it in this process."""
    torch.manual_seed(0)


ON_DEVICE = {"subject", "found", "num_gpus"}
"""Fixtures of tests whose result depends on the device: the implementation under test, what ranks found, and the GPUs there are."""

OP_BY_OP = ("test_comparison", "test_vectors")
"""Files whose tests are of one op each, which is a parameter."""

SUBJECT = pytest.StashKey[Subject | str]()
WHERE = pytest.StashKey[str]()
WHERE_IN_WORDS = {
    "cuda": lambda: f"CUDA, {torch.cuda.get_device_name()}",
    "interpreter": lambda: "Triton's interpreter on the CPU",
    "torch": lambda: "tensors on the CPU",
}


def uses_triton(name: str) -> bool:
    """Return whether an implementation's package holds Triton kernels."""
    root = name.rpartition(".")[0] or name
    return any(
        module.startswith(root) and (hasattr(value, "triton") or hasattr(value, "tl"))
        for module, value in list(sys.modules.items())
    )


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    """Return the implementation under test."""
    found = request.config.stash[SUBJECT]
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


@pytest.fixture(scope="session")
def num_gpus() -> int:
    """Return the GPUs of this machine. A test that does something else with one asks for them, so that `--on-device` finds it."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(scope="session")
def reference() -> Subject:
    """Return the reference as a subject, for tests of the suite itself."""
    from arbitor.reference import ops

    return Subject(ops, "arbitor.reference.ops")


@pytest.fixture(scope="module")
def wide_programs(pytestconfig: pytest.Config) -> Iterator[None]:
    """Let Triton's interpreter compute 64 outputs at once where float rows are multiplied. A program takes it two milliseconds.

    A GPU is given a program for each output of so small a weight. The comparison and `ops/test_linear.py` interpret such programs.
    """
    found = pytestconfig.stash[SUBJECT]
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(found, Subject) and found.name == OURS and found.device.type == "cpu":
            from arbitor.optimized.kernels import float_rows

            patch.setattr(float_rows, "PROGRAMS", 1)
            patch.setattr(float_rows, "MOST_OUTPUTS", 64)
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts of a pytest-xdist worker to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["conformance"] = report.LEDGER.counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Add the counts of a pytest-xdist worker."""
    report.LEDGER.add(node.workeroutput["conformance"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was compared, where and how."""
    terminalreporter.section("conformance")
    for line in report.LEDGER.lines(config.getoption("--impl"), config.stash[WHERE]):
        terminalreporter.write_line(line)
