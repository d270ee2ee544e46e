"""What a run is going to do: the settings asked for, those of the run that is resumed, and the defaults of the preset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from arbitor.optimized.training.checkpoint import load_header
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media import KINDS, check_kinds
from arbitor.optimized.training.model_folder import refuse_other_model
from arbitor.optimized.training.options import (
    ADAPTERS,
    BEFORE,
    BOUND,
    CHANGES,
    FINETUNE_DEFAULTS,
    ONLY,
    ROWS,
    Settings,
    TrainOptions,
    preset_defaults,
)
from arbitor.optimized.training.regular import JSON_BYTES, read_regular
from arbitor.optimized.training.run_header import FACTS, check_model
from arbitor.optimized.training.setting import AUTO
from arbitor.optimized.training.shown import nearby
from arbitor.optimized.training.sizes import config_of
from arbitor.optimized.training.streams import is_stream, stream_of
from arbitor.optimized.training.texts import STDLIB
from arbitor.reference.config import SIGN_VOTES, ArbConfig, with_fields, with_modules
from arbitor.reference.json_text import parsed_json
from arbitor.reference.presets import preset as named_preset

CONFIG_SUFFIX = ".json"
"""How a preset that is a file ends: a configuration as ``ArbConfig.to_json`` writes it."""

CHECKPOINT_SUFFIX = ".safetensors"
"""How a preset ends that is a checkpoint, whose header holds the configuration."""

RUN_CONFIG = "config.json"
"""The file of a run, and of an export, that holds its configuration."""

OF_TEXT = ("data", "data_code", "val_data")
"""Settings that name bytes, which may come from a stream."""

BATCH_BYTES = 2**28
"""Bytes of a micro-batch at most."""

MICRO_STEPS = 2**32
"""Micro-batches that a run can number."""


def preset_config(preset: str) -> ArbConfig:
    """Return the configuration of a preset, or the one that a JSON file holds.

    Args:
        preset: a name, or the path of a file that ends in ``.json``, or of a checkpoint that ends in ``.safetensors``.

    Raises:
        TrainingError: the file can't be read.
        ValueError: no preset of that name, or a file that holds no configuration.
    """
    if preset.endswith(CHECKPOINT_SUFFIX):
        return config_of(load_header(Path(preset), check_model)["config"])
    if not preset.endswith(CONFIG_SUFFIX):
        try:
            return named_preset(preset)
        except ValueError as error:
            allowed, semicolon, meant = str(error).partition("; ")
            raise ValueError(
                f"{allowed}, or a file that ends in {CONFIG_SUFFIX} or {CHECKPOINT_SUFFIX}{semicolon}{meant}"
            ) from None
    path = Path(preset)
    try:
        content = read_regular(path, most=JSON_BYTES)
    except OSError as error:
        raise TrainingError(f"preset is the file {preset!r}, which can't be read: {error.strerror}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"preset is the file {preset!r}, which is no text, but must hold JSON") from None
    try:
        return _config_of_file(parsed_json(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"preset is the file {preset!r}: {error}") from None


def preset_in_words(run: Mapping[str, Any], name: str | None = None) -> str:
    """Return the preset of a run as a sentence has it: its name, and for a file of a configuration where it is from.

    Args:
        run: settings of the run, JSON data.
        name: of the configuration; None: as the file says.
    """
    preset, source = str(run["preset"]), str(run.get("init_from") or "")
    if not preset.endswith((CONFIG_SUFFIX, CHECKPOINT_SUFFIX)):
        return preset
    if name is None:
        try:
            name = preset_config(preset).name
        except (TrainingError, TypeError, ValueError):
            name = "model"
    # A run that begins with the weights of another has its configuration.
    begins = source != "" and Path(preset) in (Path(source), Path(source) / RUN_CONFIG)
    return f"{name} (from {nearby(source if begins else preset)})"


def _config_of_file(document: Any) -> ArbConfig:
    """Return the configuration of a JSON value: itself, or the model of the ``config.json`` of a run or of an export."""
    if isinstance(document, dict) and isinstance(document.get("model"), dict):
        document = document["model"]
    if isinstance(document, dict):
        known = [field.name for field in fields(ArbConfig)]
        for name in document.keys() - set(known):
            if near := close_names(name, known):
                raise ValueError(f"config has the unknown field {name!r}: did you mean {near}?")
    return config_of(document)


def close_names(name: str, names: Iterable[str]) -> str:
    """Return the name that somebody may have meant, quoted, or nothing where none is near."""
    return "".join(repr(near) for near in get_close_matches(name, list(names), n=1))


def model_config(preset: str, **changes: bool | int | None) -> ArbConfig:
    """Return the configuration of a preset with the changes that the command line names.

    Args:
        preset: as for `preset_config`.
        changes: settings of `CHANGES` by name; None and False change nothing.

    Raises:
        TrainingError: as `preset_config`.
        ValueError: as `preset_config`; or a change that the configuration refuses, or would not show.
    """
    config = preset_config(preset)
    wanted: dict[str, Any] = {name: value for name, value in changes.items() if value not in (None, False)}
    changed = _changed(config, **wanted)
    for name, value in wanted.items():
        if _changed(config, **{name: value}) == config:
            raise ValueError(
                f"{name} is {value}, but changes nothing of the preset {preset}: it is so already"
            )
    return changed


def run_config(settings: Settings, recorded: Mapping[str, Any] | None) -> tuple[ArbConfig, tuple[str, ...]]:
    """Return the configuration of the model of a run, and a sentence where its preset is gone.

    Args:
        settings: of the run.
        recorded: the configuration that a resumed run has recorded, as JSON data; None for a new run.

    Raises:
        TrainingError: as `preset_config`, for a new run; or the preset of a resumed run has changed.
        ValueError: as `preset_config`, for a new run.
    """
    try:
        config = settings_config(settings)
    except (TrainingError, TypeError, ValueError) as error:
        if recorded is None:
            raise
        return config_of(recorded), (f"{error}; going on with the configuration that the run has recorded",)
    if recorded is not None:
        _check_same_model(settings.preset, config, config_of(recorded))
    return config, ()


def _check_same_model(preset: str, now: ArbConfig, before: ArbConfig) -> None:
    """Refuse to go on with another model than the run was started with.

    Args:
        preset: of the run.
        now: the configuration that the preset has with the changes of the run.
        before: the configuration that the run has recorded.

    Raises:
        TrainingError: a field differs; the message names it.
    """
    for field in fields(ArbConfig):
        was, is_now = getattr(before, field.name), getattr(now, field.name)
        if was != is_now:
            raise TrainingError(
                f"the run was started with {field.name} {was!r} and cannot go on with {field.name} {is_now!r}, which its preset "
                f"{nearby(preset)!r} has now: put the preset back, or begin another run with the weights (--init-from)"
            )


def settings_config(settings: Settings) -> ArbConfig:
    """Return the configuration of the model of a run. It was looked at when the run began, and is not refused here."""
    return _changed(preset_config(settings.preset), **{name: getattr(settings, name) for name in CHANGES})


def _changed(
    config: ArbConfig,
    *,
    disable_vq: bool = False,
    disable_graph: bool = False,
    disable_moe: bool = False,
    enable_memory: bool = False,
    max_moe_iters: int | None = None,
    sign_votes: bool = False,
    enable_image: bool = False,
    enable_audio: bool = False,
    enable_video: bool = False,
    enable_speech: bool = False,
) -> ArbConfig:
    return with_modules(
        with_fields(config, **SIGN_VOTES) if sign_votes else config,
        vq=not disable_vq,
        graph=not disable_graph,
        moe=not disable_moe,
        memory=True if enable_memory else None,
        max_moe_iters=max_moe_iters,
        image=enable_image,
        audio=enable_audio,
        video=enable_video,
        speech=enable_speech,
    )


def decide(
    options: TrainOptions, recorded: Mapping[str, Any] | None, model: Mapping[str, Any] | None = None
) -> Settings:
    """Settle every setting: what is asked for, else what the resumed run has, else the preset's default.

    Args:
        options: what the user asked for.
        recorded: settings of the run that is resumed, or None for a new run.
        model: the configuration that it has recorded, as JSON data; None: that of the preset.

    Raises:
        TrainingError: a setting asked for differs from the resumed run's, and the result would be another
            run.
        TypeError, ValueError: a setting asked for is out of range, or nothing would read it.
    """
    asked = options.settings()
    for name, value in asked.items():
        ROWS[name].check(value, asked=True)
    _make_paths_whole(asked)
    _check_kind(options, asked, recorded)
    _check_auto(options, asked, recorded)
    if recorded is None and "init_from" in asked:
        asked["preset"] = asked.get("preset") or _preset_of_source(
            asked["init_from"], "base" if options.finetune else "init_from"
        )
    if recorded is None and "only" in asked:
        _settle_only(asked, preset_config(asked.get("preset") or ROWS["preset"].option.default))
    # 0 says that nothing is saved on the way, which holds.
    if not options.save and asked.get("save_interval"):
        raise ValueError(
            f"save_interval is {asked['save_interval']}, but does nothing in a run that saves no checkpoints"
        )
    known = dict(recorded or {})
    preset = known.get("preset") or asked.get("preset") or ROWS["preset"].option.default
    if recorded is not None:
        _check_known(recorded)
        # A run from before there was a setting that decides what it computes.
        known = {**BEFORE, **known}
        # It says nothing of a run whose steps have one micro-batch, or of one without votes.
        known["accum_votes"] &= known["accum"] > 1 and known["lora_rank"] is None
    # A run from before there was another setting has its default.
    name = model["name"] if model is not None else preset_config(preset).name
    known = {**preset_defaults(name), "preset": preset, **known}
    if recorded is None and options.finetune:
        _settle_adapters(asked, known)
    if recorded is None:
        config = model_config(preset, **{name: asked.get(name) for name in CHANGES})
        if "rate" in asked and config.vote_rule == "sign":
            raise ValueError(
                f"rate is {asked['rate']}, but does nothing: the loss gives sign votes their size"
            )
        if asked.get("accum_votes") and config.vote_rule == "sign":
            raise ValueError("accum_votes is True, but does nothing: sign votes are of each micro-batch")
    else:
        _check_same_run(asked, known)
        _forget_what_suited_another_place(known, asked)
    values = {name: asked.get(name, known[name]) for name in ROWS}
    for name, value in values.items():
        ROWS[name].check(value)
    settings = Settings(**values)
    check_kinds(settings)
    _check_together(settings, asked)
    return settings


def _make_paths_whole(asked: dict[str, Any]) -> None:
    """Make paths that were asked for whole, so that a run can be resumed from another folder. A name on a hub is no path."""
    if asked.get("preset", "").endswith((CONFIG_SUFFIX, CHECKPOINT_SUFFIX)):
        asked["preset"] = os.path.abspath(asked["preset"])
    for name, value in asked.items():
        option = ROWS[name].option
        is_path = option.path and (os.path.exists(value) or not option.on_hub)
        if name in OF_TEXT and is_stream(value):
            asked[name] = stream_of(value).source()
        elif is_path and (name, value) != ("data", STDLIB):
            asked[name] = os.path.abspath(value)


def _check_same_run(asked: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse to go on with settings that make another run. More steps make a longer one (docs/training.md).

    Raises:
        TrainingError: a bound setting that was asked for is another than the run's.
    """
    for name in BOUND:
        is_longer = name == "steps" and asked.get(name, 0) > known[name]
        if asked.get(name, known[name]) != known[name] and not is_longer:
            more = "; more steps are possible" if name == "steps" else ""
            raise TrainingError(
                f"the run was started with {name} {known[name]} and cannot go on with {name} {asked[name]}{more}"
            )


def _check_together(settings: Settings, asked: Mapping[str, Any]) -> None:
    """Refuse settings that do nothing without another one, or are too large together.

    Raises:
        ValueError: there are such; the message names them.
    """
    has_stream = any(is_stream(getattr(settings, name) or "") for name in OF_TEXT)
    if "stream_bytes" in asked and not has_stream:
        raise ValueError(
            f"stream_bytes is {settings.stream_bytes}, but does nothing without data of a stream, hf:NAME"
        )
    if settings.keep_votes and settings.init_from is None:
        raise ValueError("keep_votes is True, but does nothing without init_from, whose votes it keeps")
    if asked.get("accum_votes") and settings.accum == 1:
        raise ValueError(
            "accum_votes is True, but does nothing with accum 1, as a single micro-batch votes once"
        )
    if settings.steps * settings.accum >= MICRO_STEPS:
        raise ValueError(f"steps times accum is {settings.steps * settings.accum}, but must be below 2**32")
    if settings.batch * settings.context > BATCH_BYTES:
        raise ValueError(
            f"batch times context is {settings.batch * settings.context}, but must be at most {BATCH_BYTES}"
        )


def _check_known(recorded: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that has a setting of another version: what it decides would be lost.

    Raises:
        TrainingError: there is one; the message names it.
    """
    for name in sorted(recorded.keys() - ROWS.keys() - set(FACTS)):
        raise TrainingError(
            f"the run has the setting {name} {recorded[name]!r}, which this program does not know: go on with the version that "
            "wrote it, or begin another run with the weights (--init-from)"
        )


def _check_kind(options: TrainOptions, asked: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> None:
    """Refuse settings of adapters in a run without them, and what a run with adapters has no use for.

    Raises:
        TrainingError: `arb finetune` is to go on with a run that has no adapters.
        ValueError: a setting asked for does nothing in this kind of run, or a new run with adapters has no base.
    """
    has_adapters = options.finetune if recorded is None else recorded.get("lora_rank") is not None
    if options.finetune and not has_adapters:
        raise TrainingError(
            f"the run in {str(options.run)!r} trains ternary weights and has no adapters: go on with it by arb train --resume"
        )
    command, other = ("finetune", "train") if has_adapters else ("train", "finetune")
    for name in asked:
        of_this = command in ROWS[name].option.commands or (has_adapters and name in ("init_from", "preset"))
        if not of_this:
            raise ValueError(
                f"{name} is {asked[name]!r}, but does nothing in arb {command}: it is of arb {other}"
            )
    if options.finetune and recorded is None and "init_from" not in asked:
        raise ValueError("init_from is not set, but must name the base, whose weights stay as they are")
    if asked.get("lora_alpha") == 0:
        raise ValueError("lora_alpha is 0, but must be above 0")


def _check_auto(options: TrainOptions, asked: dict[str, Any], recorded: Mapping[str, Any] | None) -> None:
    """Take a batch that the machine decides out of what is asked for: a resumed run has one, a new run's is decided later.

    Raises:
        ValueError: a run of this kind needs a number.
    """
    if asked.get("batch") != AUTO:
        return
    del asked["batch"]
    if recorded is not None:
        return
    other = next((name for name in asked if name.startswith("data_")), None)
    where = "in arb finetune" if options.finetune else f"beside {other}" if other else ""
    if where:
        raise ValueError(f"batch is {AUTO!r}, but must be a number {where}")


def _settle_only(asked: dict[str, Any], config: ArbConfig) -> None:
    """Give a new run on one kind of data the settings that it stands for.

    Args:
        asked: settings asked for; gets the others.
        config: of the preset.

    Raises:
        ValueError: another kind of data, or a mix, is asked for too.
    """
    only = asked["only"]
    kind, field = ONLY.get(only, ("text", ""))
    for name in ("mix", *(f"data_{other}" for other in KINDS[1:] if other != kind)):
        if name in asked:
            raise ValueError(
                f"{name} is {asked[name]!r}, but must be left out of a run of {only} alone (only)"
            )
    if kind == "text":
        return
    if f"data_{kind}" not in asked:
        raise ValueError(f"only is {only!r}, but needs data_{kind}, which is what is learned")
    asked["mix"] = f"text=0,{kind}=1"
    if not getattr(config, field):
        asked[f"enable_{kind}"] = True
    if config.use_moe:
        asked["disable_moe"] = True


def _settle_adapters(asked: dict[str, Any], known: dict[str, Any]) -> None:
    """Give a new run with adapters the defaults of their settings, and its model the turns of the last layer."""
    known.update({name: FINETUNE_DEFAULTS[name] for name in ADAPTERS})
    config = preset_config(asked["preset"])
    default = FINETUNE_DEFAULTS["max_moe_iters"]
    turns = asked.pop("max_moe_iters", default)
    if config.num_experts:
        known["max_moe_iters"] = turns
    elif turns != default:
        asked["max_moe_iters"] = turns
    # Asked for or not, it is left out of what would be refused as no change of the base.
    if config.num_experts and config.max_moe_iters != turns:
        asked["max_moe_iters"] = turns


def _preset_of_source(source: str, name: str) -> str:
    """Return the preset of a run that begins with the weights of another and has no preset of its own: what that one is.

    Args:
        source: the other.
        name: what a sentence calls it.

    Raises:
        TrainingError: there is no such source.
        ValueError: it is a file that is no checkpoint by its name.
    """
    if not os.path.exists(source):
        raise TrainingError(f"{name} is {nearby(source)!r}, but there is no such folder or file")
    if os.path.isdir(source):
        refuse_other_model(Path(source))
        return os.path.join(source, RUN_CONFIG)
    if source.endswith(CHECKPOINT_SUFFIX):
        return source
    raise ValueError(
        f"{name} is {source!r}, but must be a folder or a file that ends in {CHECKPOINT_SUFFIX}, where preset is not set"
    )


def _forget_what_suited_another_place(known: dict[str, Any], asked: dict[str, Any]) -> None:
    """Of a run that goes on with another device or op set, drop the settings that were chosen for the one it had."""
    if asked.get("device") == "auto":
        del asked["device"]
    if asked.get("device", known["device"]) != known["device"]:
        known.update(backend=None, dtype=None, cuda_graph=None)
    if asked.get("backend", known["backend"]) != known["backend"]:
        known.update(cuda_graph=None)
