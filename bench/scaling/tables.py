"""What `bench.scaling` found, as tables of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from json import loads
from typing import Any

from arbitor.optimized.distributed.ranks import MXINT8
from bench.machine import RESULTS
from bench.scaling.at_work import MODELS
from bench.scaling.floats import BYTES_A_WEIGHT

WEAK, STRONG = "weak", "strong"
"""Scalings: as many windows for each rank, or for all ranks together."""


def tables(report: Mapping[str, Any]) -> str:
    """Return a report."""
    return f"{rates_table(report)}\n\n{steps_table(report)}"


def stored_rates() -> str:
    """Return which ranks of the stored report were right, and what exchanges reach."""
    return rates_table(_stored())


def stored_steps() -> str:
    """Return what steps of models take in the stored report."""
    return steps_table(_stored())


def stored_gains() -> str:
    """Return how much faster two ranks of the stored report are than one, in a sentence."""
    return gains(_stored())


def _stored() -> Any:
    return loads((RESULTS / "nvidia-h200" / "scaling.json").read_text())


def rates_table(report: Mapping[str, Any]) -> str:
    """Return which ranks were right, and what exchanges reach."""
    lines = [
        "| ranks | check | all-reduce GB/s | gather to owners GB/s | broadcast GB/s |",
        "|---:|---|---:|---:|---:|",
    ]
    by_part = {(each["ranks"], each["part"]): each for each in report["parts"] if "model" not in each}
    for ranks in report["ranks"]:
        check, rates = by_part.get((ranks, "check"), {}), by_part.get((ranks, "rates"), {})
        said = check.get("failed") or ("passed" if "state_sha256" in check else "not run")
        cells = [
            f"{rates['exchanges'][name]['gigabytes_per_second']:.2f}"
            if "exchanges" in rates
            else rates.get("failed", "")
            for name in ("all_reduce", "gather to owners", "broadcast")
        ]
        lines.append(f"| {ranks} | {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(report: Mapping[str, Any]) -> str:
    """Return what steps of models take."""
    lines = [
        "| model | scaling | ranks | way | windows a rank | s a step | bytes a second | of linear | of linear, same bytes | "
        "received a weight | waiting | peak MiB |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [row for each in report["parts"] if "model" in each for row in rows_of(each)]
    alone = {
        (row["model"], row["way"], row["windows"]): row["bytes_per_second"]
        for row in rows
        if row["ranks"] == 1 and "seconds" in row
    }
    for row in sorted(
        rows, key=lambda row: (MODELS.index(row["model"]), row["scaling"] == STRONG, row["way"])
    ):
        lead = f"| {row['model']} | {row['scaling']} | {row['ranks']} | {row['way']} | {row['windows']} |"
        if "failed" in row:
            lines.append(f"{lead} {row['failed']} | | | | | | |")
            continue
        same_windows, same_bytes = (
            share_of_linear(row, alone.get((row["model"], row["way"].removesuffix(f", {MXINT8}"), windows)))
            for windows in (row["windows"], row["windows"] * row["ranks"])
        )
        waiting = "" if "waiting_share" not in row else f"{row['waiting_share']:.3f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append(
            f"{lead} {row['seconds']:.4f} | {row['bytes_per_second']:,.0f} | {same_windows} | {same_bytes} "
            f"| {row['received']:.3f} | {waiting} | {peak} |"
        )
    return "\n".join(lines)


def gains(report: Mapping[str, Any]) -> str:
    """Return how many times the bytes a second of one process two ranks read, with as many windows each, in a sentence."""
    rows = [row for each in report["parts"] if each["part"] == "ours" for row in rows_of(each)]
    speed = {
        (row["model"], row["ranks"], row["windows"]): row["bytes_per_second"]
        for row in rows
        if row["scaling"] == WEAK and "seconds" in row
    }
    found = [
        f"{speed[model, 2, windows] / speed[model, 1, windows]:.2f} for `{model}`"
        for model in MODELS
        for windows in sorted(windows for name, ranks, windows in speed if (name, ranks) == (model, 2))
        if (model, 1, windows) in speed
    ]
    base = (
        f"Bytes a second on two {report['device']}, as a multiple of those on one with as many windows a GPU"
    )
    return f"{base}: {', '.join(found)}."


def share_of_linear(row: Mapping[str, Any], alone: float | None) -> str:
    """Return the bytes a second of each rank as a share of those of a process alone; nothing if these were not measured."""
    return "" if alone is None else f"{row['bytes_per_second'] / alone / row['ranks']:.3f}"


def rows_of(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of steps that a part gives."""
    what = {name: part[name] for name in ("model", "scaling", "ranks", "windows")}
    if part["part"] in ("ours", MXINT8):
        way = "ours" if part["part"] == "ours" else f"ours, {MXINT8}"
        return [{**part, **what, "way": way, "received": part.get("received_bytes_a_weight")}]
    if "failed" in part:
        return [{**what, "way": part["part"], "failed": part["failed"]}]
    lead = "compiled " if part["part"] == "compiled" else ""
    return [
        {**part[way], **what, "way": lead + way, "received": part[way]["received_bytes_a_weight_by_count"]}
        for way in BYTES_A_WEIGHT
        if way in part
    ]
