"""Codebook: the search for the nearest row of a ternary table, and the start, the count and the revival of rows.

Legend: N codes, C code width, Q vectors, M candidates of a vector, R vectors of a batch, s sign bits, KG groups a row.
z_q = rint(clamp(16 z, -127, 127)), NaN -> 0: a vector in whole sixteenths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import (
    ALIVE_QUERY,
    CODE_EXPONENT_MAX,
    CODE_EXPONENT_MIN,
    DEFAULT_GROUP_SIZE,
    INIT_NONZERO,
    QUERY_MAX,
    QUERY_STEPS,
    USAGE_MAX,
)
from arbitor.reference.dtypes import widened
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize, initial_weight
from arbitor.reference.promises import op
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

_CHUNK = 1 << 24
"""Most scores, or elements of decoded codes, that exist at a time."""

_NO_ID = 2**63 - 1


@op
def initial_codebook(
    shape: Sequence[int],
    *,
    sign_bits: int,
    seed: int,
    tensor_id: int,
    group_size: int = DEFAULT_GROUP_SIZE,
    device: torch.device | str = "cpu",
) -> TernaryWeight:
    """Return the random codes that training starts from, sorted into buckets by the signs of their first columns.

    Math:    trits as in initial_weight, E = 0; but T[n, c] = +1 where bit c of the bucket number of code n is set, and
             -1 where it is not, for c < s. The bucket number of code n is floor(n 2**s / N)
    Shapes:  shape (N, C), C up to 128; s from 0 to min(C, 30), with at least 2**s codes
    Returns: weight with empty accumulators
    Raises:  ValueError for a shape, sign_bits, group size, seed or id out of range
    Laws:    the same on every device; candidate_codes of a code, as floats, holds that code
    Source:  docs/spec/codebook.md; REFACTOR14 (candidates from the signs of the input)
    """
    num_codes, num_columns = checks.matrix_shape("shape", shape)
    checks.code_columns("shape", num_columns)
    checks.buckets(num_codes, num_columns, sign_bits)
    weight = initial_weight(
        shape,
        # This deviation gives E = 0.
        std=math.sqrt(INIT_NONZERO),
        seed=seed,
        tensor_id=tensor_id,
        group_size=group_size,
        device=device,
    )
    if weight.device.type == "meta":
        return weight
    trits = trits_of(weight)
    trits[:, :sign_bits] = bucket_signs(torch.arange(num_codes, device=device), num_codes, sign_bits)
    return weight_of_trits(trits, weight.exponents, group_size)


@op
def nearest_codes(z: Tensor, weight: TernaryWeight) -> Tensor:
    """Return the code nearest to each vector.

    Math:    c' = T * 2**clamp(E, -5, 2); score_n = |c'_n|**2 / 2 - (z_q / 16) . c'_n; the n of the least score
    Shapes:  z float32, bfloat16 or float64 [..., C]; weight [N, C] with C up to 128 and no mantissa bits
    Returns: int64 [...], in 0 .. N - 1
    Ties:    the lowest n
    Raises:  TypeError or ValueError for a dtype, shape, device or weight that is not allowed
    Laws:    exact: every sum fits float32 in any order; a vector that is a code, unclamped and within 127 sixteenths,
             finds that code or an equal one before it
    Source:  docs/spec/codebook.md; REFACTOR14 (TernaryVQCodebook, exact path)
    """
    checks.codebook(weight)
    checks.last_dim("z", z, weight.shape[1])
    checks.same_device(weight=weight.packed, z=z)
    z_QC = whole_sixteenths(z).reshape(-1, weight.shape[1])
    best = torch.full((z_QC.shape[0],), torch.inf, device=z.device)
    ids = torch.zeros(z_QC.shape[0], dtype=torch.int64, device=z.device)
    rows_at_a_time = max(1, _CHUNK // max(*z_QC.shape, 1))
    for first in range(0, weight.shape[0], rows_at_a_time):
        last = min(first + rows_at_a_time, weight.shape[0])
        codes_nC = searched_codes(weight, torch.arange(first, last, device=z.device))
        score_Qn = codes_nC.square().sum(dim=1) / 2 - (z_QC / QUERY_STEPS) @ codes_nC.T
        least = score_Qn.amin(dim=1)
        places = torch.arange(first, last, device=z.device)
        lowest = torch.where(score_Qn == least[:, None], places, _NO_ID).amin(dim=1)
        ids = torch.where(least < best, lowest, ids)
        best = torch.minimum(least, best)
    return ids.reshape(z.shape[:-1])


@op
def candidate_codes(z: Tensor, *, num_codes: int, sign_bits: int, num_probes: int) -> Tensor:
    """Return the codes of the buckets that the signs of each vector name, the likeliest bucket first.

    Math:    bucket number of z: bit c set where z_q[c] > 0, c < s; bucket b holds the codes n with floor(n 2**s / N) = b
             columns c < s have ranks 0, 1, .. by |z_q[c]|, lowest column first on ties; probe m flips the bits of the
             columns whose ranks are in the m-th set of ranks, sets in order of sum over (rank + 1), then of sum over 2**rank
    Shapes:  z float32, bfloat16 or float64 [..., at least s]; s from 0 to 30, N >= 2**s; num_probes 1 .. 2**s
    Returns: int64 [..., num_probes * ceil(N / 2**s)]: the buckets one after the other, codes ascending; -1 where a bucket
             is one shorter
    Raises:  TypeError or ValueError for a dtype or number that is not allowed
    Laws:    no code is named twice; 2**s probes name every code
    Source:  docs/spec/codebook.md; order of probes as in Lv et al., "Multi-probe LSH", 2007
    """
    checks.dtype_in("z", z, checks.FLOAT_DTYPES)
    checks.last_dim_not_empty("z", z)
    checks.integer("num_codes", num_codes, 1, 2**32)
    checks.buckets(num_codes, z.shape[-1], sign_bits)
    checks.integer("num_probes", num_probes, 1, 2**sign_bits)
    z_q = whole_sixteenths(z[..., :sign_bits])
    columns_by_rank = z_q.abs().sort(dim=-1, stable=True).indices
    bits_by_rank = torch.ones_like(columns_by_rank) << columns_by_rank
    own = ((z_q > 0).to(torch.int64) << torch.arange(sign_bits, device=z.device)).sum(dim=-1)
    sets = _sets_of_ranks(sign_bits)
    probes = torch.tensor([next(sets) for _ in range(num_probes)], device=z.device)
    flipped = (probes[:, None] >> torch.arange(sign_bits, device=z.device)) & 1
    numbers = own[..., None] ^ (flipped * bits_by_rank[..., None, :]).sum(dim=-1)
    starts, ends = (((numbers + next_one) * num_codes + 2**sign_bits - 1) >> sign_bits for next_one in (0, 1))
    slots = torch.arange(bucket_size(num_codes, sign_bits), device=z.device)
    ids = starts[..., None] + slots
    return torch.where(ids < ends[..., None], ids, -1).flatten(-2)


@op
def nearest_candidates(z: Tensor, weight: TernaryWeight, candidates: Tensor) -> Tensor:
    """Return the nearest of each vector's candidates.

    Math:    the score of nearest_codes, over the candidates of each vector only
    Shapes:  z float32, bfloat16 or float64 [..., C]; candidates int64 [..., M], each in 0 .. N - 1, or -1 for an unused slot
    Returns: int64 [...], in 0 .. N - 1; -1 for a vector without candidates
    Ties:    the lowest code
    Raises:  TypeError or ValueError for a dtype, shape, device, weight or candidate that is not allowed
    Laws:    equal to nearest_codes where all codes are candidates; order and repetition of candidates change nothing
    Source:  docs/spec/codebook.md; REFACTOR14 (compare only the candidates fetched)
    """
    checks.codebook(weight)
    checks.last_dim("z", z, weight.shape[1])
    checks.candidate_slots(candidates, z)
    checks.same_device(weight=weight.packed, z=z, candidates=candidates)
    checks.values_between("candidates", candidates, -1, weight.shape[0] - 1)
    num_columns, num_candidates = weight.shape[1], candidates.shape[-1]
    z_QC = whole_sixteenths(z).reshape(-1, num_columns)
    named_QM = candidates.reshape(z_QC.shape[0], num_candidates)
    ids = torch.full((z_QC.shape[0],), -1, dtype=torch.int64, device=z.device)
    if num_candidates == 0:
        return ids.reshape(z.shape[:-1])
    vectors_at_a_time = max(1, _CHUNK // (num_candidates * num_columns))
    for first in range(0, z_QC.shape[0], vectors_at_a_time):
        some = slice(first, first + vectors_at_a_time)
        named_qM = named_QM[some]
        codes_qMC = searched_codes(weight, named_qM.clamp(min=0).flatten()).reshape(
            *named_qM.shape, num_columns
        )
        dots_qM = (codes_qMC * (z_QC[some] / QUERY_STEPS)[:, None]).sum(dim=2)
        score_qM = (codes_qMC.square().sum(dim=2) / 2 - dots_qM).masked_fill(named_qM < 0, torch.inf)
        is_least = (score_qM == score_qM.amin(dim=1, keepdim=True)) & (named_qM >= 0)
        lowest = torch.where(is_least, named_qM, _NO_ID).amin(dim=1)
        ids[some] = torch.where(lowest == _NO_ID, -1, lowest)
    return ids.reshape(z.shape[:-1])


@op
def count_codes(usage: Tensor, ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the counters with the uses of codes added.

    Math:    u_n <- min(u_n + number of ids that are n, 32767)
    Shapes:  usage int16 [N], not negative; ids int64 [...], each in 0 .. N - 1, or -1 for an unused slot
    Returns: int16 [N], new; or `out` (may be `usage` itself), overwritten. In place only the codes named are touched
    Overflow: saturates at 32767
    Raises:  TypeError or ValueError for a dtype, shape, device or id that is not allowed
    Laws:    the order of ids changes nothing; below saturation, counting twice is counting both
    Source:  docs/spec/codebook.md; REFACTOR14 (int16 usage)
    """
    checks.usage_of(None, usage, out)
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.same_device(usage=usage, ids=ids)
    checks.values_between("ids", ids, -1, usage.numel() - 1)
    used, counts = ids[ids >= 0].unique(return_counts=True)
    counted = usage.clone()
    counted[used] = (counted[used] + counts).clamp(max=USAGE_MAX).to(torch.int16)
    return counted if out is None else out.copy_(counted)


@op
def revival_vectors(
    z_RC: Tensor,
    weight: TernaryWeight,
    ids_R: Tensor,
    usage: Tensor,
    *,
    first: int | Tensor,
    window: int,
) -> Tensor:
    """Return the vector that each code of a window should become: for an unused code one that lies far from its own code.

    Math:    T_r = sign(z_q[r]) where |z_q[r]| >= 8, else 0, the code that vector r would make
             own_r = |z_q[r] / 16 - c'|**2, c' the code ids[r] as nearest_codes sees it; made_r = |z_q[r] / 16 - T_r|**2
             gain_r = own_r - made_r; 0 where ids[r] = -1
             of the vectors of each code, the one of the largest gain counts, if it is above 0; these vectors in order of
             their gain, the largest first, go to the codes n = (first + j) mod N, j < window, with usage[n] = 0, in order of j
    Shapes:  z_RC float32, bfloat16 or float64 [R, C]; ids int64 [R], the code of each vector, in 0 .. N - 1, or -1 for none;
             usage int16 [N]; first 0 .. 2**62, an integer or int64 []; window 0 .. N
    Returns: int64 [window], in 0 .. R - 1; -1 for a code in use, and for unused codes after the last vector
    Ties:    of the vectors of a code the lowest; of vectors with equal gains the one whose code is lowest
    Raises:  TypeError or ValueError for a dtype, shape, device, weight, id or window that is not allowed
    Laws:    exact: distances are multiples of 2**-10 below 2**15; no vector is named twice, and no two vectors of one code;
             a vector that is named lies nearer to the code that it makes than to its own
    Source:  docs/spec/codebook.md
    """
    checks.batch_vectors(weight, z_RC)
    checks.usage_of(weight.shape[0], usage, None)
    checks.tensor("ids_R", ids_R, torch.int64, z_RC.shape[:1])
    checks.same_device(weight=weight.packed, z_RC=z_RC, ids_R=ids_R, usage=usage)
    checks.values_between("ids_R", ids_R, -1, weight.shape[0] - 1)
    checks.code_window(weight.shape[0], first, window)
    z_q = whole_sixteenths(z_RC).to(torch.float64)
    codes = searched_codes(weight, ids_R.clamp(min=0)), revived_trits(z_q)
    own_R, made_R = ((z_q / QUERY_STEPS - code).square().sum(dim=1) for code in codes)
    gains_R = torch.where(ids_R >= 0, own_R - made_R, 0.0)
    by_gain = gains_R.sort(descending=True, stable=True).indices
    by_code = by_gain[ids_R[by_gain].sort(stable=True).indices]
    farthest = torch.ones_like(by_code, dtype=torch.bool)
    farthest[1:] = ids_R[by_code][1:] != ids_R[by_code][:-1]
    chosen = by_code[farthest & (gains_R[by_code] > 0)]
    chosen = chosen[gains_R[chosen].sort(descending=True, stable=True).indices]
    rows = (first + torch.arange(window, device=usage.device)) % usage.numel()
    dead = (usage[rows] == 0).nonzero().flatten()[: chosen.numel()]
    vectors = torch.full_like(rows, -1)
    vectors[dead] = chosen[: dead.numel()]
    return vectors


@op
def revive_codes(
    weight: TernaryWeight,
    z_RC: Tensor,
    vectors: Tensor,
    *,
    first: int | Tensor,
    sign_bits: int = 0,
    out: TernaryWeight | None = None,
) -> TernaryWeight:
    """Return the table after codes of a window have become vectors of the batch.

    Math:    for n = (first + j) mod N with r = vectors[j] >= 0: T[n] = sign(z_q[r]) where |z_q[r]| >= 8, else 0; the first s
             columns take the signs of the bucket of n, as in initial_codebook; E = 0, accumulators 0
    Shapes:  z_RC float32, bfloat16 or float64 [R, C]; vectors int64 [window], window 0 .. N, each in -1 .. R - 1, as
             revival_vectors returns; first 0 .. 2**62, an integer or int64 []
    Returns: a new weight; or `out` (may be `weight` itself), overwritten. All other codes keep every byte
    Raises:  TypeError or ValueError for a dtype, shape, device, weight or vector that is not allowed
    Laws:    codes outside of the window, and codes that become no vector, keep every byte
    Source:  docs/spec/codebook.md; REFACTOR14 (dead codes)
    """
    checks.batch_vectors(weight, z_RC)
    checks.revivals(weight.shape[0], first, vectors)
    checks.same_device(weight=weight.packed, z_RC=z_RC, vectors=vectors)
    checks.values_between("vectors", vectors, -1, z_RC.shape[0] - 1)
    checks.buckets(*weight.shape, sign_bits)
    checks.out_weight(out, weight)
    num_codes = weight.shape[0]
    rows = (first + torch.arange(vectors.numel(), device=vectors.device)) % num_codes
    revived = rows[vectors >= 0]
    new = revived_trits(whole_sixteenths(z_RC)[vectors[vectors >= 0]]).to(torch.int8)
    new[:, :sign_bits] = bucket_signs(revived, num_codes, sign_bits)
    trits = trits_of(weight)
    trits[revived] = new
    tensors = {name: tensor.clone() for name, tensor in weight.tensors().items() if name != "packed"}
    for tensor in tensors.values():
        tensor[revived] = 0
    return weight_of_trits(trits, tensors["exponents"], weight.group_size).with_tensors(**tensors).into(out)


@op
def age_codes(usage: Tensor, vectors: Tensor, *, first: int | Tensor, out: Tensor | None = None) -> Tensor:
    """Return the counters, halved within a window, as a step does after `revive_codes` on the same window.

    Math:    for n = (first + j) mod N: u_n <- 1 where vectors[j] >= 0, the code just revived; else floor(u_n / 2)
    Shapes:  usage int16 [N], not negative; vectors int64 [window], window 0 .. N, as revival_vectors returns; first
             0 .. 2**62, an integer or int64 []
    Returns: int16 [N], new; or `out` (may be `usage` itself), overwritten. In place only the window is touched
    Raises:  TypeError or ValueError for a dtype, shape, device or window that is not allowed
    Laws:    counters outside of the window stay; a code that waits for a vector keeps its 0
    Source:  docs/spec/codebook.md
    """
    checks.usage_of(None, usage, out)
    checks.revivals(usage.numel(), first, vectors)
    checks.same_device(usage=usage, vectors=vectors)
    rows = (first + torch.arange(vectors.numel(), device=usage.device)) % usage.numel()
    aged = usage.clone()
    aged[rows] = torch.where(vectors >= 0, 1, usage[rows] >> 1)
    return aged if out is None else out.copy_(aged)


def revived_trits(z_q: Tensor) -> Tensor:
    """Return the trits that vectors in whole sixteenths make as codes, in the dtype of z_q."""
    return z_q.sign() * (z_q.abs() >= ALIVE_QUERY)


def whole_sixteenths(z: Tensor) -> Tensor:
    """Return z_q as float32: the vectors in whole sixteenths, half to even, within plus and minus 127."""
    z_q = (widened(z).nan_to_num(nan=0.0) * QUERY_STEPS).clamp(-QUERY_MAX, QUERY_MAX).round()
    return z_q.to(torch.float32)


def searched_codes(weight: TernaryWeight, rows: Tensor) -> Tensor:
    """Return codes as the search sees them, float32 [rows, C]: c' = T * 2**clamp(E, -5, 2)."""
    exponents = weight.exponents.clamp(CODE_EXPONENT_MIN, CODE_EXPONENT_MAX)
    return dequantize(weight.with_tensors(exponents=exponents), rows=rows)


def bucket_size(num_codes: int, sign_bits: int) -> int:
    """Return ceil(N / 2**s), the codes of the largest bucket."""
    return -(-num_codes // 2**sign_bits)


def bucket_signs(ids: Tensor, num_codes: int, sign_bits: int) -> Tensor:
    """Return the trits that the bucket numbers of codes prescribe, int8 [..., s] in {-1, 1}."""
    numbers = (ids << sign_bits) // num_codes
    bits = (numbers[..., None] >> torch.arange(sign_bits, device=ids.device)) & 1
    return (2 * bits - 1).to(torch.int8)


def _sets_of_ranks(sign_bits: int) -> Iterator[int]:
    """Yield sets of ranks below `sign_bits` as bit masks, in order of the sum over (rank + 1), then of the mask."""

    def masks(total: int, largest: int) -> Iterator[int]:
        """Yield the sets of ranks below `largest` whose ranks, each plus 1, add up to `total`, ascending."""
        if total == 0:
            yield 0
        for rank in range(min(total, largest)):
            yield from (mask | 1 << rank for mask in masks(total - rank - 1, rank))

    for total in range(sign_bits * (sign_bits + 1) // 2 + 1):
        yield from masks(total, sign_bits)
