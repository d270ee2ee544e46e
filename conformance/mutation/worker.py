"""A process that runs tests in a copy of the tree, a fresh child for each request, so that torch is imported once.

Started as a script, in the root of the copy. Reads requests from stdin, a line of JSON each, and answers with a line of JSON:

    {"args": [...], "seconds": 60, "keep": {"<test>": order} or null, "known": [...]}
        -> {"status": 1, "seconds": 2.3, "failed": "<the first test that failed>", "output": "...", "record": {...}}

`keep` names the tests to run and their order; tests that are not in `known` run too. Without `keep` all run, and the record says
for each how long it took and which functions of the product it called. The status is pytest's, or -1 after the time ran out.

Nothing of the tree is imported here, but in the children.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import pytest  # noqa: E402

PRODUCT = ("reference", "optimized", "sidecars")
MONITORING: Any = getattr(sys, "monitoring", None)
"""Sees the first call of a function in a test, and costs nothing afterwards. Before Python 3.12 every call is traced."""

TIMED_OUT = -1
EVERYTHING = "*"
"""Called by a test that starts a process: what it does in there is not seen."""

GRACE_SECONDS = 2
"""Seconds after its time that a child ends by itself, where no worker is left to end it."""

TAIL = 3000
"""Characters of a run's output that are handed back."""


class Recorder:
    """A pytest plugin that notes the functions of the product that each test calls, as `file:name`, and what tests share.

    What is called while tests are collected counts for all of them, what a fixture of a wider scope calls for all who use it,
    and in a file that caches what its helpers return, what one test calls for every test of the file.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.labels = root, dict[CodeType, str]()
        self.imported: set[str] = set()
        self.calls: set[str] = self.imported
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self.of_fixture: dict[str, set[str]] = defaultdict(set)
        self.of_module: dict[ModuleType, set[str]] = defaultdict(set)
        self.modules: dict[str, tuple[ModuleType, list[str]]] = {}
        sys.addaudithook(self.audit)
        self.watch()

    def audit(self, event: str, _: tuple[Any, ...]) -> None:
        """Note that a process starts."""
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            self.calls.add(EVERYTHING)

    def watch(self) -> None:
        """See calls from now on, those of functions too that were seen before."""
        if MONITORING is None:
            threading.settrace(self.trace)
            sys.settrace(self.trace)
            return
        tool, events = MONITORING.COVERAGE_ID, MONITORING.events
        if MONITORING.get_tool(tool) is None:
            MONITORING.use_tool_id(tool, "conformance.mutate")
            for event in (events.PY_START, events.PY_RESUME):
                MONITORING.register_callback(tool, event, self.called)
            MONITORING.set_events(tool, events.PY_START | events.PY_RESUME)
        MONITORING.restart_events()

    def called(self, code: CodeType, _: int) -> Any:
        """Note a call, and see no further call of the function until `watch`."""
        self.note(code)
        return MONITORING.DISABLE

    def trace(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call. Lines are not followed."""
        self.note(frame.f_code)

    def note(self, code: CodeType) -> None:
        """Note a call of a function of the product."""
        label = self.labels.get(code)
        if label is None:
            label = self.labels[code] = self.label(code)
        if label:
            self.calls.add(label)

    def label(self, code: CodeType) -> str:
        """Return `file:name` of a function of the product, else an empty text."""
        path = Path(code.co_filename)
        with contextlib.suppress(OSError):
            path = path.resolve()
        if path.is_relative_to(self.root) and path.relative_to(self.root).parts[0] in PRODUCT:
            return f"{path.relative_to(self.root)}:{code.co_name}"
        return ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.calls = set[str]()
        self.watch()
        start = time.perf_counter()
        result = yield
        self.tests[item.nodeid] = {"seconds": time.perf_counter() - start, "calls": self.calls}
        self.tests[item.nodeid]["passed"] = item.nodeid not in self.failed
        module = item.getparent(pytest.Module)
        if module is not None and any(hasattr(value, "cache_info") for value in vars(module.obj).values()):
            self.of_module[module.obj] |= self.calls
        self.modules[item.nodeid] = (getattr(module, "obj", None), list(getattr(item, "fixturenames", ())))
        self.calls = set()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outer, self.calls = self.calls, set[str]()
        self.watch()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.of_fixture[fixturedef.argname] |= self.calls
            outer |= self.calls
            self.calls = outer
            self.watch()

    def record(self) -> dict[str, Any]:
        """Return what was seen."""
        sys.settrace(None)
        if MONITORING is not None:
            MONITORING.set_events(MONITORING.COVERAGE_ID, 0)
        for name, (module, fixtures) in self.modules.items():
            shared = self.of_module.get(module, set()).union(*(self.of_fixture[one] for one in fixtures))
            self.tests[name]["calls"] |= shared
        tests = {name: {**test, "calls": sorted(test["calls"])} for name, test in self.tests.items()}
        return {"tests": tests, "imported": sorted(self.imported)}


class Chosen:
    """A pytest plugin that runs some tests in an order, and the tests that the record does not know."""

    def __init__(self, keep: dict[str, float], known: list[str]) -> None:
        self.keep, self.others = keep, set(known) - keep.keys()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.others]
        items.sort(key=lambda item: self.keep.get(item.nodeid, 0.0))


class FirstFailure:
    """A pytest plugin that notes the first test that failed, or the file that could not be read."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"{report.nodeid} (not collected)"


def child(request: dict[str, Any], folder: Path, memory: int) -> None:
    """Run the tests of a request in this process, and end it."""
    os.setsid()
    # Ends it also where the worker was killed, and a mutant hangs.
    signal.alarm(math.ceil(request["seconds"]) + GRACE_SECONDS)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(here, number)
    status = 3
    try:
        failure = FirstFailure()
        recorder = None if request["keep"] is not None else Recorder(Path.cwd().resolve())
        plugin = recorder or Chosen(request["keep"], request["known"])
        status = int(
            pytest.main([*request["args"], f"--basetemp={folder / 'tmp'}"], plugins=[plugin, failure])
        )
        found = {"failed": failure.name, "record": recorder.record() if recorder else {}}
        (folder / "found").write_text(json.dumps(found))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(request: dict[str, Any], folder: Path, memory: int) -> dict[str, Any]:
    """Run a request in a child, and end whatever it has started."""
    (folder / "found").unlink(missing_ok=True)
    start, parent = time.monotonic(), os.getppid()
    pid = os.fork()
    if pid == 0:
        child(request, folder, memory)
    status = None
    try:
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                status = 128 - status if status < 0 else status
            elif time.monotonic() - start > request["seconds"] or os.getppid() != parent:
                status = TIMED_OUT
            else:
                time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    if status == TIMED_OUT:
        os.waitpid(pid, 0)
    found = {"failed": "", "record": {}}
    if (folder / "found").exists():
        found = json.loads((folder / "found").read_text())
    output = (folder / "output").read_text(errors="replace")[-TAIL:] if (folder / "output").exists() else ""
    return {"status": status, "seconds": time.monotonic() - start, "output": output, **found}


def main() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[2:]:
        with contextlib.suppress(ImportError):
            __import__(name)
    with tempfile.TemporaryDirectory(prefix="arb-mutate-") as folder:
        for line in sys.stdin:
            print(
                json.dumps(answer(json.loads(line), Path(folder), int(sys.argv[1]))), file=replies, flush=True
            )


if __name__ == "__main__":
    main()
