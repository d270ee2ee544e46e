"""The output router reads the last position and weighs every output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.graph.router import OutputRouter
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.graph.test_op_sets import contexts
from conformance.graph.test_video import count_weights, on_meta, weights_of
from conformance.graph.test_voting import context
from conformance.subject import Subject

FIELDS = {"router_inner": 6, "talker_tokens": 9}
"""A router, and a head besides the bytes' that it may choose."""


def stream() -> Tensor:
    """Return a stream [B, P, D] of a nano model."""
    return torch.randn(3, 4, models.NANO.width, generator=torch.Generator().manual_seed(1))


def test_weights_are_as_many_as_the_seeds_count() -> None:
    """The router has REFACTOR14's 12.9 M weights, 7168 * 1792 + 3 * 1792."""
    assert (
        count_weights(OutputRouter(on_meta(width=7168, router_inner=7168 // 4, talker_tokens=289)))
        == 12_850_432
    )


def test_the_last_position_decides() -> None:
    router, x_BPD = OutputRouter(context(**FIELDS)), stream()
    logits = router(x_BPD)
    assert logits.shape == (3, 3) and logits.dtype == torch.float32
    changed = x_BPD.clone()
    changed[:, :-1] += 1
    exact(router(changed), logits)
    changed[:, -1] += 1
    assert not torch.equal(router(changed), logits)


def test_both_matrices_vote_behind_a_frozen_stream() -> None:
    parts = context(**FIELDS)
    router = OutputRouter(parts)
    with parts.voting.taking(rate=1.0, step=0):
        F.cross_entropy(router(stream()), torch.tensor([0, 1, 2])).backward()
    for name, module in weights_of(router).items():
        assert module.weight.trit_accum.any(), f"{name} did not vote"


def test_logits_are_those_of_the_reference(subject: Subject) -> None:
    wide, tested = (OutputRouter(parts) for parts in contexts(subject, **FIELDS))
    with torch.no_grad():
        alike(tested(stream().to(subject.device)).cpu(), wide(stream().double()))


def test_a_stream_without_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="x_BPD"):
        OutputRouter(context(**FIELDS))(stream()[:, :0])
