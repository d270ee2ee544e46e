"""The talker head has logits that train, and repeats, cuts and pads its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.graph.talker import TalkerHead
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.graph.test_op_sets import contexts
from conformance.graph.test_video import count_weights, on_meta
from conformance.graph.test_voting import context
from conformance.subject import Subject


def positions(batch: int = 2, count: int = 5) -> Tensor:
    """Return positions [B, P, D] of a nano model."""
    return torch.randn(batch, count, models.NANO.width, generator=torch.Generator().manual_seed(1))


def test_weights_are_one_matrix() -> None:
    assert count_weights(TalkerHead(on_meta(talker_tokens=289, width=7168))) == 289 * 7168


def test_tokens_are_repeated_then_cut_or_padded() -> None:
    head = TalkerHead(context(talker_tokens=289))
    x_BPD = positions()
    best = head.token_logits(x_BPD).argmax(dim=-1)
    exact(head(x_BPD), best)
    repeated = torch.stack([best[:, place // 3] for place in range(15)], dim=1)
    exact(head(x_BPD, stride=3), repeated)
    exact(head(x_BPD, stride=3, length=10), repeated[:, :10])
    padded = head(x_BPD, stride=3, length=18, pad_token=288)
    exact(padded, torch.cat([repeated, torch.full((2, 3), 288)], dim=1))
    exact(head(x_BPD, length=0), best[:, :0])


def test_the_smoke_of_the_seed() -> None:
    """A batch of one has tokens (1, 10), as in REFACTOR9."""
    assert TalkerHead(context(talker_tokens=289))(positions(1), stride=2).shape == (1, 10)


def test_cross_entropy_trains_the_logits() -> None:
    """After a few votes and steps on one batch the loss of its targets is less than half."""
    parts = context(talker_tokens=7, theta=4, theta_e=127)
    head, x_BPD = TalkerHead(parts), positions(4, 6)
    targets = torch.randint(0, 7, (24,), generator=torch.Generator().manual_seed(2))
    losses = []
    for step in range(30):
        loss = F.cross_entropy(head.token_logits(x_BPD).flatten(0, 1), targets)
        with parts.voting.taking(rate=1.0, step=step):
            loss.backward()
        head.tokens.step_weight()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_logits_ignore_the_scale_of_the_stream() -> None:
    head, x_BPD = TalkerHead(context(talker_tokens=7)), positions()
    alike(head.token_logits(x_BPD * 1024), head.token_logits(x_BPD))


def test_logits_are_those_of_the_reference(subject: Subject) -> None:
    wide, tested = (TalkerHead(parts) for parts in contexts(subject, talker_tokens=11))
    with torch.no_grad():
        alike(
            tested.token_logits(positions().to(subject.device)).cpu(), wide.token_logits(positions().double())
        )


@pytest.mark.parametrize("bad", [{"stride": 0}, {"length": -1}, {"pad_token": 289}, {"pad_token": -1}])
def test_bad_arguments_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TalkerHead(context(talker_tokens=289))(positions(), **bad)
