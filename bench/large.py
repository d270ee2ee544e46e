"""Run the presets of the seeds' sizes forward, backward and through a vote and a step: seconds, memory, and their checkpoint.

    python -m bench.large --presets r12 r11 r14 --ctx 4 128 1024 --out docs/runs/large

With --cold every model gets an empty cache of compiled kernels, and its first pass at the first length compiles all that the model
needs; without it, that pass takes kernels from the cache where it finds them. The seeds' figures, of an RTX 4060, stand beside ours
where they ran the same model at the same length with one window. Passes are launched. With --recorded the steps of a trainer follow
them, whose passes a GPU replays from CUDA graphs. With --checkpoint the trained state is written, read back and compared by digest;
peak memory is said for every stage. Writes one JSON object, again after each length, and prints it as Markdown; what does not fit
the device is said, and costs no other row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.checkpoint import load_checkpoint, save_checkpoint, state_sha256
from arbitor.optimized.training.plan import model_config
from arbitor.optimized.training.recording import LAUNCHED_FIRST
from arbitor.optimized.training.runtime import Runtime, choose_runtime
from arbitor.optimized.training.smoke import smoke
from arbitor.reference.config import NUM_BYTES, ArbConfig, with_fields
from arbitor.reference.graph import ArbModel
from bench import machine, parts, train_step

MODELS: Mapping[str, Mapping[str, Any]] = {
    "r9": {"preset": "r9"},
    "r11": {"preset": "r11"},
    "r12": {"preset": "r12"},
    "r12 core with experts, one turn": {
        "preset": "r12", "disable_vq": True, "disable_graph": True, "max_moe_iters": 1,
    },
    "r12 core alone": {"preset": "r12", "disable_vq": True, "disable_graph": True, "disable_moe": True},
    "r12, every expert runs": {"preset": "r12"},
    "r14": {"preset": "r14"},
    "tiny": {"preset": "tiny"},
    "tiny, every expert runs": {"preset": "tiny"},
}  # fmt: skip
"""Arguments of `model_config` by the name of a model."""

DENSE = " every expert runs"
"""How the name of a model ends whose experts all run for every position (REFACTOR7), in place of the chosen ones."""


def config_of(name: str) -> ArbConfig:
    """Return the configuration of a model."""
    config = model_config(**MODELS[name])
    return with_fields(config, dense_dispatch_max_tokens=2**30) if name.endswith(DENSE) else config


SEED_FIGURES: Mapping[tuple[str, int], str] = {
    ("r12", 4): "forward 0.392 s, backward and update 0.851 s, peak 1,734.90 MiB (REFACTOR12)",
    ("r12 core with experts, one turn", 4): (
        "forward 0.348 s, backward and update 0.586 s, peak 1,638.54 MiB; train step 1.09 s, cold 119.99 s (REFACTOR12)"
    ),
    ("r11", 128): "one step of the sparse MoE path about 77 s, length not given (REFACTOR11)",
}
"""What the seeds measured on an RTX 4060, by model and length."""

PASSES = 6
"""Passes at each length: the first, and the median of the others."""


def measured(
    name: str, context: int, *, windows: int, recorded: bool, device: str, seed: int
) -> dict[str, Any]:
    """Return the figures of a model with so many windows of a length."""
    runtime, config = choose_runtime(device, None, None), config_of(name)
    report = smoke(config, runtime, context=context, batch=windows, backward=True, seed=seed, passes=PASSES)
    parts.free()
    sizes = {"context": context, "windows": windows, "seed": seed}
    of_steps = trainers_steps(config, runtime, **sizes) if recorded else {}
    return {
        "weights": report.weights,
        "canonical_bytes": report.state_bytes,
        "build_seconds": report.build_seconds,
        "cold_forward_seconds": report.cold.forward,
        "cold_update_seconds": report.cold.update,
        "forward_seconds": report.warm.forward,
        "update_seconds": report.warm.update,
        "peak_bytes": report.peak_bytes,
        **of_steps,
        "seed": SEED_FIGURES.get((name, context)) if windows == 1 else None,
    }


def trainers_steps(
    config: ArbConfig, runtime: Runtime, *, context: int, windows: int, seed: int
) -> dict[str, Any]:
    """Return the seconds of a step as a trainer takes it, and the peak of its steps: on a GPU from recorded passes."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(NUM_BYTES, (windows, context), generator=generator).to(runtime.device)
    on_gpu = runtime.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = train_step.graph_step(config, runtime.ops(), ids_BT, record=on_gpu)
    taken = []
    # In the first ones kernels are compiled, and then passes are recorded.
    for _ in range(LAUNCHED_FIRST + 1 + PASSES):
        runtime.synchronize()
        began = time.perf_counter()
        if not step():
            raise RuntimeError(f"the loss of {config.name} is not finite")
        runtime.synchronize()
        taken.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    del step
    parts.free()
    return {"step_seconds": median(taken[-PASSES:]), "step_peak_bytes": peak}


def through_a_checkpoint(name: str, *, device: str, seed: int) -> dict[str, Any]:
    """Return the stages of a model on its way through a checkpoint; if one fails, those before it, and why."""
    stages: dict[str, Any] = {}
    way = partial(_through_a_checkpoint, name, stages, device=device, seed=seed)
    return {**parts.attempt(way), "stages": stages}


@values_vouched_for()
def _through_a_checkpoint(name: str, stages: dict[str, Any], *, device: str, seed: int) -> dict[str, Any]:
    """Build a model, train it for two steps, write its state, read it into another model, and compare the two by digest."""
    runtime, config = choose_runtime(device, None, None), config_of(name)

    def stage(what: str, began: float) -> None:
        runtime.synchronize()
        peak = torch.cuda.max_memory_allocated() if runtime.device == "cuda" else None
        stages[what] = {"seconds": time.perf_counter() - began, "peak_bytes": peak}
        if runtime.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def built(seed: int) -> ArbModel:
        return ArbModel(config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=seed)

    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = built(seed)
    stage("initialise", began)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(NUM_BYTES, (1, 128), generator=generator).to(runtime.device)
    began = time.perf_counter()
    with torch.no_grad():
        model.losses(ids_BT)
    stage("forward, and with it the search of every codebook", began)
    began = time.perf_counter()
    for step in range(2):
        if not model.backward(model.losses(ids_BT), rate=6.0, step=step):
            raise RuntimeError(f"the loss of {name} is not finite")
        model.step()
    stage("two training steps", began)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        metadata: dict[str, Any] = {"config": json.loads(config.to_json()), "step": 2, "seed": seed}
        digest = save_checkpoint(path, model.state(), **metadata, best_bpb=None, run={}, progress={})
        stage("checkpoint written", began)
        del model
        began = time.perf_counter()
        other = built(seed + 1)
        other.load_state(load_checkpoint(path).state)
        stage("checkpoint read into another model", began)
        size = path.stat().st_size
    same = state_sha256(other.state()) == digest
    return {"file_bytes": size, "same_state": same}


@contextmanager
def a_process(*, cold: bool) -> Iterator[ProcessPoolExecutor]:
    """Give a model a process of its own, so that nothing of another is left; with no compiled kernels if `cold`."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {"TRITON_CACHE_DIR": folder, "ARB_CACHE": folder} if cold else {}
        with (
            patch.dict(os.environ, changed),
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            yield pool


def remotely(
    pool: ProcessPoolExecutor, function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Return what a function measured in another process, or why it failed: there, where memory must be freed, or as a whole."""
    part = partial(parts.attempt, partial(function, *arguments, **options))
    return parts.attempt(lambda: pool.submit(part).result())


def tables(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    first = "cold" if report["cold"] else "first"
    lines = [
        f"| model | windows | ctx | forward s | update s | {first} forward s | {first} update s | peak MiB "
        "| trainer's step s | its peak MiB | the seed's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        lead = f"| {row['model']} | {row['windows']:,} | {row['context']:,} |"
        if "failed" in row:
            lines.append(f"{lead} {row['failed']} | | | | | | | |")
            continue
        peak, step_peak = (
            "" if row.get(name) is None else f"{row[name] / 2**20:,.0f}"
            for name in ("peak_bytes", "step_peak_bytes")
        )
        step = f"{row['step_seconds']:.3f}" if "step_seconds" in row else ""
        lines.append(
            f"{lead} {row['forward_seconds']:.3f} | {row['update_seconds']:.3f} "
            f"| {row['cold_forward_seconds']:.2f} | {row['cold_update_seconds']:.2f} | {peak} "
            f"| {step} | {step_peak} | {row['seed'] or ''} |"
        )
    if not report["cold"]:
        lines += ["", "First: a pass whose kernels may have been compiled before."]
    for entry in report["checkpoints"]:
        lines += ["", "| stage of " + entry["model"] + " | s | peak MiB |", "|---|---:|---:|"]
        for what, figures in entry.get("stages", {}).items():
            peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:,.0f}"
            lines.append(f"| {what} | {figures['seconds']:.2f} | {peak} |")
        if "failed" in entry:
            lines.append(f"\nNo further: {entry['failed']}.")
            continue
        same = "the same state came back" if entry["same_state"] else "ANOTHER STATE CAME BACK"
        lines.append(f"\nFile of {entry['file_bytes'] / 2**20:,.0f} MiB; {same}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every model, write the JSON file, print the tables; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.large", description=(__doc__ or "").splitlines()[0]
    )
    shown = ["r12", "r12 core with experts, one turn", "r11", "r14"]
    parser.add_argument("--presets", nargs="+", default=shown, choices=list(MODELS), metavar="NAME")
    parser.add_argument("--ctx", type=int, nargs="+", default=[4, 128, 1024], help="bytes of a window")
    parser.add_argument("--windows", type=int, default=1, help="of a pass (1)")
    parser.add_argument(
        "--recorded", action="store_true", help="take steps as a trainer does too, recorded on a GPU"
    )
    parser.add_argument(
        "--checkpoint",
        nargs="*",
        default=[],
        choices=list(MODELS),
        metavar="NAME",
        help="models to write and read back",
    )
    parser.add_argument("--cold", action="store_true", help="give every model an empty cache of kernels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    machine.add_commit(parser)
    parser.add_argument("--out", type=Path, help="where to write the JSON file, without its suffix")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "device": machine.device_name(),
        "torch": torch.__version__,
        "commit": machine.commit_name(arguments.commit),
        "seed": arguments.seed,
    }
    report |= {"passes": PASSES, "cold": arguments.cold, "rows": [], "checkpoints": []}
    options = {"device": arguments.device, "seed": arguments.seed}
    sizes = {"windows": arguments.windows, "recorded": arguments.recorded}
    out = None if arguments.out is None else arguments.out.with_suffix(".json")
    for name in arguments.presets:
        with a_process(cold=arguments.cold) as pool:
            for context in arguments.ctx:
                row = remotely(pool, measured, name, context, **sizes, **options)
                report["rows"].append(
                    {"model": name, "context": context, "windows": arguments.windows, **row}
                )
                parts.write(out, report)
    for name in arguments.checkpoint:
        with a_process(cold=False) as pool:
            entry = remotely(pool, through_a_checkpoint, name, **options)
        report["checkpoints"].append({"model": name, **entry})
        parts.write(out, report)
    print(tables(report))
    return parts.exit_status([*report["rows"], *report["checkpoints"]])


if __name__ == "__main__":
    sys.exit(main())
