"""``arb info``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arbitor.optimized.commands.command import Command, of_run
from arbitor.optimized.commands.parameters import warn
from arbitor.optimized.training.options import ADAPTERS
from arbitor.optimized.training.shown import shown

if TYPE_CHECKING:
    from arbitor.optimized.training.facts import RunFacts
    from arbitor.optimized.training.run_folder import RunFolder
    from arbitor.reference.config import ArbConfig


@click.command(cls=Command)
@of_run
@click.option("--json", "as_json", is_flag=True, help="Print JSON [off].")
def info(run: Path, as_json: bool) -> None:
    """Say what RUN is: its model, its data, and how far it has come. It may also be a folder of arb export, or a checkpoint.

    Headers of checkpoints are read, and no weights. The run may be under way.
    """
    import json

    from arbitor.optimized.training.facts import read_facts
    from arbitor.optimized.training.model_folder import WEIGHTS_FILE, refuse_other_model
    from arbitor.optimized.training.plan import preset_in_words
    from arbitor.optimized.training.run_folder import RunFolder

    weights = run / WEIGHTS_FILE if run.is_dir() else run
    if run.is_dir():
        refuse_other_model(run)
    if weights.exists():
        said = _said_of_model(weights)
        preset = said["preset"]
    else:
        folder = RunFolder(run)
        facts, refusals = read_facts(folder)
        for refusal in refusals:
            warn(refusal)
        said = _said(folder, facts)
        preset = preset_in_words(facts.run, facts.config.name)
    if as_json:
        click.echo(json.dumps(said, indent=2))
        return
    for name, value in {**said, "preset": preset}.items():
        click.echo(f"{name.replace('_', ' ') + ':':<22}{shown(_in_words(value))}")


def _said_of_model(weights: Path) -> dict[str, Any]:
    """Return what is said of a checkpoint that belongs to no run here."""
    from arbitor.optimized.training.checkpoint import load_header
    from arbitor.optimized.training.run_header import check_model
    from arbitor.optimized.training.sizes import config_of

    header = load_header(weights, check_model)
    return {
        "file": str(weights),
        "preset": header["config"]["name"],
        **_sizes(config_of(header["config"])),
        "steps_taken": header["step"],
        "best_bpb": header["best_bpb"],
        "seed": header["seed"],
        "state_sha256": header["state_sha256"],
        **_adapters(header),
    }


def _adapters(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of the adapters in a header, or nothing."""
    stated = header.get("adapter")
    if stated is None:
        return {}
    return {
        "adapters": len(stated["ranks"]),
        "lora_alpha": stated["alpha"],
        "adapter_sha256": stated["sha256"],
    }


def _sizes(config: ArbConfig) -> dict[str, int]:
    from arbitor.optimized.layouts import resident_bytes
    from arbitor.reference.audit import audit

    sizes = audit(config, resident_bytes=resident_bytes)
    return {
        "weights": sizes.weights,
        "canonical_bytes": sizes.canonical_bytes,
        "resident_bytes": sizes.resident_bytes,
        "table_bytes": sizes.table_bytes,
    }


def _said(folder: RunFolder, facts: RunFacts) -> dict[str, Any]:
    """Return what is said of a run, by name, as JSON data."""
    run = facts.run
    return {
        "folder": str(folder),
        "preset": run["preset"],
        **_sizes(facts.config),
        "steps_taken": facts.step,
        "steps": run["steps"],
        "bytes_of_a_step": facts.bytes_of_steps(1),
        "seconds": round(facts.seconds, 3),
        "data": run["data"],
        "data_bytes": run["data_bytes"],
        "data_sha256": run["data_sha256"],
        "val_bpb": facts.val_bpb,
        "best_bpb": facts.best_bpb,
        "baselines": dict(facts.baselines),
        "seed": run["seed"],
        **{name: run.get(name) for name in ("device", "backend", "dtype")},
        "state_sha256": facts.state_sha256,
        **_settings_of_adapters(facts),
        "versions": dict(facts.versions),
        "files": {str(path.relative_to(folder.path)): path.lstat().st_size for path in folder.files_there()},
    }


def _settings_of_adapters(facts: RunFacts) -> dict[str, Any]:
    """Return what is said of the adapters of a run, or nothing for a run without them."""
    run = facts.run
    if run.get("lora_rank") is None:
        return {}
    return {
        "base": run["init_from"],
        **{name: run[name] for name in ADAPTERS},
        "adapter_sha256": facts.adapter_sha256,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items()) or "none"
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:,.4g}" if value >= 1000 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
