"""A model gives outputs of the right shapes, aligns its targets, looks at no later byte, and refuses wrong inputs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from arbitor.reference import ops as reference_ops
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.attention import rotary_turns
from arbitor.reference.graph.model import MODALITIES
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.presets import PRESETS
from conformance.compare import alike, exact
from conformance.graph import models


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (2, 4), (3, 17)])
def test_logits_have_one_row_a_trigram(batch: int, length: int) -> None:
    logits_BPV = models.nano()(models.random_ids(batch, length))
    assert logits_BPV.shape == (batch, length - 2, 297)
    assert logits_BPV.dtype == torch.float32


def test_specials_and_marks_are_ids() -> None:
    ids = torch.arange(297).reshape(1, -1)
    assert models.nano()(ids).isfinite().all()


def test_position_p_predicts_byte_p_plus_3() -> None:
    model, ids_BT = models.nano(), models.random_ids(2, 12)
    with torch.no_grad():
        log_p = model(ids_BT).log_softmax(dim=-1)
        terms = [-log_p[b, p, ids_BT[b, p + 3]] for b in range(2) for p in range(9)]
        alike(model.loss(ids_BT), torch.stack(terms).mean())


def test_the_last_byte_is_a_target_and_no_input_of_the_loss() -> None:
    """Changing it changes the loss by its own term alone."""
    model, ids_BT = models.nano(dtype=torch.float64), models.random_ids(1, 8)
    other = ids_BT.clone()
    other[0, -1] = (ids_BT[0, -1] + 1) % 256
    with torch.no_grad():
        logits_V = model(ids_BT)[0, -2]
        term = F.cross_entropy(logits_V, other[0, -1]) - F.cross_entropy(logits_V, ids_BT[0, -1])
        alike(model.loss(other) - model.loss(ids_BT), term / 5)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 9, 15])
def test_a_byte_changes_no_logits_before_its_first_trigram(place: int) -> None:
    model, ids_BT = models.nano(), models.random_ids(1, 16)
    other = ids_BT.clone()
    other[0, place] = (other[0, place] + 7) % 256
    with torch.no_grad():
        before, after = model(ids_BT)[0], model(other)[0]
    first = max(place - 2, 0)
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first], after[first])


def test_every_earlier_byte_reaches_the_last_position() -> None:
    """Attention sees the whole past, so changing any byte changes the last logits."""
    model, ids_BT = models.nano(), models.random_ids(1, 16)
    with torch.no_grad():
        last = model(ids_BT)[0, -1]
        for place in range(16):
            other = ids_BT.clone()
            other[0, place] = (other[0, place] + 7) % 256
            assert not torch.equal(model(other)[0, -1], last), f"byte {place} has no influence"


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, ids_BT = models.nano(), models.random_ids(3, 10)
    with torch.no_grad():
        together = model(ids_BT)
        for b in range(3):
            alike(model(ids_BT[b : b + 1])[0], together[b])


def test_rotary_scores_depend_on_distance_alone() -> None:
    turns = rotary_turns(12, 8, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(8, generator=generator, dtype=torch.float64).expand(1, 12, 1, 8) for _ in range(2))
    scores = reference_ops.rotate(q, *turns)[0, :, 0] @ reference_ops.rotate(k, *turns)[0, :, 0].T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        alike(diagonal, diagonal[:1].expand_as(diagonal))


def test_activation_dtype_is_the_model_s() -> None:
    """bfloat16 activations, float32 logits and loss."""
    model = models.nano(dtype=torch.bfloat16)
    ids_BT = models.random_ids(2, 8)
    assert model.sequencer(model.embedding(ids_BT)).dtype == torch.bfloat16
    assert model(ids_BT).dtype == torch.float32
    assert model.loss(ids_BT).dtype == torch.float32
    assert model.backward(model.loss(ids_BT), rate=models.RATE, step=0)


def test_variance_is_kept_at_the_start() -> None:
    """The residual stream starts near unit scale and the loss near that of a uniform guess, ln 297 = 5.69."""
    model = ArbModel(PRESETS["tiny"])
    ids_BT = models.random_ids(4, 32)
    with torch.no_grad():
        h_BPD = model.sequencer(model.embedding(ids_BT))
        for layer in model.layers:
            h_BPD = layer(h_BPD)
        assert 0.7 < h_BPD.square().mean().sqrt() < 2.5
        assert model.loss(ids_BT) < 7.0


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), ValueError, r"ids_BT has shape \(1, 2\)"),
        (torch.zeros(6, dtype=torch.int64), ValueError, r"ids_BT has shape \(6,\)"),
        (torch.zeros(1, 6, dtype=torch.int32), TypeError, "ids_BT has dtype int32"),
        (torch.full((1, 6), 297), ValueError, "holds 297"),
        (torch.full((1, 6), -1), ValueError, "holds -1"),
    ],
)
def test_bad_ids_are_refused(ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.nano()(ids)


@pytest.mark.parametrize("shape", [(1, 3), (0, 8), (8,)])
def test_a_loss_needs_a_byte_to_predict(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 4 bytes"):
        models.nano().loss(torch.zeros(shape, dtype=torch.int64))


def test_bad_arguments_of_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        ArbModel(models.NANO, dtype=torch.float16)
    with pytest.raises(ValueError, match="seed is -1"):
        ArbModel(models.NANO, seed=-1)


def routed(model: ArbModel, ids_BT: torch.Tensor, modalities: list[int]) -> None:
    """Set the router so that the named head answers each sequence: its row has the signs of the sequence's inner vector."""
    assert model.router is not None
    inner: list[torch.Tensor] = []
    hook = model.router.inner.register_forward_hook(lambda module, inputs, output: inner.append(output))
    with torch.no_grad():
        model.respond(ids_BT)
    hook.remove()
    weight = model.router.out.weight
    trits = torch.zeros(weight.shape, dtype=torch.int8)
    for sequence, modality in enumerate(modalities):
        trits[modality] = F.silu(inner[0][sequence]).sign().to(torch.int8)
    levels = torch.zeros_like(weight.exponents)
    model.router.out.load(
        weight_of_trits(trits, levels, weight.group_size, mantissa_bits=weight.mantissa_bits)
    )


@pytest.mark.parametrize("modalities", list(itertools.permutations(range(3))))
def test_each_sequence_is_answered_by_the_head_its_router_chooses(modalities: tuple[int, ...]) -> None:
    model, ids_BT = models.whole(), models.random_ids(3, 12, seed=4)
    routed(model, ids_BT, list(modalities))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = model.respond(ids_BT)
    assert answer.modality_B.tolist() == list(modalities)
    with torch.no_grad():
        h_BPD = model.trunk(ids_BT).h_BPD
        exact(answer.logits_BPV, model.byte_head(h_BPD))
        assert answer.latent is not None and answer.tokens is not None
        video, audio = (modalities.index(MODALITIES.index(name)) for name in ("video", "audio"))
        alike(answer.latent, model.video_head(h_BPD[video : video + 1]))
        exact(answer.tokens, model.talker_head(h_BPD[audio : audio + 1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_head_that_no_sequence_chose_answers_nothing(only: int) -> None:
    model, ids_BT = models.whole(), models.random_ids(1, 12, seed=4)
    routed(model, ids_BT, [only])
    answer = model.respond(ids_BT)
    assert answer.modality_B.tolist() == [only]
    assert (answer.latent is not None, answer.tokens is not None) == (only == 1, only == 2)


def test_a_head_that_the_model_has_not_is_never_chosen() -> None:
    config, ids_BT = replace(models.WHOLE, video_latent=0), models.random_ids(1, 12, seed=4)
    model = models.whole(config)
    routed(model, ids_BT, [1])
    assert model.router(model.trunk(ids_BT).h_BPD).argmax() == 1
    answer = model.respond(ids_BT)
    assert answer.modality_B.tolist() != [1] and answer.latent is None


def test_a_response_needs_a_router() -> None:
    with pytest.raises(RuntimeError, match="router_inner is 0"):
        models.nano().respond(models.random_ids(1, 6))


def test_a_response_leaves_the_ledger_that_a_pass_leaves() -> None:
    model, ids_BT = models.whole(), models.random_ids(1, 12, seed=4)
    ledgers = [model.new_ledger() for _ in range(2)]
    with torch.no_grad():
        model(ids_BT, ledger=ledgers[0])
    model.respond(ids_BT, ledger=ledgers[1])
    exact(ledgers[1].ids(), ledgers[0].ids())
    assert len(ledgers[1]) == 13
