"""Train one architecture by several rules on the same bytes, and print bits per byte with seeds and spread.

    python -m bench.learning --out bench/results/<gpu>/learning                # every rule, three seeds
    python -m bench.learning --suite time long wide memory --out ...           # what the claims about time and scale rest on
    python -m bench.learning --suite sweep long-sweep --seeds 0 --out ...      # other rates and decays
    python -m bench.learning --suite graph --out ...                           # the preset `small`
    python -m bench.learning --worker 0/2 ...                                  # half of the runs, for one of two GPUs
    python -m bench.learning --rules sign --out ...                            # one row of the table
    python -m bench.learning --without A.json --seconds 500 ...                # what A.json has not, as far as the time goes
    python -m bench.learning --report A.json B.json --out ...                  # table and curves; B.json has the last word

Every rule sees the same windows in the same order for a seed, and is judged on the same validation windows. Each run is written
when it ends, in case the time is cut short. Curves go to a PNG beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from arbitor.optimized.training.data import load_corpus, split_corpus, validation_windows
from bench import machine, parts
from bench.learning.learner import Architecture, train
from bench.learning.report import curves, page, table
from bench.learning.rules import RULES, Rule

SIZES: Mapping[str, Architecture] = {
    "7 M": Architecture("7 M"),
    "29 M": Architecture("29 M", width=768),
    "0.7 M": Architecture("0.7 M", width=128, num_layers=3),
    "small": Architecture("small", preset="small"),
    "toy": Architecture("toy", width=64, num_layers=1, context=64, batch=8),
}
"""Architectures by name: the benchmark; four times its weights; float weights in the memory that ternary ones of the benchmark
take; the graph; and one for a quick look."""

SUITES = ("table", "time", "long", "wide", "memory", "sweep", "long-sweep", "graph", "toy")
"""What can be run, see `jobs_of`."""

BEST = ("integer", "fixed scales", "straight-through", "float AdamW")
SWEPT: Mapping[str, Sequence[tuple[float, float]]] = {
    "integer": ((4 / 64, 0.6), (8 / 64, 0.6), (6 / 64, 0.9)),
    "straight-through": ((1e-3, 0.4), (1.5e-3, 0.4), (3e-3, 0.4), (4e-3, 0.4), (2e-3, 0.6)),
    "straight-through Muon": ((1e-3, 0.4), (4e-3, 0.4), (8e-3, 0.4)),
    "float AdamW": ((1e-3, 0.4), (2e-3, 0.4), (3e-3, 0.4), (2e-3, 0.6)),
    "float Muon": ((1e-3, 0.4), (4e-3, 0.4), (8e-3, 0.4)),
}
SWEPT_LONG: Mapping[str, Sequence[tuple[float, float]]] = {
    "fixed scales": (
        (3 / 64, 1.0), (4 / 64, 1.0), (6 / 64, 1.0), (8 / 64, 1.0), (2 / 64, 0.6), (3 / 64, 0.6),
    ),
    "straight-through": ((1e-3, 0.6), (1.4e-3, 1.0), (2e-3, 1.0)),
    "float AdamW": ((1e-3, 1.0),),
}  # fmt: skip
"""Rates and shares of decay that a rule is tried with besides its own, at the length of the benchmark and at four times that."""


@dataclass(frozen=True)
class Job:
    """One model to train."""

    suite: str
    size: str
    rule: str
    seed: int
    steps: int
    data: str
    rate: float | None = None
    decay: float | None = None


JOB = ("suite", "size", "rule", "seed", "steps", "data", "learning_rate", "decay")
"""What a run is known by in results."""


def jobs_of(suite: str, *, seeds: Sequence[int], steps: int, data: str) -> Iterator[Job]:
    """Yield the runs of a suite, the first seed of all rules before the second of any."""
    plans: Mapping[str, tuple[str, Sequence[str], int]] = {
        "table": ("7 M", tuple(RULES), steps),
        "long": ("7 M", BEST, 4 * steps),
        "time": ("7 M", ("integer",), 3 * steps // 4),
        "wide": ("29 M", BEST, steps),
        "memory": ("0.7 M", ("float AdamW",), steps),
        "graph": ("small", BEST, steps // 3),
        "toy": ("toy", tuple(RULES), steps),
    }
    if suite in ("sweep", "long-sweep"):
        swept, length = (SWEPT, steps) if suite == "sweep" else (SWEPT_LONG, 4 * steps)
        for seed in seeds:
            for name, tried in swept.items():
                for rate, decay in tried:
                    yield Job(suite, "7 M", name, seed, length, data, rate, decay)
        return
    size, rules, length = plans[suite]
    for seed in seeds:
        for name in rules:
            yield Job(suite, size, name, seed, length, data)


def run(job: Job, *, device: str, progress: Any) -> dict[str, Any]:
    """Train one model."""
    architecture, rule = SIZES[job.size], rule_of(job)
    corpus = load_corpus(job.data)
    split = split_corpus(corpus, architecture.context)
    windows_WT = validation_windows(corpus, split, count=512, context=architecture.context)
    result = train(
        architecture, rule, corpus, split, windows_WT, seed=job.seed, steps=job.steps, device=device, progress=progress,
    )  # fmt: skip
    facts = {"data_bytes": corpus.data_N.numel(), "data_sha256": corpus.sha256}
    return {**facts, **result}


def commit_name(given: str | None) -> str:
    """Return the commit that is measured, and whether its tree was changed."""
    info = machine.commit_info(given)
    return f"{info['id']}{', changed' if info['dirty'] else ''}"


def data_name(data: str) -> str:
    """Return what results call a data set: paths are of one machine."""
    return data if data == "stdlib" else Path(data).name


def measured(job: Job, run: Mapping[str, Any]) -> bool:
    """Return whether a run of some results is this job, and came to something. It may be of another commit, which it names."""
    wanted = {**asdict(job), **settings_of(job)}
    # A run of an older file does not hold the fields of its rule.
    held = {"config": wanted["config"], **run}
    return "failed" not in run and all(held[name] == wanted[name] for name in (*JOB, "config"))


def settings_of(job: Job) -> dict[str, Any]:
    """Return what results hold of a job besides its own fields: the name of its data, and the settings of its rule."""
    rule = rule_of(job)
    data = data_name(job.data)
    return {"data": data, "learning_rate": rule.rate, "decay": rule.decay, "config": dict(rule.config)}


def rule_of(job: Job) -> Rule:
    """Return the rule of a job, with the rate and the decay asked for."""
    asked = {name: getattr(job, name) for name in ("rate", "decay") if getattr(job, name) is not None}
    return replace(RULES[job.rule], **asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites asked for; return 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", nargs="+", default=["table"], choices=SUITES)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), metavar="RULE", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps",
        type=int,
        default=1500,
        help="of the benchmark; `long` takes four times as many, `time` three quarters, `graph` a third",
    )
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="`stdlib`, files or folders [stdlib]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--worker", default="0/1", metavar="I/N", help="take every N-th run from the I-th on [0/1]"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument(
        "--without", nargs="+", type=Path, default=[], metavar="JSON", help="leave out what these files hold"
    )
    parser.add_argument("--report", nargs="+", type=Path, metavar="JSON", help="measure nothing, merge these")
    parser.add_argument("--commit", metavar="ID", help="the commit that is measured, where git can't say")
    parser.add_argument("--out", type=Path, help="where to write JSON and PNG, without their suffix")
    args = parser.parse_args(argv)

    path = None if args.out is None else args.out.with_suffix(".json")
    if args.report:
        try:
            document = merged([read(parser, "--report", file) for file in args.report])
        except ValueError as error:
            parser.error(f"argument {error}")
        return publish(document, path)
    worker, workers = share_of(parser, args.worker)
    if args.steps < 1:
        parser.error(f"argument --steps: is {args.steps}, but must be at least 1")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [
        job
        for suite in args.suite
        for data in args.data
        for job in jobs_of(suite, seeds=args.seeds, steps=args.steps, data=data)
        if args.rules is None or job.rule in args.rules
    ]
    held = [run for file in args.without for run in read(parser, "--without", file)["runs"]]
    jobs = [job for job in jobs if not any(measured(job, run) for run in held)][worker::workers]
    origin = {"commit": commit_name(args.commit), "date": time.strftime("%Y-%m-%d")}
    runs: list[dict[str, Any]] = []
    command = ["python", "-m", "bench.learning", *(sys.argv[1:] if argv is None else argv)]
    document = {
        "machine": machine.machine_info(),
        "command": shlex.join(command),
        "runs": runs,
    }
    began = time.monotonic()
    with Progress(transient=True) as bar:
        for job in jobs:
            if time.monotonic() - began > args.seconds:
                break
            task = bar.add_task(f"{job.suite}: {job.rule}, seed {job.seed}", total=job.steps)
            progress = partial(_show, bar, task)
            done = parts.attempt(partial(run, job, device=device, progress=progress))
            bar.remove_task(task)
            runs.append({**origin, **asdict(job), **settings_of(job), **done})
            parts.write(path, document)
            line = f"{job.suite:7} {job.size:6} {job.rule:17} seed {job.seed}"
            result = done.get("failed") or f"{done['val_bpb']:.4f} in {done['seconds']} s"
            print(f"{line}  {result}", flush=True)
            parts.free()
    if len(runs) < len(jobs):
        print(f"{len(jobs) - len(runs)} of {len(jobs)} runs not started: time is over", file=sys.stderr)
    return publish(document, path) or parts.exit_status(runs) or int(len(runs) < len(jobs))


def read(parser: argparse.ArgumentParser, option: str, file: Path) -> dict[str, Any]:
    """Return the document that a file holds; end the program with a sentence where it holds none."""
    try:
        document = json.loads(file.read_text())
        if isinstance(document, dict) and isinstance(document.get("runs"), list):
            return document
    except (OSError, ValueError):
        pass
    parser.error(f"argument {option}: is '{file}', but must be a file that this program wrote")


def share_of(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    """Return I and N of `I/N`; end the program with a sentence for anything else."""
    numbers = text.split("/")
    if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        worker, workers = map(int, numbers)
        if worker < workers:
            return worker, workers
    parser.error(f"argument --worker: is {text!r}, but must be I/N with I from 0 to N - 1")


def merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the runs of several files as one document, in the order of their suites.

    A run takes the place of an earlier one with the same JOB, unless the later one failed.

    Raises ValueError for runs of different devices, whose times must not be averaged, or of texts that share their name alone:
    `stdlib` is another text in each version of Python.
    """
    devices = {document["machine"]["device"] for document in documents}
    if len(devices) > 1:
        raise ValueError(f"--report: is of {' and '.join(sorted(devices))}, but must be of one device")
    runs = [run for document in documents for run in document["runs"]]
    commands = "; ".join(dict.fromkeys(document["command"] for document in documents))
    for name in {run["data"] for run in runs}:
        texts = {run["data_sha256"] for run in runs if run["data"] == name and "failed" not in run}
        if len(texts) > 1:
            raise ValueError(f"--report: has runs on {len(texts)} texts called {name}, but must have one")
    by_job: dict[tuple[Any, ...], Any] = {}
    for run in runs:
        job = tuple(run[name] for name in JOB)
        if job not in by_job or "failed" not in run:
            by_job[job] = run
    return {**documents[0], "command": commands, "runs": sorted(by_job.values(), key=_place)}


def _place(run: Mapping[str, Any]) -> tuple[Any, ...]:
    names = list(RULES)
    rule = names.index(run["rule"]) if run["rule"] in names else len(names)
    places = (SUITES.index(run["suite"]), run["data"] != "stdlib", run["data"], rule, run["rule"])
    return (*places, run["learning_rate"], run["decay"], run["seed"])


def _show(bar: Progress, task: TaskID, step: int) -> None:
    bar.update(task, completed=step)


def publish(document: Mapping[str, Any], path: Path | None) -> int:
    """Write the runs, their table and their curves; print the table."""
    parts.write(path, document)
    print(table(document["runs"]))
    if path is not None:
        parts.write_text(path.with_suffix(".md"), page(document))
        curves(document["runs"], path.with_suffix(".png"), title=document["machine"]["device"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
