"""How often the candidate search finds the nearest code, on random and on trained tables: what `code_search` is chosen from.

python -m bench.recall                                              a small table, on whatever device there is
python -m bench.recall --codes 10000000 --sign-bits 12 14 16 --probes 1 8 64 --json recall.json

A candidate search counts as right where its code is as near as the nearest. Trained tables learn clustered vectors, searched by the
candidate search with the fewest probes; revival runs as in a model.
Legend: Q vectors, C code width, N codes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.state import GraphContext
from arbitor.reference.presets import PRESETS
from bench import machine

RATE = 1.25


def op_set() -> ModuleType:
    """Return the ops of this machine."""
    if machine.on_gpu():
        from arbitor.optimized import ops as found
    else:
        from arbitor.reference import ops as found
    return found


def clustered(centres: Tensor, count: int, noise: float, generator: torch.Generator) -> Tensor:
    """Return vectors of RMS 1 around centres, a few centres far more often than others, [count, C]."""
    share = torch.rand(count, generator=generator, device=centres.device).pow(2)
    chosen = centres[(share * centres.shape[0]).long()]
    z = chosen + noise * torch.randn(chosen.shape, generator=generator, device=centres.device)
    return z / z.square().mean(dim=1, keepdim=True).sqrt()


def codebook(options: argparse.Namespace, sign_bits: int) -> TernaryVQCodebook:
    """Return a table of the size asked for, at its start, searched by candidates."""
    config = replace(
        PRESETS["tiny"],
        num_codes=options.codes,
        code_dim=options.width,
        code_search="candidates",
        sign_bits=sign_bits,
        num_probes=min(options.probes),
    )
    device = "cuda" if machine.on_gpu() else "cpu"
    context = GraphContext(op_set(), config, device=device, dtype=torch.float32, seed=options.seed)
    return TernaryVQCodebook(context, options.codes, options.width)


def train(table: TernaryVQCodebook, draw: Callable[[], Tensor], steps: int) -> None:
    """Let a table learn: codes vote towards their vectors, dead ones are revived."""
    for step in range(steps):
        z = draw().requires_grad_()
        with table.voting.at(rate=RATE, step=step):
            _, c, losses = table.quantize(z)
            (losses["codebook"] + 0 * c.sum()).backward()  # through z too, which counts the uses
        table.step_weight()
        table.step_tables()


def distances(table: TernaryVQCodebook, z: Tensor, ids: Tensor) -> Tensor:
    """Return the squared distance of each vector from its code, float64 [Q]."""
    return (z - table.ops.embedding(ids, table.weight)).to(torch.float64).square().sum(dim=1)


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a result and the milliseconds that it took, the second time."""
    call()
    if machine.on_gpu():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if machine.on_gpu():
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - began)


def measure(table: TernaryVQCodebook, z: Tensor, probes: list[int], of: str) -> Iterator[dict[str, Any]]:
    """Yield recall, distance and time for each number of probes."""
    ops, weight, bits = table.ops, table.weight, table.sign_bits
    exact, exact_ms = timed(lambda: ops.nearest_codes(z, weight))
    least = distances(table, z, exact)
    for count in sorted(count for count in set(probes) if count <= 2**bits):
        buckets = {"num_codes": table.num_codes, "sign_bits": bits, "num_probes": count}
        look = lambda buckets=buckets: ops.nearest_candidates(z, weight, ops.candidate_codes(z, **buckets))  # noqa: E731
        found, ms = timed(look)
        distance = distances(table, z, found)
        yield {
            "table": of,
            "codes": table.num_codes,
            "sign_bits": bits,
            "probes": count,
            "candidates": count * -(-table.num_codes // 2**bits),
            "recall": float((distance <= least).double().mean()),
            "distance": float(distance.mean() / least.mean()),
            "exact_distance": float(least.mean() / z.shape[1]),
            "codes_used": int(exact.unique().numel()),
            "ms": ms,
            "exact_ms": exact_ms,
        }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured."""
    device = "cuda" if machine.on_gpu() else "cpu"
    generator = torch.Generator(device=device).manual_seed(options.seed)
    centres = torch.randn(options.clusters, options.width, generator=generator, device=device)
    normal = lambda count: torch.randn(count, options.width, generator=generator, device=device)  # noqa: E731
    around = lambda count: clustered(centres, count, options.noise, generator)  # noqa: E731
    rows = []
    for sign_bits in options.sign_bits:
        table = codebook(options, sign_bits)
        rows += measure(table, normal(options.vectors), options.probes, "random")
        train(table, lambda: around(options.batch), options.steps)
        rows += measure(table, around(options.vectors), options.probes, "trained")
    peak = torch.cuda.max_memory_allocated() if machine.on_gpu() else None
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    return {"device": machine.device_name(), "settings": settings, "peak_bytes": peak, "rows": rows}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the tables as Markdown."""
    at = result["settings"]
    yield (
        f"{result['device']}: {at['codes']:,} codes of {at['width']}, {at['vectors']:,} vectors; trained for {at['steps']} steps "
        f"of {at['batch']:,} vectors around {at['clusters']:,} centres, noise {at['noise']}."
    )
    if result["peak_bytes"]:
        yield f"Peak memory {result['peak_bytes'] / 2**30:.2f} GiB."
    yield ""
    yield "| table | sign bits | probes | candidates | recall | distance / exact | ms | exact ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in sorted(result["rows"], key=lambda row: row["table"]):
        yield (
            f"| {row['table']} | {row['sign_bits']} | {row['probes']} | {row['candidates']:,} | {row['recall']:.3f} "
            f"| {row['distance']:.3f} | {row['ms']:.2f} | {row['exact_ms']:.2f} |"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write them as JSON if a file is named."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.recall", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vectors", type=int, default=256, help="vectors to search for")
    parser.add_argument("--sign-bits", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--clusters", type=int, default=512, help="centres of the vectors that a table learns"
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, help="standard deviation around a centre, which has 1"
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--batch", type=int, default=512, help="vectors of a training step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    options = parser.parse_args(arguments)
    result = run(options)
    for line in lines(result):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
