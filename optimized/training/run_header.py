"""What the header of a checkpoint says of its run, checked: a stranger may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arbitor.optimized.training.adapter_state import check_stated
from arbitor.optimized.training.checkpoint import OTHER_VERSION, CheckpointError, check_layouts
from arbitor.optimized.training.options import ADAPTERS, BEFORE, BOUND, ROWS
from arbitor.optimized.training.sizes import config_of
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel

NEEDED = (
    *(name for name in BOUND if name not in BEFORE),
    "data",
    "data_sha256",
    "data_bytes",
)
"""What the settings of every run say, however old it is."""

FACTS = (
    "data_bytes",
    "data_sha256",
    "validation_sha256",
    "val_data_sha256",
    "threads",
    "media_sha256",
    "sidecars",
    "ranks",
    "init_sha256",
)
"""What is recorded of a run beside its settings."""

RANKS_MAX = 2**20
"""Ranks that a run has had at most, whatever its checkpoint says."""

THREADS_MAX = 4096
"""CPU threads that a run is given at most, whatever its checkpoint says."""


@dataclass
class Progress:
    """Counters that a resumed run carries on. A counter that its checkpoint lacks, as it is from before there was one, is 0.

    Attributes:
        seconds: wall-clock time of the training so far.
        nats, losses: sum and number of the losses since the last line of metrics.
        skipped: micro-batches without a finite loss.
        skipped_in_a_row: those since the last finite one.
        faulty_rows: gradient rows that were not finite and cast no votes.
    """

    seconds: float = 0.0
    nats: float = 0.0
    losses: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    faulty_rows: int = 0


def check_header(header: Mapping[str, Any]) -> None:
    """Refuse the header of a checkpoint that no run of this program wrote. It takes no memory for weights.

    Raises:
        CheckpointError: a setting, a counter or a layout is missing, or is what it cannot be; the message names it.
    """
    check_settings(header["run"])
    run, step = header["run"], header["step"]
    if step > run["steps"]:
        raise CheckpointError(f"its header has {step} for step, but its run has {run['steps']} steps")
    if header["seed"] != run["seed"]:
        raise CheckpointError(f"its header has {header['seed']} for seed, but its run has {run['seed']}")
    if (run.get("lora_rank") is None) == ("adapter" in header):
        has, has_not = (
            ("adapters", "its run has none") if "adapter" in header else ("no adapters", "its run has")
        )
        raise CheckpointError(f"its header has {has}, but {has_not}")
    _check_progress(header["progress"])
    check_model(header)


def check_model(header: Mapping[str, Any]) -> ArbConfig:
    """Return the configuration in a header, by which its weights and tables are laid out. It takes no memory for weights.

    Raises:
        CheckpointError: it is no configuration, or a layout is of another model.
    """
    for name in sorted(header["config"].keys() - ArbConfig.__dataclass_fields__.keys()):
        raise CheckpointError(f"its configuration has an unknown {name}; {OTHER_VERSION}")
    try:
        config = config_of(header["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"its configuration is refused: {error}") from error
    layouts = {**header["weights"], **header["tables"]}
    if len(layouts) < config.num_layers:
        raise CheckpointError(f"it has {config.num_layers} layers, but {len(layouts)} weights and tables")
    model = ArbModel(config, device="meta")
    check_layouts(layouts, model)
    if "adapter" in header:
        try:
            check_stated(header["adapter"], model)
        except ValueError as error:
            raise CheckpointError(f"its {error}") from error
    return config


def check_settings(run: Any) -> None:
    """Refuse settings that no run of this program has.

    Raises:
        CheckpointError: one of them is missing, or is what it cannot be; the message names it.
    """
    if not isinstance(run, dict):
        raise CheckpointError("the settings of its run are no object")
    run = {**BEFORE, **run}
    for name in NEEDED:
        if name not in run:
            raise CheckpointError(f"the settings of its run have no {name}")
    for name in run.keys() & ROWS.keys():
        try:
            ROWS[name].check(run[name])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the settings of its run are refused: {error}") from error
    sizes = {"data_bytes": (1, 2**63 - 1), "threads": (1, THREADS_MAX), "ranks": (1, RANKS_MAX)}
    for name, (low, high) in sizes.items():
        value = run.get(name, low)
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"the settings of its run have {value!r} for {name}, outside {low} to {high}"
            )
    # A run has all settings of adapters, or none.
    for name in ("init_from", *ADAPTERS):
        if run.get("lora_rank") is not None and run.get(name) is None:
            raise CheckpointError(f"the settings of its run have a lora_rank, but no {name}")
    if not isinstance(run["data_sha256"], str):
        raise CheckpointError(f"the settings of its run have {run['data_sha256']!r} for data_sha256")


def _check_progress(progress: Mapping[str, Any]) -> None:
    counters = vars(Progress())
    for name, value in progress.items():
        if name not in counters:
            raise CheckpointError(f"its progress has an unknown {name}; {OTHER_VERSION}")
        counted = counters[name]
        is_number = type(value) is int or (type(value) is float and isinstance(counted, float))
        if not is_number or not 0 <= value < float("inf"):
            raise CheckpointError(f"its progress has {value!r} for {name}, but it is a number of at least 0")
