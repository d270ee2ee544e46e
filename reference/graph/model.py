"""The ARB model: the modules of the graph in their order, and how it is trained.

Legend: B batch, T bytes, P = T - 2 positions, D width, V = 297 vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import NGRAM, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.attention import LatentAttention
from arbitor.reference.graph.heads import ByteHead
from arbitor.reference.graph.layers import TernaryRMSNorm
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.graph.sequencer import ByteEmbedding, TrigramSequencer
from arbitor.reference.graph.state import GraphContext, TernaryModule
from arbitor.reference.types import ACCUM_MAX, MAX_PACKED_BYTE, TernaryWeight, level_range

LOSS_REFERENCE = math.log(VOCABULARY_SIZE)
"""Loss of a uniform guess, in nats per byte: what the `sign` rule's vote size is measured against."""


class ArbLayer(nn.Module):
    """One attention and one mixture of experts, each on a normed residual stream.

    Math:    h <- h + Attention(RMSNorm(h)); h <- h + MoE(RMSNorm(h))
    Shapes:  [B, P, D] -> [B, P, D]
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__()
        config = context.config
        output_gain = 1.0 / math.sqrt(2 * config.num_layers)
        self.attention_norm = TernaryRMSNorm(context, config.width)
        self.attention = LatentAttention(context, output_gain=output_gain)
        self.moe_norm = TernaryRMSNorm(context, config.width)
        self.moe = SharedProjectionMoE(context, output_gain=output_gain)

    def forward(self, h_BPD: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        h_BPD = h_BPD + self.attention(self.attention_norm(h_BPD))
        return h_BPD + self.moe(self.moe_norm(h_BPD))


class ArbModel(nn.Module):
    """Bytes in, logits of the next byte out; every weight ternary, trained in place by votes.

    Args:
        config: shape and rules.
        ops:    op set that computes: `arbitor.reference.ops`, or another with its names.
        device: where the weights live; `meta` builds a model without memory, for the audit.
        dtype:  activations: float32, bfloat16, or float64 with the reference.
        seed:   64-bit seed of the starting weights and of the dither.

    Math:    h = layers(sequencer(embedding(ids))); logits = byte_head(h); position p predicts byte p + 3
    Raises:  TypeError or ValueError for a dtype or seed that is not allowed
    """

    def __init__(
        self,
        config: ArbConfig,
        *,
        ops: ModuleType = reference_ops,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of("dtype", dtype, checks.FLOAT_DTYPES)
        checks.integer("seed", seed, 0, 2**64 - 1)
        context = GraphContext(ops, config, device=device, dtype=dtype, seed=seed)
        self.config = config
        self.ops = ops
        self.voting = context.voting
        self.embedding = ByteEmbedding(context)
        self.sequencer = TrigramSequencer(context)
        self.layers = nn.ModuleList(ArbLayer(context) for _ in range(config.num_layers))
        self.byte_head = ByteHead(context)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the weights as torch does, and the count of faults with them."""
        self.voting.faults = fn(self.voting.faults)
        return super()._apply(fn, recurse)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of every position, float32 [B, P, V], for ids int64 [B, T] with T >= 3."""
        checks.dtype_in("ids_BT", ids_BT, (torch.int64,))
        if ids_BT.ndim != 2 or ids_BT.shape[1] < NGRAM:
            raise ValueError(
                f"ids_BT has shape {tuple(ids_BT.shape)}, but must be [batch, bytes] with at least {NGRAM} bytes"
            )
        h_BPD = self.sequencer(self.embedding(ids_BT))
        for layer in self.layers:
            h_BPD = layer(h_BPD)
        return self.byte_head(h_BPD)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Return the mean loss of the bytes from the fourth on, float32 [], in nats per byte; needs T >= 4.

        The last position's byte is not known, so its logits are left out.
        """
        if ids_BT.ndim != 2 or ids_BT.shape[0] == 0 or ids_BT.shape[1] <= NGRAM:
            raise ValueError(
                f"ids_BT has shape {tuple(ids_BT.shape)}, but must be [batch, bytes] with at least {NGRAM + 1} bytes"
            )
        logits_BPV = self(ids_BT)[:, :-1]
        return F.cross_entropy(logits_BPV.flatten(0, 1), ids_BT[:, NGRAM:].flatten())

    def backward(self, loss: Tensor, *, rate: float | Tensor, step: int | Tensor) -> bool:
        """Run the backward pass of one micro-batch, in which every weight behind the loss votes.

        Args:
            loss: what `loss` returned, or any scalar computed with this model.
            rate: schedule rate times gain, 0 .. 127, a number or a 0-dim float32 tensor. The `sign` rule asks only
                whether it is 0.
            step: number of this micro-batch, a coordinate of the dither; a number or a 0-dim int64 tensor.

        Returns:
            True; or False when the loss is not finite, in which case not one byte has changed.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}, but must be a scalar")
        value = float(loss.detach())
        if not math.isfinite(value):
            return False
        size = 1
        if self.config.vote_rule == "sign":
            size = self.ops.step_from_loss(max(value, 0.0), LOSS_REFERENCE, self.config.max_vote_step)
        with self.voting.at(rate=rate, step=step, size=size):
            loss.backward()
        return True

    def step(self) -> None:
        """Apply the step rule to every weight, or row of a table, that voted since the last step."""
        for module in self.ternary_modules().values():
            module.step_weight()

    def ternary_modules(self) -> dict[str, TernaryModule]:
        """Return the modules that hold a weight by name, in definition order: the order of their tensor ids."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryModule)}

    def weights(self) -> dict[str, TernaryWeight]:
        """Return every weight by name in canonical form, in definition order. May share memory with the model."""
        return {name: self.ops.to_spec(module.weight) for name, module in self.ternary_modules().items()}

    def load_weights(self, weights: dict[str, TernaryWeight]) -> None:
        """Overwrite every weight, in place; nothing changes unless all of them fit.

        Raises ValueError for a missing or unknown name, another shape or format, or a value out of range.
        """
        modules = self.ternary_modules()
        for name in (*modules, *weights):
            if name not in weights:
                raise ValueError(f"weights has no {name!r}, but must name every weight of the model")
            if name not in modules:
                raise ValueError(f"weights has {name!r}, but the model has no weight of that name")
        for name, weight in self.weights().items():
            _check_loadable(name, weights[name], weight)
        for name, module in modules.items():
            module.load(weights[name])

    def snapshot_trits(self) -> dict[str, Tensor]:
        """Return a copy of the packed trits of every weight that can vote."""
        spec = {
            name: self.ops.to_spec(m.weight) for name, m in self.ternary_modules().items() if not m.frozen
        }
        return {name: weight.packed.clone() for name, weight in spec.items()}

    def flip_rate(self, snapshot: dict[str, Tensor]) -> float:
        """Return the share of trits that differ from those of `snapshot_trits`, among the weights that can vote."""
        changed, total = torch.zeros((), dtype=torch.int64, device=self.voting.faults.device), 0
        modules = self.ternary_modules()
        for name, packed in snapshot.items():
            after = self.ops.to_spec(modules[name].weight)
            changed += self.ops.count_changed_trits(after.with_tensors(packed=packed), after)
            total += math.prod(after.shape)
        return float(changed) / total


def _check_loadable(name: str, weight: TernaryWeight, current: TernaryWeight) -> None:
    """Refuse a weight that does not fit the current one of that name, or holds values out of range."""
    if not isinstance(weight, TernaryWeight):
        raise TypeError(f"{name} is a {type(weight).__name__}, but must be a TernaryWeight")
    for field in ("shape", "group_size", "mantissa_bits"):
        if getattr(weight, field) != getattr(current, field):
            raise ValueError(
                f"{name} has {field} {getattr(weight, field)}, but must have {getattr(current, field)}"
            )
    checks.values_between(f"{name}.packed", weight.packed, 0, MAX_PACKED_BYTE)
    checks.values_between(f"{name}.exponents", weight.exponents, *level_range(weight.mantissa_bits))
    checks.values_between(f"{name}.trit_accum", weight.trit_accum, -ACCUM_MAX, ACCUM_MAX)
    checks.values_between(f"{name}.exponent_accum", weight.exponent_accum, -ACCUM_MAX, ACCUM_MAX)
