"""The whole model does what the seeds demand, whoever implements it (REFACTOR11, REFACTOR12, REFACTOR14).

What an op set could break, as it writes weights in place, is asked of the reference and of the op set under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.training.runtime import deterministic
from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.model import MODALITIES
from arbitor.reference.types import TernaryWeight
from conformance.graph import models
from conformance.subject import Subject

SMALL = replace(
    models.WHOLE,
    num_layers=1,
    embed_dim=6,
    width=8,
    num_heads=1,
    head_dim=6,
    rotary_dim=2,
    query_latent=6,
    kv_latent=6,
    shared_inner=8,
    num_experts=2,
    top_k=1,
    expert_rank=2,
    head_inner=8,
    num_codes=8,
    code_dim=8,
    num_hops=1,
    hop_rank=2,
    num_neighbours=2,
    memory_rows=8,
    memory_dim=6,
    composite_codes=6,
    composite_inner=4,
    image_features=4,
    image_codes=4,
    audio_features=0,
    audio_codes=0,
    router_inner=0,
    video_latent=0,
    talker_tokens=0,
)
"""What learns from bytes and images, in so few rows that Triton's interpreter, which takes 15 ms for a row, steps it in seconds."""


@pytest.fixture
def model() -> ArbModel:
    """Return a small model with every module on."""
    return models.whole()


@pytest.fixture(scope="module", params=["reference", "subject"])
def op_set(request: pytest.FixtureRequest) -> Subject:
    """Return the reference, then the op set under test."""
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class Start:
    """A state that the reference has learned in two steps, and the op set that models go on with. `small`: of SMALL models."""

    op_set: Subject
    small: bool
    state: dict[str, Any]

    def model(self) -> ArbModel:
        """Return a model in that state. The reference draws its weights, for which the interpreter takes long."""
        ops, config = models.drawn_by_the_reference(self.op_set.ops), SMALL if self.small else models.WHOLE
        made = ArbModel(config, ops=ops, device=self.op_set.device, seed=3)
        made.load_state(self.state)
        with made.voting.taking(rate=models.RATE, step=1):
            # The rate is left as after steps of the model, so that a vote outside of a pass would find one.
            pass
        if self.small:
            # The 297 rows of the vocabulary would take a third of the time.
            made.byte_head.vocabulary.frozen = True
        return made

    def ids(self, seed: int) -> Tensor:
        """Return bytes for the model, int64 [B, T]."""
        batch, length = (1, 5) if self.small else (2, 9)
        return models.random_ids(batch, length, seed=seed).to(self.op_set.device)

    def sidecar(self, model: ArbModel) -> Tensor:
        """Return a leaf that features of images come from, float32 [B, N, F]."""
        batch, patches = (1, 3) if self.small else (2, 6)
        rng = torch.Generator().manual_seed(1)
        made = torch.randn(batch, patches, model.config.image_features, generator=rng)
        return made.to(self.op_set.device).requires_grad_()


@pytest.fixture(scope="module")
def start(op_set: Subject) -> Start:
    """Return a state that the reference has learned, with neighbours and composites in place."""
    small = op_set.ops is not reference_ops and op_set.device.type == "cpu"
    state = models.whole(SMALL if small else models.WHOLE).state()
    return Start(op_set, small, state)


@dataclass(frozen=True)
class PlainStep:
    """The states of a model before a step, after its votes and after the step."""

    before: dict[str, Tensor]
    voted: dict[str, Tensor]
    stepped: dict[str, Tensor]


def plain_step(start: Start, model: ArbModel) -> PlainStep:
    """Run the step that tests compare, on text and detached features of an image, and return what it left."""
    before = full_state(model)
    losses = model.losses(start.ids(seed=2), image_BNF=(2 * start.sidecar(model)).detach())
    assert model.backward(losses, rate=models.RATE, step=1)
    voted = full_state(model)
    model.step()
    return PlainStep(before, voted, full_state(model))


@pytest.fixture(scope="module")
def plain(start: Start) -> PlainStep:
    """Return what a step of a model leaves that has done nothing else."""
    with deterministic():
        return plain_step(start, start.model())


@dataclass(frozen=True)
class Refusing:
    """A model, its state, and the components of a loss that tests spoil."""

    model: ArbModel
    before: dict[str, Tensor]
    losses: dict[str, Tensor]


@pytest.fixture(scope="module")
def refusing(start: Start) -> Refusing:
    """Return a model that has computed its losses, once for all of them that it is to refuse."""
    model = start.model()
    return Refusing(model, full_state(model), model.losses(start.ids(seed=0)))


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
    return different(before, full_state(model))


def different(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that two states have and do not have alike."""
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


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
    """The byte head reads targets where the router would choose another head too, and in eval mode, in `loss` and in `losses`."""
    model.train(training)
    ids_BT = models.random_ids(2, 9)
    want = byte_losses(model, ids_BT)
    assert torch.equal(*want)
    for choice in range(len(MODALITIES)):
        model.router.forward = lambda x, c=choice: torch.eye(3)[c].expand(x.shape[0], 3)
        for got, one in zip(byte_losses(model, ids_BT), want, strict=True):
            assert torch.equal(got, one)


def byte_losses(model: ArbModel, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the bytes in both ways that a model computes it."""
    return model.loss(ids_BT), model.losses(ids_BT)["bytes"]


def test_the_ledger_grows_by_the_predicted_ids(model: ArbModel) -> None:
    ledger = model.new_ledger(2)
    prompt_BT = models.random_ids(2, 8)
    predicted = []
    for step in range(4):
        # With gradients as in training, and without as in generation.
        with torch.set_grad_enabled(step % 2 == 0):
            logits_BPV = model(prompt_BT if step == 0 else None, ledger=ledger)
        predicted.append(logits_BPV[:, -1].argmax(dim=-1))
        assert len(ledger) == 8 + step + 1
    for row in range(2):
        want = torch.cat([prompt_BT[row], torch.stack(predicted)[:, row]])
        assert torch.equal(ledger.ids(row), want)


def test_a_detached_input_still_lets_the_weights_behind_it_vote(plain: PlainStep) -> None:
    """Features of an image need no gradient, as after a frozen sidecar, and what reads them learns."""
    assert "image_sequencer.project.trit_accum" in different(plain.before, plain.voted)
    assert "image_sequencer.project.packed" not in different(plain.before, plain.voted), (
        "a vote moved a weight"
    )


def test_every_weight_behind_the_loss_votes_and_no_other(model: ArbModel) -> None:
    """On text alone the heads of other modalities, their codebooks and sequencers keep every byte."""
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
    refusing: Refusing, fault: float, component: str
) -> None:
    model, losses = refusing.model, refusing.losses
    spoiled = losses | {component: losses[component] * fault}
    assert not model.backward(spoiled, rate=models.RATE, step=0)
    model.step()
    assert not changed(refusing.before, model)


def test_stale_gradients_never_leak_into_the_next_step(start: Start, plain: PlainStep) -> None:
    """Passes without a backward pass, or with a loss that was refused, leave nothing that a later step could count."""
    disturbed, ids_BT = start.model(), start.ids(seed=1)
    # This pass never goes backward.
    disturbed.losses(ids_BT)
    refused = disturbed.losses(ids_BT)
    spoiled = {**refused, "more": torch.tensor(math.nan, device=ids_BT.device)}
    assert not disturbed.backward(spoiled, rate=models.RATE, step=0)
    # A backward pass outside of `backward` gives gradients, but casts no votes. Nothing goes on until they are dropped.
    sum(disturbed.losses(ids_BT).values()).backward()
    with pytest.raises(RuntimeError, match="did not vote"):
        disturbed.backward(disturbed.losses(ids_BT), rate=models.RATE, step=0)
    disturbed.drop_gradients()
    with torch.no_grad():
        disturbed.losses(ids_BT)
    with deterministic():
        after = plain_step(start, disturbed).stepped
    assert not different(plain.stepped, after)
    assert different(plain.before, after), "the step changed nothing"


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
