"""The one piece of state: a ternary weight. It holds tensors and checks that they fit; `ops` decode them.

Legend: N rows (outputs, or table entries), K columns (inputs, or width), G columns a group, KG = ceil(K / G) groups a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_GROUP_SIZE, TRITS_PER_BYTE, groups_per_row, packed_bytes


class LaidOutWeight(Protocol):
    """A ternary weight in the layout of some op set: `TernaryWeight` for the reference."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, K)."""

    @property
    def group_size(self) -> int:
        """Columns per exponent."""

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of a scale."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state tensors by name."""

    def with_tensors(self, **tensors: Tensor) -> Self:
        """Return the same weight on other tensors."""

    def check_values(self, prefix: str, name: str, tensor: Tensor) -> None:
        """Refuse a tensor for the field of that name with an element that no weight of this layout holds."""

    def part(self, rows: range) -> Self:
        """Return some rows, one after the other, as a weight that shares memory with this one."""


def without_memory(like: Tensor) -> Tensor:
    """Return zeros in the shape and dtype of a tensor that take the memory of one: accumulators that another rank keeps.

    They can be read. Torch refuses to write to them.
    """
    return like.new_zeros((1,) * like.ndim).expand(like.shape)


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is none of `without_memory`."""
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor in place, unless it is one of `without_memory`: what another rank keeps is no business of this one."""
    if has_memory(tensor):
        tensor.copy_(values)


def rows_of(weight: LaidOutWeight, rows: range, *, but: str = "") -> dict[str, Any]:
    """Return some rows of the tensors of a weight that have its rows, all but one, by name. They share its memory."""
    return {name: each[rows.start : rows.stop] for name, each in weight.tensors().items() if name != but}


@dataclass(frozen=True)
class StateTensors:
    """The methods of a weight on its state tensors, in canonical form or in a device layout."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> None:
        """Refuse a function of torch that is given a weight, by a TypeError.

        Torch also asks for this method before it hands the weights of its own modules to a fused kernel. A module of torch with a
        ternary layer inside then takes the way that calls the layer.
        """
        name = getattr(func, "__name__", func)
        raise TypeError(
            f"{name} was given a {cls.__name__}, but must be given tensors: `dequantize` makes one of a weight"
        )

    def __getattr__(self, name: str) -> Any:
        """Refuse what a tensor has and a weight has not, as functions of `torch.nn.init` ask for, by an AttributeError."""
        why = ", as it is no tensor: `dequantize` makes one of a weight" if hasattr(Tensor, name) else ""
        raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}{why}")

    def tensors(self) -> dict[str, Tensor]:
        """Return the state tensors by field name, in field order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, **tensors: Tensor) -> Self:
        """Return this weight with some state tensors exchanged; the others are shared, not copied."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """Return this weight on `device`."""
        return self.with_tensors(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def clone(self) -> Self:
        """Return a copy that shares no memory with this weight."""
        return self.with_tensors(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    def into(self, out: Self | None) -> Self:
        """Return this weight, or `out` with the state tensors of this weight copied into it.

        A tensor that both share is not written, so that autograd goes on with a weight whose value is the same, as after a vote.
        """
        if out is None:
            return self
        written = out.tensors()
        for name, tensor in self.tensors().items():
            if written[name] is not tensor:
                written[name].copy_(tensor)
        return out

    @property
    def device(self) -> torch.device:
        """Device of the state tensors."""
        return next(iter(self.tensors().values())).device

    @property
    def state_bytes(self) -> int:
        """Bytes of the training state: trits, exponents and both accumulators."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


@dataclass(frozen=True)
class TernaryWeight(StateTensors):
    """A matrix of trits with one scale per group, and the integers it trains with.

    W[n, k] = T[n, k] * S[n, k // G], exact in bfloat16 and float32; S = 2**E, or a step between two powers with a mantissa.

    Fields:
        packed:          uint8 [ceil(N*K / 5)], trits row-major, first trit least significant, bytes 0..242.
        exponents:       int8 [N, KG], E in [-32, 15]. With b mantissa bits: E * 2**b + m.
        trit_accum:      int8 [N, K], T_accum in [-127, 127], votes since the trit last moved.
        exponent_accum:  int8 [N, KG], E_accum in [-127, 127], votes since the exponent last moved.
        shape:           (N, K).
        group_size:      G, one of GROUP_SIZES.
        mantissa_bits:   b, one of MANTISSA_BITS; scale = 2**E * (1 + m / 2**b).

    Raises ValueError or TypeError when the tensors do not fit each other; the values inside them are checked where
    they enter the system (`pack_trits`, `unpack_trits`, checkpoints), not on every construction.
    Source: docs/spec/update.md; state of 1/5 + 1 + 2/G bytes a weight as in REFACTOR12.
    """

    packed: Tensor
    exponents: Tensor
    trit_accum: Tensor
    exponent_accum: Tensor
    shape: tuple[int, int]
    group_size: int = DEFAULT_GROUP_SIZE
    mantissa_bits: int = 0

    def __post_init__(self) -> None:
        """Refuse tensors whose shapes, dtypes or devices do not fit each other."""
        object.__setattr__(self, "shape", checks.matrix_shape("shape", self.shape))
        checks.group_size(self.group_size)
        checks.mantissa_bits(self.mantissa_bits)
        num_rows, num_columns = self.shape
        groups = groups_per_row(num_columns, self.group_size)
        checks.tensor("packed", self.packed, torch.uint8, (packed_bytes(num_rows * num_columns),))
        checks.tensor("exponents", self.exponents, torch.int8, (num_rows, groups))
        checks.tensor("trit_accum", self.trit_accum, torch.int8, (num_rows, num_columns))
        checks.tensor("exponent_accum", self.exponent_accum, torch.int8, (num_rows, groups))
        checks.same_device(**self.tensors())

    def check_values(self, prefix: str, name: str, tensor: Tensor) -> None:
        """Refuse a tensor for the field `name` with an element that no weight has there; errors call it prefix + name."""
        checks.weight_values(prefix + name, name, tensor, self.mantissa_bits)

    def part(self, rows: range) -> TernaryWeight:
        """Return some rows, one after the other, as a weight that shares memory with this one.

        Raises ValueError if the trits of the rows are no whole bytes.
        """
        num_rows, num_columns = self.shape
        first, last = rows.start * num_columns, rows.stop * num_columns
        if first % TRITS_PER_BYTE or (last % TRITS_PER_BYTE and rows.stop != num_rows):
            raise ValueError(
                f"rows is {rows}, but must begin and end with a byte of {TRITS_PER_BYTE} trits in rows of {num_columns}"
            )
        return replace(
            self,
            packed=self.packed[first // TRITS_PER_BYTE : packed_bytes(last)],
            shape=(len(rows), num_columns),
            **rows_of(self, rows, but="packed"),
        )

    def with_mantissa(self, mantissa_bits: int) -> TernaryWeight:
        """Return the same weight with scales that move in finer steps: every level E becomes E * 2**b.

        The other tensors are shared, not copied. Exponents must be in range, and are not checked, as in every construction.
        Raises ValueError for a number of bits that is not allowed, or for a weight that has a mantissa.
        """
        checks.mantissa_bits(mantissa_bits)
        if self.mantissa_bits:
            raise ValueError(
                f"weight has mantissa_bits {self.mantissa_bits}, but must have 0 to be given a mantissa"
            )
        # Without memory there are no levels to change.
        exponents = self.exponents if self.device.type == "meta" else self.exponents << mantissa_bits
        return replace(self, exponents=exponents, mantissa_bits=mantissa_bits)
