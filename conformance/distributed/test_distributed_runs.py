"""Runs of several ranks: they begin alike, end alike, go on in other numbers, and one of two is killed."""

from __future__ import annotations

import io
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arbitor.optimized.distributed.world import BEAT_SECONDS, LOST, SILENT_SECONDS
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from conformance.distributed import ranks_at_work
from conformance.distributed.at_work import gone_on
from conformance.distributed.started import (
    SAVED_EVERY,
    STEPS,
    Found,
    both,
    copied,
    device_of_ranks,
    ended,
    is_running,
    meeting_place,
    once,
    succeeded,
    three,
    torchrun,
    two,
)
from conformance.system.command import digest, until
from conformance.training import nano


@three
def test_a_run_with_spread_codes_is_the_run_without(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So is what ranks that keep all codes say of its checkpoint, and one process."""
    folder, ranks = found
    for of_rank in ranks:
        plain, spread, laid_down = of_rank["trains_with_spread_codes"]["runs"]
        assert plain == spread == laid_down
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    shown = io.StringIO()
    own = TrainOptions(run=copied(folder / "spread", tmp_path), resume=True)
    summary = train(own, console=Console(file=shown, width=999)).summary
    assert f"the run had {len(ranks)} ranks and goes on with 1 rank: " in shown.getvalue()
    assert summary["state_sha256"] == ranks[0]["trains_with_spread_codes"]["runs"][0]["state_sha256"]


@three
def test_codes_that_cannot_be_spread_are_refused(found: Found) -> None:
    says = [of_rank["trains_with_spread_codes"] for of_rank in found[1]]
    assert all({**one, "runs": None} == {**says[0], "runs": None} for one in says)
    few = (
        "shard_codes is True, but the largest codebook has {} codes, and must have 5 for each of the {} ranks"
    )
    assert says[0]["no codes"] == few.format(0, len(says))
    assert says[0]["few codes"] == few.format(9, len(says))
    assert "must be False with init_from" in says[0]["begun"]
    assert "must be False with code_search 'candidates'" in says[0]["candidates"]


@two
def test_a_run_with_spread_experts_keeps_them_spread(found: Found) -> None:
    """Two matrices of a layer, in every turn of its loop, in training, validation and the sample."""
    each = [of_rank["trains_with_spread_experts"] for of_rank in found[1]]
    assert each[0] == each[1] and each[0]["slots"] > 8
    assert each[0]["other"] == (
        "the run was started with shard_experts True and cannot go on with shard_experts False"
    )
    assert found[1][0]["spreads_experts"]["few experts"] == (
        "shard_experts is True, but a layer has 2 experts, and must have one for each of the 3 ranks"
    )


@two
def test_two_ranks_go_on_with_a_run_of_four(found: Found) -> None:
    """The four ranks mapped their data, as they would map what is larger than memory."""
    first, second = (of_rank["goes_on_with_a_run_of_four"] for of_rank in found[1])
    assert "at step 3\nthe run had 4 ranks and goes on with 2 ranks: " in first["shown"]
    assert first["steps"] == second["steps"] == 6 and not second["shown"]
    took_up_the_means(first)


@both
def test_ranks_that_differ_are_refused(found: Found) -> None:
    sentences = [of_rank["refuses_ranks_that_differ"] for of_rank in found[1]]
    last = len(sentences) - 1
    assert all(each == sentences[0] for each in sentences)
    assert f"rank {last} has" in sentences[0]["data"] and "for data_bytes" in sentences[0]["data"]
    wanted = f"rank {last} has 1 for seed, but rank 0 has 0, and all ranks must have the same"
    assert sentences[0]["seed"] == wanted
    for name, wanted in {
        "config": r"rank \d has .* for \w+, but rank 0 has .*, and all ranks must have the same",
        "exchange": f"rank {last} has 'mxint8' for exchange, but rank 0 has 'full', and all ranks must have the same",
        "code_sha256": f"rank {last} has 'another' for code_sha256, but rank 0 has '[0-9a-f]{{64}}', and all .*",
    }.items():
        assert re.fullmatch(wanted, sentences[0][name]), sentences[0][name]
    assert sentences[0]["batch"].endswith(f"but must be a multiple of the {last + 1} ranks")
    over_nccl = device_of_ranks() == "cuda" and torch.cuda.device_count() > last
    said = sentences[0].get("cuda_graph", "")
    assert not said if over_nccl else ("cuda_graph" in said and f"{last + 1} ranks" in said), said
    assert sentences[0]["folder"] == "False"


@both
def test_a_signal_to_one_rank_stops_all(found: Found) -> None:
    assert [of_rank["passes_signals_on"] for of_rank in found[1]] == [[signal.SIGTERM, None]] * len(found[1])


@both
def test_no_window_is_read_twice(found: Found) -> None:
    shares = [of_rank["shares_windows"] for of_rank in found[1]]
    assert [window for share in shares for window in share] == list(range(ranks_at_work.BATCH))
    assert len({len(share) for share in shares}) == 1


@both
def test_the_same_seed_gives_the_same_hash(found: Found) -> None:
    first, second = found[1][0]["trains"]["hashes"]
    assert first == second
    assert len({of_rank["trains"]["val_bpb"] for of_rank in found[1]}) == 1


@both
def test_only_rank_0_prints_and_metrics_speak_of_all(found: Found) -> None:
    folder, ranks = found
    shown = [of_rank["trains"]["shown"] for of_rank in ranks]
    assert f"{len(ranks)} ranks: each reads" in shown[0] and "step 6/6" in shown[0]
    assert not any(shown[1:])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    for line in lines[1:]:
        assert 0 < line["waiting_share"] < 1 and line["exchanged_bytes"] > 10_000, line
        assert line["tokens_per_second"] > 0


@two
def test_a_killed_run_goes_on_to_the_same_hash(found: Found) -> None:
    """After SIGKILL to one rank, a restart by torchrun, SIGTERM, and --resume."""
    whole, resumed = found[1][0]["goes_on"]
    assert whole == resumed


def test_a_killed_rank_ends_the_run_with_one_sentence(survivor: dict[str, Any]) -> None:
    sentences = [line for line in survivor["err"].splitlines() if line.startswith("arb: ")]
    assert sentences[0] == f"arb: {LOST}.", survivor["err"]
    # The pages say within a minute. torchrun ends the others within half of one.
    assert SILENT_SECONDS + 2 * BEAT_SECONDS < 60
    assert sum(LOST in line for line in sentences) == 1


def test_torchrun_starts_it_again_and_it_resumes(survivor: dict[str, Any]) -> None:
    assert survivor["out"].count("resuming ") == 1, survivor["out"]
    resumed_at = int(survivor["out"].partition("at step ")[2].split()[0])
    assert resumed_at >= SAVED_EVERY and resumed_at % SAVED_EVERY == 0


def test_sigterm_saves(survivor: dict[str, Any]) -> None:
    said = (
        f"arb: stopped by SIGTERM after step {survivor['stopped_at']} of {STEPS}; the checkpoint is written"
    )
    assert sum(said in line for line in survivor["err"].splitlines()) == 1, survivor["err"]


@two
def test_two_agents_train_as_one(found: Found) -> None:
    """Two nodes are two agents, which find each other by the address of one. Here they are on one machine."""
    folder, ranks = found
    asked = (
        "conformance.system.nano_arb", "no-pictures", "train", "--preset", "nano", "--data", str(folder / "text.txt"),
        "--device", "cpu", "--steps", "6", "--batch", str(ranks_at_work.BATCH), "--log-interval", "2",
    )  # fmt: skip
    place = meeting_place()
    nodes = (
        "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{place.port}", "--rdzv-conf=is_host=0",
        "--rdzv-id=two",
    )  # fmt: skip
    agents = [torchrun(1, *asked, "--out", str(folder / "nodes"), nodes=nodes) for _ in range(2)]
    printed = "".join(map(succeeded, agents))
    assert printed.count("6 steps in") == 1, "rank 0 alone prints what the run came to"
    want = ranks[0]["trains"]["hashes"][1]
    if json.loads((folder / "run" / "config.json").read_text())["run"]["device"] != "cpu":
        # Two agents on one machine would count its GPUs from the first one each.
        succeeded(torchrun(2, *asked, "--out", str(folder / "agent")))
        want = digest(folder / "agent")
    assert digest(folder / "nodes") == want


def test_ranks_that_hang_say_where_and_are_ended(tmp_path: Path) -> None:
    hung = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(3600)"
    process = torchrun(2, "timeit", "-n", "1", "-r", "1", hung)
    until(lambda: len(list(tmp_path.iterdir())) == 2, process)
    with pytest.raises(AssertionError, match=r"^ranks hung for 0\.1 s:") as found:
        ended(process, seconds=0.1)
    assert str(found.value).count("<timeit-src>") == 2
    assert not any(is_running(int(rank.name)) for rank in tmp_path.iterdir())


def test_what_workers_of_the_suite_share_is_made_once(tmp_path: Path) -> None:
    """Who comes later waits for the first, and is told what the first made, or that it failed."""
    calls: list[str] = []

    def make(folder: Path) -> list[str]:
        calls.append(folder.name)
        assert not list(folder.iterdir())
        (folder / "used").touch()
        time.sleep(0.1)
        assert folder.name != "broken", "no luck"
        return [folder.name]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: once(tmp_path, "whole", make), range(3))) == [["whole"]] * 3
        failed = [pool.submit(once, tmp_path, "broken", make) for _ in range(3)]
        assert {str(each.exception()).rpartition(": ")[2].partition("\n")[0] for each in failed} == {
            "no luck"
        }
    assert calls == ["whole", "broken"]


@both
def test_one_process_goes_on_with_a_run_of_many(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    (folder, ranks), shown = found, io.StringIO()
    own = TrainOptions(run=copied(folder / "unfinished", tmp_path), resume=True)
    summary = train(own, console=Console(file=shown, width=999)).summary
    assert summary["steps"] == 6
    assert f"at step 3\nthe run had {len(ranks)} ranks and goes on with 1 rank: " in shown.getvalue()
    finished = train(TrainOptions(run=copied(folder / "run", tmp_path), resume=True)).summary
    assert finished["state_sha256"] == ranks[0]["trains"]["hashes"][1]


@two
def test_one_process_goes_on_with_means(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As ranks do with the same run."""
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    folder, ranks = found
    with_means = gone_on(copied(folder / "alone", tmp_path))
    took_up_the_means(with_means)
    assert with_means["state_sha256"] == ranks[0]["goes_on_with_a_run_of_one"]["state_sha256"]


@two
def test_many_go_on_with_a_run_of_one(found: Found) -> None:
    first, *others = (of_rank["goes_on_with_a_run_of_one"] for of_rank in found[1])
    assert f"at step 3\nthe run had 1 rank and goes on with {len(found[1])} ranks: " in first["shown"]
    assert first["steps"] == 6 and not any(other["shown"] for other in others)
    took_up_the_means(first)


def took_up_the_means(run: dict[str, Any]) -> None:
    """Refuse a run that went on from another state than that of its checkpoint, or without means."""
    checkpoint, held, means = run["taken_up"]
    assert checkpoint == held and means > 100
