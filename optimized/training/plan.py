"""What a run is going to do: the settings asked for, the defaults of the preset, and what the folder says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from arbitor.optimized.training.defaults import trainer_defaults
from arbitor.optimized.training.errors import TrainingError
from arbitor.reference.config import SIGN_VOTES, ArbConfig, with_fields, with_modules
from arbitor.reference.presets import preset as named_preset

CONFIG_SUFFIX = ".json"
"""How a preset that is a file ends: a configuration as ``ArbConfig.to_json`` writes it."""

CHANGES = ("disable_vq", "disable_graph", "disable_moe", "enable_memory", "max_moe_iters", "sign_votes")
"""Settings that change the model of the preset: modules off or on, and the seeds' votes."""

BOUND = ("preset", "data", "steps", "batch", "context", "accum", "seed", *CHANGES)
"""Settings that decide what a run computes: a resumed run must agree with them."""


@dataclass(frozen=True)
class TrainOptions:
    """What the user asked for; None leaves a setting to the run that is resumed, or to the preset's defaults.

    Attributes:
        preset: name of a preset, or a JSON file with a configuration; ``tiny`` by default.
        data: ``stdlib``, a file or a folder.
        steps, batch, context, accum: length of the run, windows a micro-batch, bytes a window, micro-batches
            a step.
        seed: of initial weights, batches and dither; 0 by default.
        disable_vq, disable_graph, disable_moe, enable_memory, max_moe_iters: modules other than the preset has, see
            ``arbitor.reference.config.with_modules``.
        sign_votes: learn by the seeds' rule, see ``arbitor.reference.config.SIGN_VOTES``.
        eval_interval, save_interval, log_interval: in steps.
        device: ``auto``, ``cpu`` or ``cuda``.
        backend: ``reference`` or ``triton``.
        dtype: of activations, ``float32`` or ``bfloat16``.
        cuda_graph: whether passes are recorded and replayed; by default where they can be. The results are the same.
        run: the run folder.
        resume: continue what the run folder holds.
        save: whether to write checkpoints.
    """

    preset: str | None = None
    data: str | None = None
    steps: int | None = None
    batch: int | None = None
    context: int | None = None
    accum: int | None = None
    seed: int | None = None
    disable_vq: bool | None = None
    disable_graph: bool | None = None
    disable_moe: bool | None = None
    enable_memory: bool | None = None
    max_moe_iters: int | None = None
    sign_votes: bool | None = None
    eval_interval: int | None = None
    save_interval: int | None = None
    log_interval: int | None = None
    device: str | None = None
    backend: str | None = None
    dtype: str | None = None
    cuda_graph: bool | None = None
    run: Path | None = None
    resume: bool = False
    save: bool = True


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, decided. Written to ``config.json`` and into each checkpoint as plain data."""

    preset: str
    data: str
    steps: int
    batch: int
    context: int
    accum: int
    seed: int
    disable_vq: bool
    disable_graph: bool
    disable_moe: bool
    enable_memory: bool
    max_moe_iters: int | None
    sign_votes: bool
    eval_interval: int
    save_interval: int
    log_interval: int
    eval_windows: int
    device: str
    backend: str | None
    dtype: str | None
    cuda_graph: bool | None

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON data."""
        return asdict(self)

    def model_config(self) -> ArbConfig:
        """The configuration of the model: the preset's, with the changes asked for."""
        return model_config(self.preset, **{name: getattr(self, name) for name in CHANGES})


def preset_config(preset: str) -> ArbConfig:
    """The configuration of a preset, or the one that a JSON file holds.

    Args:
        preset: a name, or the path of a file that ends in ``.json``.

    Raises:
        TrainingError: the file can't be read.
        ValueError: no preset of that name, or a file that holds no configuration.
    """
    if not preset.endswith(CONFIG_SUFFIX):
        return named_preset(preset)
    try:
        text = Path(preset).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"preset is the file {preset!r}, which is no text, but must hold JSON") from None
    except OSError as error:
        raise TrainingError(f"preset is the file {preset!r}, which can't be read: {error.strerror}") from None
    try:
        return ArbConfig.from_json(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preset is the file {preset!r}: {error}") from None


def model_config(
    preset: str,
    *,
    disable_vq: bool | None = None,
    disable_graph: bool | None = None,
    disable_moe: bool | None = None,
    enable_memory: bool | None = None,
    max_moe_iters: int | None = None,
    sign_votes: bool | None = None,
) -> ArbConfig:
    """The configuration of a preset with the changes that the command line names."""
    config = preset_config(preset)
    return with_modules(
        with_fields(config, **SIGN_VOTES) if sign_votes else config,
        vq=not disable_vq,
        graph=not disable_graph,
        moe=not disable_moe,
        memory=True if enable_memory else None,
        max_moe_iters=max_moe_iters,
    )


def decide(options: TrainOptions, recorded: Mapping[str, Any] | None) -> Settings:
    """Settle every setting: what is asked for, else what the resumed run has, else the preset's default.

    Args:
        options: what the user asked for.
        recorded: settings of the run that is resumed, or None for a new run.

    Raises:
        TrainingError: a setting asked for differs from the resumed run's, and the result would be another
            run.
        ValueError: a number is out of range.
    """
    asked = {field.name: getattr(options, field.name) for field in fields(options)}
    if (asked["preset"] or "").endswith(CONFIG_SUFFIX):
        asked["preset"] = os.path.abspath(asked["preset"])
    if recorded is not None:
        # A run from before there was an option has what its preset says.
        recorded = {**dict.fromkeys(CHANGES, False), "max_moe_iters": None, **recorded}
        for name in BOUND:
            if name != "data" and asked[name] is not None and asked[name] != recorded[name]:
                raise TrainingError(
                    f"the run was started with {name} {recorded[name]} and cannot go on with {name} {asked[name]}"
                )
    preset = asked["preset"] or (recorded or {}).get("preset") or "tiny"
    if asked["data"] not in (None, "stdlib"):
        asked["data"] = os.path.abspath(asked["data"])  # so that a run can be resumed from another folder
    if recorded is not None and asked["device"] == "auto":
        asked["device"] = None
    if recorded is not None and asked["device"] not in (None, recorded["device"]):
        # Those suited the other device.
        recorded = {**recorded, "backend": None, "dtype": None, "cuda_graph": None}
    if recorded is not None and asked["backend"] not in (None, recorded["backend"]):
        recorded = {**recorded, "cuda_graph": None}
    defaults: dict[str, Any] = {
        **asdict(trainer_defaults(preset_config(preset).name)),
        "data": "stdlib",
        "seed": 0,
        "disable_vq": False,
        "disable_graph": False,
        "disable_moe": False,
        "enable_memory": False,
        "max_moe_iters": None,
        "sign_votes": False,
        "device": "auto",
        "backend": None,
        "dtype": None,
        "cuda_graph": None,
        **(recorded or {}),
        "preset": preset,
    }
    decided: dict[str, Any] = {}
    for field in fields(Settings):
        value = asked.get(field.name)
        decided[field.name] = defaults[field.name] if value is None else value
    settings = Settings(**decided)
    for name in ("steps", "batch", "accum", "eval_interval", "save_interval", "log_interval"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}, but must be at least 1")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"seed is {settings.seed}, but must be from 0 to 2**63 - 1")
    if settings.steps * settings.accum >= 2**32:
        raise ValueError(f"steps times accum is {settings.steps * settings.accum}, but must be below 2**32")
    return settings
