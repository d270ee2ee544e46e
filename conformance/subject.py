"""The implementation under test, called the way a careful user would call it, and watched.

Tests hand over and get back CPU tensors and canonical weights. In between, a `Subject` moves them to the device under test
(with their strides and offsets), gives weights in canonical or in device layout, poisons what the implementation allocates,
and checks that inputs were not written and that weights come back in the layout that they were given in. Which layout and
which poison follow from the inputs' bytes, so that an example always runs in the same way.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.types import TernaryWeight

from .compare import bits_of, tensors_of
from .poison import PATTERNS, poisoned
from .report import skip

OURS = "arbitor.optimized.ops"
"""The implementation of this repository that is under test unless another one is named."""

WRITTEN = ("out", "faults")
"""Arguments that an op may write."""

MAKERS = ("initial_weight", "constant_weight", "initial_codebook")
"""Ops that make something of nothing: they are told where."""

LAYOUTS = ("from_spec", "to_spec")
"""Ops that an implementation with one form of weights does not need. Without both of them, a weight stays as it is."""


class Subject:
    """Ops of an implementation, on a device, poisoned and checked for purity."""

    def __init__(self, ops: ModuleType | SimpleNamespace, name: str, device: str = "cpu") -> None:
        self.ops, self.name, self.device = ops, name, torch.device(device)
        self.called: list[str] = []
        """The ops called, in their order, for the message of a law that fails."""
        self.forms: tuple[type, ...] = (TernaryWeight,)
        """The classes of weights: the canonical one, and what `from_spec` or a maker has returned."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        """Return an op of the implementation, wrapped."""
        return lambda *args, **kwargs: self.call(op, *args, **kwargs)

    def raw(self, op: str) -> Callable[..., Any]:
        """Return an op as the implementation has it. What `from_spec` and the makers return is learned.

        A missing op leaves a test out when it is used, not before, and the summary says so. Its comparison alone fails.
        """
        found = getattr(self.ops, op, None)
        if callable(found):
            if op == "from_spec" or op in MAKERS:
                return wraps(found)(lambda *args, **kwargs: self.learn(found(*args, **kwargs)))
            return found
        if self.has(op):
            return lambda weight: weight
        return lambda *args, **kwargs: skip(f"laws and vectors of `{op}`", f"{self.name} has no op `{op}`")

    def has(self, op: str) -> bool:
        """Return whether the implementation has an op, or needs none of that name."""
        needed = LAYOUTS if op in LAYOUTS else ()
        found = [name for name in (op, *needed) if callable(getattr(self.ops, name, None))]
        return op in found or (bool(needed) and not found)

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Call an op on the device under test and return its result on the CPU."""
        digest = fingerprint((args, kwargs))
        return self.call_with(op, args, kwargs, PATTERNS[digest & 1], device_layout=bool(digest & 2))

    def call_with(
        self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], pattern: int, *, device_layout: bool
    ) -> Any:
        """Call an op under one poison and one layout."""
        self.called.append(op)
        # Tensors are known by identity, so that `out=weight` stays one object.
        moved: dict[int, Any] = {}
        device_args = tuple(self.to_device(value, device_layout, moved) for value in args)
        device_kwargs = {name: self.to_device(value, device_layout, moved) for name, value in kwargs.items()}
        if op in MAKERS:
            device_kwargs.setdefault("device", self.device)
        written = [device_kwargs[name] for name in WRITTEN if device_kwargs.get(name) is not None]
        writable = {id(part) for value in written for part in (value, *parts_of(value))}
        given_parts = [parts_of(value) or (value,) for value in (*device_args, *device_kwargs.values())]
        inputs = [part for parts in given_parts for part in parts if id(part) not in writable]
        before = {path: tensor.clone() for path, tensor in self.seen(inputs).items()}
        with poisoned(pattern):
            result = self.raw(op)(*device_args, **device_kwargs)
        for path, tensor in self.seen(inputs).items():
            assert same_bytes(tensor, before[path]), f"{op} wrote to its input {path}"
        if device_kwargs.get("out") is not None:
            assert result is device_kwargs["out"], f"{op} returned something else than its `out`"
        given = {type(part) for parts in given_parts for part in parts if isinstance(part, self.forms)}
        for part in parts_of(result) or (result,):
            if isinstance(part, self.forms) and given and op not in LAYOUTS:
                names = " and a ".join(sorted(form.__name__ for form in given))
                assert type(part) in given, f"{op} was given a {names} and returned a {type(part).__name__}"
        for name in WRITTEN:
            if isinstance(device_kwargs.get(name), Tensor):
                kwargs[name].copy_(device_kwargs[name])
        return self.to_cpu(result)

    def refuses(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
        """Return what an op raises, or None. Weights are given in canonical form, as their content may be invalid.

        A call that is refused has written nothing, not even to `out` and `faults`.
        """
        moved: dict[int, Any] = {}
        device_args = [self.to_device(value, False, moved) for value in args]
        device_kwargs = {name: self.to_device(value, False, moved) for name, value in kwargs.items()}
        before = {path: tensor.clone() for path, tensor in tensors_of([device_args, device_kwargs]).items()}
        try:
            self.raw(op)(*device_args, **device_kwargs)
        except Exception as error:
            for path, tensor in tensors_of([device_args, device_kwargs]).items():
                assert same_bytes(tensor, before[path]), f"{op} wrote to {path}, then raised {error!r}"
            return error
        return None

    def to_device(self, value: Any, device_layout: bool, moved: dict[int, Any]) -> Any:
        """Return a value on the device under test. What is one object here is one object there, by `moved`."""
        if id(value) in moved:
            return moved[id(value)]
        if isinstance(value, Tensor):
            result: Any = move(value, self.device)
        elif isinstance(value, TernaryWeight):
            result = value.to(self.device) if value.device.type == "cpu" else value
            if device_layout:
                result = self.raw("from_spec")(result)
        elif isinstance(value, tuple):
            return tuple(self.to_device(part, device_layout, moved) for part in value)
        else:
            return value
        moved[id(value)] = result
        return result

    def to_cpu(self, value: Any) -> Any:
        """Return a result on the CPU, weights in canonical form."""
        if isinstance(value, Tensor):
            return value.cpu()
        if isinstance(value, tuple):
            return tuple(self.to_cpu(item) for item in value)
        if isinstance(value, self.forms):
            canonical = value if isinstance(value, TernaryWeight) else self.raw("to_spec")(value)
            return canonical.to("cpu")
        return value

    def learn(self, weight: Any) -> Any:
        """Note the class of a weight that `from_spec` or a maker made, and return it. It may be any but a tensor or a tuple."""
        if not isinstance(weight, (*self.forms, Tensor, tuple)):
            self.forms = (*self.forms, type(weight))
        return weight

    def seen(self, inputs: list[Any]) -> dict[str, Tensor]:
        """Return every tensor of some inputs. A weight whose form shows no tensors shows those of its canonical form."""
        shown = [
            self.raw("to_spec")(value) if isinstance(value, self.forms) and not tensors_of(value) else value
            for value in inputs
        ]
        return tensors_of(shown)


def needs_ours(subject: Subject, what: str) -> None:
    """Leave a test out where other ops than ours are judged, and say so in the summary."""
    if subject.name != OURS:
        skip(what, f"they are those of {OURS}, not of {subject.name}")


def needs_cuda(subject: Subject, what: str) -> None:
    """Leave a test out where there is no GPU, and say so in the summary."""
    if subject.device.type != "cuda":
        skip(what, f"needs CUDA; this run is on {subject.device}")


def parts_of(value: Any) -> tuple[Any, ...]:
    """Return the items of a tuple, and no items of anything else."""
    return value if isinstance(value, tuple) else ()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device` with the same strides and the same offset into its storage."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one dtype hold the same bytes (a NaN equals itself)."""
    if one.device.type == "meta":
        return True
    return torch.equal(bits_of(one), bits_of(other))


def fingerprint(value: Any) -> int:
    """Return a number that follows from the content of all tensors in a value, the same on every run."""
    digest = 0
    for tensor in tensors_of(value).values():
        if tensor.device.type == "cpu":
            digest = zlib.crc32(bits_of(tensor).numpy().tobytes(), digest)
    return digest


def weight_of(subject: Subject, num_rows: int, num_columns: int) -> Any:
    """Return a random weight on the device under test, in the layout of the implementation."""
    weight = reference_ops.initial_weight((num_rows, num_columns), std=0.05, seed=1, tensor_id=2)
    return subject.raw("from_spec")(weight.to(subject.device))
