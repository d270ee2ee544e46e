"""The floats of a model with adapters as a checkpoint holds them: the matrices of each adapter, and what AdamW keeps for them.

A matrix has the name of its linear, and ``lora_A`` or ``lora_B`` behind it. A tensor of AdamW has the name of its matrix, and a
field of torch's optimizer behind it. All are float32. The object ``adapter`` of the header says alpha, the rank of each adapter,
which matrices have a state of AdamW, and a digest over the floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.graph.adapters import MAX_RANK, Adapter, adapters_of, attach_tensors, linears_of

MATRICES = {"lora_A": "a_RK", "lora_B": "b_NR"}
"""The matrices of an adapter by peft's names, and the parameters that hold them."""

ADAMW = ("exp_avg", "exp_avg_sq", "step")
"""What torch's AdamW keeps for a parameter: two tensors like it, and the number of steps that moved it, float32 []."""


@dataclass(frozen=True)
class AdapterState:
    """The floats of the adapters of a model, on the CPU.

    Attributes:
        alpha: of all adapters.
        matrices: A [R, K] and B [N, R] by the name of the linear, float32.
        moments: what AdamW keeps, by matrix, ``LINEAR.lora_A`` or ``LINEAR.lora_B``, then by field. A matrix that no loss has
            reached has no entry.
    """

    alpha: float
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, optimizer: torch.optim.AdamW | None = None) -> AdapterState | None:
        """Return the floats of a model and of its optimizer, not copied; None for a model without adapters."""
        adapters = adapters_of(model)
        if not adapters:
            return None
        matrices = {name: (each.a_RK.detach(), each.b_NR.detach()) for name, each in adapters.items()}
        moments = {}
        for name, parameter in named_parameters(adapters).items():
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            if kept:
                moments[name] = {part: kept[part] for part in ADAMW}
        return cls(next(iter(adapters.values())).alpha, matrices, moments)

    def attach_to(self, model: torch.nn.Module) -> dict[str, Adapter]:
        """Give a model these adapters, which freezes it, and return them by name.

        Raises TypeError or ValueError for matrices that do not fit the model.
        """
        return attach_tensors(model, self.matrices, alpha=self.alpha)

    def load_moments(self, optimizer: torch.optim.AdamW, adapters: Mapping[str, Adapter]) -> None:
        """Give an optimizer of adapters what it has kept for them."""
        parameters = named_parameters(adapters)
        for name, kept in self.moments.items():
            parameter = parameters[name]
            optimizer.state[parameter] = {
                # The count of steps stays on the CPU, where torch has it.
                part: tensor.clone() if part == "step" else tensor.to(parameter.device, copy=True)
                for part, tensor in kept.items()
            }

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name in a checkpoint."""
        named: dict[str, Tensor] = {}
        for name, pair in self.matrices.items():
            named |= {f"{name}.{kind}": matrix for kind, matrix in zip(MATRICES, pair, strict=True)}
        for name, kept in self.moments.items():
            named |= {f"{name}.{part}": tensor for part, tensor in kept.items()}
        return named

    def header(self, sha256: str) -> dict[str, Any]:
        """Return what the header of a checkpoint says of the floats, whose digest is given."""
        return {
            "alpha": self.alpha,
            "ranks": {name: len(a_RK) for name, (a_RK, _) in self.matrices.items()},
            "moments": list(self.moments),
            "sha256": sha256,
        }


def named_parameters(adapters: Mapping[str, Adapter]) -> dict[str, torch.nn.Parameter]:
    """Return the matrices of adapters by name, ``LINEAR.lora_A`` and ``LINEAR.lora_B``."""
    return {
        f"{name}.{kind}": getattr(adapter, part)
        for name, adapter in adapters.items()
        for kind, part in MATRICES.items()
    }


def names_of(stated: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that a header states."""
    matrices = [f"{name}.{kind}" for name in stated["ranks"] for kind in MATRICES]
    return matrices + [f"{name}.{part}" for name in stated["moments"] for part in ADAMW]


def state_from(stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState:
    """Return the floats that a header states from the tensors of its file; tensors on the meta device are welcome.

    Raises:
        KeyError: a tensor or a field is missing.
        TypeError, ValueError: a tensor of another dtype or shape, or with an element that no run leaves.
    """
    checks.number("alpha", stated["alpha"], 0, float("inf"), open_low=True)
    matrices = {}
    for name, rank in stated["ranks"].items():
        a_RK, b_NR = (tensors[f"{name}.{kind}"] for kind in MATRICES)
        for kind, matrix, own in (("lora_A", a_RK, a_RK.shape[:1]), ("lora_B", b_NR, b_NR.shape[1:])):
            checks.matrix(f"{name}.{kind}", matrix, (torch.float32,))
            if tuple(own) != (rank,):
                raise ValueError(
                    f"{name}.{kind} has shape {tuple(matrix.shape)}, but its adapter has rank {rank}"
                )
            _check_finite(f"{name}.{kind}", matrix)
        matrices[name] = a_RK, b_NR
    moments: dict[str, dict[str, Tensor]] = {}
    for name in stated["moments"]:
        like = tensors[name]
        kept = {part: tensors[f"{name}.{part}"] for part in ADAMW}
        for part, tensor in kept.items():
            shape = () if part == "step" else tuple(like.shape)
            checks.tensor(f"{name}.{part}", tensor, torch.float32, shape)
            _check_finite(f"{name}.{part}", tensor, low=None if part == "exp_avg" else 0.0)
        moments[name] = kept
    return AdapterState(float(stated["alpha"]), matrices, moments)


def check_stated(stated: Any, model: torch.nn.Module) -> None:
    """Refuse adapters in a header that a model cannot have.

    Args:
        stated: the object ``adapter`` of a header.
        model: what they should fit; it may be on the meta device.

    Raises:
        ValueError: it is no such object, or names a linear that cannot have an adapter, or a rank that is none.
    """
    fields = {"alpha": float, "ranks": dict, "moments": list, "sha256": str}
    if not isinstance(stated, dict) or not all(
        isinstance(stated.get(name), kind) for name, kind in fields.items()
    ):
        raise ValueError("adapter is no object with alpha, ranks, moments and sha256")
    linears = linears_of(model)
    if not stated["ranks"]:
        raise ValueError("adapter has no ranks")
    for name, rank in stated["ranks"].items():
        if name not in linears:
            raise ValueError(f"adapter names {name!r}, but the model has no linear of that name for one")
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"adapter has rank {rank!r} for {name}, outside 1 to {MAX_RANK}")
    known = {f"{name}.{kind}" for name in stated["ranks"] for kind in MATRICES}
    for name in stated["moments"]:
        if name not in known:
            raise ValueError(f"adapter has a state of AdamW for {name!r}, which is no matrix of it")
    if len(set(stated["moments"])) != len(stated["moments"]):
        raise ValueError("adapter names a state of AdamW twice")


def _check_finite(name: str, tensor: Tensor, *, low: float | None = None) -> None:
    if tensor.is_meta:
        return
    if not bool(tensor.isfinite().all()) or (low is not None and bool((tensor < low).any())):
        wanted = "finite" if low is None else f"finite and at least {low:g}"
        raise ValueError(f"{name} holds an element that no run leaves, but all must be {wanted}")
