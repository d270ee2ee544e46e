"""The ARB model: the modules of the graph in their order, and how it is trained.

Legend: B batch, T bytes, P = T - 2 positions, D width, V = 297 vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import NGRAM, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.attention import LatentAttention
from arbitor.reference.graph.codebook import SharedVQ
from arbitor.reference.graph.composite import CompositeProposalHead
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.heads import ByteHead
from arbitor.reference.graph.layers import TernaryRMSNorm
from arbitor.reference.graph.ledger import KVLedger, LayerLedger
from arbitor.reference.graph.memory import MemGram
from arbitor.reference.graph.module import ArbModule, PartList, as_it_is
from arbitor.reference.graph.moe_graph import MoEGraph, RecurrentMoEGraph
from arbitor.reference.graph.rotary import Turns, turns_of_pass
from arbitor.reference.graph.router import MODALITIES, OutputRouter
from arbitor.reference.graph.sequencer import AudioSequencer, ByteEmbedding, ImageSequencer, TrigramSequencer
from arbitor.reference.graph.stateful import Stateful, scalar
from arbitor.reference.graph.talker import MAX_TOKENS, SPOKEN_STRIDE, TalkerHead, spoken_marks
from arbitor.reference.graph.targets import (
    Targets,
    byte_loss,
    ended_streams,
    latent_loss,
    route_loss,
    spoken_streams,
    taught_by,
    token_loss,
)
from arbitor.reference.graph.ternary_graph import TernaryGraph
from arbitor.reference.graph.video import VideoHead

Head = TypeVar("Head", bound=ArbModule)

LOSS_REFERENCE = math.log(VOCABULARY_SIZE)
"""Loss of a uniform guess, in nats per byte. The `sign` rule takes its vote size from the ratio of the loss to it."""

LOSS_WEIGHTS = {"commitment": 0.1, "composite_commitment": 0.25}
"""Weights of components of the loss in the sum that drives the votes. A component without an entry has weight 1."""


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
        gathered_BPD = self.attention(self.attention_norm(h_BPD), cache, turns)
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


@dataclass(frozen=True)
class Response:
    """The answer of the model, by the head that the router chose for each sequence.

    Fields:
        modality_B: int64, index into MODALITIES.
        logits_BPV: logits of the bytes, for every sequence.
        latent:     latents of the sequences that video answers, in their order; None without such sequences.
        tokens:     int64, tokens of the sequences that audio answers, in their order; None without such sequences.
    """

    modality_B: Tensor
    logits_BPV: Tensor
    latent: Tensor | None
    tokens: Tensor | None


class ArbModel(Stateful):
    """A model from bytes to the logits of the next byte. Every weight is ternary, and votes train it in place.

    Args:
        config: shape and rules.
        ops:    op set that computes: `arbitor.reference.ops`, or another with its names.
        device: device of the weights; `meta` builds a model without memory, for the audit.
        dtype:  dtype of activations: float32, bfloat16, or float64 with the reference.
        seed:   64-bit seed of the starting weights and of the dither.
        elsewhere: tensor ids of the weights whose accumulators another rank keeps; they read as zeros here.
        codes_over: the number of this rank, and how many ranks the rows of codebooks and of their edges are spread over; this rank
            keeps its own.
        experts_over: the same for experts.

    Math:    s = sequencer(embedding(ids)); x = shared_vq(s); h = layers(memory(x), nodes = graph(codes));
             logits = byte_head(h); position p predicts byte p + 3
    Raises:  TypeError or ValueError for a dtype or seed that is not allowed, or float64 with an op set that has none
    """

    def __init__(
        self,
        config: ArbConfig,
        *,
        ops: ModuleType = reference_ops,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        elsewhere: frozenset[int] = frozenset(),
        codes_over: tuple[int, int] = (0, 1),
        experts_over: tuple[int, int] = (0, 1),
    ) -> None:
        context = GraphContext(
            ops,
            config,
            device=device,
            dtype=dtype,
            seed=seed,
            elsewhere=elsewhere,
            codes_over=codes_over,
            experts_over=experts_over,
        )
        super().__init__(context)
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
        self.router = OutputRouter(context) if config.router_inner else None
        self.byte_head = ByteHead(context)
        self.video_head = VideoHead(context) if config.video_latent else None
        self.talker_head = TalkerHead(context) if config.talker_tokens else None

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
        _check_ids(ids_BT, NGRAM)
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
        nodes_BPD = None
        if codes_BP is not None:
            if self.memory is not None:
                previous_Bn = None if ledger is None else ledger.previous_codes(self.memory.codes_before)
                h_BPD = self.memory(h_BPD, codes_BP, previous_Bn)
            if self.graph is not None:
                extra_BPC = self.composite.read(codes_BP) if self.composite is not None else None
                nodes_BPD = self.graph(codes_BP, extra_BPC)
            if ledger is not None:
                ledger.record_codes(codes_BP)
        last = len(self.layers) - 1
        turns = turns_of_pass(h_BPD, None if ledger is None else ledger.first_B, self.config.rotary_dim)
        for index, layer in enumerate(self.layers):
            cache = None if ledger is None else ledger.layer(index)
            h_BPD = layer(h_BPD, nodes_BPD if index == last else None, cache, turns)
        return Trunk(h_BPD, codes_BP, losses)

    def forward(
        self,
        ids_BT: Tensor | None,
        *,
        ledger: KVLedger | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
        **media: Any,
    ) -> Tensor:
        """Return the logits of every text position, float32 [B, P, V].

        Args:
            ids_BT: bytes int64 [B, T]; T >= 3 without a ledger, and for an empty one.
            ledger: a transcript that the bytes follow. Its unread ids are read first, then `ids_BT`, which may be None. There is a
                position for every byte read (two fewer in the first pass). The id predicted at the last position of each sequence
                is appended to the ledger, unread (REFACTOR14).
            choose: function from logits [B, V] to the predicted ids, int64 [B]; None takes the likeliest id.
            media:  features, as for `trunk`.
        """
        if ledger is None:
            if ids_BT is None:
                raise ValueError("ids_BT is None, but must be bytes without a ledger")
            return self.byte_head(self._text(self.trunk(ids_BT, **media), ids_BT))
        logits_BPV = self.read(ids_BT, ledger, **media)
        last_BV = logits_BPV[:, -1].detach()
        ledger.end(last_BV.argmax(dim=-1) if choose is None else choose(last_BV))
        return logits_BPV

    @as_it_is
    def read(self, ids_BT: Tensor | None, ledger: KVLedger, **media: Any) -> Tensor:
        """Begin a pass as `forward` does, and return its logits. The `end` of the ledger must follow."""
        self._bind(ledger)
        window_BT = ledger.begin(ids_BT)
        return self.byte_head(self._text(self.trunk(window_BT, ledger=ledger, **media), window_BT))

    @as_it_is
    def respond(self, ids_BT: Tensor | None, *, ledger: KVLedger | None = None, **media: Any) -> Response:
        """Return the answer to each sequence by the head that the router chooses for it; nothing votes.

        Args:
            ids_BT, ledger, media: as for `forward`. The ledger grows by the predicted ids, whatever head answers.

        Raises RuntimeError for a model without a router.
        """
        if self.router is None:
            raise RuntimeError("respond was called, but the model must have a router: router_inner is 0")
        if ledger is None and ids_BT is None:
            raise ValueError("ids_BT is None, but must be bytes without a ledger")
        if ledger is not None:
            self._bind(ledger)
        with torch.no_grad():
            window_BT = ids_BT if ledger is None else ledger.begin(ids_BT)
            assert window_BT is not None
            trunk = self.trunk(window_BT, ledger=ledger, **media)
            h_BPD = self._text(trunk, window_BT)
            logits_BPV = self.byte_head(h_BPD)
            if ledger is not None:
                ledger.end(logits_BPV[:, -1].argmax(dim=-1))
            scores_B3 = self.router(h_BPD)
            absent_3 = torch.tensor(
                [name not in self.answering for name in MODALITIES], device=scores_B3.device
            )
            chosen_B = scores_B3.masked_fill(absent_3, -torch.inf).argmax(dim=-1)
            video = (chosen_B == MODALITIES.index("video")).nonzero().squeeze(1)
            audio = (chosen_B == MODALITIES.index("audio")).nonzero().squeeze(1)
            return Response(
                modality_B=chosen_B,
                logits_BPV=logits_BPV,
                latent=self.video_head(h_BPD[video]) if self.video_head is not None and len(video) else None,
                tokens=self.talker_head(h_BPD[audio])
                if self.talker_head is not None and len(audio)
                else None,
            )

    @as_it_is
    def draw(self, ids_BT: Tensor, **media: Any) -> Tensor:
        """Return the latent that answers each sequence, float32 [B, *latent_shape]; nothing votes.

        Args:
            ids_BT: int64 [B, T], T >= 3, without filling.
            media:  features, as for `trunk`.

        Raises:
            TypeError or ValueError: ids or features that are not allowed.
            RuntimeError: the model has no video head.
        """
        if self.video_head is None:
            raise RuntimeError("draw was called, but the model must have a video head: video_latent is 0")
        _check_ids(ids_BT, NGRAM)
        with torch.no_grad():
            drawn: Tensor = self.video_head(self._text(self.trunk(ids_BT, **media), ids_BT))
        return drawn

    @as_it_is
    def say(self, ids_BT: Tensor, frames: int, **media: Any) -> Tensor:
        """Return the audio tokens that answer each sequence, int64 [B, frames]; nothing votes.

        The talker answers at `spoken_marks` behind the ids, which have read all of them.

        Args:
            ids_BT: int64 [B, T], T >= 3, without filling.
            frames: number of tokens, at least 1.
            media:  features, as for `trunk`.

        Raises:
            TypeError or ValueError: ids, frames or features that are not allowed.
            RuntimeError: the model has no talker head.
        """
        if self.talker_head is None:
            raise RuntimeError("say was called, but the model must have a talker head: talker_tokens is 0")
        checks.integer("frames", frames, 1, MAX_TOKENS)
        _check_ids(ids_BT, NGRAM)
        mark_ids = ids_BT.new_tensor(spoken_marks(frames)).expand(ids_BT.shape[0], -1)
        marked_BT = torch.cat([ids_BT, mark_ids], dim=1)
        with torch.no_grad():
            h_BPD = self._text(self.trunk(marked_BT, **media), marked_BT)[:, 1 - mark_ids.shape[1] :]
            tokens: Tensor = self.talker_head(h_BPD, stride=SPOKEN_STRIDE, length=frames)
        return tokens

    def new_ledger(self, batch: int = 1) -> KVLedger:
        """Return an empty transcript of some sequences for this model."""
        return KVLedger(self.config, batch, device=self.context.device, dtype=self.dtype)

    def _bind(self, ledger: KVLedger) -> None:
        """Bind a ledger to this model, or refuse it."""
        device, dtype = self.voting.faults.device, self.embedding.table.dtype
        ledger.bind(self.voting, self.config, device=device, dtype=dtype)

    @staticmethod
    def _text(trunk: Trunk, ids_BT: Tensor) -> Tensor:
        """Return the stream of the text positions, which are the last positions of the trunk."""
        return trunk.h_BPD[:, 2 - ids_BT.shape[1] :]

    @as_it_is
    def losses(self, ids_BT: Tensor, *, targets: Targets | None = None, **media: Any) -> dict[str, Tensor]:
        """Return the components of the loss, float32 [], by name.

        `bytes` is the mean loss of the bytes from the fourth on, in nats per byte, and needs T >= 4. The byte after the last
        position is not known, so the logits of that position are left out. The byte head is taught, whatever head would answer.

        Args:
            targets: targets of the heads. Each target of another head adds its loss: `route`, `latent` or `tokens`. With
                `taught_BT`, `bytes` is the mean loss of the ids that it names.
            media:   features, as for `trunk`.

        Raises TypeError or ValueError for targets that do not fit, or of a head that the model does not have.
        """
        trunk = self._trunk_with_targets(ids_BT, media)
        # This looks at `taught_BT` before the other heads read by it.
        of_bytes = self._byte_loss(trunk, ids_BT, None if targets is None else targets.taught_BT)
        taught = {} if targets is None else self._taught_losses(self._text(trunk, ids_BT), targets)
        return {
            "bytes": of_bytes,
            **trunk.losses,
            **self._proposal_losses(trunk),
            **taught,
        }

    def _taught_losses(self, whole_BPD: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of the targets that are given, by name."""
        modality_B, found = targets.modality_B, {}
        said_BPD = h_BPD = whole_BPD
        stride = None
        if targets.taught_BT is not None:
            said_BPD = h_BPD = ended_streams(whole_BPD, targets.taught_BT)
        if targets.spoken_BT is not None:
            said_BPD, stride = spoken_streams(whole_BPD, targets.spoken_BT), SPOKEN_STRIDE
        if modality_B is not None:
            router = _head("modality_B", "router", self.router)
            found["route"] = route_loss(router, h_BPD, modality_B, self.answering)
        if targets.latent is not None:
            video = _head("latent", "video head", self.video_head)
            found["latent"] = latent_loss(video, h_BPD, targets.latent, taught_by(modality_B, "video"))
        if targets.tokens_BN is not None:
            talker = _head("tokens_BN", "talker head", self.talker_head)
            taught_B = taught_by(modality_B, "audio")
            found["tokens"] = token_loss(talker, said_BPD, targets.tokens_BN, taught_B, stride=stride)
        return found

    @property
    def answering(self) -> tuple[str, ...]:
        """Modalities that the model has a head for."""
        heads = {"text": self.byte_head, "video": self.video_head, "audio": self.talker_head}
        return tuple(name for name in MODALITIES if heads[name] is not None)

    @as_it_is
    def loss(self, ids_BT: Tensor, *, taught_BT: Tensor | None = None, **media: Any) -> Tensor:
        """Return the component `bytes` of `losses` alone, by which a model is judged. This makes no proposals."""
        return self._byte_loss(self._trunk_with_targets(ids_BT, media), ids_BT, taught_BT)

    def _trunk_with_targets(self, ids_BT: Tensor, media: dict[str, Any]) -> Trunk:
        """Return the trunk of ids that hold at least one target."""
        _check_ids(ids_BT, NGRAM + 1)
        return self.trunk(ids_BT, **media)

    def _byte_loss(self, trunk: Trunk, ids_BT: Tensor, taught_BT: Tensor | None) -> Tensor:
        """Return the mean loss of the bytes that teach, from the fourth byte on."""
        return byte_loss(self.byte_head(self._text(trunk, ids_BT)), ids_BT, taught_BT, self.voting.ranks)

    def _proposal_losses(self, trunk: Trunk) -> dict[str, Tensor]:
        """Return the losses of the composites that the positions propose."""
        if trunk.codes is None or self.composite is None or self.shared_vq is None:
            return {}
        with torch.no_grad():
            motifs_BPC = self.shared_vq.rows(trunk.codes)
        return self.composite(trunk.h_BPD, trunk.codes, motifs_BPC)

    @staticmethod
    def objective(loss: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the loss that drives the votes, []: the loss itself, or the sum of its components weighted by LOSS_WEIGHTS."""
        if not isinstance(loss, Mapping):
            return scalar("loss", loss)
        if not loss:
            raise ValueError("loss has no components, but must have at least one")
        return torch.stack(
            [LOSS_WEIGHTS.get(name, 1.0) * scalar(f"loss[{name!r}]", value) for name, value in loss.items()]
        ).sum()

    @as_it_is
    def backward(
        self,
        loss: Tensor | Mapping[str, Tensor],
        *,
        rate: float | Tensor,
        step: int | Tensor,
        undo: bool = True,
    ) -> bool:
        """Run the backward pass of one micro-batch, in which every weight behind the loss votes.

        Args:
            loss: a scalar computed with this model, as `loss` returns, or components by name, as `losses` returns. `objective`
                adds components up.
            rate: schedule rate times gain, 0 .. 127, a number or a 0-dim float32 tensor. The `sign` rule asks only
                whether it is 0.
            step: number of this micro-batch, a coordinate of the dither; a number or a 0-dim int64 tensor.
            undo: whether a pass that raises leaves every byte as it was, for which the pass keeps copies (`Voting.taking`).

        Returns:
            True; or False if the loss, or a component of it, is not finite. Then every byte stays as it was.

        Raises:
            TypeError or ValueError: a loss that is no scalar tensor, has no graph, or was not computed with this model; a rate
                or step that is not allowed.
            RuntimeError: a weight was stepped or loaded since the loss was computed; or the model is torn (`Voting`).
        """
        return super().backward(self.objective(loss), rate=rate, step=step, undo=undo)

    def vote_size(self, loss: float) -> int:
        """Return the size of the votes of a pass whose loss is finite, as the `sign` rule asks for it."""
        if self.config.vote_rule != "sign":
            return super().vote_size(loss)
        return self.ops.step_from_loss(max(loss, 0.0), LOSS_REFERENCE, self.config.max_vote_step)


def _head(target: str, name: str, head: Head | None) -> Head:
    """Return a head that a target teaches; refuse a target of a head that the model does not have."""
    if head is None:
        raise ValueError(f"{target} is given, but must be None: the model has no {name}")
    return head


def _check_ids(ids_BT: Tensor, num_bytes: int) -> None:
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
