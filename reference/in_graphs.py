"""Ops in graphs of torch.compile. An op whose row of the table says what its results are like is registered with torch.

A call in a compiled function becomes one op of the graph, `torch.ops.<namespace>.<name>`. The compiler does not look into it, so
that its results are those of any other call, bit for bit. A weight is handed over as the tensors that its value lies in, and
numbers. Other ops, and calls that write to an argument, run outside of the graph, which breaks there.

Calls outside of graphs never come here. An op is registered when a function that calls it is first compiled.

Legend: N rows, K columns, G columns a group, b mantissa bits of a weight.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.effects import EffectType

from arbitor.reference.op_table import EXACT, OP_TABLE
from arbitor.reference.types import StateTensors, TernaryWeight

ARGUMENTS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "bool": "bool",
    "torch.dtype": "ScalarType",
}
"""Types of a schema by annotation."""

RESULTS = {"Tensor": "Tensor", "tuple[Tensor, Tensor]": "(Tensor, Tensor)", "tuple[Tensor, ...]": "Tensor[]"}
"""Types of results by annotation."""

WRITTEN = "out"
"""The argument that an op writes to. No registered op has it."""


@dataclass(frozen=True)
class Layout:
    """How an op set takes weights apart, and puts them together.

    Fields:
        codes:  codes(weight) returns the tensor that holds the trits.
        weight: weight(codes, exponents, trit_accum, exponent_accum, shape=..., group_size=..., mantissa_bits=...) returns a weight.
    """

    codes: Callable[[Any], Tensor]
    weight: Callable[..., StateTensors]


CANONICAL = Layout(lambda weight: weight.packed, TernaryWeight)
"""Weights of the reference."""


def names_of_weights(signature: inspect.Signature) -> tuple[str, ...]:
    """Return the arguments of an op that are weights, of whatever layout. Annotations are text."""
    return tuple(
        name
        for name, each in signature.parameters.items()
        if re.match(r"[A-Za-z]*Weight\b", str(each.annotation))
    )


Gradients = Callable[[Sequence[str], Tensor, Mapping[str, Any]], Sequence[Tensor]]
"""Returns the gradients of the arguments of some names, of the gradient of the result and all arguments by name."""


_LIBRARIES: dict[str, torch.library.Library] = {}
"""What is registered, by namespace. Torch forgets it with these objects."""


def define(
    name: str, schema: str, compute: Callable[..., Any], like: Callable[..., Any], *, in_order: bool = False
) -> Callable[..., Any]:
    """Register an op with torch, and return it.

    `torch.library.custom_op` does the same, but looks for shared memory in each call, which takes longer than the rest of it.

    Args:
        name:     namespace::name.
        schema:   its arguments and results, of which none shares memory with another (`own_memory`).
        compute:  what it does.
        like:     what the compiler is told of the results.
        in_order: whether the op has effects that no tensor shows. Such ops keep their order, and none is dropped.
    """
    namespace, _, own = name.partition("::")
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _LIBRARIES[namespace]
    library.define(own + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))

    # The compiler would try to compile an op that is called where it is at work.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def run(*args: Any) -> Any:
        return compute(*args)

    library.impl(own, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, like, lib=library)
    if in_order:
        torch.library._register_effectful_op(name, EffectType.ORDERED, lib=library)
    found: Callable[..., Any] = getattr(getattr(torch.ops, namespace), own).default
    return found


def differentiate(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Register the backward pass of an op. `setup` says what it keeps of a call."""
    library = _LIBRARIES[name.partition("::")[0]]
    torch.library.register_autograd(name, backward, setup_context=setup, lib=library)


def left_out(reason: str) -> Callable[..., Any]:
    """Return a function that calls a function outside of graphs of torch.compile: found(function, *args, **kwargs).

    `fullgraph=True` refuses it and says the reason.
    """

    # `torch.compiler.disable` would import the compiler at once. That takes seconds, also for users who never compile.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # `torch.compiler.disable(reason=...)` leaves the same two attributes.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    found: Callable[..., Any] = call
    return found


_outside = left_out(
    "an op of arbitor that is not registered with torch, or a call with such arguments, stands in no graph of torch.compile: "
    "compile without fullgraph=True, or call it outside of the compiled function"
)


class InGraphs:
    """What takes the place of an op while a function is compiled.

    Attributes:
        name:     of the op, and of the registered one.
        names:    arguments of the registered op.
        num_positional: how many of them a call may give by their place.
        weights:  those that are weights, which it takes as three arguments: codes, exponents, and [N, K, G, b].
        detached: whether results have no gradient, whatever arguments ask for: an op that is compared EXACT has none.
        learnt:   the arguments that have a gradient.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        namespace: str,
        layout: Layout,
        gradients: Gradients | None = None,
        learnt: Sequence[str] | None = None,
    ) -> None:
        """Look at an op.

        Args:
            function:  the op. Its annotations say what it is given and returns.
            namespace: of the registered op.
            layout:    how the op set holds weights.
            gradients: makes gradients of arguments. None: autograd makes them.
            learnt:    names of the arguments that have a gradient. None: all tensors have one.
        """
        self.function, self.namespace, self.layout = function, namespace, layout
        self.gradients = by_autograd(function) if gradients is None else gradients
        self.name, signature = function.__name__, inspect.signature(function)
        row = OP_TABLE.get(self.name)
        self.like = None if row is None else row.like
        parameters = {key: each for key, each in signature.parameters.items() if key != WRITTEN}
        self.kinds = {key: str(each.annotation) for key, each in parameters.items()}
        self.names = tuple(parameters)
        self.num_positional = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters.values())
        self.weights = tuple(name for name in names_of_weights(signature) if name != WRITTEN)
        self.tensors = tuple(key for key, kind in self.kinds.items() if kind.startswith("Tensor"))
        self.defaults = {
            key: each.default for key, each in parameters.items() if each.default is not each.empty
        }
        self.returned = str(signature.return_annotation)
        self.detached = row is not None and row.output is EXACT
        self.learnt: tuple[str, ...] = ()
        if self.returned == "Tensor" and not self.detached:
            self.learnt = self.tensors if learnt is None else tuple(learnt)
        # The compiler calls a function of this mark, and takes what it returns for a constant.
        self.ensure = lambda: self.register()
        self.ensure._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a call of the op. The compiler looks at this function, and at those that it calls."""
        given = self.arguments(args, kwargs)
        is_call = len(args) <= self.num_positional and not any(
            name in kwargs for name in self.names[: len(args)]
        )
        if self.like is None or not is_call or not self.takes(given):
            return _outside(self.function, *args, **kwargs)
        given.pop(WRITTEN, None)
        found = getattr(getattr(torch.ops, self.namespace), self.ensure())(*self.taken_apart(given))
        return found if self.returned == "Tensor" else tuple(found)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Return whether the registered op takes arguments as they are, also with the gradients that they ask for."""
        if given.get(WRITTEN) is not None or len(given) - (WRITTEN in given) != len(self.names):
            return False
        for name in self.names:
            if name not in given:
                return False
        for name in self.weights:
            if not isinstance(given[name], StateTensors):
                return False
        if self.detached or not torch.is_grad_enabled():
            return True
        others = [given[name] for name in self.tensors if name not in self.learnt]
        return not any(value is not None and value.requires_grad for value in others)

    def taken_apart(self, given: Mapping[str, Any]) -> list[Any]:
        """Return the arguments as the registered op takes them."""
        flat: list[Any] = []
        for name in self.names:
            value = given[name]
            if name in self.weights:
                form = [*value.shape, value.group_size, value.mantissa_bits]
                flat += [self.layout.codes(value), value.exponents, form]
            else:
                flat.append(value.detach() if self.detached and isinstance(value, Tensor) else value)
        return flat

    def put_together(self, flat: Sequence[Any], weight: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments of the op by name, with weights as weight(codes, exponents, form)."""
        values = iter(flat)
        return {
            name: weight(next(values), next(values), next(values)) if name in self.weights else next(values)
            for name in self.names
        }

    def whole(self, codes: Tensor, exponents: Tensor, form: Sequence[int]) -> StateTensors:
        """Return a weight, with accumulators of zeros that take no memory. No registered op reads them."""
        num_rows, num_columns, group_size, mantissa_bits = form
        zero = exponents.new_zeros(1, 1)
        votes = (zero.expand(num_rows, num_columns), zero.expand(exponents.shape))
        sizes = {"shape": (num_rows, num_columns), "group_size": group_size, "mantissa_bits": mantissa_bits}
        return self.layout.weight(codes, exponents, *votes, **sizes)

    def compute(self, *flat: Any) -> Any:
        """Return the result of the registered op."""
        found = self.function(**self.put_together(flat, self.whole))
        if self.returned == "Tensor":
            return own_memory((found,), flat)[0]
        return own_memory(found, flat)

    def shapes(self, *flat: Any) -> Any:
        """Return what the compiler is told of the result."""
        assert self.like is not None
        return self.like(
            **self.put_together(
                flat, lambda _, exponents, form: SimpleNamespace(shape=form[:2], exponents=exponents)
            )
        )

    def learn(self, grad: Tensor, *rest: Any) -> list[Tensor]:
        """Return the gradients that are asked for, as the registered backward pass does."""
        *flat, asked = rest
        names = [name for name, each in zip(self.learnt, asked, strict=True) if each]
        found = self.gradients(names, grad, self.put_together(flat, self.whole))
        return list(own_memory(found, (grad, *flat)))

    def learnt_shapes(self, grad: Tensor, *rest: Any) -> list[Tensor]:
        """Return what the compiler is told of the gradients."""
        *flat, asked = rest
        given = self.put_together(flat, lambda *parts: None)
        return [
            given[name].new_empty(given[name].shape)
            for name, each in zip(self.learnt, asked, strict=True)
            if each
        ]

    def register(self) -> str:
        """Register the op with torch, unless it is, and return its name."""
        if hasattr(getattr(torch.ops, self.namespace), self.name):
            return self.name
        parts: list[str] = []
        for name in self.names:
            if name in self.weights:
                parts += [f"Tensor {name}", f"Tensor {name}_exponents", f"int[] {name}_form"]
            else:
                parts.append(f"{ARGUMENTS[self.kinds[name]]} {name}")
        taken, returned = ", ".join(parts), RESULTS[self.returned]
        qualified = f"{self.namespace}::{self.name}"
        define(qualified, f"({taken}) -> {returned}", self.compute, self.shapes)
        if self.learnt:
            backward = define(
                f"{qualified}_gradients",
                f"(Tensor grad, {taken}, bool[] asked) -> Tensor[]",
                self.learn,
                self.learnt_shapes,
            )
            places = [parts.index(f"{ARGUMENTS[self.kinds[name]]} {name}") for name in self.learnt]
            differentiate(qualified, differentiated(backward, places), keep)
        return self.name


def keep(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """Let `ctx` hold the arguments of a registered op until its backward pass."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def differentiated(
    backward: Callable[..., Any], places: Sequence[int]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return the rule by which autograd calls a registered backward pass, for gradients of the arguments in some places."""

    def grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if other is None else other[0] for other in ctx.others]
        asked = [ctx.needs_input_grad[place] for place in places]
        found = iter(backward(grad, *flat, asked))
        made: list[Tensor | None] = [None] * len(flat)
        for place, each in zip(places, asked, strict=True):
            made[place] = next(found) if each else None
        return tuple(made)

    return grads


_PLAIN_KEYS = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
"""What torch switches on and off outside of registered ops."""


def by_autograd(function: Callable[..., Any]) -> Gradients:
    """Return gradients that autograd makes through a second call of a function."""

    def gradients(names: Sequence[str], grad: Tensor, given: Mapping[str, Any]) -> Sequence[Tensor]:
        # Inside of a registered op torch has switched autograd off, also where gradients are enabled.
        with torch._C._ForceDispatchKeyGuard(*_PLAIN_KEYS), torch.enable_grad():
            leaves = {name: given[name].detach().requires_grad_() for name in names}
            result = function(**{**given, **leaves})
            if not result.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves.values()]
            return torch.autograd.grad(result, list(leaves.values()), grad, materialize_grads=True)

    return gradients


def own_memory(results: Iterable[Tensor], taken: Iterable[Any]) -> tuple[Tensor, ...]:
    """Return results with the strides of new tensors, of which none shares memory with another or with a tensor that was taken.

    This is what torch asks of a registered op, and what the compiler is told.
    """
    seen = {value.untyped_storage().data_ptr() for value in taken if isinstance(value, Tensor)}
    own = []
    for result in results:
        if not has_strides_of_new(result) or (result.numel() and result.untyped_storage().data_ptr() in seen):
            result = result.clone(memory_format=torch.contiguous_format)
        seen.add(result.untyped_storage().data_ptr())
        own.append(result)
    return tuple(own)


def has_strides_of_new(tensor: Tensor) -> bool:
    """Return whether a tensor has the strides of `torch.empty`. A contiguous one has others where a size is 0 or 1, at times."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True
