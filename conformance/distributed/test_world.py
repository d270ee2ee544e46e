"""The processes of a run, as far as one process can show: who tells, who is silent, and what one process alone does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from arbitor.optimized.distributed import world
from arbitor.optimized.distributed.owners import owned_rows
from arbitor.optimized.distributed.ranks import GroupRanks, of_rows
from arbitor.optimized.distributed.run import (
    begin_measuring,
    check_agreement,
    kept_rows,
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
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph import ArbModel, stateful
from arbitor.reference.graph.growth import grow
from arbitor.reference.graph.ranks import Gradient, Ranks
from arbitor.reference.types import has_memory, without_memory
from conformance.distributed.cuts_at_work import CUT
from conformance.distributed.started import meeting_place
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
    begin_measuring(model)
    assert measured(model, steps=1) == {}


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


def test_ranks_wait_for_each_other_after_all_else_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are counted before a rank waits to learn what the others have changed. The wait ends a step, or a pass."""
    seen: list[str] = []

    class Watched(Ranks):
        def step(self, weights: Any, apply: Any) -> None:
            seen.append("step")
            super().step(weights, apply)

        def finish(self) -> None:
            seen.append("finish")

    model = models.whole()
    model.voting.ranks = Watched()
    monkeypatch.setattr(stateful, "count_recorded", lambda _: seen.append("tables"))
    assert model.backward(model.losses(models.random_ids(2, 12)), rate=40.0, step=0)
    model.step()
    assert seen == ["finish", "step", "tables", "finish"]


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


def test_a_rank_knows_the_ranks_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world.World().of_host == range(1) and world.World(3, 4).of_host == range(4)
    # As notebooks and launchers leave it.
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert world.World().of_host == range(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert world.World(5, 8).of_host == range(4, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert world.World(5, 8).of_host == range(4, 6)
    # As the last of an uneven deal.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert world.World(5, 8).of_host == range(4, 8)


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


def test_a_part_of_a_stack_is_given_no_more_matrices_than_it_has() -> None:
    """Of matrices 5, 2, 0, 3 and 4, two rows each, and an unused slot a part with 2 and 3 takes these. The others cost no work."""
    matrices = torch.tensor([5, 2, 0, 3, 4, -1])
    rows = torch.where(matrices[:, None] < 0, -1, 2 * matrices[:, None] + torch.tensor([0, 1])).flatten()
    grad_NK = torch.arange(12.0)[:, None].expand(12, 5).clone()
    grad_NK[0] = torch.nan
    found = of_rows(Gradient(grad_NK, rows, 6, chosen=True), range(4, 8))
    assert found.rows is not None and found.rows.tolist() == [0, 1, 2, 3]
    assert found.num_matrices == 2 and found.grad_NK[:, 0].tolist() == [2, 3, 6, 7]
    found = of_rows(Gradient(grad_NK, rows, 6, chosen=True), range(12, 20))
    assert found.rows is not None and found.rows.tolist() == [-1] * 8
    assert found.num_matrices == 4 and not found.grad_NK.any()


@pytest.mark.parametrize("config", [nano.MEANS, CUT])
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_what_votes_change_at_other_ranks_is_never_kept(number: int, grown: bool, config: ArbConfig) -> None:
    """A model of two ranks takes the memory of its part from the beginning, and loads its part of a state, or grows from it."""
    two = world.World(number, 2)
    kept = kept_rows(config, two, {}, starts_rows_anew=False)
    whole, part = ArbModel(config, seed=1), ArbModel(config, seed=2, kept_rows=kept)
    num_rows = {module.tensor_id: module.weight.shape[0] for module in whole.ternary_modules().values()}
    assert (
        kept
        == {
            each: rows[number]
            for each, rows in owned_rows(whole, 2).items()
            if len(rows[number]) < num_rows[each]
        }
        != {}
    )
    assert any(map(len, kept.values())) == (config is CUT)
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
        is_here, rows = module.tensor_id not in kept, kept.get(module.tensor_id, range(0))
        for of_part, tensor in module.weight.tensors().items():
            wanted = whole.ternary_modules()[name].weight.tensors()[of_part]
            same = torch.equal(tensor, wanted)
            if of_part in VOTED_IN:
                assert has_memory(tensor) == is_here or tensor.numel() == 1
                assert same if is_here else not tensor.any(), (name, of_part)
                own = module.own_rows().tensors()[of_part]
                assert not rows or torch.equal(own, wanted[rows.start : rows.stop]), (name, of_part)
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
    assert all(num_means.values()) == config.average_gradients
    assert kept_rows(config, world.World(), {}, starts_rows_anew=False) == {}


def part_of_two() -> ArbModel:
    """Return a model of which rank 1 of two keeps its part."""
    return ArbModel(CUT, kept_rows=kept_rows(CUT, world.World(1, 2), {}, starts_rows_anew=False))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_refused_where_other_ranks_keep_accumulators(assign: bool) -> None:
    """It would overwrite what reads as zeros, and leave what votes change."""
    part = part_of_two()
    before = {name: tensor.clone() for name, tensor in part.named_buffers()}
    given = ArbModel(CUT, seed=1).state_dict()
    with pytest.raises(
        ValueError, match=r"^state_dict has '.*', but must have no tensor .*: load_state loads the part"
    ):
        part.load_state_dict(given, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.named_buffers())


def test_a_weight_that_keeps_some_rows_is_not_asked_for_others() -> None:
    """What it has left is nowhere. So a model that was built for one number of ranks is refused by another."""
    part = part_of_two()
    module = next(each for each in part.ternary_modules().values() if each.kept_rows)
    kept = module.kept_rows
    assert kept is not None
    module.leave_votes(kept)
    for other in (range(kept.start), range(kept.stop)):
        with pytest.raises(
            ValueError, match=rf"^kept is {re.escape(str(other))}, but must be {re.escape(str(kept))}, "
        ):
            module.leave_votes(other)
    with pytest.raises(ValueError, match=r"^kept is range\(0, "):
        GroupRanks(part, world.World(0, 1))


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
