"""The trunk of the ARB model: the modules of the graph in their order, from bytes and media to the stream that the heads read.

Legend: B batch, T bytes, P = T - 2 positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import NGRAM
from arbitor.reference.graph.attention import LatentAttention
from arbitor.reference.graph.codebook import SharedVQ
from arbitor.reference.graph.composite import CompositeProposalHead
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryRMSNorm, add_norm, as_built
from arbitor.reference.graph.ledger import KVLedger, LayerLedger
from arbitor.reference.graph.memory import MemGram
from arbitor.reference.graph.module import ArbModule, PartList, as_it_is
from arbitor.reference.graph.moe_graph import MoEGraph, RecurrentMoEGraph
from arbitor.reference.graph.rotary import Turns, turns_of_pass
from arbitor.reference.graph.sequencer import AudioSequencer, ByteEmbedding, ImageSequencer, TrigramSequencer
from arbitor.reference.graph.stateful import Stateful
from arbitor.reference.graph.ternary_graph import TernaryGraph


class ArbLayer(ArbModule):
    """Attention, then the experts, each on a normed residual stream. The last layer also has the nodes and the loop.

    Math:    e = h + Attention(RMSNorm(h)); h <- MoEGraph(e)
    Shapes:  [B, P, D] -> [B, P, D]
    """

    def __init__(self, context: GraphContext, *, last: bool) -> None:
        super().__init__(context)
        config = context.config
        output_gain = 1.0 / math.sqrt(2 * config.num_layers)
        self.attention_norm = TernaryRMSNorm(context, config.width)
        self.attention = LatentAttention(context, output_gain=output_gain)
        kind = RecurrentMoEGraph if last else MoEGraph
        self.moe_graph = kind(context, output_gain=output_gain)

    def forward(
        self,
        h_BPD: Tensor,
        nodes_BPD: Tensor | None = None,
        cache: LayerLedger | None = None,
        turns: Turns | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer. With a cache, positions also see the positions that it holds."""
        h_BPD, normed_BPD = add_norm(h_BPD, None, self.attention_norm)
        gathered_BPD = self.attention(normed_BPD, cache, turns)
        if isinstance(self.moe_graph, MoEGraph) and as_built(self.moe_graph):
            e_BPD, read_BPD = self.moe_graph.joined(h_BPD, gathered_BPD, nodes_BPD)
            return self.moe_graph(e_BPD, nodes_BPD, read_BPD)
        # A hook may change the stream before the experts read it, and what is in this place may know no more than the stream.
        return self.moe_graph(h_BPD + gathered_BPD, nodes_BPD)


@dataclass(frozen=True)
class Trunk:
    """The stream of the model before a head, with its codes and losses.

    Fields:
        h_BPD:  the stream of every position: images first, then audio, then text.
        codes:  int64 [B, P], the code of each position in the id space of all modalities; None without codes.
        losses: the losses of codebooks by name, scalars.
    """

    h_BPD: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor]


class ArbTrunk(Stateful):
    """The modules of a model from bytes to the stream that its heads read.

    Math:    s = sequencer(embedding(ids)); x = shared_vq(s); h = layers(memory(x), nodes = graph(codes))
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.embedding = ByteEmbedding(context)
        self.sequencer = TrigramSequencer(context)
        self.image_sequencer = ImageSequencer(context) if config.image_features else None
        self.audio_sequencer = AudioSequencer(context) if config.audio_features else None
        self.shared_vq = SharedVQ(context) if config.num_codes else None
        self.graph = None
        if self.shared_vq is not None and config.num_hops:
            self.graph = TernaryGraph(context, self.shared_vq.bridge)
        self.memory = MemGram(context) if config.memory_rows else None
        self.composite = CompositeProposalHead(context) if config.composite_codes else None
        last = config.num_layers - 1
        self.layers = PartList(ArbLayer(context, last=i == last) for i in range(config.num_layers))

    @as_it_is
    def trunk(
        self,
        ids_BT: Tensor,
        *,
        image_BNF: Tensor | None = None,
        audio_BNF: Tensor | None = None,
        ledger: KVLedger | None = None,
    ) -> Trunk:
        """Return the stream of every position, for ids int64 [B, T] with T >= 3 and, before them, features of media.

        With a ledger, between its `begin` and `end`, the positions follow the positions that the ledger holds.

        Shapes:  image_BNF and audio_BNF float [B, N, features], N >= 3, for N - 2 positions each; all of one B >= 1
        Raises:  TypeError or ValueError for ids or features that do not fit, or media that the model was not built for
        """
        checks.dtype_in("ids_BT", ids_BT, (torch.int64,))
        check_ids(ids_BT, NGRAM)
        batch = ids_BT.shape[0]
        parts = {
            "image": _sequence("image", self.image_sequencer, image_BNF, batch),
            "audio": _sequence("audio", self.audio_sequencer, audio_BNF, batch),
            "text": self.sequencer(self.embedding(ids_BT)),
        }
        present = {name: s_BPD for name, s_BPD in parts.items() if s_BPD is not None}
        codes_BP: Tensor | None = None
        losses: dict[str, Tensor] = {}
        if self.shared_vq is None:
            h_BPD = torch.cat(list(present.values()), dim=1)
        else:
            h_BPD, codes_BP, losses = self.shared_vq(present, ledger)
        first_B = None if ledger is None else ledger.first_B
        h_BPD, nodes_BPD, turns = self.voting.alongside(
            partial(self._remembered, h_BPD, codes_BP, ledger),
            partial(self._nodes, codes_BP),
            partial(turns_of_pass, h_BPD, first_B, self.config.rotary_dim),
        )
        if ledger is not None and codes_BP is not None:
            ledger.record_codes(codes_BP)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            cache = None if ledger is None else ledger.layer(index)
            h_BPD = layer(h_BPD, nodes_BPD if index == last else None, cache, turns)
        return Trunk(h_BPD, codes_BP, losses)

    def _remembered(self, h_BPD: Tensor, codes_BP: Tensor | None, ledger: KVLedger | None) -> Tensor:
        """Return the stream with what the memory holds for its codes."""
        if self.memory is None or codes_BP is None:
            return h_BPD
        previous_Bn = None if ledger is None else ledger.previous_codes(self.memory.codes_before)
        return self.memory(h_BPD, codes_BP, previous_Bn)

    def _nodes(self, codes_BP: Tensor | None) -> Tensor | None:
        """Return what the graph says of the codes."""
        if self.graph is None or codes_BP is None:
            return None
        return self.graph(codes_BP, self.composite.read(codes_BP) if self.composite is not None else None)


def check_ids(ids_BT: Tensor, num_bytes: int) -> None:
    """Refuse ids that are no batch of at least one sequence of at least `num_bytes` bytes."""
    checks.is_tensor("ids_BT", ids_BT)
    if ids_BT.ndim != 2 or ids_BT.shape[0] == 0 or ids_BT.shape[1] < num_bytes:
        raise ValueError(
            f"ids_BT has shape {tuple(ids_BT.shape)}, but must be [batch, bytes] with at least one sequence of at least "
            f"{num_bytes} bytes"
        )


def _sequence(
    name: str, sequencer: ArbModule | None, features_BNF: Tensor | None, batch: int
) -> Tensor | None:
    """Return the positions of a medium, or None without features; refuse features that no sequencer reads."""
    if features_BNF is None:
        return None
    if sequencer is None:
        raise ValueError(f"{name}_BNF is given, but must be None: the model has no {name} sequencer")
    s_BPD = sequencer(features_BNF)
    if s_BPD.shape[0] != batch:
        raise ValueError(f"{name}_BNF has a batch of {s_BPD.shape[0]}, but must have that of ids_BT, {batch}")
    return cast(Tensor, s_BPD)
