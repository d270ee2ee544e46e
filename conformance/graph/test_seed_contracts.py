"""What the seeds demand of the whole model, whoever implements it (REFACTOR11, REFACTOR12, REFACTOR14)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.model import MODALITIES
from arbitor.reference.types import TernaryWeight
from conformance.graph import models


@pytest.fixture
def model() -> ArbModel:
    """Return a small model with every module on."""
    return models.whole()


def full_state(model: ArbModel) -> dict[str, Tensor]:
    """Return a copy of every tensor of the model's state, by name."""
    found: dict[str, Tensor] = {}
    for name, value in model.state().items():
        parts = (
            {f"{name}.{part}": tensor for part, tensor in value.tensors().items()}
            if isinstance(value, TernaryWeight)
            else {name: value}
        )
        found |= {key: tensor.clone() for key, tensor in parts.items()}
    return found


def changed(before: dict[str, Tensor], model: ArbModel) -> set[str]:
    """Return the names of the tensors that are not as they were."""
    return {name for name, tensor in full_state(model).items() if not torch.equal(tensor, before[name])}


def read(model: ArbModel, prompt_BT: Tensor) -> Any:
    """Return a ledger that has read a prompt."""
    ledger = model.new_ledger(prompt_BT.shape[0])
    with torch.no_grad():
        model(prompt_BT, ledger=ledger)
    return ledger


def test_the_ledger_conditions_the_graph_the_router_and_the_heads(model: ArbModel) -> None:
    """Change one entry of what attention remembers, and the output of each of them changes."""
    outputs = []
    for changes in (False, True):
        ledger = read(model, models.random_ids(1, 12))
        if changes:
            for index in range(model.config.num_layers):
                log = ledger.layer(index).log.rows
                log[:, 3] = -log[:, 3]
        with torch.no_grad():
            window_BT = ledger.begin(None)
            trunk = model.trunk(window_BT, ledger=ledger)
            h_BPD = trunk.h_BPD
            outputs.append(
                {
                    "MoEGraph": h_BPD,
                    "router": model.router(h_BPD),
                    "byte head": model.byte_head(h_BPD),
                    "video head": model.video_head(h_BPD),
                    "talker head": model.talker_head.token_logits(h_BPD),
                }
            )
    for name, value in outputs[0].items():
        assert not torch.equal(value, outputs[1][name]), f"{name} does not depend on the ledger"


@pytest.mark.parametrize("training", [True, False])
def test_targets_are_always_read_by_the_byte_head(model: ArbModel, training: bool) -> None:
    """Also where the router would choose another head, and in eval mode."""
    model.train(training)
    ids_BT = models.random_ids(2, 9)
    want = model.loss(ids_BT)
    for choice in range(len(MODALITIES)):
        model.router.forward = lambda x, c=choice: torch.eye(3)[c].expand(x.shape[0], 3)
        assert torch.equal(model.loss(ids_BT), want)


def test_the_ledger_grows_by_the_predicted_ids(model: ArbModel) -> None:
    ledger = model.new_ledger(2)
    prompt_BT = models.random_ids(2, 8)
    predicted = []
    for step in range(4):
        with torch.set_grad_enabled(step % 2 == 0):  # in training and in generation
            logits_BPV = model(prompt_BT if step == 0 else None, ledger=ledger)
        predicted.append(logits_BPV[:, -1].argmax(dim=-1))
        assert len(ledger) == 8 + step + 1
    for row in range(2):
        want = torch.cat([prompt_BT[row], torch.stack(predicted)[:, row]])
        assert torch.equal(ledger.ids(row), want)


def test_a_detached_input_still_lets_the_weights_behind_it_vote(model: ArbModel) -> None:
    """As after a frozen sidecar: features of an image need no gradient, and what reads them learns."""
    before = full_state(model)
    features = torch.randn(2, 6, model.config.image_features, generator=torch.Generator().manual_seed(1))
    losses = model.losses(models.random_ids(2, 9), image_BNF=features.detach())
    assert model.backward(losses, rate=models.RATE, step=0)
    assert "image_sequencer.project.trit_accum" in changed(before, model)


def test_every_weight_behind_the_loss_votes_and_no_other(model: ArbModel) -> None:
    """Text alone: the heads of other modalities, their codebooks and sequencers keep every byte."""
    before = full_state(model)
    assert model.backward(model.losses(models.random_ids(3, 20)), rate=models.RATE, step=0)
    model.step()
    moved = {name.rsplit(".", 1)[0] for name in changed(before, model)}
    silent = ("video_head", "talker_head", "router", "image_sequencer", "audio_sequencer")
    assert not [name for name in moved if name.startswith(silent) or ".image" in name or ".audio" in name]
    for name, module in model.ternary_modules().items():
        apart = name.startswith(silent) or ".image" in name or ".audio" in name
        if not (module.frozen or apart):
            assert name in moved, f"{name} did not vote"


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("component", ["bytes", "commitment"])
def test_a_loss_that_is_not_finite_changes_not_one_byte(
    model: ArbModel, fault: float, component: str
) -> None:
    before = full_state(model)
    losses = model.losses(models.random_ids(2, 9))
    losses[component] = losses[component] * fault
    assert not model.backward(losses, rate=models.RATE, step=0)
    model.step()
    assert not changed(before, model)


def test_stale_gradients_never_leak_into_the_next_step() -> None:
    """Passes without a backward pass, or with a loss that was refused, leave nothing that a later step could count."""
    plain, disturbed = models.whole(), models.whole()
    first, second = models.random_ids(2, 9, seed=1), models.random_ids(2, 9, seed=2)
    disturbed.losses(first)  # never goes backward
    refused = disturbed.losses(first)
    disturbed.backward({**refused, "more": torch.tensor(math.nan)}, rate=models.RATE, step=0)
    sum(disturbed.losses(first).values()).backward()  # outside of `backward`: gradients, but no votes
    with torch.no_grad():
        disturbed.losses(first)
    for one in (plain, disturbed):
        assert one.backward(one.losses(second), rate=models.RATE, step=1)
        one.step()
    assert not changed(full_state(plain), disturbed)


@pytest.mark.parametrize("kind", ["loss_signal", "loss_components"])
def test_a_signal_and_components_both_drive_the_update(model: ArbModel, kind: str) -> None:
    before = full_state(model)
    losses = model.losses(models.random_ids(2, 9))
    loss = losses if kind == "loss_components" else losses["bytes"]
    assert model.backward(loss, rate=models.RATE, step=0)
    moved = changed(before, model)
    assert "embedding.table.trit_accum" in moved
    codebook = [name for name in moved if "bridge" in name and name.endswith("trit_accum")]
    assert bool(codebook) == (kind == "loss_components")


def test_the_future_does_not_reach_back(model: ArbModel) -> None:
    """Logits of a position depend on no later byte, whatever the graph, memory and codes do with it."""
    ids_BT = models.random_ids(2, 14)
    later_BT = ids_BT.clone()
    later_BT[:, 9:] = 255 - later_BT[:, 9:]
    with torch.no_grad():
        assert torch.equal(model(ids_BT)[:, :7], model(later_BT)[:, :7])


def test_a_sequence_does_not_see_its_neighbours_in_the_batch(model: ArbModel) -> None:
    ids_BT = models.random_ids(3, 14)
    other_BT = ids_BT.clone()
    other_BT[1:] = models.random_ids(2, 14, seed=9)
    with torch.no_grad():
        assert torch.equal(model(ids_BT)[0], model(other_BT)[0])
