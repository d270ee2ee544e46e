"""What can be run: architectures, suites of runs, and what tells one run from another in results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from arbitor.optimized.training.plan import preset_config
from arbitor.optimized.training.schedule import decay_of
from arbitor.reference.config import with_modules
from arbitor.reference.presets import PRESETS, preset
from bench.learning.learner import Architecture
from bench.learning.rules import RULES, Rule

SIZES: Mapping[str, Architecture] = {
    "7 M": Architecture("7 M"),
    "29 M": Architecture("29 M", width=768),
    "110 M": Architecture("110 M", width=1536),
    "0.7 M": Architecture("0.7 M", width=128, num_layers=3),
    "small": Architecture("small", config=preset("small")),
    "toy": Architecture("toy", width=64, num_layers=1, context=64, batch=8),
}
"""Architectures by name: the byte transformer of the benchmark; four and fifteen times its weights; float weights in the memory
that ternary ones of the benchmark take; the graph; and one for a quick look."""

LARGE_BATCH = 32
"""Windows of a step of the presets of LARGE: 8,192 bytes."""

LARGE = ("r9", "r11", "r12", "r14")

TRUNK = "/trunk"
"""What the name of a preset ends with for its trunk alone: no codes, one turn. Float rules train this."""

BEST = ("integer", "fixed scales", "straight-through", "float AdamW")

TUNED = ("integer", "averaged", "straight-through", "straight-through Muon", "float AdamW", "float Muon")
"""Rules that the suite `tune` sweeps: ours, and the baselines."""

GRID: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "integer": ((4 / 64, 6 / 64, 8 / 64), (0.6, 1.0)),
    "averaged": ((4 / 64, 6 / 64, 8 / 64), (0.6, 1.0)),
    "straight-through": ((1e-3, 2e-3, 4e-3), (0.4, 1.0)),
    "straight-through Muon": ((2e-3, 4e-3, 8e-3), (0.4, 1.0)),
    "float AdamW": ((7e-4, 1.5e-3, 3e-3), (0.4, 1.0)),
    "float Muon": ((2e-3, 4e-3, 8e-3), (0.4, 1.0)),
}
"""Rates and shares of decay of the suite `tune`. A best rate at an end of its range is said to be so."""

SWEPT: Mapping[str, Sequence[tuple[float, float]]] = {
    "integer": ((4 / 64, 0.6), (8 / 64, 0.6), (6 / 64, 0.9)),
    "straight-through": ((1e-3, 0.4), (1.5e-3, 0.4), (3e-3, 0.4), (4e-3, 0.4), (2e-3, 0.6)),
    "straight-through Muon": ((1e-3, 0.4), (4e-3, 0.4), (8e-3, 0.4)),
    "float AdamW": ((1e-3, 0.4), (2e-3, 0.4), (3e-3, 0.4), (2e-3, 0.6)),
    "float Muon": ((1e-3, 0.4), (4e-3, 0.4), (8e-3, 0.4)),
}
SWEPT_LONG: Mapping[str, Sequence[tuple[float, float]]] = {
    "fixed scales": (
        (3 / 64, 1.0), (4 / 64, 1.0), (6 / 64, 0.6), (8 / 64, 1.0), (2 / 64, 0.6), (3 / 64, 0.6),
    ),
    "straight-through": ((1e-3, 0.6), (1.4e-3, 1.0), (2e-3, 1.0)),
    "float AdamW": ((1e-3, 1.0),),
}  # fmt: skip
"""Rates and shares of decay that a rule is tried with besides its own, at the length of the benchmark and at four times that."""

SUITES = ("table", "time", "long", "wide", "memory", "sweep", "long-sweep", "graph", "tune", "best", "toy")
"""What can be run, see `jobs_of`."""


@dataclass(frozen=True)
class Job:
    """One model to train."""

    suite: str
    size: str
    rule: str
    seed: int
    steps: int
    data: str
    rate: float | None = None
    decay: float | None = None


JOB = ("suite", "size", "rule", "seed", "steps", "data", "learning_rate", "decay")
"""What a run is known by in results."""

SETTING = ("size", "steps", "data", "rule")
"""What the best rate and decay are chosen for."""


def architecture_of(size: str) -> Architecture:
    """Return the architecture of a name in SIZES, a preset or a JSON file, each also with `/trunk` behind it.

    Raises ValueError for a name that is none of these.
    """
    if size in SIZES:
        return SIZES[size]
    name = size.removesuffix(TRUNK)
    if name not in PRESETS and not name.endswith(".json"):
        raise ValueError(
            f"is {size!r}, but must be one of {', '.join((*SIZES, *PRESETS))}, or FILE.json; {TRUNK} behind a preset or file "
            "leaves the trunk alone"
        )
    config = preset_config(name)
    if size.endswith(TRUNK):
        config = with_modules(config, vq=False, max_moe_iters=1 if config.use_moe else None)
    label = Path(name).name + size[len(name) :]
    return Architecture(label, config=config, **({"batch": LARGE_BATCH} if name in LARGE else {}))


def jobs_of(
    suite: str,
    *,
    seeds: Sequence[int],
    steps: int,
    data: str,
    sizes: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Job]:
    """Yield the runs of a suite, the first seed of all rules before the second of any.

    Args:
        suite: `tune` tries rates and decays with the first seed. `best` takes those that came out best to all seeds. The others
            are what docs/learning.md rests on.
        seeds, steps, data: of the runs; some suites take a multiple of the steps.
        sizes: architectures, or None for those of the suite.
        rules: only these, or None for those of the suite.
        runs: results that `best` chooses by.

    Raises ValueError for `best` without a run of every rate and decay of the suite `tune`.
    """
    plans: Mapping[str, tuple[str, Sequence[str], int]] = {
        "table": ("7 M", tuple(RULES), steps),
        "long": ("7 M", BEST, 4 * steps),
        "time": ("7 M", ("integer",), 3 * steps // 4),
        "wide": ("29 M", BEST, steps),
        "memory": ("0.7 M", ("float AdamW",), steps),
        "graph": ("small", BEST, steps // 3),
        "sweep": ("7 M", tuple(SWEPT), steps),
        "long-sweep": ("7 M", tuple(SWEPT_LONG), 4 * steps),
        "tune": ("7 M", TUNED, steps),
        "best": ("7 M", TUNED, steps),
        "toy": ("toy", tuple(RULES), steps),
    }
    usual, of_suite, length = plans[suite]
    chosen = [rule for rule in of_suite if rules is None or rule in rules]
    for size in sizes or (usual,):
        for seed in seeds[:1] if suite == "tune" else seeds:
            for rule in chosen:
                for rate, decay in _settings(suite, rule, Job(suite, size, rule, seed, length, data), runs):
                    yield Job(suite, size, rule, seed, length, data, rate, decay)


def _settings(
    suite: str, rule: str, job: Job, runs: Sequence[Mapping[str, Any]]
) -> Sequence[tuple[float | None, float | None]]:
    """Return the rates and decays that a suite runs a rule with; None is that of the rule."""
    if suite == "tune":
        rates, decays = GRID[rule]
        return [(rate, decay) for decay in decays for rate in rates]
    if suite == "best":
        setting = setting_of({**asdict(job), **settings_of(job)})
        tried = {
            (run["learning_rate"], run["decay"])
            for run in runs
            if run["suite"] == "tune" and "failed" not in run and setting_of(run) == setting
        }
        if missing := {*itertools.product(*GRID[rule])} - tried:
            raise ValueError(
                f"{rule}, {job.size}, {job.steps:,} steps of {setting[2]}: the best rate and decay are not known, since "
                f"{len(missing)} of them have no run of the suite 'tune'"
            )
        found = best_of(runs)[setting]
        return [(found["learning_rate"], found["decay"])]
    if suite in ("sweep", "long-sweep"):
        return (SWEPT if suite == "sweep" else SWEPT_LONG)[rule]
    return [(None, None)]


def setting_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the best rate and decay are chosen for, of a run of some results."""
    return tuple(run[name] for name in SETTING)


def best_of(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Return a run of the best rate and decay for each `SETTING` that the suite `tune` has tried, by the validation text.

    A held-out text has no say in this.
    """
    tried: dict[tuple[Any, ...], dict[tuple[float, float], list[Mapping[str, Any]]]] = {}
    for run in runs:
        if run["suite"] == "tune" and "failed" not in run:
            by_rate = tried.setdefault(setting_of(run), {})
            by_rate.setdefault((run["learning_rate"], run["decay"]), []).append(run)
    return {
        setting: min(by_rate.values(), key=lambda same: mean(run["val_bpb"] for run in same))[0]
        for setting, by_rate in tried.items()
    }


def at_an_end(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each best rate that has no larger or no smaller one beside it, so that a better one may lie outside."""
    for setting, run in best_of(runs).items():
        rates = sorted(
            {
                other["learning_rate"]
                for other in runs
                if other["suite"] == "tune" and setting_of(other) == setting
            }
        )
        if run["learning_rate"] in (rates[0], rates[-1]):
            size, steps, data, rule = setting
            yield (
                f"{rule}, {size}, {steps:,} steps of {data}: the best rate {run['learning_rate']:.4g} is the "
                f"{'largest' if run['learning_rate'] == rates[-1] else 'smallest'} that was tried"
            )


def data_name(data: str) -> str:
    """Return what results call a data set: paths are of one machine."""
    return data if data == "stdlib" else Path(data).name


def measured(job: Job, run: Mapping[str, Any]) -> bool:
    """Return whether a run of some results is this job, and came to something. It may be of another commit, which it names."""
    wanted = {**asdict(job), **settings_of(job)}
    # A run of an older file does not hold the fields of its rule.
    held = {"config": wanted["config"], **run}
    return "failed" not in run and all(held[name] == wanted[name] for name in (*JOB, "config"))


def settings_of(job: Job) -> dict[str, Any]:
    """Return what results hold of a job besides its own fields: the name of its data, and the settings of its rule."""
    rule = rule_of(job)
    data = data_name(job.data)
    return {"data": data, "learning_rate": rule.rate, "decay": rule.decay, "config": dict(rule.config)}


def rule_of(job: Job) -> Rule:
    """Return the rule of a job, with the rate and the decay asked for."""
    asked = {name: getattr(job, name) for name in ("rate", "decay") if getattr(job, name) is not None}
    rule = replace(RULES[job.rule], **asked)
    return rule if rule.decay is not None else replace(rule, decay=decay_of(job.steps))
