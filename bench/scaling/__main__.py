"""Check that ranks compute what they should, then measure what they gain, for several numbers of ranks on one machine.

    python -m bench.scaling --ranks 1 2 4 8 --models small 110M r12 --out scaling.json     # one rank a GPU, over NCCL
    python -m bench.scaling --ranks 1 2 8 --models tiny --device cpu --out scaling.json    # over gloo

A check comes first for each number of ranks: two runs of one seed end with one state, and all ranks read the same weights. Where
it fails, nothing is measured with that number. Then come the rates of exchanges, and steps of each model with as many windows for
each rank (weak scaling) and for all ranks together (strong scaling): ours with gradients as they are and in eight bits, and the
float twin's under DDP and FSDP2, as it is and by torch.compile. Ours are compared with a process alone, which exchanges nothing,
with as many windows as a rank and with as many as all ranks.
The parts of a number of ranks share a start of torchrun. If one fails or takes too long, the next ones have a start of their own.
Each is written as soon as it is there.

If the file of `--out` is there, the measurement goes on with it. Parts that it has are not measured again. Checks are made anew.
So a measurement may take several leases of a machine. Each part names its commit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.distributed.ranks import MXINT8
from bench import machine, parts
from bench.scaling.at_work import EXCHANGED_BYTES, MODELS, PARTS
from bench.scaling.tables import STRONG, WEAK, tables

POLL_SECONDS = 0.2
"""Seconds between looks at whether a part is written."""

OF_MODELS = ("ours", MXINT8, "floats", "compiled")
"""Parts that time steps of a model. The others come once for each number of ranks."""


def planned(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is to be run, in order: the number of ranks, the part, and what it is asked for."""
    for ranks in asked.ranks:
        for part in PARTS:
            if part in asked.parts and part not in OF_MODELS:
                yield {"ranks": ranks, "part": part}
        for model in asked.models:
            for scaling, part, windows in steps_of(ranks, asked):
                yield {"ranks": ranks, "part": part, "model": model, "scaling": scaling, "windows": windows}


def steps_of(ranks: int, asked: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield what is to be timed of a model on so many ranks: the scaling, the part, and the windows of a rank."""
    of_models = [part for part in OF_MODELS if part in asked.parts]
    if ranks == 1:
        yield from ((WEAK, part, asked.windows) for part in of_models if part != MXINT8)
        if "ours" in of_models:
            # What several ranks read together.
            yield from ((WEAK, "ours", asked.windows * count) for count in asked.ranks if count > 1)
        return
    if WEAK in asked.scalings:
        yield from ((WEAK, part, asked.windows) for part in of_models)
    if STRONG in asked.scalings and asked.windows % ranks == 0:
        yield from ((STRONG, part, asked.windows // ranks) for part in of_models)


def identity(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was asked for in a part that was run."""
    return {name: part[name] for name in ("ranks", "part", "model", "scaling", "windows") if name in part}


def earlier(out: Path | None, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of an earlier measurement that did not fail.

    Args:
        out:   its file; there may be none.
        facts: what this measurement has in common with it.

    Raises:
        ValueError: it was of another device, another release of torch or other windows; or it is another file.
    """
    if out is None or not out.exists():
        return []
    try:
        report = loads(out.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or {*facts, "parts"} - report.keys():
        raise ValueError(f"--out is {out}, but must be a file that bench.scaling wrote, or a new one")
    for name, value in facts.items():
        if report[name] != value:
            raise ValueError(
                f"--out is {out}, which has results with {name} {report[name]!r}, but must be a file with {name} {value!r}, "
                "or a new one"
            )
    return [part for part in report["parts"] if "failed" not in part]


def left(asked: argparse.Namespace, kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the planned parts that are still to be run. A check comes again before what it is for."""
    done = [identity(part) for part in kept]
    parts = [part for part in planned(asked) if part["part"] == "check" or part not in done]
    measured = {part["ranks"] for part in parts if part["part"] != "check"}
    alone = set(asked.parts) == {"check"}
    return [part for part in parts if alone or part["ranks"] in measured]


def run(
    asked_parts: Sequence[Mapping[str, Any]], asked: argparse.Namespace, budget: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Run parts of one number of ranks by one start of torchrun; yield what came out of each. One that `failed` is the last.

    Args:
        asked_parts: what is to be run.
        asked: the arguments of the command.
        budget: returns the seconds that are left.
    """
    ours = [
        {name: part[name] for name in ("part", "model", "windows") if name in part} for part in asked_parts
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked_parts[0]['ranks']}",
            "-m", "bench.scaling.at_work", "--parts", dumps(ours), "--device", asked.device, "--out", str(out),
            "--length", str(asked.length), "--steps", str(asked.steps), "--exchanged-bytes", str(asked.exchanged_bytes),
            *(("--share-gpu",) if asked.share_gpu else ()),
        ]  # fmt: skip
        with open(Path(folder) / "err", "w+") as err:
            # torchrun ends its ranks when it is told to end, and would leave them if it were killed.
            process = subprocess.Popen(command, cwd=machine.ROOT, stdin=subprocess.DEVNULL, stderr=err)
            for place in range(len(ours)):
                seconds = min(asked.part_seconds, budget())
                if not _is_there(process, out, place, seconds):
                    process.terminate()
                    process.wait()
                    yield {"failed": f"took more than {seconds:.0f} s"}
                    return
                found = _found(out)
                if place >= len(found):
                    err.seek(0)
                    said = err.read()
                    sys.stderr.write(said)
                    yield {"failed": reason_of(said)}
                    return
                yield found[place]
            process.wait()


def _is_there(process: subprocess.Popen[bytes], out: Path, place: int, seconds: float) -> bool:
    """Wait until the result of a place is written, or the process has ended; return whether that was in time."""
    end = time.monotonic() + seconds
    while process.poll() is None and len(_found(out)) <= place:
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _found(out: Path) -> list[dict[str, Any]]:
    """Return what came out of the parts so far."""
    found: list[dict[str, Any]] = loads(out.read_text()) if out.exists() else []
    return found


def results(
    of_ranks: Sequence[Mapping[str, Any]], asked: argparse.Namespace, budget: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Yield what came out of parts of one number of ranks, up to one that failed, or of all if nothing of them can be run."""
    if budget() <= 0:
        yield from ({"failed": "the budget was spent"} for _ in of_ranks)
        return
    # `run` is asked once more after its last result, and then waits until the ranks have left their GPUs.
    for found, part in zip(run(of_ranks, asked, budget), of_ranks, strict=False):
        yield found
        if part["part"] == "check" and "failed" in found:
            yield from ({"failed": "the check of this number of ranks failed"} for _ in of_ranks[1:])
            return


def reason_of(err: str) -> str:
    """Return the line of what torchrun wrote that says why a rank failed."""
    lines = [line.partition("]:")[2].strip() or line.strip() for line in err.splitlines()]
    said = [line for line in lines if line.partition(":")[0].endswith(("Error", "Lost", "OutOfMemoryError"))]
    return said[0] if said else "a rank ended without a word"


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, write the JSON file after each part, print the tables; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)")
    parser.add_argument(
        "--models", nargs="*", default=["small", "110M", "r12"], choices=MODELS, metavar="NAME"
    )
    parser.add_argument(
        "--windows", type=int, default=64, help="of a rank, or of all ranks for strong scaling (64)"
    )
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=f"({' '.join(PARTS)})"
    )
    parser.add_argument(
        "--scalings", nargs="+", default=[WEAK, STRONG], choices=[WEAK, STRONG], help="(weak strong)"
    )
    parser.add_argument("--length", type=int, default=256, help="bytes of a window (256)")
    parser.add_argument(
        "--steps", type=int, default=10, help="that are timed, after as many that are not (10)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--share-gpu",
        action="store_true",
        help="all ranks take one GPU, and exchange over gloo: checks alone mean much",
    )
    parser.add_argument(
        "--exchanged-bytes", type=int, default=EXCHANGED_BYTES, help="of an exchange that is timed (2^28)"
    )
    parser.add_argument("--part-seconds", type=float, default=180.0, help="limit of a part (180)")
    parser.add_argument(
        "--budget", type=float, default=3600.0, help="start no part after so many seconds (3600)"
    )
    machine.add_commit(parser)
    parser.add_argument("--out", type=Path, help="where to write the JSON file, or to go on with it")
    asked = parser.parse_args(argv)
    facts = {"device": machine.device_name(), "torch": torch.__version__}
    facts |= {"windows": asked.windows, "length": asked.length, "share_gpu": asked.share_gpu}
    try:
        kept = earlier(asked.out, facts)
    except ValueError as error:
        parser.error(str(error))
    ranks = sorted({*asked.ranks, *(part["ranks"] for part in kept)})
    report: dict[str, Any] = {**facts, "ranks": ranks, "parts": kept}
    commit = machine.commit_name(asked.commit)
    began, parts_left = time.monotonic(), left(asked, kept)

    def budget() -> float:
        return asked.budget - (time.monotonic() - began)

    while parts_left:
        of_ranks = [part for part in parts_left if part["ranks"] == parts_left[0]["ranks"]]
        for found, part in zip(results(of_ranks, asked, budget), of_ranks, strict=False):
            others = [each for each in report["parts"] if identity(each) != part]
            report["parts"] = [*others, {**part, **found, "commit": commit}]
            parts.write(asked.out, report)
            parts_left.remove(part)
    print(tables(report))
    return parts.exit_status(report["parts"])


if __name__ == "__main__":
    sys.exit(main())
