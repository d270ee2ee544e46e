"""Train one architecture by several rules on the same bytes, and print bits per byte with seeds and spread.

    python -m bench.learning --out bench/results/<gpu>/learning                # every rule, three seeds
    python -m bench.learning --suite time long wide memory --out ...           # what the claims about time and scale rest on
    python -m bench.learning --suite sweep long-sweep --seeds 0 --out ...      # other rates and decays
    python -m bench.learning --suite graph --out ...                           # the preset `small`
    python -m bench.learning --worker 0/2 ...                                  # half of the runs, for one of two GPUs
    python -m bench.learning --rules sign --out ...                            # one row of the table
    python -m bench.learning --without A.json --seconds 500 ...                # what A.json has not, as far as the time goes
    python -m bench.learning --report A.json B.json --out ...                  # table and curves; B.json has the last word

Any size, text and length, with every rule tuned for it, in pieces of four minutes:

    python -m bench.learning --suite tune best --size '110 M' --steps 24000 --data TEXTS --out LONG --pieces --seconds 240
    ... again, until it says that nothing is left
    python -m bench.learning --judge OTHER_TEXT --out LONG                     # once, when all choices are made

A size is a name of the benchmark, a preset or a JSON file, and with `/trunk` behind it the trunk of that alone. Every rule sees the
same windows in the same order for a seed, and is judged on the same validation windows. Each run is written when it ends, in case
the time is cut short. With `--pieces` a run that was cut short goes on from where it was. Curves go to a PNG beside the JSON file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from arbitor.optimized.training.data import Corpus, load_corpus, split_corpus, validation_windows
from arbitor.optimized.training.errors import TrainingError
from bench import machine, parts
from bench.learning.jobs import (
    JOB,
    SUITES,
    Job,
    architecture_in,
    architecture_of,
    as_json,
    at_an_end,
    data_name,
    jobs_of,
    measured,
    record_of,
    rule_in,
)
from bench.learning.judging import judge_runs
from bench.learning.report import curves, page, table
from bench.learning.rules import RULES
from bench.learning.training import train

WINDOWS = 512
"""Validation windows."""


def run(
    record: Mapping[str, Any],
    corpus: Corpus,
    *,
    device: str,
    progress: Any,
    piece: Path | None = None,
    commit: str = "",
    until: float = float("inf"),
) -> dict[str, Any]:
    """Train the model of a record, see `record_of`, or as much of it as the time allows."""
    architecture = architecture_in(record)
    split = split_corpus(corpus, architecture.context)
    windows_WT = validation_windows(corpus, split, count=WINDOWS, context=architecture.context)
    facts = {
        "data_bytes": corpus.data_N.numel(),
        "data_sha256": corpus.sha256,
        "validation_sha256": split.validation_sha256(),
        "windows": windows_WT.shape[0],
    }
    result = train(
        architecture, rule_in(record), corpus, split, windows_WT, seed=record["seed"], steps=record["steps"], device=device,
        progress=progress, piece=piece, job=identity({**record, **facts}), commit=commit, until=until,
    )  # fmt: skip
    return {**facts, **result}


IDENTITY = ("size", "rule", "seed", "steps", "learning_rate", "decay", "config", "architecture")
"""Fields of a record that make a run what it is, beside the bytes that it sees. The suite is none of them."""


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a piece must agree with to be of the run of a record, JSON data."""
    return {name: record[name] for name in (*IDENTITY, "data_sha256")}


def piece_of(record: Mapping[str, Any], path: Path) -> Path:
    """Return the file that a run goes on from, in a folder beside its results. `best` goes on from what `tune` ended with."""
    named = json.dumps({name: record[name] for name in ("data", *IDENTITY)}, sort_keys=True)
    name = "{size} {rule} {seed}".format(**record).replace("/", "-").replace(" ", "-")
    return (
        path.with_suffix(".pieces") / f"{name}-{hashlib.sha256(named.encode()).hexdigest()[:12]}.safetensors"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites asked for; return 1 if a run failed or is left."""
    parser = parser_of()
    args = parser.parse_args(argv)
    path = None if args.out is None else args.out.with_suffix(".json")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.report:
        try:
            document = merged([read(parser, "--report", file) for file in args.report])
        except ValueError as error:
            parser.error(f"argument {error}")
        return publish(document, path)
    if args.judge is not None:
        if path is None:
            parser.error("argument --judge: needs --out, the results whose runs are judged")
        return judged(parser, args, read(parser, "--out", path), path, device)
    worker, workers = share_of(parser, args.worker)
    if args.steps < 1:
        parser.error(f"argument --steps: is {args.steps}, but must be at least 1")
    if args.pieces and path is None:
        parser.error("argument --pieces: needs --out, beside which pieces are kept")
    check_sizes(parser, args)
    began = time.monotonic()
    held = [run for file in args.without for run in read(parser, "--without", file)["runs"]]
    runs: list[dict[str, Any]] = []
    words = map(machine.without_place, sys.argv[1:] if argv is None else argv)
    commands = [shlex.join(["python", "-m", "bench.learning", *words])]
    if args.pieces and path is not None and path.exists():
        before = continued(parser, path)
        runs, commands = before["runs"], [*before.get("command", "").split("; "), *commands]
    corpora = opened(parser, "--data", args.data)
    check_names(parser, args, corpora, [*held, *runs])
    commit = machine.commit_name(args.commit)
    work = Work(
        args=args,
        path=path,
        share=slice(worker, None, workers),
        corpora=corpora,
        held=held,
        runs=runs,
        document={
            "machine": machine.machine_info(),
            "command": "; ".join(dict.fromkeys(filter(None, commands))),
            "runs": runs,
        },
        origin={"commit": commit, "date": time.strftime("%Y-%m-%d")},
        device=device,
        until=began + args.seconds,
    )
    left, lacking = 0, False
    for suite in args.suite:
        try:
            left = work.take(suite)
        except ValueError as error:
            print(error, file=sys.stderr)
            lacking = True
        if left or lacking:
            break
    if left:
        print(f"{left} runs not done: time is over", file=sys.stderr)
    for sentence in at_an_end(runs):
        print(sentence, file=sys.stderr)
    return publish(work.document, path) or parts.exit_status(runs) or int(left > 0 or lacking)


@dataclass(frozen=True)
class Work:
    """What a call of this program has to do, and has done.

    Fields:
        args:     of the command line.
        path:     of the results, or None.
        share:    which of the runs of a suite this worker takes.
        corpora:  texts, by what --data names.
        held:     runs that other files hold.
        runs:     runs of this file, to which those that end are added.
        document: what is written, `runs` among it.
        origin:   commit and date of the runs of this call.
        device:   `cpu` or `cuda`.
        until:    `time.monotonic()` after which no run is begun.
    """

    args: argparse.Namespace
    path: Path | None
    share: slice
    corpora: Mapping[str, Corpus]
    held: Sequence[Mapping[str, Any]]
    runs: list[dict[str, Any]]
    document: dict[str, Any]
    origin: Mapping[str, str]
    device: str
    until: float

    def take(self, suite: str) -> int:
        """Take the runs of a suite, and return how many are left when time is over. Raises ValueError as `jobs_of`."""
        begun: set[Job] = set()
        # `tune` asks more once it knows more.
        while jobs := self._waiting(suite, begun):
            left = 0
            for number, job in enumerate(jobs):
                if time.monotonic() > self.until:
                    return left + len(jobs) - number
                begun.add(job)
                left += not self._run(job)
            if left:
                return left
        return 0

    def _waiting(self, suite: str, begun: set[Job]) -> list[Job]:
        """Return the runs of a suite that are asked of this worker and were neither begun nor done."""
        done = [*self.held, *self.runs]
        # Shared out before what is done is left out, or workers that know of different runs would leave some to each other.
        jobs = planned(self.args, suite, done)[self.share]
        return [job for job in jobs if job not in begun and not measured(job, done)]

    def _run(self, job: Job) -> bool:
        """Take a run, add it to the results, and return whether it came to its end, or failed."""
        record = record_of(job)
        more: dict[str, Any] = {"commit": self.origin["commit"]}
        if self.args.pieces and self.path is not None:
            more |= {"piece": piece_of(record, self.path), "until": self.until}
        with Progress(transient=True) as bar:
            task = bar.add_task(f"{job.suite}: {job.rule}, seed {job.seed}", total=job.steps)
            show = partial(_show, bar, task)
            done = parts.attempt(
                partial(run, record, self.corpora[job.data], device=self.device, progress=show, **more)
            )
        line = f"{job.suite:7} {record['size']:6} {job.rule:17} seed {job.seed}"
        if "unfinished" in done:
            print(f"{line}  {done['unfinished']} of {job.steps} steps", flush=True)
        else:
            self.runs.append({**record, **self.origin, **done})
            parts.write(self.path, self.document)
            result = done.get("failed") or f"{done['val_bpb']:.4f} in {done['seconds']} s"
            print(f"{line}  {result}", flush=True)
        parts.free()
        return "unfinished" not in done


def planned(args: argparse.Namespace, suite: str, runs: Sequence[Mapping[str, Any]]) -> list[Job]:
    """Return the runs of a suite that the options ask for, on every text; raise as `jobs_of`."""
    how: dict[str, Any] = {"seeds": args.seeds, "steps": args.steps, "sizes": args.size, "rules": args.rules}
    return [job for data in args.data for job in jobs_of(suite, data=data, runs=runs, **how)]


def parser_of() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", nargs="+", default=["table"], choices=SUITES)
    parser.add_argument("--size", nargs="+", metavar="SIZE", help="what is trained [what the suite says]")
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
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no run, and with --pieces take no step, after so many",
    )
    parser.add_argument(
        "--pieces", action="store_true", help="go on with the runs of --out, and keep what they go on from"
    )
    parser.add_argument(
        "--without", nargs="+", type=Path, default=[], metavar="JSON", help="leave out what these files hold"
    )
    parser.add_argument("--report", nargs="+", type=Path, metavar="JSON", help="measure nothing, merge these")
    parser.add_argument(
        "--judge",
        metavar="TEXT",
        help="train nothing, judge the runs of `best` in --out by a text that no choice was made on",
    )
    machine.add_commit(parser)
    parser.add_argument("--out", type=Path, help="where to write JSON and PNG, without their suffix")
    return parser


def check_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a sentence for a size that is none, or that a float rule is asked to train with codes."""
    for size in args.size or ():
        try:
            architecture = architecture_of(size)
        except (ValueError, TrainingError) as error:
            parser.error(f"argument --size: {error}")
        floats = [rule for rule in args.rules or RULES if RULES[rule].kind != "integer"]
        if architecture.has_codes and floats:
            parser.error(
                f"argument --size: is {size!r}, whose codes only integer rules train, but --rules has {floats[0]!r}: name integer "
                f"rules alone, or take '{size}/trunk'"
            )


def opened(parser: argparse.ArgumentParser, option: str, sources: Sequence[str]) -> dict[str, Corpus]:
    """Return the texts that an option names, each read once; end the program with a sentence for one that cannot be."""
    try:
        return {source: load_corpus(source) for source in sources}
    except TrainingError as error:
        parser.error(f"argument {option}: {error}")


def check_names(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    corpora: Mapping[str, Corpus],
    runs: Sequence[Mapping[str, Any]],
) -> None:
    """End the program with a sentence where a name of results stands for two texts, or for two architectures.

    Results name texts and sizes without the paths of a machine, and a run is looked for by these names.
    """
    texts: dict[str, str] = {}
    for source, corpus in corpora.items():
        if texts.setdefault(data_name(source), corpus.sha256) != corpus.sha256:
            parser.error(f"argument --data: names two texts {data_name(source)!r}, but must name each once")
    sizes: dict[str, Any] = {}
    for size in args.size or ():
        architecture = architecture_of(size)
        if sizes.setdefault(architecture.name, as_json(architecture)) != as_json(architecture):
            parser.error(f"argument --size: names two sizes {architecture.name!r}, but must name each once")
    for run in runs:
        if "failed" in run:
            continue
        if texts.get(run["data"], run["data_sha256"]) != run["data_sha256"]:
            parser.error(
                f"argument --data: is a text {run['data']!r} with other bytes than that of the runs at hand, but must be the same "
                "or have another name"
            )
        held = sizes.get(run["size"])
        if held is not None and run.get("architecture", held) != held:
            parser.error(
                f"argument --size: is another {run['size']!r} than that of the runs at hand, but must be the same or have another "
                "name"
            )


def judged(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    document: dict[str, Any],
    path: Path,
    device: str,
) -> int:
    """Judge the runs of some results by a held-out text, and publish them."""
    learned = opened(parser, "--data", args.data)
    try:
        judge_runs(
            document["runs"],
            args.judge,
            {corpus.sha256: corpus for corpus in learned.values()},
            lambda run: piece_of(run, path),
            identity,
            device=device,
            windows=WINDOWS,
        )
    except (ValueError, TrainingError) as error:
        parser.error(f"argument --judge: {error}")
    return publish(document, path)


def read(parser: argparse.ArgumentParser, option: str, file: Path) -> dict[str, Any]:
    """Return the document that a file holds, of some runs on a device; end the program with a sentence where it holds none."""
    try:
        document = json.loads(file.read_text())
        if isinstance(document["runs"], list) and isinstance(document["machine"]["device"], str):
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    parser.error(f"argument {option}: is '{file}', but must be a file that this program wrote")


def continued(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Return the document of a file without the runs that failed, which are done again; end the program where another device
    wrote it."""
    document, own = read(parser, "--out", path), machine.machine_info()["device"]
    device = document["machine"]["device"]
    if device != own:
        parser.error(
            f"argument --out: is '{path}', whose runs are of {device}, but must be of this device, {own}"
        )
    return {**document, "runs": [run for run in document["runs"] if "failed" not in run]}


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
