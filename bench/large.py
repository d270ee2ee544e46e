"""Run the presets of the seeds' sizes forward, backward and through a vote and a step: seconds, memory, and their checkpoint.

    python -m bench.large --presets r12 r11 r14 --ctx 4 128 1024 --out docs/runs/large

The first pass at the first length is cold: with an empty cache of compiled kernels (--cold gives every preset one of its own) it
compiles all that the model needs. The seeds' figures, of an RTX 4060, stand beside ours where they ran the same model at the same
length. With --checkpoint the trained state is written, read back and compared by digest; peak memory is said for every stage.
Writes one JSON object and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from arbitor.optimized.training.checkpoint import load_checkpoint, save_checkpoint, state_sha256
from arbitor.optimized.training.plan import model_config
from arbitor.optimized.training.runtime import choose_runtime
from arbitor.optimized.training.smoke import smoke
from arbitor.reference.graph import ArbModel
from bench import machine

MODELS: Mapping[str, Mapping[str, Any]] = {
    "r9": {"preset": "r9"},
    "r11": {"preset": "r11"},
    "r12": {"preset": "r12"},
    "r12 core with experts, one turn": {
        "preset": "r12", "disable_vq": True, "disable_graph": True, "max_moe_iters": 1,
    },
    "r12 core alone": {"preset": "r12", "disable_vq": True, "disable_graph": True, "disable_moe": True},
    "r14": {"preset": "r14"},
    "tiny": {"preset": "tiny"},
}  # fmt: skip
"""Arguments of `model_config` by the name of a model."""

SEED_FIGURES: Mapping[tuple[str, int], str] = {
    ("r12", 4): "forward 0.392 s, backward and update 0.851 s, peak 1,734.90 MiB (REFACTOR12)",
    ("r12 core with experts, one turn", 4): (
        "forward 0.348 s, backward and update 0.586 s, peak 1,638.54 MiB; train step 1.09 s, cold 119.99 s (REFACTOR12)"
    ),
    ("r11", 128): "one step of the sparse MoE path about 77 s, length not given (REFACTOR11)",
}
"""What the seeds measured on an RTX 4060, by model and length."""

PASSES = 6
"""Passes at each length: one cold, the median of the others."""


def measured(name: str, lengths: Sequence[int], *, device: str, seed: int) -> list[dict[str, Any]]:
    """Return the figures of a model at each length."""
    runtime, config = choose_runtime(device, None, None), model_config(**MODELS[name])
    rows = []
    for context in lengths:
        report = smoke(config, runtime, context=context, batch=1, backward=True, seed=seed, passes=PASSES)
        assert report.cold.update is not None and report.warm.update is not None
        rows.append(
            {
                "model": name,
                "context": context,
                "weights": report.weights,
                "canonical_bytes": report.state_bytes,
                "build_seconds": report.build_seconds,
                "cold_forward_seconds": report.cold.forward,
                "cold_update_seconds": report.cold.update,
                "forward_seconds": report.warm.forward,
                "update_seconds": report.warm.update,
                "peak_bytes": report.peak_bytes,
                "seed": SEED_FIGURES.get((name, context)),
            }
        )
        if runtime.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def through_a_checkpoint(name: str, *, device: str, seed: int) -> dict[str, Any]:
    """Build a model, train it for two steps, write its state, read it into another model, and compare the two by digest."""
    runtime, config = choose_runtime(device, None, None), model_config(**MODELS[name])
    stages: dict[str, Any] = {}

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
    ids_BT = torch.randint(0, 256, (1, 128), generator=generator).to(runtime.device)
    began = time.perf_counter()
    with torch.no_grad():
        model.loss(ids_BT)
    stage("forward, and with it the search of every codebook", began)
    began = time.perf_counter()
    for step in range(2):
        if not model.backward(model.losses(ids_BT), rate=1.25, step=step):
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
    return {"model": name, "stages": stages, "file_bytes": size, "same_state": same}


def in_a_process(function: Callable[..., Any], *arguments: Any, cold: bool = False, **options: Any) -> Any:
    """Call a function in a process of its own, so that nothing of another model is left; with no compiled kernels if `cold`."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {"TRITON_CACHE_DIR": folder} if cold else {}
        with (
            patch.dict(os.environ, changed),
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            return pool.submit(function, *arguments, **options).result()


def tables(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [
        "| model | ctx | forward s | update s | cold forward s | cold update s | peak MiB | the seed's |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append(
            f"| {row['model']} | {row['context']:,} | {row['forward_seconds']:.3f} | {row['update_seconds']:.3f} "
            f"| {row['cold_forward_seconds']:.2f} | {row['cold_update_seconds']:.2f} | {peak} | {row['seed'] or ''} |"
        )
    for entry in report["checkpoints"]:
        lines += ["", "| stage of " + entry["model"] + " | s | peak MiB |", "|---|---:|---:|"]
        for what, figures in entry["stages"].items():
            peak = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**20:,.0f}"
            lines.append(f"| {what} | {figures['seconds']:.2f} | {peak} |")
        same = "the same state came back" if entry["same_state"] else "ANOTHER STATE CAME BACK"
        lines.append(f"\nFile of {entry['file_bytes'] / 2**20:,.0f} MiB; {same}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every model, write the JSON file, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.large", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--presets", nargs="+", default=["r12", "r11", "r14"], choices=list(MODELS), metavar="NAME"
    )
    parser.add_argument("--ctx", type=int, nargs="+", default=[4, 128, 1024], help="bytes of a window")
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="NAME", help="models to write and read back"
    )
    parser.add_argument("--cold", action="store_true", help="give every model an empty cache of kernels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the JSON file, without its suffix")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "device": machine.device_name(),
        "torch": torch.__version__,
        "seed": arguments.seed,
    }
    report |= {"passes": PASSES, "rows": [], "checkpoints": []}
    options = {"device": arguments.device, "seed": arguments.seed}

    def keep(kind: str, found: list[dict[str, Any]]) -> None:
        report[kind] += found
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")

    for name in arguments.presets:
        keep("rows", in_a_process(measured, name, arguments.ctx, cold=arguments.cold, **options))
    for name in arguments.checkpoint:
        keep("checkpoints", [in_a_process(through_a_checkpoint, name, **options)])
    print(tables(report))


if __name__ == "__main__":
    main()
