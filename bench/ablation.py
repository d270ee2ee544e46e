"""Train one model with each module off in turn, on the same bytes, and print what each is worth.

    python -m bench.ablation --preset small --steps 1000 --out docs/runs/ablation-small

The model is the preset with every module that the loss of bytes reaches; what a preset leaves out comes from `EVERY_MODULE`.
Every variant is a run of `arb train` with that preset's settings and a seed; several run side by side, since a small model
leaves a GPU waiting for the host. Each run is added to the JSON file (variants, settings, versions) when it ends, in case the
time is cut short, and the whole is printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from inspect import signature
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from arbitor.optimized.training.plan import preset_config
from arbitor.reference.config import ArbConfig, with_fields, with_modules
from bench import machine, parts

EVERY_MODULE = {
    "num_codes": 4096,
    "num_hops": 2,
    "hop_rank": 24,
    "memory_rows": 16_384,
    "composite_codes": 4096,
    "composite_inner": 256,
    "max_moe_iters": 2,
}
"""What a preset gets that leaves these modules out; a preset that has codes already is taken as it is."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "every module": {},
    "no memory": {"memory": False},
    "no graph": {"graph": False},
    "no composites": {"composite_codes": 0},
    "no codes": {"vq": False},
    "no experts": {"moe": False},
    "one turn": {"max_moe_iters": 1},
    "four turns": {"max_moe_iters": 4},
    "trunk alone": {"vq": False, "max_moe_iters": 1},
}
"""Arguments of `with_modules`, or fields of the config, by the name of a variant. Without codes there is neither graph nor
memory, and without a graph there are no composites."""

MODULES = frozenset(signature(with_modules).parameters) - {"config"}
"""Names of those arguments."""


def full(config: ArbConfig) -> ArbConfig:
    """Return a configuration with every module on."""
    return config if config.num_codes else replace(config, **EVERY_MODULE)


def variant(config: ArbConfig, changes: Mapping[str, Any]) -> ArbConfig:
    """Return a configuration with the changes of a variant."""
    modules = {name: value for name, value in changes.items() if name in MODULES}
    fields = {name: value for name, value in changes.items() if name not in MODULES}
    return with_fields(with_modules(config, **modules), **fields)


def train(
    config: ArbConfig, *, steps: int | None, seed: int, device: int | None, extra: Sequence[str]
) -> dict[str, Any]:
    """Run `arb train`, on one of several GPUs if a number is given, and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "config.json", Path(folder) / "run"
        file.write_text(config.to_json())
        command = [sys.executable, "-m", "arbitor.optimized.cli", "train", "--preset", str(file)]
        command += ["--seed", str(seed), "--run", str(run), "--no-save", *extra]
        if steps is not None:
            command += ["--steps", str(steps)]
        environment = (
            dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        summary = json.loads((run / "summary.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line["val_bpb"]) for line in metrics if line.get("val_bpb") is not None]
        stored = {
            name: machine.without_place(value) if isinstance(value, str) else value
            for name, value in summary.items()
        }
        return {**stored, "preset": config.name, "model": json.loads(config.to_json()), "curve": curve}


def runs(
    config: ArbConfig, jobs: Sequence[tuple[str, int]], *, side_by_side: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yield the summary of each variant and seed as soon as it is there; one that failed is said on stderr."""
    devices = torch.cuda.device_count()
    with ThreadPoolExecutor(side_by_side) as pool:
        waiting = {
            pool.submit(
                train,
                variant(config, VARIANTS[name]),
                seed=seed,
                device=number % devices if devices > 1 else None,
                **options,
            ): name
            for number, (name, seed) in enumerate(jobs)
        }
        for done in as_completed(waiting):
            try:
                yield {"variant": waiting[done], **done.result()}
            except Exception as error:
                # Whatever it is, the other runs are worth keeping.
                print(f"{waiting[done]}: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the variants asked for, write the JSON file, print the table; return 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=(__doc__ or "").splitlines()[0]
    )
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

    jobs = [(name, seed) for seed in args.seeds for name in args.variants]
    began = time.monotonic()
    out = None if args.out is None else args.out.with_suffix(".json")
    results: list[dict[str, Any]] = []
    for result in runs(
        full(preset_config(args.preset)),
        jobs,
        side_by_side=args.side_by_side,
        steps=args.steps,
        extra=args.extra,
    ):
        results.append(result)
        parts.write(out, results)
    print(table(results))
    print(
        f"{len(results)} of {len(jobs)} runs, {args.side_by_side} side by side, {time.monotonic() - began:.0f} s"
    )
    return int(len(results) < len(jobs))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return validation bits per byte by variant, in the order of VARIANTS, as a Markdown table."""
    lines = ["| variant | weights | val bpb | by seed | against the first |", "|---|---:|---:|---|---:|"]
    first = None
    for name in VARIANTS:
        found = sorted((r for r in results if r["variant"] == name), key=lambda r: r["seed"])
        if not found:
            continue
        values = [float("nan") if r["val_bpb"] is None else r["val_bpb"] for r in found]
        first = mean(values) if first is None else first
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        lines.append(
            f"| {name} | {found[0]['weights']:,} | {mean(values):.3f} | {by_seed} | {mean(values) - first:+.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
