"""A campaign: mutants are handed to workers, each with a copy of the tree, and what became of each is written down at once."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import py_compile
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from conformance.mutation.operators import Mutant
from conformance.mutation.selection import Selection, Unit
from conformance.mutation.worker import EVERYTHING, PRODUCT, TIMED_OUT

WORKER = Path(__file__).with_name("worker.py")
LEFT_OUT = (".git", ".venv", "venv", "runs", "site", "build", "dist", "__pycache__")
PASSED = (0, 5)
"""What pytest returns where no test failed: all passed, or there was none."""

SLOWER = 4
"""Times the seconds of the unchanged tree after which a mutant hangs."""

GIB = 2**30


class RedBaselineError(Exception):
    """A test fails without any mutation, so that a failure says nothing."""


@dataclass(frozen=True)
class Options:
    """How a campaign runs; see `python -m conformance.mutate --help`."""

    root: Path
    out: Path
    jobs: int = 1
    budget: float = float("inf")
    timeout: float = 20.0
    stages: int = 3
    device: str = "cpu"
    examples: int = 5
    memory_gib: int = 16
    again: bool = False
    name: str = "results"
    preloaded: Sequence[str] = ("numpy", "torch", "hypothesis")
    say: Callable[[str], None] = field(default=print)

    def arguments(self, unit: Unit) -> list[str]:
        """Return pytest's arguments for a unit; few examples where each is dear."""
        own = ["--impl", unit.impl] if unit.impl else ["--examples", str(self.examples)]
        return [
            unit.tests,
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "--device",
            self.device,
            *own,
        ]


class Worker:
    """A copy of the tree and the process that runs tests in it."""

    def __init__(self, options: Options) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="arb-mutate-", ignore_cleanup_errors=True)
        self.tree = Path(self.folder.name).resolve() / "tree"
        copy_tree(options.root, self.tree)
        # Checked by content: two sources of one size, written within a second, would share a file checked by time.
        for folder in PRODUCT:
            checked = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(self.tree / folder, quiet=2, invalidation_mode=checked)
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
        }
        preloaded, memory = list(options.preloaded), 0
        if options.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
            memory = options.memory_gib * GIB
            preloaded += ["triton.language"] if preloaded else []
        self.errors = Path(self.folder.name) / "errors"
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(memory), *preloaded],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def run(
        self, arguments: list[str], seconds: float, keep: dict[str, float] | None, known: list[str]
    ) -> dict[str, Any]:
        """Run tests and return the answer of `worker.py`."""
        assert self.process.stdin and self.process.stdout
        request = {"args": arguments, "seconds": seconds, "keep": keep, "known": known}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}: {self.errors.read_text()}")
        return json.loads(reply)


class Campaign:
    """Runs mutants against the tests of their files."""

    def __init__(self, options: Options) -> None:
        self.options, self.selection = options, Selection(options.root)
        self.deadline = time.monotonic() + options.budget
        self.baseline: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        options.out.mkdir(parents=True, exist_ok=True)
        self.results = options.out / f"{options.name}.jsonl"

    def run(self, mutants: Sequence[Mutant]) -> None:
        """Try the mutants that have no result yet, or all when they are to be tried again, until the budget is spent."""
        stored = [] if self.options.again else records(self.options.out)
        done = {(record["id"], record["source"]) for record in stored}
        sources = {m.file: digest_of([self.options.root / m.file]) for m in mutants}
        left = [mutant for mutant in mutants if (mutant.id, sources[mutant.file]) not in done]
        stages = {file: self.selection.stages(file)[: self.options.stages] for file in {m.file for m in left}}
        with ExitStack() as stack, ThreadPoolExecutor(self.options.jobs) as pool:
            make = lambda _: stack.enter_context(Worker(self.options))  # noqa: E731
            workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
            for worker in pool.map(make, range(min(self.options.jobs, max(1, len(left))))):
                workers.put(worker)

            def lent(job: Callable[[Worker, Any], None], item: Any) -> None:
                if time.monotonic() >= self.deadline:
                    return
                worker = workers.get()
                try:
                    job(worker, item)
                finally:
                    workers.put(worker)

            units = sorted({unit for of_file in stages.values() for stage in of_file for unit in stage})
            self.load_baseline()
            missing = [unit for unit in units if str(unit) not in self.baseline]
            self.options.say(
                f"{len(left)} of {len(mutants)} mutants to try; {len(missing)} files of tests to run unchanged"
            )
            try:
                list(pool.map(lambda unit: lent(self.run_unchanged, unit), missing))
            finally:
                self.save_baseline()
            if any(str(unit) not in self.baseline for unit in units):
                self.options.say(
                    "the budget was spent on the tests without mutation, whose record is kept: run it again"
                )
                return
            if left and not any(
                test["calls"] for unit in units for test in self.baseline[str(unit)]["tests"].values()
            ):
                raise RedBaselineError(
                    f"no test calls a function of {', '.join(PRODUCT)} in the copy of the tree"
                )
            list(
                pool.map(
                    lambda m: lent(lambda w, m: self.try_mutant(w, m, stages[m.file], sources[m.file]), m),
                    left,
                )
            )

    def key(self) -> str:
        """Return what a record of the unchanged tree depends on."""
        read = (*PRODUCT, "conformance")
        found = [
            path for path in files_of(self.options.root) if path.suffix == ".py" and path.parts[0] in read
        ]
        files = sorted(path for path in found if path.parts[:2] != ("conformance", "mutation"))
        tree = digest_of([self.options.root / path for path in files])
        return f"{tree} {self.options.device} {self.options.examples}"

    def load_baseline(self) -> None:
        """Take the records that an earlier run left, if the tree is the same."""
        path = self.options.out / "baseline.json"
        if path.exists():
            stored = json.loads(path.read_text())
            self.baseline = stored["units"] if stored["key"] == self.key() else {}

    def save_baseline(self) -> None:
        """Keep the records for a run that goes on."""
        beside = self.options.out / f"baseline.{self.options.name}.tmp"
        beside.write_text(json.dumps({"key": self.key(), "units": self.baseline}))
        beside.replace(self.options.out / "baseline.json")

    def run_unchanged(self, worker: Worker, unit: Unit) -> None:
        """Run tests without a mutation, and keep how long each took and what it called."""
        left = self.deadline - time.monotonic()
        answer = worker.run(self.options.arguments(unit), min(left, 3600.0), None, [])
        if answer["status"] == TIMED_OUT:
            return
        if answer["status"] not in PASSED:
            raise RedBaselineError(f"{unit} fails without a mutation: {answer['failed']}\n{answer['output']}")
        record = answer["record"]
        of_tests = sum(test["seconds"] for test in record["tests"].values())
        with self.lock:
            self.baseline[str(unit)] = {**record, "start": max(0.0, answer["seconds"] - of_tests)}

    def try_mutant(self, worker: Worker, mutant: Mutant, stages: list[list[Unit]], source: str) -> None:
        """Run the tests that reach a mutant, cheapest first, until one fails; write down which."""
        path = worker.tree / mutant.file
        original, start = path.read_bytes(), time.monotonic()
        status, failed, reached = "survived", "", 0
        path.write_bytes(mutant.applied(original))
        try:
            for unit, keep in self.tests_of(mutant, stages):
                reached += len(keep)
                unchanged = self.baseline[str(unit)]
                limit = self.options.timeout + SLOWER * (unchanged["start"] + sum(keep.values()))
                left = self.deadline - time.monotonic()
                seconds, known = min(limit, max(left, 0.0)), list(unchanged["tests"])
                answer = worker.run(self.options.arguments(unit), seconds, keep, known)
                if answer["status"] == TIMED_OUT and left < limit:
                    return
                if answer["status"] not in PASSED:
                    status = "timeout" if answer["status"] == TIMED_OUT else "killed"
                    failed = answer["failed"] or str(unit)
                    break
        finally:
            path.write_bytes(original)
        line = self.options.root.joinpath(mutant.file).read_text().splitlines()[mutant.line - 1].strip()
        record = {
            "id": mutant.id,
            "file": mutant.file,
            "line": mutant.line,
            "what": mutant.what,
            "code": line,
            "source": source,
            "status": status if reached else "unreached",
            "by": failed,
            "tests": reached,
            "seconds": round(time.monotonic() - start, 2),
        }
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if status == "survived":
            self.options.say(shown(record))

    def tests_of(self, mutant: Mutant, stages: list[list[Unit]]) -> list[tuple[Unit, dict[str, float]]]:
        """Return the tests that call the function of a mutant, with their seconds; all tests for code outside of functions.

        What is called while a file of tests is imported is used by any test of it; where that file has not the name of the
        mutant's, that is too many to run. A compiled kernel or a cached result hides a call: where the function is
        decorated, calls of the whole file count.
        """
        found = []
        wanted = {EVERYTHING, f"{mutant.file}:{mutant.function}"}
        for number, stage in enumerate(stages):
            of_stage = []
            for unit in stage:
                record = self.baseline[str(unit)]
                seconds = {name: test["seconds"] for name, test in record["tests"].items()}
                calls = {name: set(test["calls"]) for name, test in record["tests"].items()}
                everywhere = number == 0 and not wanted.isdisjoint(record["imported"])
                keep = {name for name in calls if everywhere or not mutant.function or calls[name] & wanted}
                if mutant.decorated and ("cache" in mutant.decorated or not keep):
                    of_file = f"{mutant.file}:"
                    keep |= {name for name in calls if any(call.startswith(of_file) for call in calls[name])}
                if keep:
                    of_stage.append((unit, {name: seconds[name] for name in keep}))
            found += sorted(of_stage, key=lambda pair: sum(pair[1].values()))
        return found


def files_of(root: Path) -> list[Path]:
    """Return the files of a tree that git would keep; without git, all but what is known to be made."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    top = root / ".git"
    if listed.returncode == 0 and top.exists():
        return [Path(name) for name in listed.stdout.split("\0") if name and os.path.lexists(root / name)]
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in LEFT_OUT and name not in linked]
        found += [here / name for name in (*files, *linked)]
    return found


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files of a tree; links stay links."""
    for path in files_of(root):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target / path, follow_symlinks=False)


def digest_of(files: Iterable[Path]) -> str:
    """Return a short name of the content of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def records(out: Path) -> list[dict[str, Any]]:
    """Return the last record of each mutant in a folder of results."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["id"]] = record
    return list(found.values())


def shown(record: dict[str, Any]) -> str:
    """Return a record as `file:line: what`, and the line of source."""
    return f"{record['file']}:{record['line']}: {record['status']}: {record['what']}\n    {record['code']}"
