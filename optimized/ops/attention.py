"""Attention. See `arbitor.reference.ops.attention`."""

from __future__ import annotations

from torch import Tensor

from arbitor.optimized.kernels import attention as kernels
from arbitor.optimized.kernels import context
from arbitor.optimized.kernels.launch import may_look_at_values, values_between
from arbitor.optimized.ops.op import op
from arbitor.optimized.ops.scale import DTYPES
from arbitor.reference import checks

__all__ = ["decode_attention", "visible_slots"]


@op()
def decode_attention(
    q_BHK: Tensor,
    keys_BSK: Tensor,
    bias_BS: Tensor,
    *,
    value_width: int,
    scale: float,
    places_BS: Tensor | None = None,
) -> Tensor:
    """See reference; float64 is not supported."""
    checks.dtype_in("q_BHK", q_BHK, DTYPES)
    checks.decode_slots(q_BHK, keys_BSK, bias_BS, places_BS, value_width=value_width, scale=scale)
    if places_BS is not None:
        values_between("places_BS", places_BS, 0, keys_BSK.shape[1] - 1)
    if may_look_at_values(bias_BS):
        checks.slot_bias(bias_BS)
    return kernels.attended(q_BHK, keys_BSK, bias_BS, value_width, float(scale), places_BS)


@op()
def visible_slots(
    first_B: Tensor, *, num_queries: int, window: int, block: int, num_summaries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference. One launch makes all three."""
    checks.view_of_past(
        first_B, num_queries=num_queries, window=window, block=block, num_summaries=num_summaries
    )
    values_between("first_B", first_B, 0, 2**48)
    return context.slots_seen(first_B, num_queries, window, block, num_summaries)
