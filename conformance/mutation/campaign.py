"""A campaign: mutants are handed to workers, each with a copy of the tree, and what became of each is written down at once."""

from __future__ import annotations

import compileall
import functools
import hashlib
import json
import math
import os
import py_compile
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

SAVE_SECONDS = 10.0
"""Seconds after which records of the unchanged tree are written, so that a campaign that is killed has lost few."""

GIB = 2**30


class RedBaselineError(Exception):
    """A test fails without any mutation, so that a failure says nothing."""


@dataclass(frozen=True)
class Options:
    """How a campaign runs, as `python -m conformance.mutate --help` says it."""

    root: Path
    out: Path
    jobs: int = 1
    budget: float = math.inf
    timeout: float = 20.0
    stages: int = 3
    patience: float = math.inf
    keep_going: bool = False
    device: str = "cpu"
    examples: int = 5
    memory_gib: int = 16
    again: bool = False
    name: str = "results"
    preloaded: Sequence[str] = ("numpy", "torch", "hypothesis")
    say: Callable[[str], None] = field(default=print)

    def arguments(self, units: Sequence[Unit]) -> list[str]:
        """Return pytest's arguments for units of one implementation. Where an example is dear, there are few."""
        own = ["--impl", units[0].impl] if units[0].impl else ["--examples", str(self.examples)]
        shared = ["-q", "--no-header", "-p", "no:cacheprovider", "--device", self.device]
        return [*(unit.tests for unit in units), *shared, *own]


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
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.tree), os.environ.get("PYTHONPATH")))),
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
        self.expected: dict[str, float] = {}
        self.red: list[str] = []
        self.stopped = False
        self.saved = time.monotonic()
        self.changed = threading.Condition()
        options.out.mkdir(parents=True, exist_ok=True)
        self.results = options.out / f"{options.name}.jsonl"

    def run(self, mutants: Sequence[Mutant]) -> None:
        """Try the mutants that have no result yet, or all when they are to be tried again, until the budget is spent."""
        stored = [] if self.options.again else records(self.options.out)
        done = {(record["id"], record["source"]) for record in stored}
        sources = {m.file: digest_of([self.options.root / m.file]) for m in mutants}
        left = [mutant for mutant in mutants if (mutant.id, sources[mutant.file]) not in done]
        stages = {file: self.selection.stages(file)[: self.options.stages] for file in {m.file for m in left}}
        units = sorted({unit for of_file in stages.values() for stage in of_file for unit in stage})
        self.load_baseline()
        self.units = [unit for unit in units if str(unit) not in self.baseline]
        # Longest first, so that none of them is left to run alone. Where nothing is known, a large file counts as long.
        size = {unit: self.options.root.joinpath(unit.tests).stat().st_size for unit in self.units}
        slowness = {unit: (self.expected.get(str(unit), math.inf), size[unit]) for unit in self.units}
        self.units.sort(key=slowness.__getitem__, reverse=True)
        self.jobs = [(mutant, stages[mutant.file], sources[mutant.file]) for mutant in left]
        self.options.say(
            f"{len(left)} of {len(mutants)} mutants to try; {len(self.units)} files of tests to run unchanged"
        )
        if not left:
            return
        with ExitStack() as stack, ThreadPoolExecutor(self.options.jobs) as pool:
            make = lambda _: stack.enter_context(Worker(self.options))  # noqa: E731
            workers = list(pool.map(make, range(min(self.options.jobs, len(left)))))
            try:
                list(pool.map(self.work, workers))
            finally:
                self.save_baseline()
        if self.jobs and any(str(unit) not in self.baseline for unit in units):
            self.options.say(
                "the budget was spent before all tests had run without mutation; their record is kept: run it again"
            )
        elif not any(test["calls"] for unit in units for test in self.baseline[str(unit)]["tests"].values()):
            raise RedBaselineError(
                f"no test calls a function of {', '.join(PRODUCT)} in the copy of the tree"
            )
        if self.red:
            raise RedBaselineError("left out, because they fail without a mutation:\n" + "\n".join(self.red))

    def work(self, worker: Worker) -> None:
        """Take jobs until there is none, or the budget is spent."""
        try:
            while (job := self.next_job()) is not None:
                job(worker)
        except BaseException:
            self.stopped = True
            raise
        finally:
            with self.changed:
                self.changed.notify_all()

    def next_job(self) -> Callable[[Worker], None] | None:
        """Return a file of tests to run unchanged, else the first mutant whose tests have all been run unchanged."""
        with self.changed:
            while self.jobs and not self.stopped and time.monotonic() < self.deadline:
                if self.units:
                    return functools.partial(self.run_unchanged, unit=self.units.pop(0))
                for place, (mutant, stages, source) in enumerate(self.jobs):
                    if all(str(unit) in self.baseline for stage in stages for unit in stage):
                        del self.jobs[place]
                        return functools.partial(self.try_mutant, mutant=mutant, stages=stages, source=source)
                self.changed.wait(1.0)
        return None

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
            self.expected = {name: seconds_of(unit) for name, unit in stored["units"].items()}

    def save_baseline(self) -> None:
        """Keep the records for a run that goes on."""
        beside = self.options.out / f"baseline.{self.options.name}.tmp"
        beside.write_text(json.dumps({"key": self.key(), "units": self.baseline}))
        beside.replace(self.options.out / "baseline.json")
        self.saved = time.monotonic()

    def run_unchanged(self, worker: Worker, unit: Unit) -> None:
        """Run tests without a mutation, and keep how long each took and what it called."""
        left = self.deadline - time.monotonic()
        answer = worker.run(self.options.arguments([unit]), min(left, 3600.0), None, [])
        if answer["status"] == TIMED_OUT:
            return
        tests = answer["record"].get("tests", {})
        if answer["status"] not in PASSED:
            told = f"{unit} fails without a mutation: {answer['failed']}"
            failed = [name for name, test in tests.items() if not test["passed"]]
            if not self.options.keep_going or not failed:
                raise RedBaselineError(f"{told}\n{answer['output']}")
            self.red += [f"{name} ({unit})" for name in failed]
        with self.changed:
            start = max(0.0, answer["seconds"] - sum(test["seconds"] for test in tests.values()))
            self.baseline[str(unit)] = {**answer["record"], "start": start}
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save_baseline()
            self.changed.notify_all()

    def try_mutant(self, worker: Worker, mutant: Mutant, stages: list[list[Unit]], source: str) -> None:
        """Run the tests that reach a mutant, cheapest first, until one fails, and write down which.

        Tests of one stage and implementation share a process, since a process costs as much as many tests. A mutant that
        outlives the patience is written down with how many tests were left out.
        """
        path = worker.tree / mutant.file
        original, start = path.read_bytes(), time.monotonic()
        status, failed, reached, skipped = "survived", "", 0, 0
        patience = self.options.patience
        path.write_bytes(mutant.applied(original))
        try:
            for units, found in self.tests_of(mutant, stages):
                keep = {}
                for name, cost in found.items():
                    if patience > 0:
                        keep[name] = cost
                        patience -= cost
                reached, skipped = reached + len(keep), skipped + len(found) - len(keep)
                if not keep:
                    continue
                units = [
                    unit for unit in units if not self.baseline[str(unit)]["tests"].keys().isdisjoint(keep)
                ]
                unchanged = [self.baseline[str(unit)] for unit in units]
                limit = self.options.timeout + SLOWER * (
                    sum(record["start"] for record in unchanged) + sum(keep.values())
                )
                left = self.deadline - time.monotonic()
                known = [name for record in unchanged for name in record["tests"]]
                order = {name: float(place) for place, name in enumerate(keep)}
                arguments = ["-x", *self.options.arguments(units)]
                answer = worker.run(arguments, min(limit, max(left, 0.0)), order, known)
                if answer["status"] == TIMED_OUT and left < limit:
                    return
                if answer["status"] not in PASSED:
                    status = "timeout" if answer["status"] == TIMED_OUT else "killed"
                    failed = answer["failed"] or str(units[0])
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
            "kind": mutant.kind,
            "tests": reached,
            "left_out": skipped,
            "seconds": round(time.monotonic() - start, 2),
        }
        with self.changed, self.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if status == "survived":
            self.options.say(shown(record))

    def tests_of(self, mutant: Mutant, stages: list[list[Unit]]) -> list[tuple[list[Unit], dict[str, float]]]:
        """Return the tests that call the function of a mutant, with their seconds: of code outside of functions, all tests.

        They come in groups of one stage and implementation, cheap files first and cheap tests of a file first. A function that is
        called while a file of tests is imported may be used by every test of the file. These are too many to run, unless the file
        is named as that of the mutant. A compiled kernel or a cached result hides a call, so that of a decorated function the
        calls of its whole file count.
        """
        found = []
        wanted = {EVERYTHING, f"{mutant.file}:{mutant.function}"}
        for number, stage in enumerate(stages):
            of_impl: dict[str, list[tuple[Unit, dict[str, float]]]] = {}
            for unit in stage:
                record = self.baseline[str(unit)]
                tests = {name: test for name, test in record["tests"].items() if test["passed"]}
                calls = {name: set(test["calls"]) for name, test in tests.items()}
                everywhere = number == 0 and not wanted.isdisjoint(record["imported"])
                keep = {name for name in calls if everywhere or not mutant.function or calls[name] & wanted}
                if mutant.decorated and ("cache" in mutant.decorated or not keep):
                    of_file = f"{mutant.file}:"
                    keep |= {name for name in calls if any(call.startswith(of_file) for call in calls[name])}
                if keep:
                    seconds = {name: tests[name]["seconds"] for name in sorted(keep)}
                    of_impl.setdefault(unit.impl, []).append((unit, seconds))
            for group in of_impl.values():
                group.sort(key=lambda pair: sum(pair[1].values()))
                ordered = {
                    name: cost
                    for _, seconds in group
                    for name, cost in sorted(seconds.items(), key=lambda pair: pair[1])
                }
                found.append(([unit for unit, _ in group], ordered))
        return found


def seconds_of(record: dict[str, Any]) -> float:
    """Return the seconds that a file of tests took unchanged."""
    return record["start"] + sum(test["seconds"] for test in record["tests"].values())


def files_of(root: Path) -> list[Path]:
    """Return the files of a tree that git would keep. Without git these are all but those that are known to be made."""
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
    """Copy the files of a tree. A link is copied as a link."""
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
