"""The heads beside the byte head learn from targets: their losses are those of a hand, and wrong targets are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference.config import with_fields, with_modules
from arbitor.reference.graph import ArbModel, Targets
from arbitor.reference.graph.model import LOSS_WEIGHTS
from arbitor.reference.graph.targets import NO_TOKEN, ended_streams
from arbitor.reference.graph.video import latent_shape
from conformance.compare import alike, exact
from conformance.graph import models

B, T = 4, 10
VIDEO = replace(models.WHOLE, video_latent=64)
"""A latent of [16, 1, 2, 2]."""


def random_targets(config: Any = models.WHOLE, *, tokens: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Return a target for each head and sequence."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "modality_B": torch.tensor([0, 1, 2, 1]),
        "latent": torch.randn(B, config.video_latent, generator=rng),
        "tokens_BN": torch.randint(0, config.talker_tokens, (B, tokens), generator=rng),
    }


def test_losses_by_hand() -> None:
    """Each component from what the heads say, number by number, over the sequences that the head is to answer."""
    model, ids_BT, given = models.whole(), models.random_ids(B, T), random_targets()
    losses = model.losses(ids_BT, targets=Targets(**given))
    with torch.no_grad():
        h_BPD = model.trunk(ids_BT).h_BPD
        logits_B3, logits_BPV = model.router(h_BPD), model.talker_head.token_logits(h_BPD)
    error_B = model.video_head.noise_errors(h_BPD, given["latent"]).detach()
    route = [-F.log_softmax(logits_B3[b].double(), 0)[m] for b, m in enumerate(given["modality_B"].tolist())]
    alike(losses["route"].detach(), torch.stack(route).mean(), "route")
    alike(losses["latent"].detach(), error_B[[1, 3]].mean(), "latent")
    # 11 tokens of 8 positions: each position says two.
    nats = [-F.log_softmax(logits_BPV[2, n // 2].double(), 0)[given["tokens_BN"][2, n]] for n in range(11)]
    alike(losses["tokens"].detach(), torch.stack(nats).mean(), "tokens")
    assert {"bytes", "route", "latent", "tokens"} <= losses.keys()


def test_targets_leave_the_other_losses_alone() -> None:
    model, ids_BT = models.whole(), models.random_ids(B, T)
    plain, taught = model.losses(ids_BT), model.losses(ids_BT, targets=Targets(**random_targets()))
    assert taught.keys() - plain.keys() == {"route", "latent", "tokens"}
    for name, value in plain.items():
        exact(taught[name].detach(), value.detach(), name)
    assert not {"route", "latent", "tokens"} & LOSS_WEIGHTS.keys()


def test_the_byte_head_learns_the_ids_that_teach() -> None:
    """Their mean, by hand. What the others are leaves no trace in the loss beside what positions read of them."""
    model, ids_BT = models.whole(), models.random_ids(B, T)
    taught_BT = torch.zeros(B, T, dtype=torch.bool)
    taught_BT[0, 5:], taught_BT[1, 9], taught_BT[2, :3] = True, True, True
    got = model.losses(ids_BT, targets=Targets(taught_BT=taught_BT))["bytes"].detach()
    with torch.no_grad():
        nats_BPV = -F.log_softmax(model(ids_BT).double(), -1)
    chosen = [(0, t) for t in range(5, T)] + [(1, 9)]
    alike(got, torch.stack([nats_BPV[b, t - 3, ids_BT[b, t]] for b, t in chosen]).mean(), "bytes")
    exact(model.loss(ids_BT, taught_BT=taught_BT).detach(), got)
    # The last id is read by no position that predicts.
    other_BT = ids_BT.clone()
    other_BT[2:, -1] = (other_BT[2:, -1] + 1) % 256
    exact(model.loss(other_BT, taught_BT=taught_BT).detach(), got)
    every = model.losses(ids_BT, targets=Targets(taught_BT=torch.ones_like(taught_BT)))
    alike(every["bytes"].detach(), model.losses(ids_BT)["bytes"].detach())
    none = model.losses(ids_BT, targets=Targets(taught_BT=torch.zeros_like(taught_BT)))
    assert none["bytes"].item() == 0.0


def test_heads_do_not_see_the_filling() -> None:
    """A sequence that is filled up behind is routed, and teaches a latent, as it would without the filling."""
    model, ids_BT, latent = models.whole(), models.random_ids(2, T), random_targets()["latent"][:2]
    filled_BT, modality_B = torch.cat([ids_BT, torch.full((2, 3), 256)], dim=1), torch.tensor([0, 1])
    taught_BT = torch.zeros(2, T + 3, dtype=torch.bool)
    taught_BT[:, 3:T] = True
    with torch.no_grad():
        h_BPD = model.trunk(ids_BT).h_BPD
        ended_BPD = ended_streams(model.trunk(filled_BT).h_BPD, taught_BT)
        got = model.losses(filled_BT, targets=Targets(modality_B, latent, taught_BT=taught_BT))
        want = model.losses(ids_BT, targets=Targets(modality_B))
    alike(ended_BPD[:, 3:], h_BPD)
    exact(ended_BPD[:, :3], ended_BPD[:, 3:4].expand(-1, 3, -1))
    alike(got["bytes"], want["bytes"])
    alike(got["route"], want["route"])
    again = model.losses(
        torch.cat([ids_BT, torch.full((2, 3), 9)], dim=1),
        targets=Targets(modality_B, latent, taught_BT=taught_BT),
    )
    for name in ("bytes", "route", "latent"):
        alike(again[name].detach(), got[name], name)
    exact(ended_streams(h_BPD, torch.zeros(2, T, dtype=torch.bool)), h_BPD)


def test_without_modalities_every_sequence_is_taught() -> None:
    model, ids_BT, given = models.whole(), models.random_ids(B, T), random_targets()
    every = model.losses(ids_BT, targets=Targets(latent=given["latent"], tokens_BN=given["tokens_BN"]))
    alone = [
        model.losses(ids_BT[b : b + 1], targets=Targets(latent=given["latent"][b : b + 1]))["latent"].detach()
        for b in range(B)
    ]
    assert "route" not in every
    alike(every["latent"].detach(), torch.stack(alone).mean())


def test_what_is_not_taught_leaves_no_trace() -> None:
    """Neither in the loss nor in any weight: latents that are not finite, and tokens, of sequences that another head answers."""
    ids_BT, given = models.random_ids(B, T), random_targets()
    other = {name: value.clone() for name, value in given.items()}
    other["latent"][[0, 2]] = math.nan
    other["tokens_BN"][[0, 1, 3]] = NO_TOKEN
    states = []
    for targets in (given, other):
        model = models.whole()
        losses = model.losses(ids_BT, targets=Targets(**targets))
        assert model.backward(losses, rate=models.RATE, step=9)
        model.step()
        states.append({**model.state_dict(), "latent": losses["latent"].detach()})
    for name, value in states[0].items():
        exact(states[1][name], value, name)


def test_no_sequence_to_teach_is_a_loss_of_zero() -> None:
    model, ids_BT, given = models.whole(), models.random_ids(B, T), random_targets()
    losses = model.losses(
        ids_BT, targets=Targets(**{**given, "modality_B": torch.zeros(B, dtype=torch.int64)})
    )
    assert losses["latent"].item() == losses["tokens"].item() == 0.0
    silent = Targets(tokens_BN=torch.full((B, 5), NO_TOKEN))
    assert model.losses(ids_BT, targets=silent)["tokens"].item() == 0.0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"modality_B": torch.tensor([0, 1, 2, 3])}, ValueError, "modality_B holds 3"),
        ({"modality_B": torch.zeros(B)}, TypeError, "modality_B has dtype float32"),
        ({"modality_B": torch.zeros(3, dtype=torch.int64)}, ValueError, "modality_B has shape"),
        ({"latent": torch.zeros(B, 31)}, ValueError, "latent has shape"),
        ({"latent": torch.zeros(B, 32, dtype=torch.int64)}, TypeError, "latent has dtype int64"),
        ({"latent": torch.zeros(3, 32)}, ValueError, "latent has shape"),
        ({"tokens_BN": torch.full((B, 4), 9)}, ValueError, "tokens_BN holds 9"),
        ({"tokens_BN": torch.full((B, 4), -2)}, ValueError, "tokens_BN holds -2"),
        ({"tokens_BN": torch.zeros(B, 4)}, TypeError, "tokens_BN has dtype float32"),
        ({"tokens_BN": torch.zeros(B, 0, dtype=torch.int64)}, ValueError, "tokens_BN has shape"),
        ({"tokens_BN": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "tokens_BN has shape"),
        ({"taught_BT": torch.ones(B, T, dtype=torch.int64)}, TypeError, "taught_BT has dtype int64"),
        ({"taught_BT": torch.ones(B, T - 3, dtype=torch.bool)}, ValueError, "taught_BT has shape"),
    ],
)
def test_targets_that_do_not_fit(changes: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        models.whole().losses(models.random_ids(B, T), targets=Targets(**{**random_targets(), **changes}))


def test_labels_are_no_targets() -> None:
    """As other libraries have them: the ids themselves."""
    ids_BT: Any = models.random_ids(B, T)
    with pytest.raises(TypeError, match="targets is a Tensor, but must be Targets or None"):
        models.whole().losses(ids_BT, targets=ids_BT)


@pytest.mark.parametrize(
    ("without", "target", "says"),
    [
        ({"router_inner": 0}, "modality_B", "the model has no router"),
        ({"video_latent": 0}, "latent", "the model has no video head"),
        ({"talker_tokens": 0}, "tokens_BN", "the model has no talker head"),
        (
            {"video_latent": 0},
            "modality_B",
            "modality_B names video, but must name heads of the model: text, audio",
        ),
    ],
)
def test_targets_of_a_head_that_is_not_there(without: dict[str, int], target: str, says: str) -> None:
    model = ArbModel(with_fields(models.WHOLE, **without))
    with pytest.raises(ValueError, match=says):
        model.losses(models.random_ids(B, T), targets=Targets(**{target: random_targets()[target]}))


@pytest.mark.parametrize(
    ("size", "shape"),
    [(16384, (16, 1, 32, 32)), (64, (16, 1, 2, 2)), (16, (16, 1, 1, 1)), (32, (32,)), (1, (1,))],
)
def test_the_shape_of_a_latent(size: int, shape: tuple[int, ...]) -> None:
    """REFACTOR9: (1, 16, 1, 32, 32)."""
    assert latent_shape(size) == shape and math.prod(shape) == size


def test_a_latent_comes_out_in_its_shape() -> None:
    model = ArbModel(VIDEO)
    with torch.no_grad():
        h_BPD = model.trunk(models.random_ids(2, 6)).h_BPD
        assert model.video_head(h_BPD).shape == (2, 16, 1, 2, 2)
    assert model.video_head(h_BPD).shape == (2, 16, 1, 2, 2)


def test_a_smaller_latent_is_padded_with_zeros() -> None:
    """REFACTOR12: targets are padded to the head's latent."""
    head, small = ArbModel(VIDEO).video_head, torch.randn(3, 16, 1, 1, 2)
    fitted = head.fitted(small, 3)
    assert fitted.shape == (3, 16, 1, 2, 2)
    exact(fitted[..., :1, :], small)
    assert not fitted[..., 1:, :].any()
    exact(head.fitted(torch.arange(64.0)[None], 1).flatten(), torch.arange(64.0))
    with pytest.raises(ValueError, match="latent has shape"):
        head.fitted(torch.zeros(3, 16, 1, 3, 2), 3)


def lesson(seed: int) -> tuple[Tensor, Targets]:
    """Return sequences of a letter that tells the head and digits that count, with what that head is to answer."""
    rng = torch.Generator().manual_seed(seed)
    modality_B = torch.randint(0, 3, (12,), generator=rng)
    ids_BT = torch.empty(12, 10, dtype=torch.int64)
    ids_BT[:, ::2], ids_BT[:, 1::2] = (97 + modality_B)[:, None], torch.arange(48, 53)
    latent = torch.linspace(-1, 1, 64).expand(12, -1).unflatten(1, (16, 1, 2, 2))
    return ids_BT, Targets(modality_B, latent, torch.tensor([[1, 2, 3, 4, 5, 6]]).expand(12, -1))


def test_the_heads_learn_together() -> None:
    """A letter tells which head is asked for: every sequence is routed, audio says its tokens, and video's error falls."""
    model, num_steps = ArbModel(with_modules(VIDEO, vq=False), seed=1), 50
    first: dict[str, float] = {}
    for step in range(num_steps):
        ids_BT, targets = lesson(step)
        losses = model.losses(ids_BT, targets=targets)
        first = first or {name: value.item() for name, value in losses.items()}
        assert model.backward(losses, rate=6.0 * (1 - step / num_steps), step=step)
        model.step()
    ids_BT, targets = lesson(1000)
    with torch.no_grad():
        last = {name: value.item() for name, value in model.losses(ids_BT, targets=targets).items()}
    answer = model.respond(ids_BT)
    assert targets.modality_B is not None and answer.tokens is not None
    exact(answer.modality_B, targets.modality_B)
    assert answer.tokens[:, :6].eq(torch.tensor([1, 2, 3, 4, 5, 6])).all()
    assert last["route"] < 0.1 < first["route"] and last["tokens"] < 0.3 < first["tokens"]
    assert last["latent"] < first["latent"] / 4
