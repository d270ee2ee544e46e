"""The three modules that own one matrix: linear, RMSNorm and embedding. Most of the graph is built from them.

Each forward pass is one op. Its backward pass computes the input gradient, then the weight gradient, and votes with that gradient.
So few float gradients exist together (`Voting`), and of a large weight only some rows at a time.
Legend: N outputs (rows of a weight), K inputs (columns), R used rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from arbitor.reference.constants import MIN_ORTHOGONAL_RANK
from arbitor.reference.graph.averages import average_of
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.rule import Rule, registered
from arbitor.reference.graph.spread import Read, fetched
from arbitor.reference.graph.uncompiled import uncompiled
from arbitor.reference.promises import differentiable_once
from arbitor.reference.types import LaidOutWeight, TernaryWeight

VOTE_ELEMENTS = 2**27
"""Most elements of a weight gradient that are made at a time: 512 MiB of float32, 256 of bfloat16. A larger one votes in parts."""


class Multiplier(TernaryModule):
    """A module whose weight multiplies an input with all of its rows: a linear, or the matrices of all experts."""

    def vote_of(self, grad: Tensor, x: Tensor) -> None:
        """Vote with the gradient of the output and the input of that product, some rows of the weight at a time."""
        raise NotImplementedError


class TernaryLinear(Multiplier):
    """y = x W^T. No bias.

    Shapes:  [..., K] -> [..., N]
    Start:   standard deviation gain * K^-1/2, which keeps the variance of x for gain 1. `fan_in` replaces K if only some columns
             see a non-zero input. For gain 0 every trit is 0, at the scale of gain 1
    Votes:   from the gradient made orthogonal, unless `orthogonal` is False, as for a matrix whose rows are classes, or the
             smaller side of the weight is below MIN_ORTHOGONAL_RANK
    """

    in_graphs = True

    def __init__(
        self,
        context: GraphContext,
        num_inputs: int,
        num_outputs: int,
        *,
        gain: float = 1.0,
        fan_in: int | None = None,
        orthogonal: bool = True,
    ) -> None:
        scale, shape = 1.0 / math.sqrt(fan_in or num_inputs), (num_outputs, num_inputs)

        def start(tensor_id: int) -> TernaryWeight:
            if gain:
                return context.random_weight(shape, std=gain * scale, tensor_id=tensor_id)
            return context.constant_weight(shape, trit=0, exponent=round(math.log2(scale)))

        super().__init__(context, start)
        self.orthogonal = orthogonal and min(shape) >= MIN_ORTHOGONAL_RANK
        self.average = average_of(self, orthogonal=self.orthogonal)

    def forward(self, x: Tensor) -> Tensor:
        """Return `ops.linear` of x, in the dtype of x, and the change of the adapter if there is one."""
        return self.adapted(self.run(_LINEAR, x), x)

    def vote_of(self, grad: Tensor, x: Tensor) -> None:
        """Vote with the gradient of the output and the input of a product, some rows of the weight at a time."""
        num_matrices = int(self.orthogonal)
        dtype = self.voting.dtype_of(num_matrices)
        for rows in row_ranges(*self.weight.shape):
            grad_NK = self.ops.linear_weight_grad(grad[..., rows.start : rows.stop], x, dtype=dtype)
            self.vote(grad_NK, named_rows(rows, self), num_matrices=num_matrices, part=rows.start)


def plain(*linears: nn.Module) -> bool:
    """Return whether an op may read the weights of some linears instead of calling them.

    It may if all of them are ternary and `as_built`, and none has an adapter.
    """
    return all(
        isinstance(linear, Multiplier) and linear.adapter is None and as_built(linear) for linear in linears
    )


def as_built(module: nn.Module) -> bool:
    """Return whether a call of a module runs a `forward` of this package and nothing else.

    False where somebody gave the module, or a subclass, another `forward`, and where hooks are called.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    # Not by its `__module__`, which `functools.wraps` copies from the function that it wraps.
    home = getattr(type(module).forward, "__globals__", {}).get("__package__")
    return home == __package__ and not (any(hooks) or "forward" in vars(module) or _has_any_global_hook())


class TernaryRMSNorm(TernaryModule):
    """y = x / rms(x) * W[0], with a weight of 2**exponent that is frozen unless said otherwise.

    Shapes:  [..., K] -> [..., K]
    """

    in_graphs = True

    def __init__(self, context: GraphContext, width: int, *, frozen: bool = True, exponent: int = 0) -> None:
        super().__init__(
            context, lambda _: context.constant_weight((1, width), trit=1, exponent=exponent), frozen=frozen
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `ops.rms_norm` of x, in the dtype of x."""
        return self.run(_NORM, x)


class TernaryEmbedding(TernaryModule):
    """Rows of a table by id. Only the rows that a batch used vote and step; a row used several times votes once.

    Shapes:  ids int64 [...] -> [..., K] in the model's dtype
    Start:   standard deviation `std`, or the weight that `start` returns for a tensor id
    """

    in_graphs = True

    def __init__(
        self,
        context: GraphContext,
        num_rows: int,
        width: int,
        *,
        std: float = 1.0,
        start: Callable[[int], TernaryWeight] | None = None,
    ) -> None:
        shape = (num_rows, width)
        super().__init__(
            context, start or (lambda tensor_id: context.random_weight(shape, std=std, tensor_id=tensor_id))
        )
        self.used_rows: list[Tensor] = []

    def decoded(self, ids: Tensor, weight: LaidOutWeight) -> Tensor:
        """Return `ops.embedding` of the ids by a weight of this table, in the model's dtype, whoever keeps the rows."""
        if self.spread is None:
            return self.ops.embedding(ids, weight, dtype=self.dtype)
        return fetched(ids, self.spread, self.reader(weight), self.voting.ranks, self.dtype)

    def reader(self, weight: LaidOutWeight) -> Read:
        """Return the function that decodes rows of a weight by their places in it, as `spread` asks for it."""
        return partial(self.ops.embedding, weight=weight, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """Return `ops.embedding` of the ids."""
        return self.run(_ROWS, ids)

    def rows_or_zeros(self, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the rows of the chosen ids, and zeros for the other ids. Without `chosen`, ids of 0 and more are chosen.

        Only rows that are chosen vote and step. The other ids may be anything.
        Shapes:  ids int64 [...], chosen bool [...] -> [..., K] in the model's dtype
        """
        chosen = ids >= 0 if chosen is None else chosen
        # Each other id is replaced by a chosen one, with a gradient of 0, so that output shapes depend on input shapes alone. If no
        # id is chosen, row 0 replaces all, and its slot is marked unused.
        stand_in = torch.where(chosen, ids, 0).amax() if ids.numel() else 0
        return self.run(_SOME_ROWS, torch.where(chosen, ids, stand_in), chosen)

    def note_vote(self, rows: Tensor | None) -> None:
        """Remember which rows voted."""
        super().note_vote(rows)
        if rows is not None:
            self.used_rows.append(rows)

    @property
    def steps_whole(self) -> bool:
        """Whether the next step moves all rows: never, as only rows that a batch used vote."""
        return False

    def step_weight(self) -> None:
        """Apply the step rule to the rows that voted since the last step, unless the table is frozen."""
        self.voting.deliver()
        if self.used_rows and not self.frozen:
            self.apply_step(rows=union_of_rows(self.used_rows))
        self.forget_votes()

    def forget_votes(self) -> None:
        """Forget which rows voted."""
        super().forget_votes()
        self.used_rows.clear()


def union_of_rows(row_lists: list[Tensor]) -> Tensor:
    """Return the rows named in any of the lists, each once. Slots that are left over hold -1, so that shapes stay fixed."""
    if len(row_lists) == 1:
        return row_lists[0]
    rows = torch.cat(row_lists).sort().values
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[1:] = rows[1:] == rows[:-1]
    return torch.where(repeated, -1, rows)


def fan_out(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Return the products of several linears that read the same x, each as `TernaryLinear` gives it.

    The gradients that x has from them are added up one after the other as they are made, without a launch for a sum. A float
    module, which a merge puts in the place of a linear, and a linear that is not `as_built` are called by themselves.
    """
    linears = tuple(module for module in modules if isinstance(module, Multiplier) and as_built(module))
    outputs = dict(zip(linears, uncompiled(_fan_out, x, linears), strict=True)) if linears else {}
    return tuple(module.adapted(outputs[module], x) if module in outputs else module(x) for module in modules)


def _fan_out(x: Tensor, modules: tuple[Multiplier, ...]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _FanOutFunction.apply(x, modules, *(module.anchor() for module in modules))
    return found


class _FanOutFunction(torch.autograd.Function):
    """`ops.linear` of one input with several weights, with a backward pass in which all of them vote."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, modules: tuple[Multiplier, ...], *anchors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.held = [SimpleNamespace() for _ in modules]
        weights = [module.forward_weight(held) for module, held in zip(modules, ctx.held, strict=True)]
        return modules[0].voting.alongside(
            *(partial(module.ops.linear, x, weight) for module, weight in zip(modules, weights, strict=True))
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x: Tensor | None = None
        for grad, held in zip(grads, ctx.held, strict=True):
            if grad is None:
                continue
            module, weight = held.module, held.module.backward_weight(held)
            if ctx.needs_input_grad[0]:
                grad_x = module.ops.linear_input_grad(grad, weight, out=grad_x)
            if module.moves:
                module.vote_of(grad, x)
        return grad_x, None, *(None for _ in ctx.held)


def add_norm(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a residual stream, with a branch added if there is one, and its norm, as `TernaryRMSNorm` gives it.

    The gradient that the stream has from its norm is added to its other gradient as it is made, without a launch for a sum. So
    whoever else reads the stream must read the one that is returned. A float module in the place of the norm, and a norm that is
    not `as_built`, are called by themselves.
    """
    fits = branch is None or (branch.dtype, branch.shape) == (x.dtype, x.shape)
    if isinstance(norm, TernaryRMSNorm) and as_built(norm) and fits:
        found: tuple[Tensor, Tensor] = uncompiled(_add_norm, x, branch, norm)
        return found
    total = x if branch is None else x + branch
    return total, norm(total)


def _add_norm(x: Tensor, branch: Tensor | None, norm: TernaryRMSNorm) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _AddNormFunction.apply(x, branch, norm, norm.anchor())
    return found


class _AddNormFunction(torch.autograd.Function):
    """`ops.add_rms_norm`, or `ops.rms_norm` beside its own input, with one gradient for stream and branch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, norm: TernaryRMSNorm, anchor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        weight = norm.forward_weight(ctx)
        if branch is None:
            total, normed = x, norm.ops.rms_norm(x, weight)
        else:
            total, normed = norm.ops.add_rms_norm(x, branch, weight)
        ctx.save_for_backward(total)
        return total, normed

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, added: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is not None:
            norm, (total,) = ctx.module, ctx.saved_tensors
            asked = any(ctx.needs_input_grad[:2])
            added = _norm_learns(norm, norm.backward_weight(ctx), grad, total, asked=asked, added=added)
        return *(added if asked else None for asked in ctx.needs_input_grad[:2]), None, None


def row_ranges(num_rows: int, row_elements: int) -> Iterator[range]:
    """Yield ranges of rows whose gradient has at most VOTE_ELEMENTS elements, or a single row each.

    A range has a multiple of 16 rows if it can, because kernels compile once for multiples of 16 and once for other widths.
    """
    step = max(VOTE_ELEMENTS // row_elements, 1)
    step -= step % 16 if step > 16 else 0
    for start in range(0, num_rows, step):
        yield range(start, min(start + step, num_rows))


def named_rows(rows: range, module: TernaryModule) -> Tensor | None:
    """Return rows as ids, or None for all rows of a module's weight."""
    if len(rows) == module.weight.shape[0]:
        return None
    return torch.arange(rows.start, rows.stop, device=module.device)


def _multiplied(module: TernaryLinear, weight: LaidOutWeight, x: Tensor) -> Tensor:
    return module.ops.linear(x, weight)


def _linear_learns(
    module: TernaryLinear, weight: LaidOutWeight, grad: Tensor, x: Tensor, *, asked: bool
) -> Tensor | None:
    grad_x = module.ops.linear_input_grad(grad, weight) if asked else None
    if module.moves:
        module.vote_of(grad, x)
    return grad_x


def _normed(module: TernaryRMSNorm, weight: LaidOutWeight, x: Tensor) -> Tensor:
    return module.ops.rms_norm(x, weight)


def _norm_learns(
    module: TernaryRMSNorm,
    weight: LaidOutWeight,
    grad: Tensor,
    x: Tensor,
    *,
    asked: bool,
    added: Tensor | None = None,
) -> Tensor | None:
    grad_x = module.ops.rms_norm_input_grad(grad, x, weight, added=added) if asked else None
    if module.moves:
        module.vote(module.ops.rms_norm_weight_grad(grad, x))
    return grad_x


def _rows_of(module: TernaryEmbedding, weight: LaidOutWeight, ids: Tensor) -> Tensor:
    return module.decoded(ids, weight)


def _rows_learn(
    module: TernaryEmbedding, weight: LaidOutWeight, grad: Tensor, ids: Tensor, *, asked: bool
) -> None:
    if module.moves:
        rows, grad_RK = module.ops.embedding_row_grads(ids, grad)
        module.vote(grad_RK, rows, chosen=True)


def _some_rows_of(module: TernaryEmbedding, weight: LaidOutWeight, ids: Tensor, chosen: Tensor) -> Tensor:
    return module.decoded(ids, weight) * chosen[..., None]


def _some_rows_learn(
    module: TernaryEmbedding, weight: LaidOutWeight, grad: Tensor, ids: Tensor, chosen: Tensor, *, asked: bool
) -> None:
    if module.moves:
        # A product would not do: the gradient of an id that was not chosen may be NaN, and would reach a chosen row.
        rows, grad_RK = module.ops.embedding_row_grads(ids, torch.where(chosen[..., None], grad, 0.0))
        module.vote(grad_RK, torch.where(chosen.any(), rows, -1), chosen=True)


_LINEAR = registered(
    "linear", _multiplied, _linear_learns, lambda x, shape, dtype: x.new_empty((*x.shape[:-1], shape[0]))
)
_NORM = registered("rms_norm", _normed, _norm_learns, lambda x, shape, dtype: x.new_empty(x.shape))
_ROWS = registered(
    "embedding",
    _rows_of,
    _rows_learn,
    lambda ids, shape, dtype: ids.new_empty((*ids.shape, shape[1]), dtype=dtype),
)
_SOME_ROWS = Rule(_some_rows_of, _some_rows_learn)
