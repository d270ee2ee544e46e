"""The promises of every op beside its own rule. The `@op` of each op set stands above its definitions, and `promised` keeps them.

- Dtypes: an op works in the dtypes that its docstring names. `torch.autocast` would hand a matrix product bfloat16 where the rule
  says float32. So autocast is off inside of an op, on every device that ops run on.
- Device: an op runs on the device of its first argument, or on the `device` that it is told, whichever device is current. Some
  functions of torch do not: `torch.ldexp` of torch 2.11 gives zeros on another GPU. So that device becomes the current one inside
  of an op. Kernels need the same.
- Refusals: what is no weight, where a weight is asked for, is refused by the name of the argument.
- Graphs: in a function that torch.compile compiles, an op is one op of the graph (`in_graphs`).
- Gradients: a gradient that is computed by hand cannot be differentiated again. `differentiable_once` stands above such a backward
  pass, in the graph and in other op sets, and lets a second derivative raise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from arbitor.reference.in_graphs import CANONICAL, Gradients, InGraphs, Layout, names_of_weights
from arbitor.reference.types import StateTensors

P = ParamSpec("P")
R = TypeVar("R")

AUTOCAST_DEVICES = ("cpu", "cuda")
"""Kinds of devices that ops run on; each has an autocast of its own."""


def autocast_is_on() -> bool:
    """Return whether autocast would change a dtype on a device that ops run on."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off until the block ends, on the devices where it is on. Torch would warn of a device that is not there."""
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def op(function: Callable[P, R]) -> Callable[P, R]:
    """Return an op of the reference that keeps what every op promises; signature, docstring and module stay its own."""
    return promised(function, function, "arbitor_reference", CANONICAL)


def promised(
    function: Callable[P, R],
    compute: Callable[P, R],
    namespace: str,
    layout: Layout,
    gradients: Gradients | None = None,
    learnt: Sequence[str] | None = None,
) -> Callable[P, R]:
    """Return an op of a set, which keeps what every op promises.

    Args:
        function: what the set defines; its signature, docstring and module are the op's.
        compute:  what a call does: the function, or the function with gradients of the set's own.
        namespace, layout, gradients, learnt: as `InGraphs` takes them.
    """
    signature = inspect.signature(function)
    is_told = "device" in signature.parameters
    first = next(iter(signature.parameters))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if autocast_is_on():
            with without_autocast():
                return run(*args, **kwargs)
        if is_told:
            index = index_of_device(kwargs.get("device", "cpu"))
        else:
            index = index_of(args[0] if args else kwargs.get(first))
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return run(*args, **kwargs)
        try:
            return compute(*args, **kwargs)
        except Exception:
            # Nothing else can stand for a weight, so that the op fails in any case, and a call that succeeds takes no time here.
            refuse_no_weights(signature, args, kwargs)
            raise

    within = InGraphs(run, namespace, layout, gradients, learnt)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return cast(R, within.call(args, kwargs))
        return run(*args, **kwargs)

    call.in_graphs = within  # type: ignore[attr-defined]
    return call


def refuse_no_weights(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that has something else where its op asks for a weight, by the name of the argument."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return
    for name in names_of_weights(signature):
        if name in given and given[name] is not signature.parameters[name].default:
            is_weight(name, given[name])


def is_weight(name: str, value: object) -> None:
    """Refuse what is no weight, in canonical form or in a device layout."""
    if not isinstance(value, StateTensors):
        raise TypeError(
            f"{name} is a {type(value).__name__}, but must be a weight, for example a TernaryWeight"
        ) from None


def index_of_device(device: Any) -> int:
    """Return the index of the CUDA device that `device` names, or -1 if it names none. The op refuses what is no device."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        return -1
    return found.index if found.type == "cuda" and found.index is not None else -1


def index_of(value: object) -> int:
    """Return the index of the CUDA device that an argument lies on, or -1 if there is no such device.

    Several weights in a tuple lie on one device.
    """
    if isinstance(value, tuple):
        return index_of(value[0]) if value else -1
    if isinstance(value, Tensor):
        return value.get_device()
    if isinstance(value, StateTensors):
        # Every layout has exponents. A look at all fields would take longer than the rest of a call's wrapping.
        exponents: Tensor = getattr(value, "exponents")  # noqa: B009
        return exponents.get_device()
    return -1


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward pass of an autograd function, with gradients that raise if they are differentiated again.

    Torch's own `once_differentiable` marks gradients only if the gradient of the result requires one. It forgets that a gradient
    depends on the inputs, too, so a penalty on the gradient of a linear loss would be lost without a word.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        every = found if isinstance(found, tuple) else (found,)
        made = [each for each in every if each is not None]
        asked = [each for each in (*grads, *ctx.saved_tensors) if each is not None and each.requires_grad]
        if not made or not asked:
            return found
        marked = iter(_Once.apply(len(asked), *asked, *made))
        return tuple(None if each is None else next(marked) for each in every)

    return call


class _Once(torch.autograd.Function):
    """Gradients that look as if they depended on the tensors that asked for them, and raise if they are differentiated."""

    @staticmethod
    def forward(ctx: Any, num_asked: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[num_asked:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "a gradient of the model or of an optimized op is differentiated twice, but it can be only once: "
            "use arbitor.reference.ops for second derivatives"
        )
