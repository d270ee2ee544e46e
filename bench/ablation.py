"""Train one preset with each module off in turn, on the same bytes, and print what each is worth.

    python -m bench.ablation --preset small --steps 1000 --out docs/runs/ablation-small

Every variant is a run of `arb train` with its own options and seed; several run side by side, since a small model leaves a
GPU waiting for the host. Writes one JSON object (variants, settings, versions) and prints it as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "all modules": (),
    "no graph": ("--disable-graph",),
    "no codes": ("--disable-vq",),
    "no experts": ("--disable-moe",),
    "one turn": ("--max-moe-iters", "1"),
    "two turns": ("--max-moe-iters", "2"),
    "with memory": ("--enable-memory",),
    "trunk alone": ("--disable-vq", "--max-moe-iters", "1"),
}
"""Options of `arb train` by the name of a variant."""


def train(
    preset: str, options: Sequence[str], *, steps: int | None, seed: int, extra: Sequence[str]
) -> dict[str, Any]:
    """Run `arb train` and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "arbitor.optimized.cli",
            "train",
            "--preset",
            preset,
            "--seed",
            str(seed),
        ]
        command += ["--run", str(run), "--no-save", *options, *extra]
        if steps is not None:
            command += ["--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return json.loads((run / "summary.json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the variants asked for, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, help="optimisation steps [of the preset]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--side-by-side", type=int, default=4, help="runs at the same time [4]")
    parser.add_argument("--out", type=Path, help="where to write the JSON file, without its suffix")
    parser.add_argument("extra", nargs="*", help="further options of arb train, after --")
    args = parser.parse_args(argv)

    jobs = [(name, seed) for name in args.variants for seed in args.seeds]
    began = time.monotonic()
    with ThreadPoolExecutor(args.side_by_side) as pool:
        summaries = list(
            pool.map(
                lambda job: train(
                    args.preset, VARIANTS[job[0]], steps=args.steps, seed=job[1], extra=args.extra
                ),
                jobs,
            )
        )
    results: dict[str, list[dict[str, Any]]] = {}
    for (name, _), summary in zip(jobs, summaries, strict=True):
        results.setdefault(name, []).append(summary)
    print(table(results))
    print(f"{len(jobs)} runs, {args.side_by_side} side by side, {time.monotonic() - began:.0f} s")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return validation bits per byte by variant as a Markdown table."""
    lines = ["| variant | weights | val bpb | by seed | against the first |", "|---|---:|---:|---|---:|"]
    first = None
    for name, summaries in results.items():
        values = [float("nan") if s["val_bpb"] is None else s["val_bpb"] for s in summaries]
        first = mean(values) if first is None else first
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        lines.append(
            f"| {name} | {summaries[0]['weights']:,} | {mean(values):.3f} | {by_seed} | {mean(values) - first:+.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
