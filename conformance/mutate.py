"""Mutation of the product: change one statement, run the tests of its file, list the changes that no test notices.

    python -m conformance.mutate reference/ops                        # one file after the other, until all are tried
    python -m conformance.mutate --jobs 16 --budget 480 --sample 2000 # some of everything, for eight minutes
    python -m conformance.mutate --jobs 16 --shard 3/64               # the third of 64 machines
    python -m conformance.mutate --report                             # the score and the survivors so far
    python -m conformance.mutate --survivors                          # try again what survived, after tests were added

Results are written as they come, a line of JSON each, to `--out`; a run that was interrupted goes on where it stopped. A mutant
is `killed` by the first test that fails, by a timeout too; it has `survived` where all that reach it pass, and is `unreached` where
none does. One that changes no result is excused in `mutate_excuses.json`, with the reason. The exit status is 1 if there are
survivors and 2 if a test fails without a mutation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.import_lint import ROOT
from conformance.mutation.campaign import Campaign, Options, RedBaselineError, records, shown
from conformance.mutation.operators import KINDS, STATEMENTS, Mutant, mutants_of
from conformance.mutation.worker import PRODUCT

EXCUSES = Path("conformance/mutate_excuses.json")


def main(argv: Sequence[str] | None = None, **overrides: Any) -> int:
    """Run the command; return the exit status. `overrides` replace fields of `Options`."""
    args = parsed(argv)
    root = Path(overrides.get("root", ROOT)).resolve()
    if args.report:
        return report(args.out)
    try:
        mutants = chosen(root, args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{mutant.file}:{mutant.line}: {mutant.id}" for mutant in mutants))
        return 0
    names = ("out", "jobs", "budget", "timeout", "stages", "device", "examples", "patience", "keep_going")
    part = "" if args.shard == (1, 1) else "-{:03}-of-{:03}".format(*args.shard)
    given = {name: getattr(args, name) for name in names}
    options = Options(
        **{"root": root, **given, "again": args.survivors, "name": f"results{part}", **overrides}
    )
    try:
        Campaign(options).run(mutants)
    except RedBaselineError as error:
        print(error, file=sys.stderr)
        return 2
    return report(args.out, {mutant.id for mutant in mutants})


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="conformance.mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "paths", nargs="*", default=list(PRODUCT), help="files or folders of the product (default: all of it)"
    )
    add("--jobs", type=int, default=1, help="processes, each with a copy of the tree (default: 1)")
    add(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="stop after so long, baseline included",
    )
    add(
        "--timeout",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="allowed beyond four times the usual (20)",
    )
    add("--sample", type=int, metavar="N", help="try so many mutants, drawn by --seed")
    add(
        "--kinds",
        type=kinds,
        default=tuple(KINDS),
        metavar="KIND,...",
        help="kinds of change: "
        + "; ".join(f"{name}: {what}" for name, what in KINDS.items())
        + f"; statements: {' and '.join(STATEMENTS)} (default: all)",
    )
    add(
        "--patience",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="seconds of tests, as the unchanged tree takes them, that a mutant is given, the nearest and cheapest first",
    )
    add(
        "--keep-going",
        action="store_true",
        help="leave out tests that fail without a mutation, and name them at the end",
    )
    add("--seed", type=int, default=0, help="orders the mutants (default: 0)")
    add("--shard", type=shard, default=(1, 1), metavar="K/N", help="the K-th of N parts of them, K from 1")
    add(
        "--stages",
        type=int,
        default=3,
        help="1: tests with the name of the file; 2: and their folder; 3: all sets of ops",
    )
    add("--only", default="", metavar="TEXT", help="mutants whose `file function: what` contains the text")
    add("--survivors", action="store_true", help="try again those that survived or were not reached")
    add(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where optimized ops run (cpu: Triton's interpreter)",
    )
    add(
        "--examples", type=int, default=5, metavar="N", help="examples of a law of optimized ops (default: 5)"
    )
    add(
        "--out",
        type=Path,
        default=ROOT / "runs" / "mutate",
        help="folder of the results (default: runs/mutate)",
    )
    add("--list", action="store_true", help="print the mutants, try none")
    add("--report", action="store_true", help="print what the folder of results holds, try none")
    return parser.parse_args(argv)


def shard(text: str) -> tuple[int, int]:
    """Return K and N of `K/N`."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} must be K/N with 1 <= K <= N")
    return int(number), int(count)


def kinds(text: str) -> tuple[str, ...]:
    """Return the kinds of a list with commas, `statements` among them."""
    names = [name for word in text.split(",") for name in (STATEMENTS if word == "statements" else (word,))]
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} must be statements or one of {', '.join(KINDS)}")
    return tuple(names)


def chosen(root: Path, args: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that are asked for, in the order of the seed, without those excused."""
    excused = {entry["mutant"] for entry in excuses(root)}
    found = [mutant for file in files(root, args.paths) for mutant in mutants_of(root, file)]
    found = [
        mutant
        for mutant in found
        if mutant.kind in args.kinds and mutant.id not in excused and args.only in mutant.id
    ]
    if args.survivors:
        again = {
            record["id"]: record
            for record in records(args.out)
            if record["status"] in ("survived", "unreached")
        }
        found = [mutant for mutant in found if mutant.id in again]
    # The place of a mutant depends on itself alone, so that a change elsewhere does not deal them anew.
    found.sort(key=lambda mutant: hashlib.sha256(f"{args.seed} {mutant.id}".encode()).digest())
    part, parts = args.shard
    return found[: args.sample][part - 1 :: parts]


def files(root: Path, paths: Sequence[str]) -> list[str]:
    """Return the Python files of the product under some paths, as paths from the root."""
    found = []
    for name in paths:
        path = (root / name).resolve()
        inside = path.is_relative_to(root) and path.relative_to(root).parts[:1]
        if not path.exists() or not inside or inside[0] not in PRODUCT:
            raise ValueError(
                f"{name} must be a file or a folder within {', '.join(PRODUCT[:-1])} or {PRODUCT[-1]}"
            )
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [str(path.relative_to(root)) for path in dict.fromkeys(found)]


def excuses(root: Path) -> list[dict[str, str]]:
    """Return the mutants that change no result: `mutant` and `reason` each."""
    path = root / EXCUSES
    return json.loads(path.read_text()) if path.exists() else []


def stale_excuses(root: Path) -> list[str]:
    """Return what is wrong with the excuses: those of mutants that are gone, and those without a reason."""
    entries = excuses(root)
    paths = {entry["mutant"].split(" ")[0] for entry in entries}
    known = {mutant.id for file in paths if (root / file).exists() for mutant in mutants_of(root, file)}
    gone = [
        f"no such mutant any more: {entry['mutant']}" for entry in entries if entry["mutant"] not in known
    ]
    return gone + [f"no reason: {entry['mutant']}" for entry in entries if len(entry["reason"].split()) < 3]


def report(out: Path, ids: set[str] | None = None) -> int:
    """Print the survivors and the score of a folder of results; return 1 if anything survived."""
    found = [record for record in records(out) if ids is None or record["id"] in ids]
    alive = [record for record in found if record["status"] in ("survived", "unreached")]
    for record in sorted(alive, key=lambda record: (record["file"], record["line"])):
        print(shown(record))
    counts = Counter(record["status"] for record in found)
    parts = ", ".join(f"{counts[name]} {name}" for name in ("killed", "timeout", "survived", "unreached"))
    print(f"{len(found)} mutants: {parts}; {len(found) - len(alive)} of {len(found)} noticed")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
