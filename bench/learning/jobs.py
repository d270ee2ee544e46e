"""What can be run: architectures, suites of runs, and what tells one run from another in results."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from arbitor.optimized.training.plan import preset_config
from arbitor.optimized.training.schedule import decay_of
from arbitor.optimized.training.sizes import config_of
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

TUNED = (
    "integer",
    "averaged",
    "long averaged",
    "straight-through",
    "straight-through Muon",
    "straight-through groups",
    "float AdamW",
    "float Muon",
)
"""Rules that the suite `tune` sweeps: ours, and the baselines."""

GRID: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "integer": ((4 / 64, 6 / 64, 8 / 64), (0.6, 1.0)),
    "averaged": ((4 / 64, 6 / 64, 8 / 64), (0.6, 1.0)),
    "long averaged": ((1 / 64, 1.5 / 64, 3 / 64), (0.6, 1.0)),
    "straight-through": ((1e-3, 2e-3, 4e-3), (0.4, 1.0)),
    "straight-through Muon": ((2e-3, 4e-3, 8e-3), (0.4, 1.0)),
    "straight-through groups": ((1e-3, 2e-3, 4e-3), (0.4, 1.0)),
    "float AdamW": ((7e-4, 1.5e-3, 3e-3), (0.4, 1.0)),
    "float Muon": ((2e-3, 4e-3, 8e-3), (0.4, 1.0)),
}
"""Rates, each larger than the one before, and shares of decay that the suite `tune` begins with, as many for each rule. Where the
best rate is at an end, the next one beyond it is tried too: `rates_to_try`."""

GROWTH = 3
"""Rates that `tune` adds at each end at most. A best rate at an end after that is said to be so."""

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

CONTENT = ("config", "architecture")
"""What the names of a rule and of a size stand for. A name may come to stand for something else, in a later commit or another
file."""

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
        suite: `tune` tries rates and decays with the first seed, and with the runs of its grid it has more to try, until the best
            rate has a smaller and a larger one beside it. `best` takes those that came out best to all seeds. The others are what
            docs/learning.md rests on.
        seeds, steps, data: of the runs; some suites take a multiple of the steps.
        sizes: architectures, or None for those of the suite.
        rules: only these, or None for those of the suite.
        runs: results that `tune` goes on from and `best` chooses by.

    Raises ValueError for `best` without a run of every rate and decay of the suite `tune`, or where none of them learned.
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
    if suite in ("tune", "best"):
        setting = setting_of(record_of(job))
        rates, decays = rates_to_try(setting, runs), GRID[rule][1]
        if suite == "tune":
            return [(rate, decay) for decay in decays for rate in rates]
        named = f"{rule}, {setting[0]}, {job.steps:,} steps of {setting[2]}"
        if missing := {*itertools.product(rates, decays)} - tried_for(setting, runs).keys():
            raise ValueError(
                f"{named}: the best rate and decay are not known, since {len(missing)} of them have no run of the suite 'tune'"
            )
        found = best_of(runs)[setting]
        if not math.isfinite(found["val_bpb"]):
            raise ValueError(
                f"{named}: no rate is the best, since the loss is not finite with any that was tried"
            )
        return [(found["learning_rate"], found["decay"])]
    if suite in ("sweep", "long-sweep"):
        return (SWEPT if suite == "sweep" else SWEPT_LONG)[rule]
    return [(None, None)]


def setting_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the best rate and decay are chosen for, of a run of some results."""
    return tuple(run[name] for name in SETTING)


def tried_for(
    setting: tuple[Any, ...], runs: Sequence[Mapping[str, Any]]
) -> dict[tuple[float, float], list[Mapping[str, Any]]]:
    """Return the runs of the suite `tune` for a `SETTING` by their rate and decay, without those that failed."""
    tried: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["suite"] == "tune" and "failed" not in run and setting_of(run) == setting:
            tried.setdefault((run["learning_rate"], run["decay"]), []).append(run)
    return tried


def rates_to_try(setting: tuple[Any, ...], runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the rates that the suite `tune` tries for a `SETTING`: those of GRID, and then one beyond each end that was best.

    A rate is added once all that there are have a run with every decay. It is as many times as large as the one beside it as
    that one is to its other neighbour. GROWTH bounds how many.
    """
    rates, decays = GRID[setting[SETTING.index("rule")]]
    found, tried = list(rates), tried_for(setting, runs)
    added = {"below": 0, "above": 0}
    while len(found) > 1 and {*itertools.product(found, decays)} <= tried.keys():
        best, _ = min(itertools.product(found, decays), key=lambda pair: _mean_bpb(tried[pair]))
        if best == found[-1] and added["above"] < GROWTH:
            found.append(found[-1] * (found[-1] / found[-2]))
            added["above"] += 1
        elif best == found[0] and added["below"] < GROWTH:
            found.insert(0, found[0] * (found[0] / found[1]))
            added["below"] += 1
        else:
            break
    return found


def best_of(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Return a run of the best rate and decay for each `SETTING` that the suite `tune` has tried, by the validation text.

    A held-out text has no say in this.
    """
    settings = dict.fromkeys(
        setting_of(run) for run in runs if run["suite"] == "tune" and "failed" not in run
    )
    return {setting: min(tried_for(setting, runs).values(), key=_mean_bpb)[0] for setting in settings}


def _mean_bpb(same: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean of some runs; infinity where one lost its way, since no other number is larger or smaller than NaN."""
    bpb = mean(run["val_bpb"] for run in same)
    return bpb if math.isfinite(bpb) else math.inf


def at_an_end(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each best rate that has no larger or no smaller one beside it, so that a better one may lie outside."""
    for setting, run in best_of(runs).items():
        rates = sorted({rate for rate, _ in tried_for(setting, runs)})
        if run["learning_rate"] in (rates[0], rates[-1]):
            size, steps, data, rule = setting
            yield (
                f"{rule}, {size}, {steps:,} steps of {data}: the best rate {run['learning_rate']:.4g} is the "
                f"{'largest' if run['learning_rate'] == rates[-1] else 'smallest'} that was tried"
            )


def data_name(data: str) -> str:
    """Return what results call a data set: paths are of one machine."""
    return data if data == "stdlib" else Path(data).name


def measured(job: Job, runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether one of some runs is this job, and came to something. It may be of another commit, which it names."""
    wanted = record_of(job)
    # A run of an older file does not hold the fields of its rule and its architecture.
    older = {name: wanted[name] for name in CONTENT}
    return any(
        "failed" not in run and all({**older, **run}[name] == wanted[name] for name in (*JOB, *CONTENT))
        for run in runs
    )


def record_of(job: Job) -> dict[str, Any]:
    """Return what results hold of a job, JSON data: its own fields, with names for paths, and what the names stand for."""
    rule, architecture = rule_of(job), architecture_of(job.size)
    held = {"learning_rate": rule.rate, "decay": rule.decay, "config": dict(rule.config)}
    return {
        **asdict(job),
        "size": architecture.name,
        "data": data_name(job.data),
        **held,
        "architecture": as_json(architecture),
    }


def as_json(architecture: Architecture) -> dict[str, Any]:
    """Return an architecture as JSON data, from which `architecture_in` makes it again."""
    shape = {"context": architecture.context, "batch": architecture.batch}
    if architecture.config is not None:
        return {**shape, "config": json.loads(architecture.config.to_json())}
    return {**shape, "width": architecture.width, "num_layers": architecture.num_layers}


def architecture_in(run: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a run of some results. A run of an older file names it alone."""
    if "architecture" not in run:
        return architecture_of(run["size"])
    held: dict[str, Any] = dict(run["architecture"])
    if "config" in held:
        held["config"] = config_of(held["config"])
    return Architecture(run["size"], **held)


def rule_in(run: Mapping[str, Any]) -> Rule:
    """Return the rule of a run of some results, with the settings that it was run with."""
    held = {"rate": run["learning_rate"], "decay": run["decay"]}
    return replace(RULES[run["rule"]], **held, config=run.get("config", RULES[run["rule"]].config))


def rule_of(job: Job) -> Rule:
    """Return the rule of a job, with the rate and the decay asked for."""
    asked = {name: getattr(job, name) for name in ("rate", "decay") if getattr(job, name) is not None}
    rule = replace(RULES[job.rule], **asked)
    return rule if rule.decay is not None else replace(rule, decay=decay_of(job.steps))
