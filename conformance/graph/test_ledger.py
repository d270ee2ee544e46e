"""The ledger is a transcript of what was read. A pass that fails leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.ledger import GrowingRows, KVLedger
from conformance.compare import exact
from conformance.graph import models

ids = models.random_ids


def read(ledger: KVLedger, given: Tensor | None, predicted: int = 7) -> Tensor:
    """Run a pass that attends to nothing, with rows that number the positions. Return what the pass was given to read."""
    window_BT = ledger.begin(given)
    count = window_BT.shape[1] - 2
    columns = ledger.config.kv_latent + 2 * ledger.config.rotary_dim
    rows = ledger.first_B[:, None, None] + torch.arange(count)[:, None] + torch.arange(columns) / 100
    for layer in range(ledger.config.num_layers):
        ledger.layer(layer).append(rows.to(ledger.dtype))
    ledger.record_codes(1000 + ledger.first_B[:, None] + torch.arange(count))
    ledger.end(torch.full((ledger.batch,), predicted))
    return window_BT


def small(batch: int = 1, **fields: int) -> KVLedger:
    return KVLedger(models.nano(**{"window": 4, "block": 2, "num_summaries": 1, **fields}).config, batch)


def test_a_ledger_is_a_transcript() -> None:
    """After a prompt, a prediction, more ids and a prediction, each id has been read once, after the two before it."""
    ledger, prompt, more = small(2), ids(2, 5), ids(2, 3, seed=1)
    assert read(ledger, prompt).tolist() == prompt.tolist()
    assert read(ledger, more, predicted=8).tolist() == [
        [*one[-2:].tolist(), 7, *other.tolist()] for one, other in zip(prompt, more, strict=True)
    ]
    assert read(ledger, None, predicted=9)[:, -1].tolist() == [8, 8]
    for sequence in range(2):
        want = [*prompt[sequence].tolist(), 7, *more[sequence].tolist(), 8, 9]
        assert ledger.ids(sequence).tolist() == want
    assert ledger.lengths == [11, 11] and len(ledger) == 11
    assert ledger.positions == [8, 8] and ledger.unread == 1


def test_retracted_ids_were_never_there() -> None:
    ledger, prompt = small(), ids(1, 6)
    read(ledger, prompt[:, :4])
    ledger.retract()
    assert ledger.ids().tolist() == prompt[0, :4].tolist()
    read(ledger, prompt[:, 4:])
    assert ledger.ids().tolist() == [*prompt[0].tolist(), 7]
    with pytest.raises(ValueError, match="leaves 0 bytes to read"):
        ledger.retract()
        ledger.begin(None)


def test_a_pass_that_fails_leaves_no_trace() -> None:
    ledger, prompt = small(), ids(1, 9)
    read(ledger, prompt[:, :5])
    kept = ledger.copy()
    ledger.begin(prompt[:, 5:])
    ledger.layer(0).append(torch.full((1, 5, kept.layer(0).log.rows.shape[-1]), 99.0))
    assert torch.equal(read(ledger, prompt[:, 5:7]), read(kept, prompt[:, 5:7]))
    assert torch.equal(ledger.ids(), kept.ids()) and ledger.positions == kept.positions
    used = ledger.scheduler.log_size(ledger.positions[0])
    for layer in range(2):
        one, other = ledger.layer(layer).log.rows, kept.layer(layer).log.rows
        assert torch.equal(one[:, :used], other[:, :used])


def test_a_copy_after_a_pass_that_failed_has_no_trace_of_it() -> None:
    ledger, prompt = small(), ids(1, 9)
    read(ledger, prompt[:, :5])
    kept = ledger.copy()
    for taken in (KVLedger.copy, lambda one: one.select([0]), lambda one: KVLedger.stack([one])):
        ledger.begin(prompt[:, 5:])
        other = taken(ledger)
        assert (other.lengths, other.unread, other.positions) == (kept.lengths, kept.unread, kept.positions)
        assert torch.equal(read(other, prompt[:, 5:7]), read(kept.copy(), prompt[:, 5:7]))


@pytest.mark.parametrize("pieces", [[40], [3, 1, 1, 1, 34], [10, 20, 7, 3], [3, *[1] * 37]])
def test_the_log_does_not_depend_on_the_passes(pieces: list[int]) -> None:
    """Rows stand in the order in which they become known: a position, then the means of the blocks that it completes."""
    ledger, text = small(), ids(1, 42)
    done = 0
    for piece in pieces:
        count = piece + (0 if done else 2)
        read(ledger, text[:, done : done + count])
        ledger.retract()
        done += count
    rows = ledger.layer(1).log.rows[0]
    assert rows[:4, 0].tolist() == [0.0, 1.0, 0.5, 2.0]
    size = ledger.scheduler.log_size(40)
    for level, block in enumerate(ledger.scheduler.sizes):
        blocks = torch.arange(40 // block)
        means = rows[ledger.scheduler.place_of_block(level, blocks), 0]
        # Every mean of these integers is a whole number of halves, and so exact.
        assert torch.equal(means, blocks * block + (block - 1) / 2)
    whole = small()
    read(whole, text)
    assert torch.equal(rows[:size], whole.layer(1).log.rows[0, :size])


def test_codes_are_kept_beside_the_ids() -> None:
    ledger = small(2)
    ledger.begin(ids(2, 6))
    assert (ledger.previous_codes(2) == -1).all()
    read(ledger, ids(2, 6))
    ledger.begin(None)
    assert ledger.previous_codes(3).tolist() == [[1001, 1002, 1003]] * 2
    assert ledger.previous_codes(6).tolist() == [[-1, -1, 1000, 1001, 1002, 1003]] * 2
    assert ledger.codes(1).tolist() == [1000, 1001, 1002, 1003]


def test_sequences_of_different_lengths_side_by_side() -> None:
    """Stacked, they are read in lockstep and each stays what it is alone."""
    alone = [small(), small()]
    for ledger, count in zip(alone, (5, 23), strict=True):
        read(ledger, ids(1, count, seed=count))
    stacked = KVLedger.stack(alone)
    assert stacked.lengths == [6, 24] and stacked.positions == [3, 21]
    for _ in range(20):
        windows = read(stacked, None)
        assert torch.equal(windows, torch.cat([read(ledger, None) for ledger in alone]))
    for sequence, ledger in enumerate(alone):
        assert torch.equal(stacked.ids(sequence), ledger.ids())
        assert torch.equal(stacked.codes(sequence), ledger.codes())
        used = ledger.scheduler.log_size(ledger.positions[0])
        one, other = stacked.layer(0).log.rows[sequence, :used], ledger.layer(0).log.rows[0, :used]
        assert torch.equal(one, other)


def test_a_copy_and_a_selection_live_on_their_own() -> None:
    ledger = small(3)
    read(ledger, ids(3, 8))
    chosen, copied = ledger.select([2, 0, 0]), ledger.copy()
    before = [ledger.ids(sequence) for sequence in range(3)]
    read(ledger, ids(3, 4, seed=5), predicted=1)
    for sequence, source in enumerate([2, 0, 0]):
        assert torch.equal(chosen.ids(sequence), before[source])
    assert torch.equal(copied.ids(1), before[1]) and copied.positions == [6, 6, 6]
    assert read(chosen, None)[:, -1].tolist() == [7, 7, 7]


def test_storage_grows_by_doubling() -> None:
    """So that a hundred thousand steps copy each row about once."""
    ledger, capacities = small(), set()
    read(ledger, ids(1, 3))
    for _ in range(200):
        read(ledger, None)
        capacities.add(ledger.layer(0).log.rows.shape[1])
    assert len(capacities) <= 9


def prompted(model: ArbModel, batch: int = 1, **options: Any) -> KVLedger:
    """Return a ledger that a model has read six bytes with."""
    ledger = KVLedger(model.config, batch, **options)
    with torch.no_grad():
        model(ids(batch, 6), ledger=ledger)
    return ledger


def a_step(model: ArbModel) -> None:
    assert model.backward(model.losses(ids(2, 9)), rate=models.RATE, step=0)
    model.step()


def a_load(model: ArbModel) -> None:
    model.load_state({name: value.clone() for name, value in model.state().items()})


def a_load_of_weights(model: ArbModel) -> None:
    model.load_weights(models.state_of(model))


def a_load_of_one_weight(model: ArbModel) -> None:
    model.embedding.table.load(model.embedding.table.weight.clone())


READS = {
    "forward": lambda model, ledger: model(None, ledger=ledger),
    "read": lambda model, ledger: model.read(None, ledger),
    "a replay": lambda model, ledger: ledger.replay(),
}
"""Ways to go on with a ledger."""


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("change", [a_step, a_load, a_load_of_weights, a_load_of_one_weight])
def test_a_ledger_from_before_a_change_of_the_weights_is_refused(
    change: Callable[[ArbModel], None], how: str
) -> None:
    """It was read without a word, with logits off by a third."""
    model = models.nano(theta=1)
    ledger = prompted(model)
    taken = [
        ledger,
        ledger.copy(),
        ledger.select([0, 0]),
        KVLedger.stack([ledger, ledger]),
        copy.deepcopy(ledger),
    ]
    with torch.no_grad():
        for one in taken:
            READS[how](model, one.copy())
    before = model.voting.version
    change(model)
    for one in taken:
        with pytest.raises(
            RuntimeError,
            match=f"at version {before} of its weights, but they are at .* {model.voting.version}",
        ):
            READS[how](model, one)
        assert one.lengths[0] == 7 and one.unread == 1
    with pytest.raises(ValueError, match="ledgers were read at versions"):
        KVLedger.stack([ledger, prompted(model)])
    prompted(model)


def test_a_step_that_changes_nothing_leaves_ledgers_of_use() -> None:
    """As after micro-batches that were all refused: no weight voted, and no table counted."""
    model = models.whole()
    ledger, before = prompted(model), model.voting.version
    losses = model.losses(models.random_ids(2, 12))
    assert not model.backward({**losses, "bytes": losses["bytes"] * torch.nan}, rate=models.RATE, step=9)
    model.step()
    assert model.voting.version == before
    with torch.no_grad():
        model(None, ledger=ledger)


def test_a_ledger_that_nothing_was_read_into_waits_for_its_model() -> None:
    """It may be made before a step, and one pass that is refused binds it to nothing."""
    model, other = models.nano(theta=1), models.nano(theta=1, seed=9)
    ledger = model.new_ledger()
    with pytest.raises(ValueError, match="at least 3"):
        model(ids(1, 2), ledger=ledger)
    a_step(model)
    with torch.no_grad():
        other(ids(1, 6), ledger=ledger)
        other(None, ledger=ledger)
    assert ledger.positions == [5]
    with pytest.raises(ValueError, match="is given to another model 'nano' of the same config"):
        model(None, ledger=ledger)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "ledger holds what one model 'nano' has read, but is given to another model 'nano'"),
        ({"num_layers": 3}, "ledger is of a model with num_layers 2, but this model has 3"),
        ({"window": 8, "block": 4}, "ledger is of a model with window 512, but this model has 8"),
        ({"theta": 9}, "ledger is of a model with theta 64, but this model has 9"),
    ],
)
def test_a_ledger_of_another_model_is_refused(fields: dict[str, int], message: str) -> None:
    ledger = prompted(models.nano())
    other = models.nano(**fields)
    with pytest.raises(ValueError, match=message):
        other(None, ledger=ledger)
    with pytest.raises(ValueError, match="different models" if not fields else "differ in config"):
        KVLedger.stack([ledger, prompted(other)])


def test_a_ledger_of_another_dtype_or_device_is_refused() -> None:
    model = models.nano(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"ledger has dtype torch.float32, but must have that of the model, torch.bfloat16"
    ):
        model(ids(1, 6), ledger=KVLedger(model.config))
    with pytest.raises(ValueError, match="ledger has device meta, but must have that of the model, cpu"):
        model(ids(1, 6), ledger=KVLedger(model.config, device="meta", dtype=torch.bfloat16))


def test_a_ledger_of_a_model_is_not_its_copy_s() -> None:
    """Two voting states are two models, whatever else is equal. A ledger keeps no model alive."""
    model, twin = models.nano(), models.nano()
    twin.load_weights(models.state_of(model))
    ledger = prompted(model)
    with pytest.raises(ValueError, match="another model"):
        twin(None, ledger=ledger)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match="another model"):
        twin(None, ledger=ledger)


def test_respond_refuses_a_ledger_as_forward_does() -> None:
    model = models.whole()
    ledger = prompted(model)
    model.backward(model.losses(models.random_ids(2, 12)), rate=models.RATE, step=9)
    model.step()
    with pytest.raises(RuntimeError, match="make a new one from its ids"):
        model.respond(None, ledger=ledger)


def _twice(ledger: KVLedger) -> None:
    ledger.begin(ids(1, 5))
    ledger.layer(0).append(torch.zeros(1, 3, ledger.layer(0).log.rows.shape[-1]))
    ledger.layer(1).append(torch.zeros(1, 2, ledger.layer(0).log.rows.shape[-1]))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda ledger: ledger.begin(ids(1, 2)), ValueError, "at least 3"),
        (lambda ledger: ledger.begin(None), ValueError, "leaves 0 bytes"),
        (lambda ledger: ledger.begin(ids(2, 5)), ValueError, "ids_BT has shape"),
        (lambda ledger: ledger.begin(ids(1, 5)[0]), ValueError, "ids_BT has shape"),
        (lambda ledger: ledger.begin(ids(1, 5) + 300), ValueError, "ids_BT holds"),
        (lambda ledger: ledger.begin(ids(1, 5).float()), TypeError, "ids_BT has dtype"),
        (lambda ledger: ledger.end(torch.tensor([1])), RuntimeError, "must follow a begin"),
        (lambda ledger: ledger.follow(torch.tensor([1])), RuntimeError, "must follow a begin"),
        (lambda ledger: ledger.replayed(), RuntimeError, "must follow a replay"),
        (lambda ledger: ledger.layer(0).append(torch.zeros(1, 3, 20)), RuntimeError, "a pass must begin"),
        (lambda ledger: ledger.layer(0).seen(1), RuntimeError, "a pass must begin"),
        (_twice, ValueError, "appends 2 positions"),
        (lambda ledger: KVLedger(ledger.config, 0), ValueError, "batch is 0"),
        (lambda ledger: KVLedger(ledger.config, dtype=torch.float16), ValueError, "dtype is"),
        (lambda ledger: KVLedger.stack([ledger, small(window=8)]), ValueError, "differ in config"),
    ],
)
def test_misuse_is_refused(act: Callable[[KVLedger], object], error: type[Exception], message: str) -> None:
    ledger = small()
    with pytest.raises(error, match=message):
        act(ledger)
    assert ledger.retract() is None and ledger.lengths == [0]


def test_a_ledger_that_nobody_holds_is_freed_at_once() -> None:
    """Its rows are the memory of a long text, and wait for no collection of cycles."""
    model = models.nano()
    ledger = model.new_ledger()
    model(ids(1, 12), ledger=ledger)
    rows = weakref.ref(ledger._logs[0].rows)
    gc.disable()
    try:
        del ledger
        assert rows() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("owner", [GrowingRows, KVLedger], ids=["a row is written", "blocks are summarised"])
def test_a_pass_that_is_interrupted_leaves_no_trace(owner: type) -> None:
    """Wherever it is, as by Ctrl-C. The counters of the device go back too, so that the next pass reads what it would have read."""
    model, interrupts = models.whole(), 0
    name = "write" if owner is GrowingRows else "summarise"
    with torch.no_grad():
        # The next position is in the midst of a block, or completes one, or one of each of two levels.
        for length in (6, 5, 17):
            before = model.new_ledger()
            model(ids(1, length), ledger=before)
            for calls in itertools.count():
                ledger, undisturbed = before.copy(), before.copy()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(owner, name, interrupted(getattr(owner, name), after=calls))
                    try:
                        model(None, ledger=ledger)
                        break
                    except KeyboardInterrupt:
                        interrupts += 1
                for _ in range(3):
                    exact(model(None, ledger=ledger), model(None, ledger=undisturbed))
                assert ledger.first_B.tolist() == ledger.positions == undisturbed.positions
    assert interrupts >= (18 if owner is GrowingRows else 3)


def interrupted(real: Callable[..., Any], *, after: int) -> Callable[..., Any]:
    """Return a method that is interrupted at the end of a call, after some calls that are not."""
    calls = itertools.count()

    def run(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if next(calls) == after:
            raise KeyboardInterrupt
        return result

    return run
