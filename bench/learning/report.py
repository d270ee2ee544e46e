"""Runs of `bench.learning` as a table and as curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Run = Mapping[str, Any]


def grouped(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Return the runs that differ in nothing but their seed together, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if "failed" not in run:
            key = tuple(
                run[name] for name in ("suite", "data", "size", "steps", "rule", "learning_rate", "decay")
            )
            found.setdefault(key, []).append(run)
    return found


def table(runs: Sequence[Run]) -> str:
    """Return a Markdown table: one line for all seeds of a rule, with the spread between them."""
    lines = [
        "| suite | data | model | steps | rule | rate | decay | val bpb | spread | seeds | tokens | seconds | MB of state |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (suite, data, size, steps, rule, rate, decay), same in grouped(runs).items():
        values = [run["val_bpb"] for run in same]
        lines.append(
            f"| {suite} | {data} | {size} | {steps:,} | {rule} | {rate:.4g} | {decay:g} | {mean(values):.3f} "
            f"| {max(values) - min(values):.3f} | {len(values)} | {same[0]['tokens'] / 1e6:.1f} M "
            f"| {mean(run['seconds'] for run in same):.1f} | {same[0]['state_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def curves(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Draw validation bits per byte over tokens and over seconds, a panel for each data set and model; written atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str, int], dict[str, list[Run]]] = {}
    for (suite, data, size, steps, rule, *_), same in grouped(runs).items():
        if "sweep" not in suite:
            panels.setdefault((data, size, steps), {}).setdefault(rule, []).extend(same)
    if not panels:
        return
    rules = list(dict.fromkeys(rule for panel in panels.values() for rule in panel))
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(11, 3.6 * len(panels)), squeeze=False, constrained_layout=True
    )
    for row, ((data, size, steps), by_rule) in zip(axes, panels.items(), strict=True):
        best = min(run["val_bpb"] for same in by_rule.values() for run in same)
        for rule, same in by_rule.items():
            color = f"C{rules.index(rule)}"
            for number, run in enumerate(same):
                points = run["curve"][1:]
                values = [bpb for _, bpb in points]
                label = f"{rule} {mean(each['val_bpb'] for each in same):.3f}" if number == 0 else None
                tokens_a_step = run["tokens"] / run["steps"]
                row[0].plot(
                    [step * tokens_a_step / 1e6 for step, _ in points], values, color=color, label=label
                )
                row[1].plot([step / steps * run["seconds"] for step, _ in points], values, color=color)
        for axis, unit in zip(row, ("million tokens", "seconds of training"), strict=True):
            axis.set(xlabel=unit, ylabel="validation bits per byte", ylim=(best - 0.05, best + 1.2))
            axis.grid(alpha=0.3)
        row[0].set_title(f"{data}, {size} weights, {steps:,} steps", fontsize=10)
        row[0].legend(fontsize=8)
    figure.suptitle(f"Rules compared: {title}", fontsize=11)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
    os.replace(beside, path)
