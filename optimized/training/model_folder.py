"""Models as files: a run of the trainer, a folder of ``config.json`` and ``model.safetensors``, or a checkpoint alone.

``model.safetensors`` is a checkpoint as the trainer writes it: the canonical form of every weight, with the configuration and
digests in its header. ``config.json`` says the same configuration to people and to tools that look for one. No other file of such
a folder is read or written, and neither format can hold code. All are written whole, and read with suspicion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from arbitor.optimized.training.adapter_files import CONFIG_FILE as ADAPTER_FILE
from arbitor.optimized.training.adapter_files import FLOAT_MODEL_TYPE
from arbitor.optimized.training.adapter_state import AdapterState
from arbitor.optimized.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    State,
    check_fits,
    load_checkpoint,
    save_checkpoint,
)
from arbitor.optimized.training.errors import NoModelError
from arbitor.optimized.training.options import ROWS
from arbitor.optimized.training.regular import read_regular
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.run_header import THREADS_MAX
from arbitor.optimized.training.runtime import Runtime, deterministic, versions
from arbitor.optimized.training.sizes import check_memory, config_of
from arbitor.optimized.training.whole_file import made_folder, told, write_whole
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from arbitor.reference.json_text import parsed_json

WEIGHTS_FILE = "model.safetensors"
"""The file of a folder that holds the model."""

CONFIG_FILE = "config.json"
"""The file of a folder that says what the model is."""

MODEL_TYPE = "arbitor"
"""What `config.json` calls our models, in the field that Hugging Face's tools look at."""

MAX_CONFIG_BYTES = 2**20
"""Bytes of `config.json` at most."""


def read_model(
    path: Path, refused: Callable[[str], None], *, any_rules: bool = False
) -> tuple[ArbConfig, Checkpoint]:
    """Return configuration and checkpoint of a run, of a folder that `write_folder` wrote, or of a file; both were verified.

    Args:
        path: of a run, of which the best checkpoint is taken, or another where that is missing or refused; of a folder; or of
            a checkpoint.
        refused: is told one sentence for each checkpoint of a run that was refused.
        any_rules: as for `load_checkpoint`.

    Raises:
        NoModelError: the folder holds no model.
        CheckpointError: what is there cannot be trusted.
        TrainingError: it is a run without a checkpoint that can be used.
    """
    checkpoint = _checkpoint_at(path, refused, any_rules=any_rules)
    return _config_of(checkpoint, path), checkpoint


def open_model(
    path: Path, runtime: Runtime, refused: Callable[[str], None]
) -> AbstractContextManager[tuple[ArbModel, Checkpoint]]:
    """Return the model of a run, folder or file, built and loaded, until the end of the block, in which torch is deterministic.

    Args:
        path, refused: as for `read_model`.
        runtime: where it runs.

    Raises:
        TrainingError: as `read_model`; or there is no such model, or not the memory that it needs.
    """
    config, checkpoint = read_model(path, refused)
    check_memory(config, runtime.device)
    return _opened(config, checkpoint, runtime)


@contextmanager
def _opened(
    config: ArbConfig, checkpoint: Checkpoint, runtime: Runtime
) -> Iterator[tuple[ArbModel, Checkpoint]]:
    with deterministic(_known(checkpoint, "threads", 1, THREADS_MAX)):
        model = ArbModel(
            config, ops=runtime.ops(), device=runtime.device, dtype=runtime.dtype, seed=checkpoint.seed
        )
        load_into(model, checkpoint)
        yield model, checkpoint


def load_into(model: ArbModel, checkpoint: Checkpoint) -> None:
    """Load a checkpoint that fits a model, and give the model the adapters of the checkpoint."""
    model.load_state(checkpoint.state)
    if checkpoint.adapter is not None:
        checkpoint.adapter.attach_to(model)


def trained_context(checkpoint: Checkpoint) -> int | None:
    """Return the bytes of the windows that a model was trained on, or None where its checkpoint does not say."""
    row = ROWS["context"].option
    return _known(checkpoint, "context", row.low or 1, row.high)


def _known(checkpoint: Checkpoint, name: str, low: int, high: int | None) -> int | None:
    """Return a number that the run of a checkpoint has, where it has one that can be: a folder may say anything."""
    value = checkpoint.run.get(name)
    return value if type(value) is int and low <= value <= (high or value) else None


def _checkpoint_at(path: Path, refused: Callable[[str], None], *, any_rules: bool) -> Checkpoint:
    """Return the checkpoint of a file, of a folder that `write_folder` wrote, or of a run."""
    if not path.exists():
        raise CheckpointError(f"there is no run, folder or checkpoint {str(path)!r}")
    if not path.is_dir():
        return load_checkpoint(path, any_rules=any_rules)
    refuse_other_model(path)
    weights, config = path / WEIGHTS_FILE, path / CONFIG_FILE
    if weights.exists():
        checkpoint = load_checkpoint(weights, any_rules=any_rules)
        said = _model_said_by(config)
        if said is not None and said != checkpoint.config:
            raise CheckpointError(
                f"{str(config)!r} describes another model than {WEIGHTS_FILE} beside it, but must describe the same"
            )
        return checkpoint
    run = RunFolder(path)
    if run.has_run():
        return run.load_best(lambda refusal: refused(f"{refusal}; trying another one"), any_rules=any_rules)
    raise NoModelError(
        f"the folder {str(path)!r} holds no checkpoint: it is no run, and has no {WEIGHTS_FILE}"
    )


def refuse_other_model(folder: Path) -> None:
    """Refuse a folder that `arb export` wrote, or peft, and that holds no ternary weights.

    Raises:
        CheckpointError: it holds adapters alone, or float weights; the message says what reads them.
    """
    if (folder / ADAPTER_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{str(folder)!r} holds adapters alone: load their base, and then arbitor.adapters.load_adapter(model, "
            f"{str(folder)!r})"
        )
    config = folder / CONFIG_FILE
    if config.exists() and (folder / WEIGHTS_FILE).exists():
        try:
            document = parsed_json(read_regular(config, most=MAX_CONFIG_BYTES))
        except (OSError, ValueError):
            # Who reads the model says what is wrong.
            return
        if isinstance(document, dict) and document.get("model_type") == FLOAT_MODEL_TYPE:
            raise CheckpointError(
                f"{str(folder)!r} holds the float weights of arb export --merge float, which "
                "arbitor.adapters.float_model reads"
            )


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
        model = ArbModel(config, device="meta")
        check_fits(checkpoint, model)
        if checkpoint.adapter is not None:
            checkpoint.adapter.attach_to(model)
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
    adapter: AdapterState | None = None,
) -> None:
    """Write a model into a folder, which is created: `model.safetensors`, then `config.json`, each whole or not at all.

    Where one cannot be written, the folder is as it was, but for files that replaced others.

    Args:
        folder: where to; one that holds such a model is overwritten.
        config, state: of the model.
        step: steps that it was trained for.
        seed: of its dither.
        run: what is known of its training, JSON data.
        adapter: floats of its adapters, or None.

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
    with told(f"the folder {str(path)!r}"), made_folder(path, (WEIGHTS_FILE, CONFIG_FILE)):
        save_checkpoint(
            path / WEIGHTS_FILE,
            state,
            config=document["model"],
            step=step,
            seed=seed,
            best_bpb=None,
            run=run,
            progress={},
            adapter=adapter,
        )
        with told(repr(str(path / CONFIG_FILE))):
            write_whole(path / CONFIG_FILE, (json.dumps(document, indent=2) + "\n").encode())
