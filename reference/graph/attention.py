"""Multi-head latent attention (MLA), in which keys and values of a position are made from one small latent.

Legend: B batch, P positions, D width, H heads, C head width, R rotary width, L key-value latent, S slots that are seen,
N rows of a log, K columns of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryLinear, TernaryRMSNorm, fan_out, plain
from arbitor.reference.graph.ledger import LayerLedger, mean_of_parts
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.rotary import Turns, rotary_turns, turns_at, turns_of_pass, with_turned_key
from arbitor.reference.graph.scheduler import ContextAttentionScheduler, Seen

__all__ = ["LatentAttention", "rotary_turns"]

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of all heads, [B, S, H, C] each."""


class LatentAttention(ArbModule):
    """Attention whose cache has one latent and one rotary key for each position, which all heads share. It sums up old positions.

    Math:    [l_p; k^R_p] = W_latent_down x_p; l^_p = RMSNorm(l_p)
             q_p = W_query_up RMSNorm(W_query_down x_p), H heads of C
             in each head the first R query columns and k^R are turned by the position. The other C - R key columns are rows
             of W_key_up l^_p, and the C value columns are rows of W_value_up l^_p
             y_p = W_output [sum over the visible s of softmax(q_p . k_s / sqrt(C) + ln n_s) v_s, all heads]
             ContextAttentionScheduler says which s are visible to p. It is a position s <= p (n = 1), or a block of n positions,
             with the mean of their l^, and the mean of their k^R turned to the middle of the block
    Absorbed: one position with a ledger is read without keys and values of heads, unless W_key_up or W_value_up has an adapter.
             There q . k_s = (W_key_up^T q^C) . l^_s + q^R . k^R_s, and the values are W_value_up applied to the mean of the latents
    Shapes:  [B, P, D] -> [B, P, D]
    Source:  DeepSeek-V2 (2024), section 2.1; keys and values of one width C, so that fused attention kernels apply
    """

    def __init__(self, context: GraphContext, *, output_gain: float = 1.0) -> None:
        super().__init__(context)
        config = context.config
        self.num_heads, self.head_dim, self.rotary_dim = config.num_heads, config.head_dim, config.rotary_dim
        self.plain_dim, self.kv_latent = config.head_dim - config.rotary_dim, config.kv_latent
        self.scale = 1 / math.sqrt(config.head_dim)
        self.scheduler = ContextAttentionScheduler(config)
        heads_width = config.num_heads * config.head_dim
        self.query_down = TernaryLinear(context, config.width, config.query_latent)
        self.query_norm = TernaryRMSNorm(context, config.query_latent)
        self.query_up = TernaryLinear(context, config.query_latent, heads_width)
        self.latent_down = TernaryLinear(context, config.width, config.kv_latent + config.rotary_dim)
        self.latent_norm = TernaryRMSNorm(context, config.kv_latent)
        self.key_up = TernaryLinear(context, config.kv_latent, config.num_heads * self.plain_dim)
        self.value_up = TernaryLinear(context, config.kv_latent, heads_width)
        self.output = TernaryLinear(context, heads_width, config.width, gain=output_gain)

    def forward(self, x_BPD: Tensor, cache: LayerLedger | None = None, turns: Turns | None = None) -> Tensor:
        """Return what each position gathers from itself and the positions before it, including the positions of the cache.

        The cache gets the rows of these positions. A gradient reaches the positions of this pass, and no older position.
        `turns` are those of the positions, `turns_of_pass`, which all layers of a model share.
        """
        first_B = None if cache is None else cache.first_B
        if turns is None:
            turns = turns_of_pass(x_BPD, first_B, self.rotary_dim)
        query_BPL, down_BPK = fan_out(x_BPD, self.query_down, self.latent_down)
        q_BPHC = self._queries(query_BPL, turns)
        key_BPR, latent_BPL = self._latents(down_BPK)
        fits = x_BPD.shape[1] <= self.scheduler.window
        if fits and (cache is None or cache.is_empty):
            if cache is not None:
                cache.append(self._rows(key_BPR, latent_BPL, turns))
            heads_BPHC = self._causal(q_BPHC, latent_BPL, self._turned_key(key_BPR, turns))
        elif cache is None:
            log_BNK = self._log_of(self._rows(key_BPR, latent_BPL, turns))
            heads_BPHC = self._over_past(q_BPHC, self._seen_from_start, self._picker(log_BNK))
        else:
            rows_BPK = self._rows(key_BPR, latent_BPL, turns)
            cache.append(rows_BPK)
            absorbs = plain(self.key_up, self.value_up) and not torch.is_grad_enabled()
            if x_BPD.shape[1] == 1 and absorbs:
                heads_BPHC = self._absorbed(q_BPHC[:, 0], cache)[:, None]
            else:
                heads_BPHC = self._over_past(q_BPHC, cache.seen, self._reader(cache, rows_BPK))
        return self.output(heads_BPHC.flatten(-2))

    def _queries(self, query_BPL: Tensor, turns: Turns) -> Tensor:
        """Return the queries of all heads for W_query_down x, their rotary columns turned."""
        q_BPHC = self.query_up(self.query_norm(query_BPL))
        return self.ops.rotate(q_BPHC.unflatten(-1, (self.num_heads, self.head_dim)), *turns)

    def _turned_key(self, key_BPR: Tensor, turns: Turns) -> Tensor:
        """Return the rotary key of each position, turned."""
        return self.ops.rotate(key_BPR[..., None, :], *turns)[..., 0, :]

    def _rows(self, key_BPR: Tensor, latent_BPL: Tensor, turns: Turns) -> Tensor:
        """Return the row that is kept of each position: [rotary key; normed latent; rotary key turned to the position]."""
        return torch.cat([key_BPR, latent_BPL, self._turned_key(key_BPR, turns)], dim=-1)

    def _latents(self, down_BPK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary key of each position, not turned, and its normed latent, for W_latent_down x."""
        latent_BPL, key_BPR = down_BPK.split([self.kv_latent, self.rotary_dim], dim=-1)
        return key_BPR, self.latent_norm(latent_BPL)

    def _heads(self, latent_BSL: Tensor, turned_BSR: Tensor) -> KeysValues:
        """Return keys and values of all heads for normed latents and turned rotary keys."""
        plain_BSN, values_BSN = fan_out(latent_BSL, self.key_up, self.value_up)
        plain_BSHC = plain_BSN.unflatten(-1, (self.num_heads, self.plain_dim))
        values_BSHC = values_BSN.unflatten(-1, (self.num_heads, self.head_dim))
        return self.ops.head_keys(turned_BSR, plain_BSHC), values_BSHC

    def _heads_of_rows(self, rows_BSK: Tensor) -> KeysValues:
        """Return keys and values of all heads for rows of a log."""
        latent_BSL, turned_BSR = rows_BSK[..., self.rotary_dim :].split(
            [self.kv_latent, self.rotary_dim], dim=-1
        )
        return self._heads(latent_BSL, turned_BSR)

    def _causal(self, q_BPHC: Tensor, latent_BPL: Tensor, turned_BPR: Tensor) -> Tensor:
        """Attend where every position sees all positions before it, by the kernels for causal attention."""
        q, k, v = (each.transpose(1, 2) for each in (q_BPHC, *self._heads(latent_BPL, turned_BPR)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def _over_past(
        self, q_BPHC: Tensor, seen: Callable[[int, int], Seen], pick: Callable[[Tensor], KeysValues]
    ) -> Tensor:
        """Attend with a window of queries at a time, to the rows that at least one of them sees, in float32 or better.

        In bfloat16, ln n would be off by up to a percent of a summary's weight.
        """
        wide = wide_dtype(q_BPHC)
        gathered = []
        for skipped in range(0, q_BPHC.shape[1], self.scheduler.window):
            some_BQHC = q_BPHC[:, skipped : skipped + self.scheduler.window]
            view = seen(some_BQHC.shape[1], skipped)
            q, k, v = (each.transpose(1, 2).to(wide) for each in (some_BQHC, *pick(view.places_BS)))
            mask_B1QS = view.bias_BQS[:, None].to(wide)
            gathered.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1QS).transpose(1, 2))
        return torch.cat(gathered, dim=1).to(q_BPHC.dtype)

    def _absorbed(self, q_BHC: Tensor, cache: LayerLedger) -> Tensor:
        """Attend with one position of each sequence to the latents themselves."""
        batch = q_BHC.shape[0]
        view = cache.seen(1)
        q_rotary, q_plain = q_BHC.split([self.rotary_dim, self.plain_dim], dim=-1)
        heads_H = cache.ledger.ahead(self.num_heads)
        heads_M = heads_H if batch == 1 else heads_H.repeat(batch)
        q_latent = self.ops.grouped_linear_input_grad(
            q_plain.flatten(0, 1), self.key_up.weight, heads_M, num_groups=self.num_heads
        )
        mean_BHL = self.ops.decode_attention(
            torch.cat([q_latent.unflatten(0, (batch, self.num_heads)), q_rotary], dim=-1),
            cache.log.rows[..., self.rotary_dim :],
            view.bias_BQS[:, 0].to(wide_dtype(q_BHC)),
            value_width=self.kv_latent,
            scale=self.scale,
            places_BS=view.places_BS,
        )
        values_MC = self.ops.grouped_linear(
            mean_BHL.flatten(0, 1), self.value_up.weight, heads_M, num_groups=self.num_heads
        )
        return values_MC.unflatten(0, (batch, self.num_heads))

    def _seen_from_start(self, num_queries: int, skipped: int) -> Seen:
        """Return what the positions from `skipped` on see when nothing was read before this pass."""
        first_1 = torch.full((1,), skipped, device=self.latent_norm.device)
        return self.scheduler.seen(first_1, num_queries, self.ops)

    def _log_of(self, rows_BPK: Tensor) -> Tensor:
        """Return the log [B, N, K] of the rows of positions 0, 1, ..., such that gradients reach the rows."""
        scheduler, positions = self.scheduler, torch.arange(rows_BPK.shape[1], device=rows_BPK.device)
        parts, places = [rows_BPK], [scheduler.place_of_position(positions)]
        for level, size in enumerate(scheduler.sizes):
            width = size // scheduler.sizes[level - 1] if level else size
            blocks = positions[: parts[-1].shape[1] // width]
            averaged = parts[-1][:, : len(blocks) * width, : -self.rotary_dim].unflatten(
                1, (len(blocks), width)
            )
            turns = turns_at(scheduler.middle(level, blocks), self.rotary_dim)
            parts.append(with_turned_key(mean_of_parts(averaged), turns))
            places.append(scheduler.place_of_block(level, blocks))
            if not len(blocks):
                break
        return torch.cat(parts, dim=1)[:, torch.cat(places).argsort()]

    def _picker(self, log_BNK: Tensor) -> Callable[[Tensor], KeysValues]:
        """Return a function from places to keys and values. Each row of the log is expanded once, and the weights vote once."""
        keys_BNHC, values_BNHC = self._heads_of_rows(log_BNK)
        return lambda places_1S: (keys_BNHC[:, places_1S[0]], values_BNHC[:, places_1S[0]])

    def _reader(self, cache: LayerLedger, rows_BPK: Tensor) -> Callable[[Tensor], KeysValues]:
        """Return a function from places in the cache to keys and values. The rows of this pass keep their gradient."""
        if not (torch.is_grad_enabled() and rows_BPK.requires_grad):
            return lambda places_BS: self._heads_of_rows(cache.log.read(places_BS))
        each_B1 = torch.arange(rows_BPK.shape[0], device=rows_BPK.device)[:, None]
        ahead_P = torch.arange(rows_BPK.shape[1], device=rows_BPK.device)
        places_BP = self.scheduler.place_of_position(cache.first_B[:, None] + ahead_P)
        log_BNK = cache.log.rows.index_put((each_B1, places_BP), rows_BPK)
        return lambda places_BS: self._heads_of_rows(log_BNK[each_B1, places_BS])
