"""Layout: conversions between the canonical form and the device layout, the two kinds of weight that every op takes."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import packing
from arbitor.optimized.kernels.launch import runs_here, values_between
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.op import op
from arbitor.reference.constants import MAX_PACKED_BYTE
from arbitor.reference.types import TernaryWeight, has_memory

__all__ = ["from_spec", "to_spec"]


@op()
def from_spec(weight: AnyWeight) -> DeviceWeight:
    """See reference. Returns the device layout, which shares no memory with a weight in canonical form."""
    if isinstance(weight, DeviceWeight):
        return weight
    shared = on_device(weight)
    copies = {name: tensor.clone() for name, tensor in shared.tensors().items() if name != "words"}
    return shared.with_tensors(**copies)


@op()
def to_spec(weight: AnyWeight) -> TernaryWeight:
    """See reference. Returns the canonical form, which shares no memory with a weight in device layout."""
    if isinstance(weight, TernaryWeight):
        return weight
    shared = canonical(weight)
    copies = {name: tensor.clone() for name, tensor in shared.tensors().items() if name != "packed"}
    return shared.with_tensors(**copies)


def on_device(weight: AnyWeight) -> DeviceWeight:
    """Return a weight to compute with. It shares the int8 tensors of a canonical weight, so it must not be updated."""
    if isinstance(weight, DeviceWeight):
        return weight
    runs_here(weight.packed)
    values_between("packed", weight.packed, 0, MAX_PACKED_BYTE)
    return DeviceWeight(
        words=packing.words_from_packed(weight.packed, weight.shape),
        exponents=weight.exponents.contiguous(),
        trit_accum=weight.trit_accum.contiguous(),
        exponent_accum=weight.exponent_accum.contiguous(),
        shape=weight.shape,
        group_size=weight.group_size,
        mantissa_bits=weight.mantissa_bits,
    )


def canonical(weight: DeviceWeight) -> TernaryWeight:
    """Return a weight in canonical form that shares the int8 tensors, for a weight that nobody else keeps."""
    return TernaryWeight(
        packed=packing.packed_from_words(weight.words, weight.shape),
        exponents=weight.exponents,
        trit_accum=weight.trit_accum,
        exponent_accum=weight.exponent_accum,
        shape=weight.shape,
        group_size=weight.group_size,
        mantissa_bits=weight.mantissa_bits,
    )


def target_of(weight: AnyWeight, out: AnyWeight | None) -> DeviceWeight:
    """Return the weight that an update's kernels may overwrite: one on the memory of `out` where that works, else a copy."""
    if out is not None and not all(has_memory(tensor) for tensor in out.tensors().values()):
        raise RuntimeError(
            "out has accumulators that another rank keeps, but must have its own to be written to"
        )
    if out is weight and isinstance(weight, DeviceWeight):
        return weight
    if isinstance(out, DeviceWeight):
        on_device(weight).into(out)
        return out
    return from_spec(weight) if isinstance(weight, TernaryWeight) else weight.clone()


def deliver(result: DeviceWeight, weight: AnyWeight, out: AnyWeight | None) -> AnyWeight:
    """Return an updated weight in `out`, or as the kind of weight that came in."""
    if out is None:
        return result if isinstance(weight, DeviceWeight) else canonical(result)
    if isinstance(out, TernaryWeight):
        canonical(result).into(out)
    return out


def table_target(table: Tensor, out: Tensor | None) -> Tensor:
    """Return a contiguous table that an update's kernels may overwrite: `out` if it is contiguous, else a copy."""
    if out is not None and out.is_contiguous():
        return out if out is table else out.copy_(table)
    return table.clone(memory_format=torch.contiguous_format)


def deliver_table(target: Tensor, out: Tensor | None) -> Tensor:
    """Return an updated table, in `out` if there is one."""
    return target if out is None or out is target else out.copy_(target)
