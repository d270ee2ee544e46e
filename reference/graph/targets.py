"""Targets of the heads: which bytes are learned, the head that answers, a video latent, audio tokens.

Legend: B batch, T bytes, P positions, D width, L numbers of a latent, N audio tokens, V audio tokens or ids to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import checks
from arbitor.reference.config import NGRAM
from arbitor.reference.graph.module import ArbModule
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.router import MODALITIES, OutputRouter
from arbitor.reference.graph.talker import SPOKEN_STRIDE, TalkerHead
from arbitor.reference.graph.video import VideoHead

Head = TypeVar("Head", bound=ArbModule)

NO_TOKEN = -1
"""Target of the talker where there is no token."""


@dataclass(frozen=True)
class Targets:
    """Targets of the heads for each sequence of a batch. A field that is None teaches nothing, but without `taught_BT` every byte
    teaches the byte head.

    Fields:
        modality_B: int64 [B], the head that answers, as an index into MODALITIES. If it is given, only the sequences that video
                    answers teach a latent, and only the sequences that audio answers teach tokens.
        latent:     float [B, ...], the answer of video, in a shape that `VideoHead.fitted` takes.
        tokens_BN:  int64 [B, N], the answer of audio; NO_TOKEN where there is no token.
        spoken_BT:  bool [B, T], the ids at which audio answers, as many in each sequence, from the third id on (`spoken_marks`
                    behind a text). Token n is then the target of mark n // SPOKEN_STRIDE. None: every position answers.
        taught_BT:  bool [B, T], the ids that the byte head learns to predict. Of the first three ids none is ever predicted.
                    Filling, and marks that a prompt begins with, are no such ids. The other heads then read each sequence up
                    to its last id that teaches (`ended_streams`), as filling stands behind it.
    """

    modality_B: Tensor | None = None
    latent: Tensor | None = None
    tokens_BN: Tensor | None = None
    taught_BT: Tensor | None = None
    spoken_BT: Tensor | None = None


def byte_loss(logits_BPV: Tensor, ids_BT: Tensor, taught_BT: Tensor | None, ranks: Ranks) -> Tensor:
    """Return the mean cross-entropy of the ids that teach, from the fourth id on; 0 where no id teaches.

    Args:
        logits_BPV: logits of every position; position p predicts id p + 3. Those of the last position are left out.
        ids_BT:     int64, T = P + 2.
        taught_BT:  bool; None stands for all ids.
        ranks:      the ranks of the model, over which the ids that teach are counted.

    Raises TypeError or ValueError for `taught_BT` that is not bool [B, T].
    """
    logits_MV, targets_M = logits_BPV[:, :-1].flatten(0, 1), ids_BT[:, NGRAM:].flatten()
    if taught_BT is None:
        return F.cross_entropy(logits_MV, targets_M)
    checks.tensor("taught_BT", taught_BT, torch.bool, tuple(ids_BT.shape))
    taught_M = taught_BT[:, NGRAM:].flatten()
    nats_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
    # A sum of chosen terms, not a product with 0, which would keep a NaN of what is left out.
    return torch.where(taught_M, nats_M, 0.0).sum() / ranks.divisor(taught_M)


def ended_streams(h_BPD: Tensor, taught_BT: Tensor) -> Tensor:
    """Return streams that end with the position that has read the last id that teaches. Before them the first position is repeated.

    Sequences of unequal length are filled up behind, where no position before sees it. The heads that read a whole stream shall
    not see the filling either. A sequence without ids that teach stays as it is.

    Shapes:  h [B, P, D], taught bool [B, P + 2] -> [B, P, D]
    """
    positions = h_BPD.shape[1]
    behind_B1 = taught_BT.flip(1).to(torch.int8).argmax(dim=1, keepdim=True)
    places_BP = torch.arange(positions, device=h_BPD.device) - behind_B1
    rows_B1 = torch.arange(h_BPD.shape[0], device=h_BPD.device)[:, None]
    return h_BPD[rows_B1, places_BP.clamp(min=0)]


def spoken_streams(h_BPD: Tensor, spoken_BT: Tensor) -> Tensor:
    """Return the positions that have read the marks at which audio answers, [B, K, D] with K marks in each sequence.

    Raises TypeError or ValueError for marks that are not bool [B, P + 2], of unequal number, or among the first two ids.
    """
    batch, positions = h_BPD.shape[:2]
    checks.tensor("spoken_BT", spoken_BT, torch.bool, (batch, positions + NGRAM - 1))
    counts_B = spoken_BT.sum(dim=1)
    if (
        int(counts_B[0]) == 0
        or bool((counts_B != counts_B[0]).any())
        or bool(spoken_BT[:, : NGRAM - 1].any())
    ):
        raise ValueError(
            f"spoken_BT has {counts_B.tolist()} marks, but must have the same number in each sequence, at least 1, and none among "
            "the first two ids"
        )
    places_BK = spoken_BT.nonzero()[:, 1].reshape(batch, -1) - (NGRAM - 1)
    return h_BPD[torch.arange(batch, device=h_BPD.device)[:, None], places_BK]


def route_loss(router: OutputRouter, h_BPD: Tensor, modality_B: Tensor, present: tuple[str, ...]) -> Tensor:
    """Return the mean cross-entropy of the router's choice among the heads that are present, [].

    Raises TypeError or ValueError for modalities that are not int64 [B], or name a head that the model does not have.
    """
    checks.tensor("modality_B", modality_B, torch.int64, (h_BPD.shape[0],))
    checks.values_between("modality_B", modality_B, 0, len(MODALITIES) - 1)
    absent_3 = torch.tensor([name not in present for name in MODALITIES], device=h_BPD.device)
    if bool(absent_3[modality_B].any()):
        missing = MODALITIES[int(modality_B[absent_3[modality_B]][0])]
        raise ValueError(
            f"modality_B names {missing}, but must name heads of the model: {', '.join(present)}"
        )
    return F.cross_entropy(router(h_BPD).masked_fill(absent_3, -torch.inf), modality_B)


def latent_loss(head: VideoHead, h_BPD: Tensor, latent: Tensor, taught_B: Tensor | None) -> Tensor:
    """Return the mean squared error of the noise that the head predicts, over the sequences that teach a latent; 0 where none does.

    Math:    mean of `VideoHead.noise_errors` over these sequences
    Source:  docs/spec/heads.md; targets are padded to the head's latent (REFACTOR12)
    """
    target_BL = head.fitted(latent, h_BPD.shape[0]).flatten(1)
    if taught_B is not None:
        # This comes before the square, because a NaN that is left out later has a NaN as its gradient.
        target_BL = torch.where(taught_B[:, None], target_BL, 0.0)
    error_B = head.noise_errors(h_BPD, target_BL)
    if taught_B is None:
        return error_B.mean()
    return torch.where(taught_B, error_B, 0.0).sum() / head.voting.ranks.divisor(taught_B)


def token_loss(
    head: TalkerHead, h_BPD: Tensor, tokens_BN: Tensor, taught_B: Tensor | None, *, stride: int | None = None
) -> Tensor:
    """Return the mean cross-entropy of the target tokens, []; 0 without targets.

    Math:    a position says s = `stride` tokens, or ceil(N / P) where that is None, as `TalkerHead` repeats them. Token n is the
             target of position n // s
    Raises:  TypeError or ValueError for tokens that are no int64 [B, N] with N >= 1 in NO_TOKEN .. V - 1, or more than P s
    Source:  REFACTOR11 (cross-entropy of `token_logits`); docs/spec/heads.md
    """
    checks.dtype_in("tokens_BN", tokens_BN, (torch.int64,))
    if tokens_BN.ndim != 2 or tokens_BN.shape[0] != h_BPD.shape[0] or tokens_BN.shape[1] == 0:
        raise ValueError(
            f"tokens_BN has shape {tuple(tokens_BN.shape)}, but must be [batch, tokens] with the batch of ids_BT, "
            f"{h_BPD.shape[0]}, and at least one token"
        )
    logits_BPV = head.token_logits(h_BPD)
    checks.values_between("tokens_BN", tokens_BN, NO_TOKEN, logits_BPV.shape[-1] - 1)
    stride = stride or head.stride(h_BPD.shape[1], tokens_BN.shape[1])
    if tokens_BN.shape[1] > stride * h_BPD.shape[1]:
        raise ValueError(
            f"tokens_BN has shape {tuple(tokens_BN.shape)}, but must have at most {stride * h_BPD.shape[1]} tokens, {stride} for "
            "each mark"
        )
    positions_N = torch.arange(tokens_BN.shape[1], device=h_BPD.device) // stride
    if taught_B is not None:
        tokens_BN = torch.where(taught_B[:, None], tokens_BN, NO_TOKEN)
    nats = F.cross_entropy(
        logits_BPV[:, positions_N].flatten(0, 1), tokens_BN.flatten(), ignore_index=NO_TOKEN, reduction="sum"
    )
    return nats / head.voting.ranks.divisor(tokens_BN != NO_TOKEN)


def taught_by(modality_B: Tensor | None, name: str) -> Tensor | None:
    """Return the mask of the sequences that teach a head, bool [B]; None, for all, if `modality_B` is None."""
    return None if modality_B is None else modality_B == MODALITIES.index(name)


def head_losses(
    h_BPD: Tensor,
    targets: Targets,
    *,
    router: OutputRouter | None,
    video: VideoHead | None,
    talker: TalkerHead | None,
    answering: tuple[str, ...],
) -> dict[str, Tensor]:
    """Return the losses of the targets of all heads but the byte head, [], by name: `route`, `latent` and `tokens`.

    Args:
        h_BPD: the stream of the text positions.
        targets: a target that is None has no loss.
        router, video, talker: the heads of the model, or None.
        answering: modalities that the model has a head for.

    Raises TypeError or ValueError for targets that do not fit, or of a head that the model does not have.
    """
    modality_B, found = targets.modality_B, {}
    read_BPD = h_BPD if targets.taught_BT is None else ended_streams(h_BPD, targets.taught_BT)
    said_BPD, stride = read_BPD, None
    if targets.spoken_BT is not None:
        said_BPD, stride = spoken_streams(h_BPD, targets.spoken_BT), SPOKEN_STRIDE
    if modality_B is not None:
        router = _head("modality_B", "router", router)
        found["route"] = route_loss(router, read_BPD, modality_B, answering)
    if targets.latent is not None:
        video = _head("latent", "video head", video)
        found["latent"] = latent_loss(video, read_BPD, targets.latent, taught_by(modality_B, "video"))
    if targets.tokens_BN is not None:
        talker = _head("tokens_BN", "talker head", talker)
        taught_B = taught_by(modality_B, "audio")
        found["tokens"] = token_loss(talker, said_BPD, targets.tokens_BN, taught_B, stride=stride)
    return found


def _head(target: str, name: str, head: Head | None) -> Head:
    """Return a head that a target teaches; refuse a target of a head that the model does not have."""
    if head is None:
        raise ValueError(f"{target} is given, but must be None: the model has no {name}")
    return head
