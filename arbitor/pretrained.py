"""Models as folders: `config.json` and `model.safetensors`, written whole, read with suspicion, fetched from a hub and sent to one.

`model.safetensors` is a checkpoint as the trainer writes it: the canonical form of every weight, with the configuration and digests
in its header. `config.json` says the same configuration to people and to tools that look for one. No other file is read or
written, and neither format can hold code.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from arbitor.optimized.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_fits,
    load_checkpoint,
    save_checkpoint,
)
from arbitor.optimized.training.checkpoint import State as State
from arbitor.optimized.training.regular import read_regular
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.runtime import versions
from arbitor.optimized.training.sizes import config_of
from arbitor.optimized.training.whole_file import told, write_whole
from arbitor.reference.config import ArbConfig, parsed_json
from arbitor.reference.graph import ArbModel
from arbitor.sidecars import SidecarError
from arbitor.sidecars.libraries import library

WEIGHTS_FILE = "model.safetensors"
"""The file of a folder that holds the model."""

CONFIG_FILE = "config.json"
"""The file of a folder that says what the model is."""

MODEL_TYPE = "arbitor"
"""What `config.json` calls our models, in the field that Hugging Face's tools look at."""

MAX_CONFIG_BYTES = 2**20
"""Bytes of `config.json` at most."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a model on a hub is called: OWNER/NAME."""


def read_source(source: str | PathLike[str], revision: str | None = None) -> tuple[ArbConfig, Checkpoint]:
    """Return configuration and checkpoint of a folder, a run, a checkpoint file, or a model on a hub; both were verified.

    Args:
        source: see `ArbModel.from_pretrained`.
        revision: of a model on a hub.

    Raises:
        FileNotFoundError: there is no such file or folder, nor a model on the hub, or the folder holds no model.
        CheckpointError: what is there cannot be trusted.
        ImportError: the source is on a hub, and huggingface_hub is not installed.
        ValueError: a revision of what is here.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but must be None for {str(source)!r}, which is not on a hub"
            )
    elif isinstance(source, str) and HUB_ID.fullmatch(source):
        path = _fetched(source, revision)
    else:
        raise FileNotFoundError(
            f"there is no folder or file {str(source)!r}, and a model on a hub is called OWNER/NAME"
        )
    checkpoint = _checkpoint_at(path)
    return _config_of(checkpoint, path), checkpoint


def _checkpoint_at(path: Path) -> Checkpoint:
    """Return the checkpoint of a file, of a folder that `write_folder` wrote, or of a run."""
    if not path.is_dir():
        return load_checkpoint(path)
    weights, config = path / WEIGHTS_FILE, path / CONFIG_FILE
    if weights.exists():
        checkpoint = _checkpoint_at(weights)
        said = _model_said_by(config)
        if said is not None and said != checkpoint.config:
            raise CheckpointError(
                f"{str(config)!r} describes another model than {WEIGHTS_FILE} beside it, but must describe the same"
            )
        return checkpoint
    run = RunFolder(path)
    if run.has_run():
        return run.load_best(lambda refusal: warnings.warn(f"{refusal}; trying another one", stacklevel=5))
    raise FileNotFoundError(f"the folder {str(path)!r} holds no {WEIGHTS_FILE}, and no run")


def _model_said_by(path: Path) -> Any:
    """Return the field `model` of a `config.json`, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        return parsed_json(read_regular(path, most=MAX_CONFIG_BYTES))["model"]
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} is refused: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is refused: it is no JSON object with a field model") from error


def _config_of(checkpoint: Checkpoint, path: Path) -> ArbConfig:
    """Return the configuration of a checkpoint whose model it fits, which is looked at without memory."""
    try:
        config = config_of(checkpoint.config)
        check_fits(checkpoint, checkpoint.config, ArbModel(config, device="meta"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint in {str(path)!r} is refused: {error}") from error
    return config


def write_folder(
    folder: str | PathLike[str],
    config: ArbConfig,
    state: State,
    *,
    step: int,
    seed: int,
    run: Mapping[str, Any],
) -> None:
    """Write a model into a folder, which is created: `model.safetensors`, then `config.json`, each whole or not at all.

    Args:
        folder: where to; one that holds such a model is overwritten.
        config, state: of the model.
        step: steps that it was trained for.
        seed: of its dither.
        run: what is known of its training, JSON data.

    Raises:
        ValueError: the folder is that of a run, or has a `config.json` of something else.
        TrainingError: the disk is full or cannot be written.
    """
    path = Path(folder)
    of_run = RunFolder(path)
    others = (of_run.metrics, of_run.latest, of_run.previous, of_run.best, of_run.final)
    config_alone = (path / CONFIG_FILE).exists() and not (path / WEIGHTS_FILE).exists()
    if config_alone or any(other.exists() for other in others):
        raise ValueError(
            f"folder is {str(path)!r}, but must be one of its own: it holds a run, or the {CONFIG_FILE} of something else"
        )
    document = {
        "model_type": MODEL_TYPE,
        "architectures": ["ArbModel"],
        "model": json.loads(config.to_json()),
        "versions": versions(),
    }
    with told(f"the folder {str(path)!r}"):
        path.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path / WEIGHTS_FILE,
        state,
        config=document["model"],
        step=step,
        seed=seed,
        best_bpb=None,
        run=run,
        progress={},
    )
    with told(repr(str(path / CONFIG_FILE))):
        write_whole(path / CONFIG_FILE, (json.dumps(document, indent=2) + "\n").encode())


def send_folder(folder: Path, name: str, *, private: bool | None, message: str) -> str:
    """Create a model on the hub, unless it is there, upload a folder to it, and return the address of the commit."""
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"name is {name!r}, but must be OWNER/NAME")
    api = _hub().HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    return str(commit.commit_url)


def _fetched(name: str, revision: str | None) -> Path:
    """Return the folder on this machine of a model on a hub: its two files, and nothing else of it."""
    hub = _hub(f"there is no folder {name!r} here, and ")
    try:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    # Whatever it is (network, rights, names), the library's first line says it best.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and no such model could be fetched from the hub: {reason}"
        ) from error


def _hub(why: str = "") -> ModuleType:
    """Return huggingface_hub; raise ImportError with the command that installs it."""
    try:
        return library("huggingface_hub")
    except SidecarError as error:
        raise ImportError(
            f"{why}the hub needs the package 'huggingface_hub', which is not installed: pip install 'arbitor[hub]'"
        ) from error
