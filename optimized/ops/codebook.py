"""Codebook. See `arbitor.reference.ops.codebook`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.optimized.kernels import codebook, codebook_rows, scale
from arbitor.optimized.kernels.launch import may_look_at_values, same_device, values_between
from arbitor.optimized.layouts import AnyWeight, DeviceWeight
from arbitor.optimized.ops.layout import canonical, deliver, deliver_table, on_device, table_target, target_of
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks
from arbitor.reference.constants import DEFAULT_GROUP_SIZE, RESERVED_STEP, groups_per_row
from arbitor.reference.types import TernaryWeight

__all__ = [
    "age_codes",
    "candidate_codes",
    "count_codes",
    "initial_codebook",
    "nearest_candidates",
    "nearest_codes",
    "revival_vectors",
    "revive_codes",
]


@op()
def initial_codebook(
    shape: Sequence[int],
    *,
    sign_bits: int,
    seed: int,
    tensor_id: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """See reference."""
    num_codes, num_columns = checks.matrix_shape("shape", shape)
    checks.code_columns("shape", num_columns)
    checks.buckets(num_codes, num_columns, sign_bits)
    checks.group_size(group_size)
    checks.group_ids_fit(num_codes, num_columns, group_size)
    checks.vote_clock(seed, RESERVED_STEP, tensor_id, last_step=RESERVED_STEP)
    shape, groups = (num_codes, num_columns), groups_per_row(num_columns, group_size)
    words = scale.initial_words(shape, groups, group_size, seed, tensor_id, checks.device(device))
    codebook_rows.sign_words_(words, sign_bits)
    zeros = lambda width: torch.zeros(num_codes, width, dtype=torch.int8, device=words.device)  # noqa: E731
    return canonical(DeviceWeight(words, zeros(groups), zeros(num_columns), zeros(groups), shape, group_size))


@op()
def nearest_codes(z: Tensor, weight: AnyWeight) -> Tensor:
    """See reference; float64 is not supported."""
    checks.codebook(weight)
    checks.last_dim("z", z, weight.shape[1], DTYPES)
    checks.same_device(weight=weight.exponents, z=z)
    return codebook.nearest(_vectors(z), on_device(weight)).reshape(z.shape[:-1])


@op()
def candidate_codes(z: Tensor, *, num_codes: int, sign_bits: int, num_probes: int) -> Tensor:
    """See reference; float64 is not supported."""
    checks.dtype_in("z", z, DTYPES)
    checks.last_dim_not_empty("z", z)
    checks.integer("num_codes", num_codes, 1, 2**32)
    checks.buckets(num_codes, z.shape[-1], sign_bits)
    checks.integer("num_probes", num_probes, 1, 2**sign_bits)
    found = codebook.candidates(_vectors(z), num_codes, sign_bits, num_probes)
    return found.reshape(*z.shape[:-1], found.shape[1])


@op()
def nearest_candidates(z: Tensor, weight: AnyWeight, candidates: Tensor) -> Tensor:
    """See reference; float64 is not supported."""
    checks.codebook(weight)
    checks.last_dim("z", z, weight.shape[1], DTYPES)
    checks.candidate_slots(candidates, z)
    checks.same_device(weight=weight.exponents, z=z, candidates=candidates)
    values_between("candidates", candidates, -1, weight.shape[0] - 1)
    vectors = _vectors(z)
    named = candidates.reshape(vectors.shape[0], candidates.shape[-1])
    return codebook.nearest_of(vectors, on_device(weight), named).reshape(z.shape[:-1])


@op()
def count_codes(usage: Tensor, ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See reference."""
    checks.usage_of(None, usage, out)
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.same_device(usage=usage, ids=ids)
    values_between("ids", ids, -1, usage.numel() - 1)
    target = table_target(usage, out)
    codebook_rows.count_(target, ids.reshape(-1))
    return deliver_table(target, out)


@op()
def revival_vectors(
    z_RC: Tensor,
    weight: AnyWeight,
    ids_R: Tensor,
    usage: Tensor,
    *,
    first: int | Tensor,
    window: int,
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.batch_vectors(weight, z_RC, DTYPES)
    checks.usage_of(weight.shape[0], usage, None)
    checks.tensor("ids_R", ids_R, torch.int64, z_RC.shape[:1])
    checks.same_device(weight=weight.exponents, z_RC=z_RC, ids_R=ids_R, usage=usage)
    values_between("ids_R", ids_R, -1, weight.shape[0] - 1)
    checks.code_window(weight.shape[0], first, window, values=may_look_at_values(first))
    same_device("first", first, usage.device)
    return codebook_rows.vectors_of_window(z_RC, on_device(weight), ids_R, usage, first, window)


@op()
def revive_codes(
    weight: AnyWeight,
    z_RC: Tensor,
    vectors: Tensor,
    *,
    first: int | Tensor,
    sign_bits: int = 0,
    out: AnyWeight | None = None,
) -> AnyWeight:
    """See reference; float64 is not supported."""
    checks.batch_vectors(weight, z_RC, DTYPES)
    checks.revivals(weight.shape[0], first, vectors, values=may_look_at_values(first))
    checks.same_device(weight=weight.exponents, z_RC=z_RC, vectors=vectors)
    same_device("first", first, vectors.device)
    values_between("vectors", vectors, -1, z_RC.shape[0] - 1)
    checks.buckets(*weight.shape, sign_bits)
    checks.out_weight(out, weight)
    target = target_of(weight, out)
    codebook_rows.revive_(target, z_RC, vectors, first, sign_bits)
    return deliver(target, weight, out)


@op()
def age_codes(usage: Tensor, vectors: Tensor, *, first: int | Tensor, out: Tensor | None = None) -> Tensor:
    """See reference."""
    checks.usage_of(None, usage, out)
    checks.revivals(usage.numel(), first, vectors, values=may_look_at_values(first))
    checks.same_device(usage=usage, vectors=vectors)
    same_device("first", first, usage.device)
    target = table_target(usage, out)
    codebook_rows.age_(target, vectors, first)
    return deliver_table(target, out)


def _vectors(z: Tensor) -> Tensor:
    """Return vectors as [Q, C]."""
    return z.reshape(z.numel() // z.shape[-1], z.shape[-1])
