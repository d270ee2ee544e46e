"""Ternary layers for any torch module, and `Ternary`, through which the layers of a model vote and step together.

    model = Ternary(net)                                # net has layers of this module, and any others
    loss = loss_of(model(x))
    model.backward(loss, rate=6.0, step=step)           # ternary weights vote; float parameters get their gradients
    model.step()                                        # trits and scales move

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from arbitor.alone import Alone
from arbitor.asked import Asked
from arbitor.placement import settled
from arbitor.reference import checks
from arbitor.reference.config import ArbConfig, at_rest, check_rules
from arbitor.reference.convert import Loss, loss_of, ternarize
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.module import ArbModule, TernaryModule

__all__ = ["Embedding", "Linear", "RMSNorm", "Rules", "Ternary", "swap_linears"]


@dataclass(frozen=True)
class Rules:
    """The rules that ternary layers are held and trained by: those fields of an `ArbConfig`, which describes them.

    Votes are always stochastic. Raises TypeError or ValueError, one sentence, for a field that is not allowed.
    """

    group_size: int = at_rest("group_size")
    mantissa_bits: int = at_rest("mantissa_bits")
    theta: int = at_rest("theta")
    theta_e: int = at_rest("theta_e")
    on_flip: str = at_rest("on_flip")
    exponent_rule: str = at_rest("exponent_rule")
    orthogonal_steps: int = at_rest("orthogonal_steps")

    def __post_init__(self) -> None:
        """Refuse a field that is not allowed."""
        check_rules(self)

    @property
    def vote_rule(self) -> str:
        """How gradients become votes."""
        return "stochastic"

    @property
    def average_gradients(self) -> bool:
        """Whether a running mean leads a gradient: layers in models of others keep none."""
        return False


class Linear(TernaryLinear):
    """y = x W^T + bias, with a ternary weight.

    Args:
        in_features:  K.
        out_features: N.
        bias:         whether there is one: a float parameter, which an optimizer of the user's trains.
        seed:         64-bit seed of the starting weight. None: drawn from torch's generator, so that torch.manual_seed fixes it.
        device:       where the weight lives.
        dtype:        of the bias. The product has the dtype of x, and the sum is promoted as torch promotes the two.
        ops:          op set, as for `ArbModel`.
        rules:        how the weight is held and trained.

    Shapes:  [..., K] -> [..., N]
    Start:   standard deviation K^-1/2, which keeps the variance of x
    Raises:  TypeError or ValueError for an argument that is not allowed
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        ops: ModuleType | str | None = None,
        rules: Rules | None = None,
    ) -> None:
        _sizes(in_features=in_features, out_features=out_features)
        checks.flag("bias", bias)
        context = _context(seed, device, dtype, ops, rules)
        super().__init__(context, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=context.device, dtype=context.dtype))

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, ops: ModuleType | str | None = None, rules: Rules | None = None
    ) -> Self:
        """Return the layer whose weight is the nearest to that of a float layer, on its device; the bias is its own.

        Raises TypeError for what is no nn.Linear or of a dtype that no layer has, ValueError for a weight that is not finite or has
        no values.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}, but must be a torch.nn.Linear")
        w_NK, rules = linear.weight.detach(), _settled_rules(rules)
        if w_NK.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(
                f"linear has dtype {checks.names((w_NK.dtype,))}, but must have {checks.names(checks.FLOAT_DTYPES)}: "
                "convert the model first, for example by .float()"
            )
        if w_NK.is_meta:
            raise ValueError("linear is on the meta device, but must have values")
        form = {"group_size": rules.group_size, "mantissa_bits": rules.mantissa_bits}
        weight = ternarize(w_NK.cpu(), **form)
        layer = cls(
            linear.in_features,
            linear.out_features,
            seed=0,
            device=w_NK.device,
            dtype=w_NK.dtype,
            ops=ops,
            rules=rules,
        )
        layer.load(weight)
        layer.bias = linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x and the weight, plus the bias."""
        y = super().forward(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, ternary"

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Let the bias be of another dtype from now on."""
        self.context.change_dtype(dtype)


class RMSNorm(TernaryRMSNorm):
    """y = x / rms(x) * W, with a ternary weight of ones, which is frozen unless said otherwise.

    Shapes:  [..., K] -> [..., K]
    """

    def __init__(
        self,
        width: int,
        *,
        frozen: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        ops: ModuleType | str | None = None,
        rules: Rules | None = None,
    ) -> None:
        _sizes(width=width)
        super().__init__(_context(0, device, dtype, ops, rules), width, frozen=frozen)

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Follow the model: results are in the dtype of x."""
        self.context.change_dtype(dtype)


class Embedding(TernaryEmbedding):
    """Rows of a ternary table by id; only rows that were used vote and step.

    Shapes:  ids int64 [...] -> [..., embedding_dim] in `dtype`
    Start:   standard deviation 1, as torch.nn.Embedding
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        ops: ModuleType | str | None = None,
        rules: Rules | None = None,
    ) -> None:
        _sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        super().__init__(_context(seed, device, dtype, ops, rules), num_embeddings, embedding_dim)

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Return rows in another dtype from now on."""
        self.context.change_dtype(dtype)


class Ternary(Asked):
    """A module of the user's with ternary layers somewhere in it: they vote in one backward pass, and step together.

    The module stays what it is, at `module`: it can be called there too, and its float parameters are trained by an optimizer of
    the user's. A layer belongs to one `Ternary` for good.

    Args:
        module: has at least one layer of `arbitor.nn`; all are of one op set, device, dtype and `Rules`.
        seed:   64-bit seed of the dither.

    Raises:
        TypeError or ValueError: the module is none, has no ternary layers, or has some that differ or belong to another model.
    """

    instead = "its attribute module, and a training_step of a Trainer calls backward and step of the Ternary"

    def __init__(self, module: nn.Module, *, seed: int = 0) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}, but must be a torch.nn.Module")
        layers = {name: part for name, part in module.named_modules() if isinstance(part, TernaryModule)}
        if not layers:
            raise ValueError("module has no ternary layer, but must have at least one of arbitor.nn")
        first = next(iter(layers.values()))
        for name, layer in layers.items():
            if not isinstance(layer.context, _OwnContext):
                raise ValueError(
                    f"the layer {name!r} belongs to another model, but must belong to none: make one Ternary of a whole module"
                )
            for what, own, common in (
                ("ops", layer.context.op_set.name, first.context.op_set.name),
                ("device", layer.device, first.device),
                ("dtype", layer.dtype, first.dtype),
                ("rules", layer.config, first.config),
            ):
                if own != common:
                    raise ValueError(
                        f"the layer {name!r} has {what} {own}, but must have {common}, as the first one"
                    )
        context = GraphContext(first.ops, first.config, device=first.device, dtype=first.dtype, seed=seed)
        super().__init__(context)
        self.voting.ranks = Alone()
        for layer in layers.values():
            layer.context, layer.tensor_id = context, context.next_tensor_id()
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, in its own surroundings: autocast and torch.compile are the user's."""
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        return self.module(*args, **kwargs)


def swap_linears(
    module: nn.Module,
    select: Callable[[str, nn.Linear], bool] | None = None,
    *,
    ops: ModuleType | str | None = None,
    rules: Rules | None = None,
) -> dict[str, Loss]:
    """Put the nearest ternary layer in place of every float linear layer below a module.

    Args:
        module: is changed in place.
        select: whether a layer is exchanged, by its name and itself. None: all are.
        ops, rules: as for `Linear`.

    Returns:
        What each layer lost, by name.

    Raises:
        TypeError: an argument is of another type, or a weight is of a dtype that no layer has.
        ValueError: nothing is selected; a weight is not finite, or another layer's too, as that of an embedding often is; or the
            module has ternary layers of a `Ternary` or another model, with which new ones could not vote.
        After an error the module is as it was.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}, but must be a torch.nn.Module")
    if select is not None and not callable(select):
        raise TypeError(f"select is a {type(select).__name__}, but must be a function of a name and a layer")
    _settled_rules(rules)
    for name, part in module.named_modules():
        if isinstance(part, ArbModule) and not isinstance(part.context, _OwnContext):
            raise ValueError(
                f"module has {name!r}, which votes with a model already, but new layers could not vote with it: "
                "swap first, and then make one Ternary of the whole module"
            )
    chosen = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part) is nn.Linear and name and (select is None or select(name, part))
    }
    if not chosen:
        raise ValueError(
            "module has no torch.nn.Linear below it that is selected, but must have at least one"
        )
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for name, part in chosen.items():
        for owner in owners[part.weight]:
            if module.get_submodule(owner.rpartition(".")[0]) is not part:
                raise ValueError(
                    f"the weight of {name!r} is {owner!r} too, but must be of one layer: untie it, or leave the layer out"
                )
    # A layer that stands in two places stays one layer.
    swapped: dict[nn.Linear, Linear] = {}
    for name, part in chosen.items():
        if part not in swapped:
            try:
                swapped[part] = Linear.from_float(part, ops=ops, rules=rules)
            except (TypeError, ValueError) as error:
                raise type(error)(f"the layer {name!r} is refused: {error}") from None
    losses = {}
    for name, part in chosen.items():
        layer = swapped[part]
        losses[name] = loss_of(part.weight.detach().cpu(), layer.ops.to_spec(layer.weight).to("cpu"))
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer)
    return losses


class _OwnContext(GraphContext):
    """The context of a layer that belongs to no model yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.voting.alone = True


def _context(
    seed: int | None,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    ops: ModuleType | str | None,
    rules: Rules | None,
) -> GraphContext:
    """Return a context for one layer."""
    place, number_format, op_set = settled(device, dtype, ops)
    config = cast(ArbConfig, _settled_rules(rules))
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return _OwnContext(op_set, config, device=place, dtype=number_format, seed=seed)


def _settled_rules(rules: Rules | None) -> Rules:
    """Return rules, or those that hold where nobody says otherwise; refuse what are none."""
    if rules is not None and not isinstance(rules, Rules):
        raise TypeError(f"rules is a {type(rules).__name__}, but must be Rules")
    return rules or Rules()


def _sizes(**sizes: int) -> None:
    """Refuse sizes that no matrix has."""
    for name, size in sizes.items():
        checks.integer(name, size, 1, 2**31 - 1)
