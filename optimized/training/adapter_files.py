"""Adapters as files of peft, the library that most adapters are made with, and a model with merged adapters as a file of floats.

A folder of peft has ``adapter_config.json`` and ``adapter_model.safetensors``. The matrices of the linear NAME stand there as
``base_model.model.NAME.lora_A.weight`` and ``...lora_B.weight``. A folder may come from a stranger. Neither file can hold code. A
field by which an adapter would compute something else than an adapter here is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.training.adapter_state import MATRICES, AdapterState
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import json_object, read_regular
from arbitor.optimized.training.runtime import versions
from arbitor.optimized.training.tensor_file import write_safetensors
from arbitor.optimized.training.whole_file import made_folder, told, write_whole
from arbitor.reference.config import ArbConfig

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The files of a folder of peft."""

PREFIX = "base_model.model."
"""What peft puts before the name of a module."""

FLOAT_MODEL_TYPE = "arbitor-float"
"""What ``config.json`` calls a model whose weights are floats."""

WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"),
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
    ),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
"""Fields of peft's configuration that do not change what trained adapters compute. The names of tensors say where they belong."""

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` for which peft leaves the weights of the base as they are."""


def write_adapter(
    folder: str | PathLike[str], state: AdapterState, *, base: str, stacks: Collection[str] = ()
) -> None:
    """Write adapters into a folder of peft, which is created.

    Args:
        folder: where to; files of an earlier adapter are overwritten, each whole or not at all.
        state: the adapters.
        stacks: names of the linears whose weight is a stack of matrices. peft knows such a weight as a parameter.
        base: name of the model that they belong to, for whoever reads the folder.

    Raises:
        TrainingError: the disk is full or cannot be written.
    """
    path = Path(folder)
    ranks = {name: len(a_RK) for name, (a_RK, _) in state.matrices.items()}
    most = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": int(state.alpha) if state.alpha.is_integer() else state.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [name for name in ranks if name not in stacks],
        "target_parameters": [f"{name}.weight" for name in ranks if name in stacks] or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    tensors = {
        f"{PREFIX}{name}.{kind}.weight": matrix.detach().to("cpu").contiguous()
        for name, pair in state.matrices.items()
        for kind, matrix in zip(MATRICES, pair, strict=True)
    }
    with told(f"the adapter in {str(path)!r}"), made_folder(path, (TENSORS_FILE, CONFIG_FILE)):
        _write_tensors(path / TENSORS_FILE, tensors)
        write_whole(path / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def read_adapter(folder: str | PathLike[str]) -> AdapterState:
    """Return the adapters in a folder of peft, as float32.

    Raises:
        TrainingError: a file cannot be read, is damaged, or holds what an adapter here does not have; the message names it.
    """
    path = Path(folder)
    config = _config(path / CONFIG_FILE)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path / TENSORS_FILE).items():
        name, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if key != f"{PREFIX}{name}.{kind}.weight" or kind not in MATRICES or not name:
            raise TrainingError(
                f"{str(path)!r} is refused: it has the tensor {key!r}, but must have matrices of linears, "
                f"{PREFIX}NAME.lora_A.weight and lora_B.weight"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"{str(path)!r} is refused: {key!r} is no matrix of finite floats, but must be one"
            )
        pairs.setdefault(name, {})[kind] = tensor.to(torch.float32)
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in pairs.items():
        if len(pair) != len(MATRICES) or len(pair["lora_A"]) != pair["lora_B"].shape[1]:
            raise TrainingError(
                f"{str(path)!r} is refused: {name!r} has no lora_A and lora_B that belong together"
            )
        matrices[name] = pair["lora_A"], pair["lora_B"]
    if not matrices:
        raise TrainingError(f"{str(path)!r} is refused: it has no adapter")
    alpha, ranks = float(config["lora_alpha"]), {len(a_RK) for a_RK, _ in matrices.values()}
    if config.get("use_rslora"):
        # There the factor is alpha over the root of the rank.
        if len(ranks) > 1:
            raise TrainingError(f"{str(path)!r} is refused: it has use_rslora and several ranks")
        alpha *= math.sqrt(ranks.pop())
    return AdapterState(alpha, matrices)


def _config(path: Path) -> Mapping[str, Any]:
    """Return the configuration of a folder of peft; refuse fields that change what adapters compute."""
    config = json_object(path)
    if config.get("peft_type") != "LORA":
        raise TrainingError(f"{str(path)!r} is refused: its peft_type must be LORA")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise TrainingError(
            f"{str(path)!r} is refused: lora_alpha is {alpha!r}, but must be a number above 0"
        )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise TrainingError(
            f"{str(path)!r} is refused: init_lora_weights is {start!r}, but must leave the weights of the base as they are"
        )
    read = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
    for name, value in config.items():
        if name not in read and name not in WITHOUT_EFFECT and value not in (None, False, "none", [], {}):
            raise TrainingError(
                f"{str(path)!r} is refused: {name} is {value!r}, but must be left out, as adapters here do not have it"
            )
    return config


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_whole(path, lambda file: write_safetensors(file, tensors, {"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises TrainingError for a file that cannot be read or is no safetensors file."""
    # Here alone, since the trainer's modules are imported where this library may be missing.
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    try:
        return load_tensors(read_regular(path))
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise TrainingError(f"{str(path)!r} is damaged or not a safetensors file: {reason}") from error


def check_new(folder: Path) -> None:
    """Refuse to write a model into a folder that holds something.

    Raises:
        ValueError: the folder is neither new nor empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, but must be new or empty")


def write_floats(
    folder: str | PathLike[str],
    config: ArbConfig,
    floats: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
) -> None:
    """Write a model of float weights into a folder, which is created: ``model.safetensors`` and ``config.json``.

    A weight stands as ``NAME.weight``, float32 [N, K], and a table of integers under its name.

    Args:
        folder: where to. It must be new or empty.
        config: of the model.
        floats, tables: by name, as `merged_floats` and ``ArbModel.tables`` return them.

    Raises:
        ValueError: the folder holds something.
        TrainingError: the disk is full or cannot be written.
    """
    path = Path(folder)
    check_new(path)
    tensors = {f"{name}.weight": tensor.contiguous() for name, tensor in floats.items()}
    tensors |= {name: tensor.to("cpu").contiguous() for name, tensor in tables.items()}
    document = {
        "model_type": FLOAT_MODEL_TYPE,
        "model": json.loads(config.to_json()),
        "versions": versions(),
    }
    weights_file, config_file = "model.safetensors", "config.json"
    with told(f"the model in {str(path)!r}"), made_folder(path, (weights_file, config_file)):
        _write_tensors(path / weights_file, tensors)
        write_whole(path / config_file, (json.dumps(document, indent=2) + "\n").encode())
