"""The processes of a run, as far as one process can show: who tells, who is silent, and what one process alone does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from arbitor.optimized.distributed import traffic, world
from arbitor.optimized.distributed.ranks import owners
from arbitor.optimized.distributed.run import (
    check_agreement,
    kept_elsewhere,
    measured,
    spreads_over,
    train_together,
    unrecorded,
    whole_state,
)
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.evaluate import turns
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_mix import Mix
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.growth import grow
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.types import has_memory, without_memory
from conformance.distributed.started import meeting_place
from conformance.distributed.threads import Table, on_threads
from conformance.graph import models
from conformance.system.command import TIMEOUT
from conformance.training import nano
from conformance.training.runs import options


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make hearts fast, and return the exit codes with which they would have ended the process."""
    codes: list[int] = []
    monkeypatch.setattr(world, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(world, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


BEATS = 20
"""Beats without a sign of life after which a rank is not taken for ended yet."""


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hearts beat when they are told to, and not by the clock of a machine that may be busy."""
    monkeypatch.setattr(world, "BEAT_SECONDS", 3600.0)
    monkeypatch.setattr(world, "SILENT_SECONDS", BEATS * 3600.0)


@pytest.fixture
def store() -> Iterator[HashStore]:
    yield HashStore()


def heart(store: HashStore, number: int) -> world._Heart:
    return world._Heart(store, world.World(number, 2, store))


@pytest.mark.usefixtures("by_hand")
def test_a_rank_is_silent_when_it_gave_no_sign_of_life_for_long(store: HashStore) -> None:
    first, second = heart(store, 0), heart(store, 1)
    for _ in range(3 * BEATS):
        assert first.beat() and second.beat()
    assert all(first.beat() for _ in range(BEATS)) and second.beat()
    # The newest sign is seen, and then none.
    assert [first.beat() for _ in range(BEATS + 2)] == [True] * (BEATS + 1) + [False]
    for each in (first, second):
        each.stop(is_done=False)


@pytest.mark.usefixtures("by_hand")
def test_a_rank_that_is_done_ends_nobody(store: HashStore) -> None:
    first, second = heart(store, 0), heart(store, 1)
    second.stop(is_done=True)
    assert all(first.beat() for _ in range(3 * BEATS))
    first.stop(is_done=True)


def test_a_rank_that_is_silent_ends_the_others_with_one_sentence(
    store: HashStore, ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """By the clock, however slow the machine is."""
    first, second = heart(store, 0), heart(store, 1)
    second.stop(is_done=False)
    first._thread.join(timeout=TIMEOUT)
    assert ends == [1]
    assert capfd.readouterr().err == f"arb: {world.LOST}.\n"


def test_a_rank_that_never_came_is_silent_too(store: HashStore, ends: list[int]) -> None:
    heart(store, 0)._thread.join(timeout=TIMEOUT)
    assert ends == [1]


def test_a_rank_whose_store_is_gone_ends(ends: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    """The store goes with the rank that holds it."""

    class Gone(HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    heart(Gone(), 0)._thread.join(timeout=TIMEOUT)
    assert ends == [1] and capfd.readouterr().err == f"arb: {world.LOST}.\n"


def test_one_rank_tells(store: HashStore) -> None:
    assert [world.World(number, 3, store).tells() for number in (2, 0, 1)] == [True, False, False]
    assert [world.World(number, 3).tells() for number in (2, 0, 1)] == [False, True, False]


def test_a_process_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ids, model = torch.arange(6)[:, None], models.nano()
    with world.joined() as alone:
        assert (alone.number, alone.count, alone.is_first) == (0, 1, True)
        assert not dist.is_initialized()
        assert alone.share(ids) is ids and alone.gathered(ids)[0] is ids
        assert [alone.signal(None), alone.signal(15)] == [None, 15]
        alone.agree({"seed": 1})
        alone.check_batch(7)
        train_together(model, alone, exchange="full")
    assert type(model.voting.ranks) is Ranks
    assert whole_state(model).keys() == model.state().keys()  # type: ignore[union-attr]
    assert measured(model, steps=1, seconds=1.0) == {}


def test_one_rank_of_torchrun_computes_what_a_process_alone_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nano.register(monkeypatch)
    (tmp_path / "text.txt").write_bytes(nano.TEXT)
    asked = options(tmp_path / "text.txt", None, save=False, steps=2)
    hashes = [train(asked).summary["state_sha256"]]
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    hashes.append(train(asked).summary["state_sha256"])
    assert hashes[0] == hashes[1]


def test_a_step_that_raises_leaves_nothing_to_send() -> None:
    """What it had begun would be taken for a part of a later step, after another state was loaded."""

    class Failing(Ranks):
        abandoned = 0

        def step(self, weights: Any, apply: Any) -> None:
            raise RuntimeError("the exchange broke")

        def abandon(self) -> None:
            self.abandoned += 1

    model = models.nano()
    model.voting.ranks = ranks = Failing()
    assert model.backward(model.losses(models.random_ids(2, 12)), rate=40.0, step=0)
    with pytest.raises(RuntimeError, match="the exchange broke"):
        model.step()
    assert ranks.abandoned == 1 and model.voting.torn


def test_ranks_compare_what_they_go_on_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each fact of the checkpoint that each of them found. Steps and the best measurement decide when they save together, and a
    rank that saved alone would wait for ever.
    """
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    (tmp_path / "text.txt").write_bytes(nano.TEXT)
    train(options(tmp_path / "text.txt", tmp_path / "run", steps=2))
    found, told = load_checkpoint(tmp_path / "run" / "latest.safetensors"), []
    monkeypatch.setattr(world.World, "agree", lambda _, facts: told.append(facts))
    checkpoints = [
        found,
        replace(found, run={**found.run, "data": "its name elsewhere"}),
        replace(found, run={**found.run, "steps": 9}),
        replace(found, best_bpb=1.0),
        replace(found, step=1),
        replace(found, state_sha256="0" * 64),
        replace(found, adapter=SimpleNamespace(tensors=lambda: {"lora": torch.zeros(2)})),
    ]
    for checkpoint in checkpoints:
        check_agreement(world.World(0, 2), config={}, document={}, checkpoint=checkpoint)
    first, renamed, *others = told
    assert first == renamed and first not in others and len(others) == 5


class ThreadWorld(world.World):
    """A rank that is a thread."""

    def __init__(self, number: int, table: Table) -> None:
        super().__init__(number, table.count)
        self._table = table

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self._table.meet(self.number, tensor)


def told_of_files(*ranks: list[Item]) -> list[str]:
    """Return what each of some ranks says of the files that they read, "" where it goes on."""

    def told(number: int, table: Table) -> str:
        mix: Any = SimpleNamespace(world=ThreadWorld(number, table))
        try:
            Mix._refuse_other_files(mix, "images held out", ranks[number])
        except TrainingError as error:
            return str(error)
        return ""

    return on_threads(len(ranks), told)


def items(folder: str, *numbers: int) -> list[Item]:
    """Return files of a folder, each of a content and a name of its own."""
    return [Item(bytes([number]) * 32, b"text", Path(folder) / f"{number}.png") for number in numbers]


def test_the_first_file_that_ranks_do_not_share_is_named() -> None:
    """By its place in the list, of ten files or more too. Names play no part, which may differ between machines."""
    first, elsewhere = items("/a", *range(12)), items("/b", *range(12))
    assert told_of_files(first, elsewhere) == ["", ""]
    of, must = "images held out that can be decoded", ", and all ranks must have the same"
    assert told_of_files(first, elsewhere, items("/b", 0, 1, *range(3, 13))) == 3 * [
        f"rank 2 has '/b/3.png (03030303)' for file 3 of {of}, but rank 0 has '/a/2.png (02020202)'{must}"
    ]
    assert told_of_files(first, elsewhere[:-1]) == 2 * [
        f"rank 1 has None for file 12 of {of}, but rank 0 has '/a/11.png (0b0b0b0b)'{must}"
    ]
    assert told_of_files(first[:-1], elsewhere) == 2 * [
        f"rank 1 has '/b/11.png (0b0b0b0b)' for file 12 of {of}, but rank 0 has None{must}"
    ]


def test_one_rank_refuses_a_way_of_exchange(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nano.register(monkeypatch)
    (tmp_path / "text.txt").write_bytes(nano.TEXT)
    with pytest.raises(
        ValueError, match=r"^exchange is 'mxint8', but does nothing with one rank, which sends no"
    ):
        train(options(tmp_path / "text.txt", None, save=False, exchange="mxint8"))


@pytest.mark.parametrize("value", ["two", "", "-1"])
def test_an_environment_that_torchrun_never_sets_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with (
        pytest.raises(ValueError, match=f"^WORLD_SIZE is {value!r} in the environment, but must be a number"),
        world.joined(),
    ):
        pass


def test_ranks_that_cannot_be_reached_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(TrainingError, match=r"^rank 1 of 2 cannot reach the others: .*MASTER_ADDR"),
        world.joined(),
    ):
        pass


def test_what_no_graph_holds_of_exchanges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spreads = {"codes_over": (0, 2)}
    assert unrecorded(world.World(), spreads) == ""
    for over_nccl, words in ((False, "2 ranks that exchange without NCCL"), (True, "")):
        monkeypatch.setattr(world.World, "exchanges_over_nccl", over_nccl)
        assert unrecorded(world.World(0, 2), {}) == words
        assert unrecorded(world.World(0, 2), spreads) == "rows that 2 ranks keep for each other"


def test_what_cannot_be_spread_over_ranks_is_refused() -> None:
    """Codes that are not all searched, and experts of which some rank would have none."""
    two = world.World(1, 2)
    assert spreads_over(models.WHOLE, world.World(), codes=True, experts=True) == {}
    assert spreads_over(models.WHOLE, two, codes=False, experts=True) == {"experts_over": (1, 2)}
    candidates = replace(models.WHOLE, code_search="candidates", sign_bits=2, num_probes=1)
    said = "^shard_codes is True, but must be False with code_search 'candidates': "
    with pytest.raises(ValueError, match=said):
        spreads_over(candidates, two, codes=True, experts=False)
    few = replace(models.WHOLE, num_experts=2, top_k=1)
    with pytest.raises(ValueError, match=r"^shard_experts is True, .* 2 experts"):
        spreads_over(few, world.World(1, 3), codes=False, experts=True)


def test_a_group_that_the_caller_made_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with world.joined() as joined:
            assert (joined.number, joined.count) == (0, 1)
        assert dist.is_initialized()
        # One of several, of whom the environment says nothing.
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        with world.joined() as joined:
            assert (joined.number, joined.count) == (1, 3)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_that_is_joined_is_left(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Its world is that of the whole process until then. After an error the others may wait, and the group is left as it is."""
    store = meeting_place()
    place = {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in {**place, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), world._group(0, 1) as own:
            with world.joined() as again:
                assert again is own
            assert "signs of life" in {thread.name for thread in threading.enumerate()}
            if fails:
                raise KeyboardInterrupt
        assert "signs of life" not in {thread.name for thread in threading.enumerate()}
        assert dist.is_initialized() is fails and world._joined is None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_each_rank_of_a_host_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    world.World(3, 4).take_device("cuda")
    world.World(3, 4).take_device("cpu")
    world.World().take_device("cuda")
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match=r"^rank 2 is number 2 on its host, but must be below .* 2$"):
        world.World(2, 4).take_device("cuda")


@pytest.mark.parametrize("name", ["shard_codes", "shard_experts"])
def test_one_rank_refuses_to_spread_its_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_bytes(nano.TEXT)
    with pytest.raises(
        ValueError, match=rf"^{name} is True, but does nothing with one rank, which keeps the whole model$"
    ):
        train(options(tmp_path / "text.txt", None, preset="tiny", save=False, **{name: True}))


@pytest.mark.parametrize("sizes", [[4, 4, 4, 1], [4], [2, 2, 2], [1], [4, 4, 4, 4, 3]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_validate_pieces_of_one_size_at_a_time(sizes: list[int], count: int) -> None:
    """Whoever keeps rows for others takes part in every pass, and each piece counts once."""
    found = list(turns(sizes, count))
    assert all(len(turn) == count and len({sizes[i] for i in turn}) == 1 for turn in found)
    counted = [i for turn in found for rank, i in enumerate(turn) if turn.index(i) == rank]
    assert counted == list(range(len(sizes)))


def test_exchanges_end_when_too_much_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ends first, and no more end than have to: what has ended is under way no more."""
    monkeypatch.setattr(traffic, "PENDING_BYTES", 100)
    sent, ended, seen = traffic.Traffic(world.World(0, 2), on_gpu=lambda: False), [], []
    for number, size in enumerate((40, 60, 30, 70, 10)):
        sent.later(size, partial(ended.append, number))
        seen.append(list(ended))
    assert seen == [[], [], [0], [0, 1], [0, 1, 2]]
    sent.end_all()
    assert ended == [0, 1, 2, 3, 4] and sent._pending == 0
    sent.later(100, partial(ended.append, 5))
    sent.forget()
    sent.end_all()
    assert len(ended) == 5 and sent._pending == 0


class Event:
    """Stands in for an event of a GPU, which has passed what it was given so far as `done` says."""

    recorded: ClassVar[int] = 0
    done: ClassVar[int] = 0

    def __init__(self, *, enable_timing: bool, external: bool) -> None:
        assert enable_timing
        self.at, self.external = 0, external

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def query(self) -> bool:
        return self.at <= Event.done

    def synchronize(self) -> None:
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_waiting_of_a_gpu_is_counted_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events do not pile up until somebody asks for the sum, and none is asked before the GPU has passed it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "done", 0)
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    for number in range(100):
        Event.done = max(Event.recorded - 4, 0)
        sent.gathered(torch.tensor(number))
        assert len(sent._events) <= 3
    assert sent.measured() == (100.0, 0) and not sent._events
    assert sent.measured() == (0.0, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_owners_share_the_weights_evenly(count: int) -> None:
    model = models.nano()
    sizes = {module.tensor_id: module.weight.shape for module in model.ternary_modules().values()}
    found = owners(model, count)
    loads = [
        sum(sizes[each][0] * sizes[each][1] for each in found if found[each] == rank) for rank in range(count)
    ]
    largest = max(sizes[each][0] * sizes[each][1] for each in found)
    assert max(loads) - min(loads) <= largest
    frozen_or_table = {
        module.tensor_id
        for name, module in model.ternary_modules().items()
        if "norm" in name.rpartition(".")[2] or name == "embedding.table"
    }
    assert found.keys() == sizes.keys() - frozen_or_table


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_what_votes_change_at_other_ranks_is_never_made(number: int, grown: bool) -> None:
    """A model of two ranks takes the memory of its part from the beginning, and loads its part of a state, or grows from it."""
    config, two = nano.MEANS, world.World(number, 2)
    elsewhere = kept_elsewhere(config, two, {})
    whole, part = ArbModel(config, seed=1), ArbModel(config, seed=2, elsewhere=elsewhere)
    assert elsewhere == {each for each, owner in owners(whole, 2).items() if owner != number} != set()
    for module in whole.ternary_modules().values():
        module.get_buffer("trit_accum").random_(-20, 20)
        if module.average is not None:
            for table in module.average.tables().values():
                table.random_(-20, 20)
    if grown:
        assert not grow(part, config, whole.state(), votes=True).fresh
    else:
        part.load_state(whole.state())
    num_means = {True: 0, False: 0}
    for name, module in part.ternary_modules().items():
        is_here = module.tensor_id not in elsewhere
        for of_part, tensor in module.weight.tensors().items():
            same = torch.equal(tensor, whole.ternary_modules()[name].weight.tensors()[of_part])
            if of_part in VOTED_IN:
                assert has_memory(tensor) == is_here or tensor.numel() == 1
                assert same if is_here else not tensor.any(), (name, of_part)
            else:
                assert same, (name, of_part)
        if module.average is not None:
            num_means[is_here] += 1
            of_whole = whole.ternary_modules()[name].average
            assert of_whole is not None
            for table, of_table in module.average.tables().items():
                assert has_memory(of_table) == is_here
                wanted = of_whole.tables()[table]
                assert torch.equal(of_table, wanted if is_here else torch.zeros_like(wanted)), (name, table)
    assert all(num_means.values())
    assert kept_elsewhere(config, world.World(), {}) == frozenset()


@pytest.mark.parametrize("shape", [(), (1,), (1, 5), (7, 1), (4, 6)])
def test_accumulators_that_another_rank_keeps_read_as_zeros(shape: tuple[int, ...]) -> None:
    like = torch.ones(shape, dtype=torch.int8)
    made = without_memory(like)
    assert made.untyped_storage().nbytes() == 1
    assert made.shape == like.shape and made.dtype is like.dtype and not made.any()
    assert has_memory(like) and has_memory(made) == (made.numel() == 1)
    if made.numel() > 1:
        with pytest.raises(RuntimeError):
            made.copy_(like)


def test_the_digest_of_the_code_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source of Python and of CUDA C++ counts."""
    sources = [
        tmp_path / name
        for name in (
            "reference/some.py",
            "optimized/distributed/some.py",
            "optimized/cuda/some.cu",
            "optimized/cuda/some.cuh",
        )
    ]
    for source in sources:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("x = 1\n")
    monkeypatch.setattr(world, "__file__", str(tmp_path / "optimized/distributed/world.py"))
    digests: list[str] = []
    for source in (None, *sources):
        if source is not None:
            source.write_text("x = 2\n")
        world.code_sha256.cache_clear()
        digests.append(world.code_sha256())
    world.code_sha256.cache_clear()
    assert len(set(digests)) == len(digests)


def test_a_replay_counts_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and waits of recorded exchanges count for each replay, the waits as those of the last one, and are counted once."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "done", 0)
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    with sent.recording() as recorded:
        for _ in range(2):
            with sent._waiting():
                sent._receive(7)
    assert all(event.external for events in recorded.waits for event in events)
    # What is recorded has not run.
    assert sent.measured() == (0.0, 0)
    with sent._waiting():
        sent._receive(5)
    for _ in range(3):
        recorded.replay()
    assert sent.measured() == (1.0 + 3 * 2.0, 5 + 3 * 14)
    assert sent.measured() == (0.0, 0)
    # Also where the GPU has not come to the end of the last replay.
    monkeypatch.setattr(Event, "done", 0)
    recorded.replay()
    assert sent.measured() == (2.0, 14)


@pytest.mark.parametrize("asked", [True, False])
def test_recordings_whose_graphs_are_gone_leave(asked: bool) -> None:
    """Their last replays are counted, whether or not somebody asks before the next recording."""
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    total = 0
    for again in range(5):
        with sent.recording() as recorded:
            sent._receive(7)
        for _ in range(again):
            recorded.replay()
        recorded.close()
        if asked:
            total += sent.measured()[1]
        assert len(sent._recorded) == (0 if asked else 1)
    assert total + sent.measured()[1] == 7 * (0 + 1 + 2 + 3 + 4)
    assert not sent._recorded


def test_a_recording_that_failed_is_none() -> None:
    sent = traffic.Traffic(world.World(), on_gpu=lambda: True)
    with pytest.raises(RuntimeError), sent.recording():
        raise RuntimeError("no memory")
    sent._receive(5)
    assert sent.measured() == (0.0, 5)
