"""The byte transformer that rules are compared on: nothing in it is trained but matrices, and all of them by the rule.

Legend: B batch, T bytes, D width, H heads, C columns of a head, V = 256 byte values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.config import NUM_BYTES
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear
from arbitor.reference.graph.module import ArbModule, PartList
from arbitor.reference.graph.stateful import Stateful

HEAD_COLUMNS = 64
"""C of every size."""

TABLE_STD = 0.1
"""Standard deviation of the byte and position tables at the start."""

OUTPUT_GAIN = 0.5
"""Gain of what writes to the residual stream or makes logits: better than 1 for the rules for which it was tried (docs/log.md)."""


KIND_OF_PART = {
    "bytes": "embedding",
    "positions": "embedding",
    "qkv": "attention",
    "output": "attention",
    "up": "feed-forward",
    "down": "feed-forward",
    "head": "head",
}
"""The kind of a weight by the last part of its name, in the words of docs/training.md where the graph has such weights."""


class ByteTransformer(Stateful):
    """Causal attention and a squared-ReLU layer, each on a normed residual stream; norms without weights.

    Shapes:  ids int64 [B, T] -> logits float32 [B, T, V]
    """

    in_graphs = True

    def __init__(self, context: GraphContext, *, width: int, num_layers: int, length: int) -> None:
        super().__init__(context)
        self.width = width
        self.bytes = TernaryEmbedding(context, NUM_BYTES, width, std=TABLE_STD)
        self.positions = TernaryEmbedding(context, length, width, std=TABLE_STD)
        self.layers = PartList(_Layer(context, width) for _ in range(num_layers))
        self.head = TernaryLinear(context, width, NUM_BYTES, gain=OUTPUT_GAIN, orthogonal=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of each byte's successor."""
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.bytes(ids_BT) + self.positions(places_T)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(F.rms_norm(x_BTD, (self.width,))).float()

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy of bytes 1 .. T - 1 in nats, each from those before it."""
        logits_BTV = self(ids_BT[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


class _Layer(ArbModule):
    in_graphs = True

    def __init__(self, context: GraphContext, width: int) -> None:
        super().__init__(context)
        self.width = width
        self.qkv = TernaryLinear(context, width, 3 * width)
        self.output = TernaryLinear(context, width, width, gain=OUTPUT_GAIN)
        self.up = TernaryLinear(context, width, 4 * width)
        self.down = TernaryLinear(context, 4 * width, width, gain=OUTPUT_GAIN)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv_BT3HC = self.qkv(F.rms_norm(x_BTD, (self.width,))).unflatten(-1, (3, -1, HEAD_COLUMNS))
        q_BHTC, k_BHTC, v_BHTC = qkv_BT3HC.permute(2, 0, 3, 1, 4)
        q_BHTC, k_BHTC = (F.rms_norm(each, (HEAD_COLUMNS,)) for each in (q_BHTC, k_BHTC))
        heads_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        x_BTD = x_BTD + self.output(heads_BHTC.transpose(1, 2).flatten(-2))
        hidden_BTK = F.relu(self.up(F.rms_norm(x_BTD, (self.width,)))).square()
        return x_BTD + self.down(hidden_BTK)
