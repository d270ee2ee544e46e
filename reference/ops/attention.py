"""Attention of one position over a cache of latents, in the absorbed form: no head has keys and values of its own. And the rows
of a log that positions see.

Legend: B batch, H heads, S slots (the rows of the cache that are read), K columns of a slot, L value width, Q queries. The first L
columns of a slot are the latent, and the other K - L are the rotary key. w window, b smallest block, n_l = b 4**l positions of a
block of level l.
Products and sums run in float32, or float64 for float64 inputs, and are rounded once to the dtype that comes out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.constants import CONTEXT_CHILDREN, CONTEXT_LEVELS
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.promises import op

__all__ = ["decode_attention", "visible_slots"]


@op
def decode_attention(
    q_BHK: Tensor,
    keys_BSK: Tensor,
    bias_BS: Tensor,
    *,
    value_width: int,
    scale: float,
    places_BS: Tensor | None = None,
) -> Tensor:
    """Return each head's weighted mean of the visible slots, which all heads share.

    Math:    a[b, h, s] = softmax over s of (scale * sum_k q[b, h, k] * keys[b, s, k] + bias[b, s])
             y[b, h, l] = sum_s a[b, h, s] * keys[b, s, l], l < L
    Shapes:  q float32, bfloat16 or float64 [B, H, K], keys of the same dtype [B, S, K]; bias float32 (float64 for float64
             inputs) [B, S], each finite or -inf. A slot of bias -inf is not visible. A slot of bias ln n stands for n slots
             with its key. B, H and S may be 0. With places int64 [B, S] the keys are those of a log [B, N, K], and slot s is
             row places[b, s] of it, in 0 .. N - 1 even where the slot is not visible
    Range:   L = value_width in 1 .. K; scale above 0, at most 2**15
    Returns: dtype of q, [B, H, L]; zeros for a sequence that sees no slot
    Raises:  TypeError or ValueError for a dtype, shape, device, width, scale or bias that is not allowed
    Laws:    an invisible slot is not read, so not even a NaN in it shows; a single visible slot gives its value exactly;
             n equal slots give the same as one slot of bias ln n
    Source:  docs/spec/attention.md; DeepSeek-V2 (2024), section 2.1 (absorbed form)
    """
    checks.decode_slots(q_BHK, keys_BSK, bias_BS, places_BS, value_width=value_width, scale=scale)
    checks.slot_bias(bias_BS)
    if places_BS is not None:
        checks.values_between("places_BS", places_BS, 0, keys_BSK.shape[1] - 1)
        keys_BSK = keys_BSK[torch.arange(len(places_BS), device=places_BS.device)[:, None], places_BS]
    wide = wide_dtype(q_BHK)
    visible_BS1 = (bias_BS > -torch.inf)[:, :, None]
    keys_BSK = torch.where(visible_BS1, keys_BSK.to(wide), 0.0)
    scores_BHS = q_BHK.to(wide) @ keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :]
    # Where nothing is visible the softmax is 0 / 0.
    shares_BHS = torch.where(visible_BS1.transpose(1, 2), scores_BHS.softmax(dim=-1), 0.0)
    return (shares_BHS @ keys_BSK[:, :, :value_width]).to(q_BHK.dtype)


@op
def visible_slots(
    first_B: Tensor, *, num_queries: int, window: int, block: int, num_summaries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of a log that the positions first, first + 1, ... of each sequence see, and those that are theirs.

    Math:    position p sees start_0(p) .. p one by one, and the blocks of level l from start_{l+1}(p) to start_l(p), l = 0 .. 7:
             start_0(p) = b max(0, floor((p + 1 - w) / b)); start_{l+1}(p) = 4 n_l max(0, floor((start_l(p) - N n_l) / (4 n_l)))
             position s is at place s + sum over l of floor(s / n_l), and a block of level l at 1 + l behind its last position
    Shapes:  first int64 [B], each 0 or more; num_queries Q, window w, block b and num_summaries N of 1 or more
    Returns: places int64 [B, S] of the slots, 0 for a slot that no query sees; bias float32 [B, Q, S], 0 for a position, ln n_l
             for a block and -inf for what a query does not see; own places int64 [B, Q]. S depends on Q, w, b and N alone:
             w + b + Q - 2 positions, then N + 3 + ceil((Q - 1) / n_l) blocks of each level
    Raises:  TypeError or ValueError for a dtype, shape or number that is not allowed
    Laws:    what a position sees does not depend on the other queries
    Source:  docs/spec/attention.md; REFACTOR14 (ContextAttentionScheduler)
    """
    checks.view_of_past(
        first_B, num_queries=num_queries, window=window, block=block, num_summaries=num_summaries
    )
    checks.values_between("first_B", first_B, 0, 2**48)
    sizes = block_sizes(block)
    first_B1 = first_B[:, None]
    last_BQ = first_B1 + torch.arange(num_queries, device=first_B.device)
    starts_of = lambda positions: block_starts(positions, window, block, num_summaries)  # noqa: E731
    oldest, newest = starts_of(first_B1), starts_of(first_B1 + num_queries - 1)
    starts = [start_BQ[:, :, None] for start_BQ in starts_of(last_BQ)]

    exact_BS = oldest[0] + torch.arange(window + block + num_queries - 2, device=first_B.device)
    visible = [(exact_BS[:, None] >= starts[0]) & (exact_BS[:, None] <= last_BQ[:, :, None])]
    within = [exact_BS < first_B1 + num_queries]
    places, weights = [place_in_log(exact_BS, sizes)], [0.0]
    for level, size in enumerate(sizes):
        slots = num_summaries + CONTEXT_CHILDREN - 1 + math.ceil((num_queries - 1) / size)
        blocks_BS = oldest[level + 1] // size + torch.arange(slots, device=first_B.device)
        begin_B1S = (blocks_BS * size)[:, None]
        visible.append((begin_B1S >= starts[level + 1]) & (begin_B1S < starts[level]))
        within.append(blocks_BS * size < newest[level])
        places.append(place_in_log((blocks_BS + 1) * size - 1, sizes) + 1 + level)
        weights.append(math.log(size))
    bias_BQS = torch.cat(
        [
            torch.full(sees_BQS.shape, -torch.inf, dtype=torch.float32, device=first_B.device).masked_fill(
                sees_BQS, weight
            )
            for sees_BQS, weight in zip(visible, weights, strict=True)
        ],
        dim=2,
    )
    places_BS = torch.where(torch.cat(within, dim=1), torch.cat(places, dim=1), 0)
    return places_BS, bias_BQS, place_in_log(last_BQ, sizes)


def block_sizes(block: int) -> tuple[int, ...]:
    """Return the positions of a block of each level."""
    return tuple(block * CONTEXT_CHILDREN**level for level in range(CONTEXT_LEVELS))


def block_starts(positions: Tensor, window: int, block: int, num_summaries: int) -> list[Tensor]:
    """Return start_0 and the start of each level of int64 positions, each in the shape of `positions`."""
    found = [block * ((positions + 1 - window) // block).clamp(min=0)]
    for size in block_sizes(block):
        parent = CONTEXT_CHILDREN * size
        found.append(parent * ((found[-1] - num_summaries * size) // parent).clamp(min=0))
    return found


def place_in_log(positions: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the place of each position in a log: behind it stand the blocks that end with it."""
    return positions + sum((positions // size for size in sizes), torch.zeros_like(positions))
