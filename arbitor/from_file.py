"""The tensors of `model.safetensors` loaded into a model by name, without the header, as trainers of other libraries do it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arbitor.model import ArbModel
from arbitor.optimized.training.adapter_state import MATRICES, named_parameters
from arbitor.optimized.training.checkpoint import PARTS
from arbitor.reference import checks
from arbitor.reference.graph.adapters import adapters_of
from arbitor.reference.types import TernaryWeight

ADAPTED = tuple(f".{kind}" for kind in MATRICES)
"""What the names of the matrices of adapters end with."""


def load_tensors(model: ArbModel, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite weights, integer tables and the matrices of adapters by what `ArbModel.save_pretrained` wrote of the same model.

    Args:
        model: is changed in place, and not at all after an error.
        tensors: every tensor of the file, by its name there.

    Raises:
        TypeError or ValueError: a tensor is missing, unknown, of another shape or dtype, or has a value out of range.
    """
    modules, tables = model.ternary_modules(), model.tables()
    adapters = named_parameters(adapters_of(model))
    wanted = {f"{name}.{part}" for name in modules for part in PARTS} | tables.keys() | adapters.keys()
    for name in sorted(wanted ^ tensors.keys()):
        has = "has no" if name in wanted else "has"
        must = "attach the same adapters" if name.endswith(ADAPTED) else "load the file of the same model"
        raise ValueError(
            f"state_dict {has} {name!r}, but must name every tensor of the model and no other: {must}"
        )
    for name, parameter in adapters.items():
        checks.tensor(name, tensors[name], torch.float32, parameter.shape)
    weights = {}
    for name, module in modules.items():
        weight = module.weight
        weights[name] = TernaryWeight(
            **{part: tensors[f"{name}.{part}"] for part in PARTS},
            shape=weight.shape,
            group_size=weight.group_size,
            mantissa_bits=weight.mantissa_bits,
        )
    model.load_state({**weights, **{name: tensors[name] for name in tables}})
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[name])
