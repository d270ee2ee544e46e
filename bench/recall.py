"""How often the candidate search finds the nearest code, on random and on trained tables: what `code_search` is chosen from.

python -m bench.recall                                              a small table, on whatever device there is
python -m bench.recall --codes 10000000 --sign-bits 12 14 16 --probes 1 8 64 --json recall.json

A candidate search counts as right where its code is as near as the nearest. Trained tables learn clustered vectors, searched by the
candidate search with the fewest probes; revival runs as in a model. How many vectors, and around how many centres, follows from the
size of the table unless it is told: some for each code of a small one, as many as minutes allow for a large one. Vectors are drawn
for each step, and a table is gone before the next is built. Results are written after each table.
Legend: Q vectors, C code width, N codes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.presets import PRESETS
from bench import machine, parts

RATE = 6.0

CODES_A_CENTRE, MOST_CENTRES = 4, 200_000
"""Codes for each centre of the vectors that a table learns, and most centres."""

CODES_A_VECTOR, LEAST_BATCH, MOST_BATCH = 4, 512, 65_536
"""Codes for each vector of a training step, and the bounds of their number."""

CODES_A_STEP, LEAST_STEPS, MOST_STEPS = 20_000, 40, 300
"""Codes for each training step, and the bounds of their number."""


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """Return options with what they leave open chosen by the size of the table."""
    codes = options.codes
    chosen = {
        "clusters": min(max(codes // CODES_A_CENTRE, 1), MOST_CENTRES),
        "batch": min(max(codes // CODES_A_VECTOR, LEAST_BATCH), MOST_BATCH),
        "steps": min(max(codes // CODES_A_STEP, LEAST_STEPS), MOST_STEPS),
    }
    asked = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **chosen, **asked})


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


def train(table: TernaryVQCodebook, draw: Callable[[], Tensor], steps: int) -> dict[str, float]:
    """Let a table learn: codes vote towards their vectors, dead ones are revived.

    Returns: the shares of its codes that some vector found: `found` in any step, `in_use` in one of the last half
    """
    found_in = torch.full((table.num_codes,), -1, dtype=torch.int16, device=table.device)
    for step in range(steps):
        z = draw().requires_grad_()
        with table.voting.taking(rate=RATE, step=step):
            ids, c, losses = table.quantize(z)
            # Through z too, which counts the uses.
            (losses["codebook"] + 0 * c.sum()).backward()
        table.step_weight()
        table.step_tables()
        found_in[ids] = step
    shares = {"found": found_in >= 0, "in_use": found_in >= steps // 2}
    return {name: float(codes.double().mean()) for name, codes in shares.items()}


def distances(table: TernaryVQCodebook, z: Tensor, ids: Tensor) -> Tensor:
    """Return the squared distance of each vector from its code, float64 [Q]."""
    return (z - table.ops.embedding(ids, table.weight)).to(torch.float64).square().sum(dim=1)


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, float, int | None]:
    """Return a result, the median of the seconds that it took, and the most memory that a GPU held meanwhile."""
    seconds = []
    if machine.on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        if machine.on_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return result, median(seconds), torch.cuda.max_memory_allocated() if machine.on_gpu() else None


def searched(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float, int | None]:
    """Return what a search finds, the milliseconds that it takes once it is warm, and its peak memory."""
    call()
    ids, seconds, peak = timed(call, repeats)
    return ids, 1e3 * seconds, peak


def measure(
    table: TernaryVQCodebook, z: Tensor, options: argparse.Namespace, of: str
) -> Iterator[dict[str, Any]]:
    """Yield recall, distance, time and memory for each number of probes; what fails says why."""
    ops, weight, bits = table.ops, table.weight, table.sign_bits
    of_table = {"table": of, "codes": table.num_codes, "sign_bits": bits}
    least = torch.empty(0)

    def exact() -> dict[str, Any]:
        nonlocal least
        ids, ms, peak = searched(lambda: ops.nearest_codes(z, weight), options.repeats)
        least = distances(table, z, ids)
        return {
            "exact_distance": float(least.mean() / z.shape[1]),
            "codes_used": int(ids.unique().numel()),
            "exact_ms": ms,
            "exact_peak_bytes": peak,
        }

    def candidates(count: int) -> dict[str, Any]:
        buckets = {"num_codes": table.num_codes, "sign_bits": bits, "num_probes": count}
        look = lambda: ops.nearest_candidates(z, weight, ops.candidate_codes(z, **buckets))  # noqa: E731
        ids, ms, peak = searched(look, options.repeats)
        distance = distances(table, z, ids)
        return {
            "recall": float((distance <= least).double().mean()),
            "distance": float(distance.mean() / least.mean()),
            "ms": ms,
            "peak_bytes": peak,
        }

    of_exact = parts.attempt(exact)
    for count in sorted(count for count in set(options.probes) if count <= 2**bits):
        probed = {"probes": count, "candidates": count * -(-table.num_codes // 2**bits)}
        found = of_exact if "failed" in of_exact else parts.attempt(partial(candidates, count))
        yield {**of_table, **probed, **of_exact, **found}


@values_vouched_for()
def tried(
    options: argparse.Namespace,
    sign_bits: int,
    normal: Callable[[int], Tensor],
    around: Callable[[int], Tensor],
    rows: list[dict[str, Any]],
    stages: dict[str, Any],
) -> dict[str, Any]:
    """Build a table, search it, train it and search it again, adding to `rows` and `stages`; return what training found."""
    table, seconds, peak = timed(lambda: codebook(options, sign_bits))
    stages["initialise"] = {"seconds": seconds, "peak_bytes": peak}
    rows += measure(table, normal(options.vectors), options, "random")
    shares, seconds, peak = timed(lambda: train(table, lambda: around(options.batch), options.steps))
    stages["train"] = {"seconds": seconds, "peak_bytes": peak}
    rows += measure(table, around(options.vectors), options, "trained")
    return dict(shares)


def run(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return all that was measured; `keep` gets what there is after each table."""
    device = "cuda" if machine.on_gpu() else "cpu"
    generator = torch.Generator(device=device).manual_seed(options.seed)
    centres = torch.randn(options.clusters, options.width, generator=generator, device=device)
    normal = lambda count: torch.randn(count, options.width, generator=generator, device=device)  # noqa: E731
    around = lambda count: clustered(centres, count, options.noise, generator)  # noqa: E731
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result: dict[str, Any] = {"device": machine.device_name(), "settings": settings, "tables": [], "rows": []}
    for sign_bits in options.sign_bits:
        stages: dict[str, Any] = {}
        table = partial(tried, options, sign_bits, normal, around, result["rows"], stages)
        result["tables"].append({"sign_bits": sign_bits, "stages": stages, **parts.attempt(table)})
        keep(result)
        # This table goes before the next is made.
        parts.free()
    return result


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the tables as Markdown."""
    at = result["settings"]
    yield (
        f"{result['device']}: {at['codes']:,} codes of {at['width']}, {at['vectors']:,} vectors; trained for {at['steps']} steps "
        f"of {at['batch']:,} vectors around {at['clusters']:,} centres, noise {at['noise']}."
    )
    yield ""
    yield "| table | sign bits | probes | candidates | recall | distance / exact | ms | exact ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in sorted(result["rows"], key=lambda row: row["table"]):
        lead = f"| {row['table']} | {row['sign_bits']} | {row['probes']} | {row['candidates']:,} |"
        if "failed" in row:
            yield f"{lead} {row['failed']} | | | |"
            continue
        yield f"{lead} {row['recall']:.3f} | {row['distance']:.3f} | {row['ms']:.2f} | {row['exact_ms']:.2f} |"
    yield ""
    yield "| sign bits | initialise s | MiB | exact MiB | candidates MiB | train s | MiB | codes found | in use |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for table in result["tables"]:
        rows = [row for row in result["rows"] if row["sign_bits"] == table["sign_bits"]]
        start, train = (table["stages"].get(name, {}) for name in ("initialise", "train"))
        cells = [
            str(table["sign_bits"]),
            _shown(start.get("seconds"), "{:.2f}"),
            _mebibytes(start.get("peak_bytes")),
            *(
                _mebibytes(max((row.get(f"{of}peak_bytes") or 0 for row in rows), default=0))
                for of in ("exact_", "")
            ),
            _shown(train.get("seconds"), "{:.2f}"),
            _mebibytes(train.get("peak_bytes")),
            table.get("failed") or _shown(table.get("found"), "{:.2%}"),
            _shown(table.get("in_use"), "{:.2%}"),
        ]
        yield f"| {' | '.join(cells)} |"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mebibytes(value: int | None) -> str:
    return f"{value / 2**20:,.0f}" if value else ""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write them as JSON if a file is named; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.recall", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vectors", type=int, default=256, help="vectors to search for")
    parser.add_argument("--sign-bits", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--clusters", type=int, help="centres of the vectors that a table learns [by the size of the table]"
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, help="standard deviation around a centre, which has 1"
    )
    parser.add_argument("--steps", type=int, help="training steps [by the size of the table]")
    parser.add_argument("--batch", type=int, help="vectors of a training step [by the size of the table]")
    parser.add_argument("--repeats", type=int, default=5, help="times that each search is timed [5]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    options = settled(parser.parse_args(arguments))
    result = run(options, partial(parts.write, options.json))
    for line in lines(result):
        print(line)
    return parts.exit_status([*result["tables"], *result["rows"]])


if __name__ == "__main__":
    sys.exit(main())
