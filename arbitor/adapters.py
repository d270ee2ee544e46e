"""Adapters over frozen ternary models (LoRA): attached, trained by any optimizer of torch, exchanged with peft, and merged.

    model = ArbModel.from_pretrained("runs/demo")
    attach(model, rank=8, targets="query_up,value_up")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)       # the adapters' parameters are the only ones
    model.loss(ids).backward()
    optimizer.step()
    save_adapter(model, "my-adapter")                                # peft reads this folder

`arb finetune` trains adapters with all that a run has. docs/spec/adapters.md has the rule.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from arbitor.model import ArbModel
from arbitor.optimized.training.adapter_files import (
    FLOAT_MODEL_TYPE,
    read_adapter,
    read_tensors,
    write_adapter,
)
from arbitor.optimized.training.adapter_state import AdapterState
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.regular import json_object
from arbitor.reference import checks
from arbitor.reference.config import ArbConfig
from arbitor.reference.convert import ternarize
from arbitor.reference.graph.adapters import (
    Adapter,
    Merge,
    adapters_of,
    attach,
    detach,
    linears_of,
    merge_ternary,
    merged_floats,
    stacks_of,
    use_float_linears,
)
from arbitor.wrapped import HELD

__all__ = [
    "Adapter",
    "Merge",
    "adapters_of",
    "attach",
    "detach",
    "float_model",
    "load_adapter",
    "merge_ternary",
    "merged_floats",
    "save_adapter",
    "use_float_linears",
]


def save_adapter(model: nn.Module, folder: str | PathLike[str], *, base: str = "") -> None:
    """Write the adapters of a model into a folder that peft reads: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: with adapters.
        folder: created where it is missing.
        base: what the model without them is called, for whoever reads the folder.

    Raises:
        RuntimeError: the model has no adapters.
        TrainingError: the disk is full or cannot be written.
    """
    state = AdapterState.of(model)
    if state is None:
        raise RuntimeError("save_adapter was called, but the model has no adapters")
    write_adapter(folder, state, base=base, stacks=stacks_of(model))


def load_adapter(model: nn.Module, folder: str | PathLike[str]) -> dict[str, Adapter]:
    """Give a model the adapters in a folder of peft, freeze everything else of it, and return the adapters by name.

    They may have been trained on an `ArbModel` or on the `ArbForCausalLM` around it, and so may the model be either.

    Raises:
        TrainingError: the folder cannot be read, is damaged, or holds what adapters here do not have, such as DoRA.
        ValueError: an adapter is for a linear that the model does not have, or of another size.
        RuntimeError: the model has adapters already.
    """
    state, known = read_adapter(folder), linears_of(model)
    return replace(
        state, matrices={_known_as(name, known): pair for name, pair in state.matrices.items()}
    ).attach_to(model)


def _known_as(name: str, known: Collection[str]) -> str:
    """Return the name that a linear has in a model: with or without the attribute of `ArbForCausalLM` that holds the model."""
    names = (name, name.removeprefix(HELD), HELD + name)
    return next((each for each in names if each in known), name)


def float_model(folder: str | PathLike[str]) -> ArbModel:
    """Return the model that `arb export --merge float` wrote, on the CPU, with a frozen float module for each linear.

    The other weights have stayed ternary, and are held so. The model computes, and does not vote.

    Raises:
        TrainingError: the folder cannot be read, or holds no such model.
    """
    path = Path(folder)
    try:
        document = json_object(path / "config.json")
        if document["model_type"] != FLOAT_MODEL_TYPE:
            raise ValueError(
                f"its model_type is {document['model_type']!r}, but must be {FLOAT_MODEL_TYPE!r}"
            )
        model = ArbModel(ArbConfig(**document["model"]), device="cpu", ops="reference")
        tensors = read_tensors(path / "model.safetensors")
        ranges = model.table_ranges()
        with torch.no_grad():
            for name, module in model.ternary_modules().items():
                w_NK, weight = tensors[f"{name}.weight"], module.weight
                checks.tensor(f"{name}.weight", w_NK, torch.float32, weight.shape)
                if name not in linears_of(model):
                    form = {"group_size": weight.group_size, "mantissa_bits": weight.mantissa_bits}
                    module.load(ternarize(w_NK, **form))
            for name, table in model.tables().items():
                checks.tensor(name, tensors[name], table.dtype, table.shape)
                checks.values_between(name, tensors[name], *ranges[name])
                table.copy_(tensors[name])
            for name in use_float_linears(model):
                model.get_submodule(name).get_parameter("weight").copy_(tensors[f"{name}.weight"])
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{str(path)!r} holds no float model: {error}") from error
    return model
