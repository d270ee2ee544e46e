"""Layout: between the two kinds of weight that every op takes, the canonical form and the device layout."""

from __future__ import annotations

from torch import Tensor

from arbitor.optimized.kernels import packing
from arbitor.optimized.kernels.launch import runs_here, values_between
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.reference.types import MAX_PACKED_BYTE, TernaryWeight


def from_spec(weight: AnyWeight) -> DeviceWeight:
    """See reference. Returns device layout; the three int8 tensors are shared where they are contiguous."""
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


def to_spec(weight: AnyWeight) -> TernaryWeight:
    """See reference. Returns the canonical form; the three int8 tensors are shared, not copied."""
    if isinstance(weight, TernaryWeight):
        return weight
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
    """Return what an update's kernels may overwrite: the memory of `out` where it can be, else a copy of `weight`."""
    if out is not None and (out.shape, out.group_size, out.mantissa_bits) != (
        weight.shape, weight.group_size, weight.mantissa_bits
    ):  # fmt: skip
        raise ValueError(
            f"out has shape {out.shape}, but must match weight, {weight.shape}, in shape and format"
        )
    if out is weight and isinstance(weight, DeviceWeight):
        return weight
    source = from_spec(weight)
    if isinstance(out, DeviceWeight):
        copy_(source, out)
        return out
    return source.clone()


def deliver(result: DeviceWeight, weight: AnyWeight, out: AnyWeight | None) -> AnyWeight:
    """Return an updated weight in `out`, or as the kind of weight that came in."""
    if out is None:
        return result if isinstance(weight, DeviceWeight) else to_spec(result)
    if isinstance(out, TernaryWeight):
        copy_(to_spec(result), out)
    return out


def copy_(source: AnyWeight, target: AnyWeight) -> None:
    """Copy the state of one weight over another of the same kind and shape."""
    tensors: dict[str, Tensor] = source.tensors()
    for name, tensor in target.tensors().items():
        tensor.copy_(tensors[name])
