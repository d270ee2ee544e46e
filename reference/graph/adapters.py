"""Adapters: float matrices of low rank beside the linears of a frozen ternary model. They learn, and the base keeps every byte.

Legend: N rows of a weight (outputs, or outputs of all experts), K inputs, R rank, M slots, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.constants import RESERVED_STEP
from arbitor.reference.convert import ternarize
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.graph.layers import TernaryLinear
from arbitor.reference.graph.module import ArbModule, TernaryModule
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.ops.scale import dequantize

ALL_LINEAR = "all-linear"
"""Target that stands for every linear that can have an adapter. peft has the same word."""

DEFAULT_RANK, DEFAULT_ALPHA = 8, 16.0
"""Rank and alpha of an adapter unless said otherwise."""

MAX_RANK = 2**16
"""Largest rank."""

MAX_ALPHA = 2.0**20
"""Largest alpha."""

FIRST_TENSOR = 2**31
"""Tensor id in the dither of the adapter of weight 0. No model has as many weights. The noise of the video head has the last id."""

_BYTES = 6
"""Group size of the draws of A: two of the seven bytes of a group make an element."""


Adaptable = TernaryLinear | TernaryGroupedLinear
"""A linear that can have an adapter: of one matrix, or of a matrix for each expert, stacked in one weight."""


class Adapter(nn.Module):
    """A change of low rank that a linear adds to its output.

    Math:    y <- y + (alpha / R) B A x, in float32 or better, rounded once to the dtype of y
             of a stack of matrices, B is the stack of the experts' B_e, and y <- y + (alpha / R) B_e A x, e the expert of each slot
    Shapes:  x [..., K], y [..., N] -> [..., N]
             of a stack y [..., N / E], experts int64 [...] -> [..., N / E]; no change where the expert is -1
    Start:   A as `starting_rows` draws it, B zero: the model starts as its base
    Moving:  the parameters stay float32, whatever dtype activations have. They follow the model to its device
    Source:  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; REFACTOR11 and 12; docs/spec/adapters.md

    Attributes:
        a_RK, b_NR: parameters, float32.
        alpha:      numerator of the factor.
        froze:      float parameters of the model that learned before the adapters came, and learn again without them.
    """

    def __init__(self, a_RK: Tensor, b_NR: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.froze: list[nn.Parameter] = []
        self.a_RK, self.b_NR, self.alpha = nn.Parameter(a_RK), nn.Parameter(b_NR), alpha

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RK.shape[0]

    @property
    def factor(self) -> float:
        """The factor of the change, alpha / R."""
        return self.alpha / self.rank

    def forward(self, x: Tensor, y: Tensor, experts: Tensor | None = None) -> Tensor:
        """Return y with the change for x added, by the expert of each slot if there are experts."""
        wide = wide_dtype(y)
        if experts is not None:
            # Whatever a slot without an expert holds, A has no gradient of it. A zero times NaN would be one.
            x = torch.where((experts < 0)[..., None], 0.0, x)
        b_NR, z = self.b_NR.to(wide), F.linear(x.to(wide), self.a_RK.to(wide))
        if experts is not None:
            b_NR, z = _by_expert(b_NR, z, experts, num_outputs=y.shape[-1])
        return (y.to(wide) + self.factor * F.linear(z, b_NR)).to(y.dtype)

    def matrix(self) -> Tensor:
        """Return the change as a matrix, float64 [N, K], without a gradient."""
        wide = torch.float64
        return self.factor * (self.b_NR.detach().to(wide) @ self.a_RK.detach().to(wide))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the parameters as torch does, and keep their dtype."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def extra_repr(self) -> str:
        """Return what `print` shows of an adapter."""
        return f"rank={self.rank}, alpha={self.alpha}"


def _by_expert(b_NR: Tensor, z: Tensor, experts: Tensor, *, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Return B with the experts side by side, [N / E, E R], and z [..., R] at the place of its expert among zeros, [..., E R]."""
    b_ENR = b_NR.unflatten(0, (-1, num_outputs))
    chosen = experts[..., None, None] == torch.arange(len(b_ENR), device=experts.device)[:, None]
    return b_ENR.transpose(0, 1).flatten(1), torch.where(chosen, z[..., None, :], 0.0).flatten(-2)


def attach(
    model: nn.Module,
    *,
    rank: int = DEFAULT_RANK,
    alpha: float = DEFAULT_ALPHA,
    targets: str | Sequence[str] = ALL_LINEAR,
    seed: int | None = None,
) -> dict[str, Adapter]:
    """Give linears of a model adapters, freeze everything else of it, and return the adapters by the names of their linears.

    The parameters of the adapters are then the only ones that require a gradient. No weight votes and no table counts, until
    somebody asks for it by `requires_grad_`.

    Args:
        model:   an `ArbModel`, or another module with ternary linears in it.
        rank:    R, 1 .. 2^16.
        alpha:   above 0, at most 2^20.
        targets: suffixes of names, as for `linears_named`.
        seed:    64-bit seed of the matrices A; None: that of each linear's model.

    Raises:
        TypeError or ValueError: an argument that is not allowed, or a target as `linears_named` refuses it.
        RuntimeError: the model has adapters already.
    """
    checks.integer("rank", rank, 1, MAX_RANK)
    checks.number("alpha", alpha, 0, MAX_ALPHA, open_low=True)
    if seed is not None:
        checks.integer("seed", seed, 0, 2**64 - 1)
    if adapters_of(model):
        raise RuntimeError("attach was called, but the model has adapters already: detach them first")
    linears = linears_named(model, targets)
    froze = _freeze(model)
    for linear in linears.values():
        b_NR = torch.zeros(linear.weight.shape[0], rank, device=linear.device)
        adapter = Adapter(starting_rows(linear, rank, seed=seed), b_NR, alpha=float(alpha))
        linear.adapter, adapter.froze = adapter, froze
    return adapters_of(model)


def attach_tensors(
    model: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float
) -> dict[str, Adapter]:
    """Give linears of a model adapters with given matrices, freeze everything else, and return the adapters by name.

    Args:
        model:   as for `attach`.
        tensors: A float32 [R, K] and B float32 [N, R] by the name of the linear. Ranks may differ.
        alpha:   as for `attach`.

    Raises:
        TypeError or ValueError: a name of no linear that can have an adapter, or matrices that do not fit it.
        RuntimeError: the model has adapters already.
    """
    checks.number("alpha", alpha, 0, MAX_ALPHA, open_low=True)
    if adapters_of(model):
        raise RuntimeError("attach_tensors was called, but the model has adapters already: detach them first")
    linears, made = linears_of(model), {}
    for name, (a_RK, b_NR) in tensors.items():
        if name not in linears:
            raise ValueError(f"tensors has {name!r}, but the model has no linear of that name for an adapter")
        checks.matrix(f"A of {name}", a_RK, (torch.float32,))
        num_outputs, num_inputs = linears[name].weight.shape
        checks.tensor(f"A of {name}", a_RK, torch.float32, (a_RK.shape[0], num_inputs))
        checks.tensor(f"B of {name}", b_NR, torch.float32, (num_outputs, a_RK.shape[0]))
        device = linears[name].device
        made[name] = Adapter(a_RK.to(device, copy=True), b_NR.to(device, copy=True), alpha=float(alpha))
    if not made:
        raise ValueError("tensors has no entry, but must have at least one")
    froze = _freeze(model)
    for name, adapter in made.items():
        linears[name].adapter, adapter.froze = adapter, froze
    return adapters_of(model)


def _make_stale(model: nn.Module) -> None:
    """Make ledgers stale that the models of some modules have read."""
    for voting in {part.voting for part in model.modules() if isinstance(part, ArbModule)}:
        voting.version += 1


def detach(model: nn.Module) -> None:
    """Take all adapters from a model, and let its weights and tables move again, except those that were built frozen.

    Float parameters that `attach` froze, as those of a module around ternary layers, require gradients again.
    """
    _make_stale(model)
    for module in model.modules():
        if isinstance(module, ArbModule):
            module.frozen = module.built_frozen
    for adapter in adapters_of(model).values():
        for parameter in adapter.froze:
            parameter.requires_grad_(True)
    for linear in linears_of(model).values():
        linear.adapter = None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by the names of their linears, in definition order."""
    return {
        name: linear.adapter
        for name, linear in linears_of(model).items()
        if isinstance(linear.adapter, Adapter)
    }


def linears_of(model: nn.Module) -> dict[str, Adaptable]:
    """Return the linears that can have an adapter by name, in definition order: all but those whose scores choose experts.

    The choice of experts is exact, by integers of the router's weight (docs/spec/experts.md). A float beside it would not be seen.
    """
    choosing = {part.router for part in model.modules() if isinstance(part, SharedProjectionMoE)}
    return {
        name: part
        for name, part in model.named_modules()
        if name and isinstance(part, Adaptable) and part not in choosing
    }


def stacks_of(model: nn.Module) -> list[str]:
    """Return the names of the linears that can have an adapter and are stacks of a matrix for each expert."""
    return [name for name, part in linears_of(model).items() if isinstance(part, TernaryGroupedLinear)]


def linears_named(model: nn.Module, targets: str | Sequence[str]) -> dict[str, Adaptable]:
    """Return the linears whose name is a target, or ends in a dot and a target, by name.

    Args:
        model:   as for `attach`.
        targets: suffixes in a list, or in a string with commas between them. ALL_LINEAR alone stands for all linears.

    Raises TypeError for what are no suffixes, ValueError for no target, or a target that names no linear that can have an adapter.
    """
    if not isinstance(targets, str | Sequence):
        raise TypeError(f"targets is a {type(targets).__name__}, but must be a string or a list of strings")
    suffixes = (
        [target.strip() for target in targets.split(",")] if isinstance(targets, str) else list(targets)
    )
    linears = linears_of(model)
    if suffixes == [ALL_LINEAR]:
        suffixes = list(linears)
    if not linears or not all(isinstance(suffix, str) and suffix for suffix in suffixes) or not suffixes:
        raise ValueError(f"targets is {targets!r}, but must name at least one linear of the model")
    chosen: set[str] = set()
    for suffix in suffixes:
        named = [name for name in linears if _ends_in(name, suffix)]
        if not named:
            raise ValueError(f"targets has {suffix!r}, but {_why_not(model, suffix, linears)}")
        chosen.update(named)
    return {name: linear for name, linear in linears.items() if name in chosen}


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _last_word(name: str) -> str:
    """Return the end of a name that says what it is: `down`, and `gates.0` where a number is last."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _why_not(model: nn.Module, suffix: str, linears: Iterable[str]) -> str:
    """Return why a suffix names no linear that can have an adapter."""
    for name, part in model.named_modules():
        if isinstance(part, TernaryModule) and _ends_in(name, suffix):
            if isinstance(part, TernaryLinear):
                return f"{name} chooses experts by exact integers, which no float can change"
            return f"{name} is a {type(part).__name__}, and adapters are for linears"
    known = sorted({_last_word(name) for name in linears})
    return f"must end the name of a linear, such as {', '.join(known)}"


def starting_rows(linear: Adaptable, rank: int, *, seed: int | None = None) -> Tensor:
    """Return A as an adapter of a linear starts with it, float32 [R, K]: the same on every device.

    Math:    A[i, k] = ((2 u - 65535) / 65536) K^-1/2 with u = byte 0 + 256 byte 1 of the dither of group i K + k, at step
             2^32 - 1 and the tensor id 2^31 + that of the weight. It is uniform, as peft's A is, between -K^-1/2 and K^-1/2
    """
    num_inputs, device = linear.weight.shape[1], linear.device
    if device.type == "meta":
        return torch.empty(rank, num_inputs, device=device)
    rows = []
    for row in range(rank):
        groups_K = torch.arange(row * num_inputs, (row + 1) * num_inputs, device=device)
        bytes_KG = linear.ops.dither_bytes(
            groups_K,
            group_size=_BYTES,
            seed=linear.seed if seed is None else seed,
            step=RESERVED_STEP,
            tensor_id=FIRST_TENSOR + linear.tensor_id,
        ).to(torch.int64)
        rows.append(2 * (bytes_KG[:, 0] + 256 * bytes_KG[:, 1]) - 65535)
    # A division by a power of two and one rounding, in float64, so that every device gets the same bits.
    return (torch.stack(rows).to(torch.float64) / 65536 * (1 / math.sqrt(num_inputs))).to(torch.float32)


def _freeze(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every weight, table and float parameter of a model, and return the parameters that have learned so far.

    The model is about to compute something else, so that ledgers become stale.
    """
    _make_stale(model)
    for part in model.modules():
        if isinstance(part, ArbModule):
            part.frozen = True
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    return learned


@dataclass(frozen=True)
class Merge:
    """The error of a weight that took over its adapter's change. Norms are of all elements, and those of a sum of `Merge` add up.

    Fields:
        size:    norm of base plus change.
        change:  norm of the change.
        missed:  norm of the difference between the merged weight and base plus change.
    """

    size: float
    change: float
    missed: float

    @property
    def error(self) -> float:
        """The difference over base plus change; 0 for zeros."""
        return self.missed / self.size if self.size else 0.0

    @property
    def kept(self) -> float:
        """The share of the change, by squares, that the merged weight has: 1 for all of it, 0 for a merge that left the base."""
        return 1.0 - (self.missed / self.change) ** 2 if self.change else 1.0

    def __add__(self, other: Merge) -> Merge:
        """Return the merge of both weights together."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Merge(*(math.hypot(a, b) for a, b in pairs))


def merged(linear: Adaptable) -> Tensor:
    """Return W + (alpha / R) B A of a linear, or W of one without an adapter, float64 [N, K] on the CPU."""
    w_NK = dequantize(linear.ops.to_spec(linear.weight).to("cpu"), dtype=torch.float64)
    return w_NK + linear.adapter.matrix().to("cpu") if isinstance(linear.adapter, Adapter) else w_NK


@torch.no_grad()
def merge_ternary(model: nn.Module) -> dict[str, Merge]:
    """Load into each linear with an adapter the ternary weight nearest to W + (alpha / R) B A, take the adapters away, and
    return the error of each merge by name.

    Votes that the weight had gathered are gone. All others of the model stay as they are, and everything can move again.
    Raises RuntimeError for a model without adapters.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise RuntimeError("merge_ternary was called, but the model has no adapters")
    losses = {}
    for name, linear in linears_of(model).items():
        if name not in adapters:
            continue
        wanted_NK, weight = merged(linear), linear.weight
        form = {"group_size": weight.group_size, "mantissa_bits": weight.mantissa_bits}
        nearest = ternarize(wanted_NK, **form)
        missed_NK = wanted_NK - dequantize(nearest, dtype=torch.float64)
        norms = (wanted_NK, adapters[name].matrix(), missed_NK)
        losses[name] = Merge(*(float(each.norm()) for each in norms))
        linear.load(nearest)
    detach(model)
    return losses


def merged_floats(model: nn.Module) -> dict[str, Tensor]:
    """Return every ternary weight of a model as floats by the name of its module, float32 [N, K] on the CPU, adapters merged."""
    floats = {}
    for name, module in model.named_modules():
        if isinstance(module, Adaptable):
            floats[name] = merged(module).to(torch.float32)
        elif isinstance(module, TernaryModule):
            floats[name] = dequantize(module.ops.to_spec(module.weight).to("cpu"))
    return floats


class FloatGroupedLinear(nn.Module):
    """y = x W_e^T as `TernaryGroupedLinear` computes it, with one float parameter, the stack of all experts' matrices."""

    def __init__(self, weight_NK: Tensor, num_groups: int) -> None:
        super().__init__()
        self.weight, self.num_groups = nn.Parameter(weight_NK, requires_grad=False), num_groups

    def forward(self, x_MK: Tensor, experts_M: Tensor) -> Tensor:
        """Return the product of each slot with the matrix of its expert; zeros where the expert is -1."""
        w_ENK = self.weight.unflatten(0, (self.num_groups, -1))
        y_MN = torch.zeros(*experts_M.shape, w_ENK.shape[1], dtype=x_MK.dtype, device=x_MK.device)
        for expert, w_NK in enumerate(w_ENK):
            slots = (experts_M == expert).nonzero(as_tuple=True)
            y_MN = y_MN.index_put(slots, F.linear(x_MK[slots], w_NK.to(x_MK.dtype)))
        return y_MN


@torch.no_grad()
def use_float_linears(model: nn.Module) -> list[str]:
    """Replace every linear that can have an adapter by a float module with the merged weight, and return their names.

    The module is a `torch.nn.Linear`, or for stacked matrices a `FloatGroupedLinear`. The model then computes as before, and other
    libraries know its linears, as peft does. The float weights require no gradient. No weight votes and no table counts any more.
    """
    linears = linears_of(model)
    _freeze(model)
    for name, linear in linears.items():
        weight = merged(linear).to(linear.device, linear.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _float_module(linear, weight))
    return list(linears)


def _float_module(linear: Adaptable, weight_NK: Tensor) -> nn.Module:
    """Return the float module that computes as a linear does, with a weight."""
    if isinstance(linear, TernaryGroupedLinear):
        return FloatGroupedLinear(weight_NK, linear.num_groups)
    num_outputs, num_inputs = weight_NK.shape
    made = nn.Linear(num_inputs, num_outputs, bias=False, device="meta")
    made.weight = nn.Parameter(weight_NK, requires_grad=False)
    # Layers of `arbitor.nn` may have one.
    bias: Any = getattr(linear, "bias", None)
    made.bias = bias
    return made
