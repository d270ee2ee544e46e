"""The ARB model: the heads over its trunk, what it answers, and how it is trained.

Legend: B batch, T bytes, P = T - 2 positions, D width, V = 297 vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import NGRAM, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.heads import ByteHead
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.module import as_it_is
from arbitor.reference.graph.router import MODALITIES, OutputRouter
from arbitor.reference.graph.stateful import scalar
from arbitor.reference.graph.talker import MAX_TOKENS, SPOKEN_STRIDE, TalkerHead, spoken_marks
from arbitor.reference.graph.targets import Targets, byte_loss, head_losses
from arbitor.reference.graph.trunk import ArbTrunk, Trunk, check_ids
from arbitor.reference.graph.video import VideoHead

LOSS_REFERENCE = math.log(VOCABULARY_SIZE)
"""Loss of a uniform guess, in nats per byte. The `sign` rule takes its vote size from the ratio of the loss to it."""

LOSS_WEIGHTS = {"commitment": 0.1, "composite_commitment": 0.25}
"""Weights of components of the loss in the sum that drives the votes. A component without an entry has weight 1."""


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


class ArbModel(ArbTrunk):
    """A model from bytes to the logits of the next byte. Every weight is ternary, and votes train it in place.

    Args:
        config: shape and rules.
        ops:    op set that computes: `arbitor.reference.ops`, or another with its names.
        device: device of the weights; `meta` builds a model without memory, for the audit.
        dtype:  dtype of activations: float32, bfloat16, or float64 with the reference.
        seed:   64-bit seed of the starting weights and of the dither.
        kept_rows: by tensor id the rows whose accumulators this rank keeps, of weights of which other ranks keep some. The others
            read as zeros here.
        codes_over: the number of this rank, and how many ranks the rows of codebooks and of their edges are spread over; this rank
            keeps its own.
        experts_over: the same for experts.

    Math:    h = trunk(ids); logits = byte_head(h); position p predicts byte p + 3
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
        kept_rows: Mapping[int, range] | None = None,
        codes_over: tuple[int, int] = (0, 1),
        experts_over: tuple[int, int] = (0, 1),
    ) -> None:
        context = GraphContext(
            ops,
            config,
            device=device,
            dtype=dtype,
            seed=seed,
            kept_rows=kept_rows,
            codes_over=codes_over,
            experts_over=experts_over,
        )
        super().__init__(context)
        self.router = OutputRouter(context) if config.router_inner else None
        self.byte_head = ByteHead(context)
        self.video_head = VideoHead(context) if config.video_latent else None
        self.talker_head = TalkerHead(context) if config.talker_tokens else None

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
        check_ids(ids_BT, NGRAM)
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
        check_ids(ids_BT, NGRAM)
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
        if targets is not None and not isinstance(targets, Targets):
            raise TypeError(
                f"targets is a {type(targets).__name__}, but must be Targets or None: the bytes to learn are those of ids_BT"
            )
        trunk = self._trunk_with_targets(ids_BT, media)
        # This looks at `taught_BT` before the other heads read by it.
        of_bytes = self._byte_loss(trunk, ids_BT, None if targets is None else targets.taught_BT)
        of_heads: dict[str, Tensor] = {}
        if targets is not None:
            of_heads = head_losses(
                self._text(trunk, ids_BT),
                targets,
                router=self.router,
                video=self.video_head,
                talker=self.talker_head,
                answering=self.answering,
            )
        return {"bytes": of_bytes, **trunk.losses, **self._proposal_losses(trunk), **of_heads}

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
        check_ids(ids_BT, NGRAM + 1)
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
        accum: int = 1,
        undo: bool = True,
    ) -> bool:
        """Run the backward pass of one micro-batch, in which every weight behind the loss votes.

        Args:
            loss: a scalar computed with this model, as `loss` returns, or components by name, as `losses` returns. `objective`
                adds components up.
            rate: schedule rate times gain, 0 .. 127, a number or a 0-dim float32 tensor. The `sign` rule asks only
                whether it is 0.
            step: number of this micro-batch, a coordinate of the dither; a number or a 0-dim int64 tensor.
            accum: how many micro-batches the next step has, the same for each of them. The gradients of several are summed, and the
                sums vote once with that step, at `rate`. At 1 the weights vote in this pass. The `sign` rule has no sums.
            undo: whether a pass that raises leaves every byte as it was, for which the pass keeps copies (`Voting.taking`).

        Returns:
            True; or False if the loss, or a component of it, is not finite. Then every byte stays as it was.

        Raises:
            TypeError or ValueError: a loss that is no scalar tensor, has no graph, or was not computed with this model; a rate,
                step or accum that is not allowed; another accum than in the passes since the last step, or a pass too many.
            RuntimeError: a weight was stepped or loaded since the loss was computed; gradients came by `loss.backward()` before;
                the model is torn (`Voting`); or it is a model of `arbitor` in one process of several, whose votes nobody exchanges.
        """
        return super().backward(self.objective(loss), rate=rate, step=step, accum=accum, undo=undo)

    def vote_size(self, loss: float) -> int:
        """Return the size of the votes of a pass whose loss is finite, as the `sign` rule asks for it."""
        if self.config.vote_rule != "sign":
            return super().vote_size(loss)
        return self.ops.step_from_loss(max(loss, 0.0), LOSS_REFERENCE, self.config.max_vote_step)
