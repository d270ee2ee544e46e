"""Ranks of torch.distributed over gloo compute what docs/spec/distributed.md says: 2 and 3 of them, and of 2 one is killed.

A process takes seconds to import torch. So torchrun is started three times, and each start serves many tests.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arbitor.optimized.distributed.world import LOST
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.metrics import last_step
from arbitor.optimized.training.options import TrainOptions
from conformance.distributed import adapters_at_work, passes_at_work, ranks_at_work
from conformance.distributed.at_work import gone_on
from conformance.system.command import REPOSITORY, environment, until
from conformance.training import nano
from conformance.training.runs import options, train_until_killed

SECONDS = 300
"""Seconds after which ranks hang. On two busy cores they are slow."""

STEPS, SAVED_EVERY, KILLED_AT, STOPPED_AT = 30, 3, 5, 12
"""Steps of the run that is killed and then stopped."""


def torchrun(
    count: int, *arguments: str, restarts: int = 0, nodes: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    """Start ranks, without a terminal, on a port that is free. On a CPU kernels of Triton run in its interpreter."""
    interpreted = {name: os.environ[name] for name in ("TRITON_INTERPRET",) if name in os.environ}
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc-per-node={count}",
            f"--max-restarts={restarts}", "-m", *arguments,
        ],
        cwd=REPOSITORY,
        env={**environment(), **interpreted, "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return the exit code of ranks and what they wrote; end them if they hang."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process ids of the ranks that torchrun has started, by number."""
    found = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found.update({int(each[5:]): child for each in variables if each.startswith(b"RANK=")})
    return found


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    assert until(lambda: last_step(run / "metrics.jsonl") >= step, process), ended(process)


@pytest.fixture(scope="session")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two ranks: rank 1 is killed, torchrun starts both again, and SIGTERM stops them."""
    folder = tmp_path_factory.mktemp("survivor")
    (folder / "text.txt").write_bytes(nano.TEXT)
    run = folder / "survivor"
    process = torchrun(
        2, "conformance.system.nano_arb", "no-pictures", "train", "--preset", "means", "--data", str(folder / "text.txt"),
        "--device", "cpu", "--steps", str(STEPS), "--batch", str(ranks_at_work.BATCH), "--log-interval", "1",
        "--save-interval", str(SAVED_EVERY), "--out", str(run), restarts=1,
    )  # fmt: skip
    wait_for_step(run, KILLED_AT, process)
    first = ranks_of(process)
    killed_at = time.monotonic()
    os.kill(first[1], signal.SIGKILL)
    until(lambda: set(ranks_of(process).values()).isdisjoint(first.values()), seconds=SECONDS)
    seconds = time.monotonic() - killed_at
    wait_for_step(run, STOPPED_AT, process)
    process.send_signal(signal.SIGTERM)
    _, out, err = ended(process)
    return {
        "folder": folder,
        "seconds": seconds,
        "out": out,
        "err": err,
        "stopped_at": last_step(run / "metrics.jsonl"),
    }


@pytest.fixture(scope="session")
def already_found() -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """What was found by numbers of ranks. Pytest ends a fixture of another parameter, and may come back to the first."""
    return {}


@pytest.fixture(scope="session")
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    already_found: dict[int, tuple[Path, list[dict[str, Any]]]],
) -> tuple[Path, list[dict[str, Any]]]:
    """What each rank found, and the folder in which they worked, for a number of ranks."""
    count = request.param
    if count not in already_found:
        already_found[count] = find(request, tmp_path_factory, count)
    return already_found[count]


def find(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, count: int
) -> tuple[Path, list[dict[str, Any]]]:
    """Let ranks work, and return the folder in which they do, and what each of them finds."""
    # The suite has set it, or has a GPU.
    device = "cpu" if "TRITON_INTERPRET" in os.environ else "cuda"
    if count == 2:
        folder = request.getfixturevalue("survivor")["folder"]
    else:
        folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_bytes(nano.TEXT)
    (folder / "other.txt").write_bytes(nano.TEXT + b"!")
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        alone = {"preset": "means", "steps": 6, "batch": ranks_at_work.BATCH, "save_interval": 3}
        train_until_killed(4, options(folder / "text.txt", folder / "alone", **alone))
        # The run itself goes on.
        shutil.copytree(folder / "alone", folder / "base")
        (folder / "base-again").symlink_to("base")
        begun = replace(adapters_at_work.finetune_options(folder), device="cpu", run=folder / "adapted-alone")  # type: ignore[type-var]
        train_until_killed(4, begun)
    code, _, err = ended(torchrun(count, "conformance.distributed.ranks_at_work", str(folder), device))
    assert code == 0, err
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


both = pytest.mark.parametrize("found", [2, 3], indirect=True, ids=["two_ranks", "three_ranks"])
two = pytest.mark.parametrize("found", [2], indirect=True, ids=["two_ranks"])
three = pytest.mark.parametrize("found", [3], indirect=True, ids=["three_ranks"])
Found = tuple[Path, list[dict[str, Any]]]


@both
def test_every_check_ran(found: Found) -> None:
    for of_rank in found[1]:
        assert list(of_rank) == [check.__name__ for check in ranks_at_work.CHECKS], of_rank


@both
@pytest.mark.parametrize("case", ranks_at_work.CASES)
def test_gradients_are_summed_in_rank_order_before_they_vote(found: Found, case: str) -> None:
    """Every bit of the state is the oracle's, after two steps, one of them of two passes."""
    of_cases = found[1][0]["sums_as_the_rule_says"]
    ours, oracles = of_cases[case]["hashes"]
    assert ours == oracles
    assert sum(each["hashes"][0] == ours for each in of_cases.values()) == 1, "two cases are one"


@both
def test_terms_are_added_from_rank_0_on(found: Found) -> None:
    wanted = [None, None, 2.0**30, 0.0][len(found[1])]
    each = [of_rank["adds_in_order"] for of_rank in found[1]]
    assert all(one["total"] == wanted for one in each), each
    assert [one["voted"] for one in each if one["steps"]] == [[[wanted]]]
    assert not any(one["voted"] for one in each if not one["steps"])


@both
@pytest.mark.parametrize("case", ranks_at_work.CASES)
def test_a_census_counts_over_all_ranks(found: Found, case: str) -> None:
    ours, oracles = found[1][0]["sums_as_the_rule_says"][case]["censuses"]
    assert ours == oracles
    assert any(kind["rail_share"] for kind in ours["kinds"].values())


@both
def test_ranks_are_one_batch(found: Found) -> None:
    """Gradients are alike (the ranks compare them), every weight has a rank that steps it, and integer tables are equal."""
    each = [of_rank["is_one_batch"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert sorted({name for one in each for name in one["compared"]}) == each[0]["all"]
    assert each[0]["same"] and all(all(one["same"].values()) for one in each), each


@both
def test_all_ranks_read_the_same_weights_and_tables(found: Found) -> None:
    assert len({of_rank["agrees_after_steps"]["read"] for of_rank in found[1]}) == 1


@both
def test_one_rank_keeps_the_accumulators_of_a_matrix(found: Found) -> None:
    kept = [of_rank["agrees_after_steps"]["kept"] for of_rank in found[1]]
    owners = {name: sum(one[name] for one in kept) for name in kept[0]}
    matrices = {name for name, number in owners.items() if number == 1}
    shared = {name for name, number in owners.items() if number == len(kept)}
    assert matrices | shared == set(owners)
    assert "byte_head.gate" in matrices and "embedding.table" in shared
    assert all(any(one[name] for name in matrices) for one in kept), "each rank owns some"


@both
def test_codes_that_ranks_keep_for_each_other_are_one_table(found: Found) -> None:
    """With rows of codebooks spread over ranks, the state, the census and the checkpoint are those without."""
    each = [of_rank["spreads_codes"] for of_rank in found[1]]
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"], each[0]["hashes"]
    assert all(one["same_census"] for one in each)
    # Each rank of the one model revives all codes, of the other its own.
    revived = [one["revived"] for one in each]
    assert {of_all for of_all, _ in revived} == {sum(own for _, own in revived)} and revived[0][0] > 0


@both
def test_a_rank_keeps_its_part_of_the_codes(found: Found) -> None:
    """Bytes in memory of four codebooks and two tables of edges: accumulators, counts of use and neighbours among them."""
    kept = [of_rank["spreads_codes"]["kept"] for of_rank in found[1]]
    for name in kept[0]:
        whole, parts = kept[0][name][0], [one[name][1] for one in kept]
        few = len(kept) == 3 and name.endswith("audio")
        assert parts == [whole] * len(kept) if few else sum(parts) == whole > max(parts), name
    assert len(kept[0]) == 6


@both
def test_bytes_of_codes_are_those_of_the_formulas(found: Found) -> None:
    """A codebook whose rows are spread sends fewer."""
    whole, spread = found[1][0]["counts_bytes_of_codes"]
    assert whole[0] == whole[1] and spread[0] == spread[1] > 0


@three
def test_a_run_with_spread_codes_is_the_run_without(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what ranks that keep all codes say of its checkpoint, and one process."""
    folder, ranks = found
    for of_rank in ranks:
        plain, spread, laid_down = of_rank["trains_with_spread_codes"]["runs"]
        assert plain == spread == laid_down
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    shown = io.StringIO()
    summary = train(
        TrainOptions(run=folder / "spread", resume=True), console=Console(file=shown, width=999)
    ).summary
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


@both
def test_experts_that_ranks_keep_for_each_other_learn_as_in_one_process(found: Found) -> None:
    """Gradients are alike, as the ranks compare. The state is one for one seed, and what one process and new ranks load."""
    each = [of_rank["spreads_experts"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert sorted({name for one in each for name in one["compared"]}) == each[0]["all"]
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@both
def test_a_rank_keeps_its_experts(found: Found) -> None:
    """Bytes in memory, accumulators among them, but for the last byte of the trits of a part, which is not full."""
    kept = [of_rank["spreads_experts"]["kept"] for of_rank in found[1]]
    for name, (whole, _) in kept[0].items():
        parts = [one[name][1] for one in kept]
        assert whole <= sum(parts) < whole + len(parts) and max(parts) < whole, name
    assert len(kept[0]) == 2


@both
def test_votes_of_spread_experts_are_those_of_one_process(found: Found) -> None:
    """Outputs, gradients and state, of sums that are exact; and the bytes that were received are those of the formula."""
    each = [of_rank["votes_as_one_process"] for of_rank in found[1]]
    assert all(one["same"][:2] == [True, True] for one in each) and each[0]["same"][2]
    received, wanted = each[0]["bytes"]
    assert received == wanted > 0


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


@both
def test_the_owner_of_a_matrix_alone_keeps_its_mean(found: Found) -> None:
    """Both tables of a mean. Rank 0 collects them, and one process and new ranks that load the state have them all."""
    each = [of_rank["keeps_means"] for of_rank in found[1]]
    for name in each[0]["owned"]:
        assert sum(one["owned"][name] for one in each) == 1
        assert all(one["kept"][name] == [one["owned"][name]] * 2 for one in each), name
        assert all(one["led"][name] == one["owned"][name] for one in each), name
        (owner,) = (one for one in each if one["owned"][name])
        assert each[0]["collected"][name] == owner["means"][name], name
    assert sum(any(one["owned"].values()) for one in each) > 1, "one rank owns all"
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@both
def test_a_rank_keeps_the_means_of_its_experts(found: Found) -> None:
    """They are those of one process, and lie in parts. One process and new ranks go on with them."""
    each = [of_rank["spreads_means"] for of_rank in found[1]]
    assert len(each[0]["same"]) == 2 and all(each[0]["same"].values()) and each[0]["led"], each[0]
    for name, (whole, _) in each[0]["kept"].items():
        parts = [one["kept"][name][1] for one in each]
        assert sum(parts) == whole > max(parts), name
    assert len(each[0]["kept"]) == 2
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@two
def test_two_ranks_go_on_with_a_run_of_four(found: Found) -> None:
    """The four ranks mapped their data, as they would map what is larger than memory."""
    first, second = (of_rank["goes_on_with_a_run_of_four"] for of_rank in found[1])
    assert "at step 3\nthe run had 4 ranks and goes on with 2 ranks: " in first["shown"]
    assert first["steps"] == second["steps"] == 6 and not second["shown"]
    took_up_the_means(first)


@both
def test_bytes_are_those_of_the_table(found: Found) -> None:
    for dtype, (counted, wanted) in found[1][0]["counts_bytes"].items():
        assert counted == wanted > 0, dtype


@both
def test_a_small_table_sends_its_rows_and_not_its_slots(found: Found) -> None:
    for of_rank in found[1]:
        plain, longer = of_rank["sends_no_more_rows_than_there_are"]
        assert plain == longer and plain[1] == plain[2] > 0


@both
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_all(found: Found) -> None:
    for of_rank in found[1]:
        assert of_rank["refuses_what_is_not_finite"]["accepted"] is False
    assert found[1][0]["refuses_what_is_not_finite"]["changed"] is False


@both
def test_a_fault_is_counted_once(found: Found) -> None:
    """One row of a matrix and one of a table; and one of a table whose rows are spread."""
    assert [of_rank["counts_faults"] for of_rank in found[1]] == [[2, 1]] * len(found[1])


@both
def test_gradients_of_adapters_are_summed_in_rank_order(found: Found) -> None:
    """Every bit of the adapters and of AdamW is the oracle's on every rank. The ranks received each gradient once."""
    each = [of_rank["adds_gradients_of_adapters_in_order"] for of_rank in found[1]]
    digests = {digest for one in each for digest in one["digests"]}
    assert digests == {each[0]["oracle"]}
    assert all(received == wanted > 0 for one in each for received, wanted in one["received"])
    smallest = 4 * len(found[1]) * adapters_at_work.SMALL_PIECE
    assert each[0]["received"][0][0] > smallest, "the small pieces were several"
    before, after = each[0]["base"]
    assert before == after is not None


@both
def test_adapters_of_ranks_learn_from_one_batch(found: Found) -> None:
    """Gradients of the ranks and of one process are alike, as the ranks compare. Every matrix that has one is compared."""
    for of_rank in found[1]:
        assert isinstance(of_rank["adapts_as_one_batch"], list), of_rank
        for ours, theirs in of_rank["adapts_as_one_batch"]:
            assert ours == theirs and len(ours) > 20


@both
def test_what_is_not_finite_on_one_rank_moves_no_adapters(found: Found) -> None:
    """A loss, and a row of a gradient, which is counted once."""
    wanted = {"accepted": False, "norm is finite": False, "changed": False, "faults": 1}
    each = [of_rank["moves_no_adapters_by_what_is_not_finite"] for of_rank in found[1]]
    assert each == [wanted] * len(each)


@both
def test_ranks_that_finetune_keep_the_same_adapters(found: Found) -> None:
    """With and without checkpoints, killed and resumed, and stopped by a signal to one rank and resumed."""
    each = [of_rank["finetunes"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert len({digest for one in each for digest in one["digests"].values()}) == 1
    assert {one["stopped"] for one in each} == {
        "stopped by SIGTERM after step 2 of 6; the checkpoint is written, go on with --resume"
    }


@both
def test_rank_0_alone_writes_a_run_of_adapters(found: Found) -> None:
    (folder, ranks), count = found, len(found[1])
    first, *others = (of_rank["finetunes"] for of_rank in ranks)
    assert f"{count} ranks: each reads" in first["shown"] and "step 6/6" in first["shown"]
    assert not any(other["shown"] or other["of one"]["shown"] for other in others)
    assert (folder / "adapted" / "adapter" / "adapter_model.safetensors").exists()
    lines = [json.loads(line) for line in (folder / "adapted" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 6]
    assert all(
        line["exchanged_bytes"] > 10_000 and line["grad_norm"] > 0 for line in lines if "grad_norm" in line
    )
    assert f"at step 3\nthe run had 1 rank and goes on with {count} ranks: " in first["of one"]["shown"]


@both
def test_one_process_goes_on_with_adapters_of_many(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    (folder, ranks), shown = found, io.StringIO()
    left = TrainOptions(run=folder / "adapted-left", resume=True, finetune=True)
    assert train(left, console=Console(file=shown, width=999)).summary["steps"] == 6
    assert f"at step 3\nthe run had {len(ranks)} ranks and goes on with 1 rank: " in shown.getvalue()
    finished = train(TrainOptions(run=folder / "adapted", resume=True)).summary
    assert finished["adapter_sha256"] == ranks[0]["finetunes"]["digests"]["saved"]


@two
def test_torchrun_starts_the_module_on_ranks(found: Found) -> None:
    """It takes the options of `arb finetune`, and ends with the adapters of the ranks above. Rank 0 alone prints."""
    folder, ranks = found
    config = json.loads((folder / "adapted" / "config.json").read_text())
    asked = {name: config["run"][name] for name in ("data", "steps", "batch", "context", "accum")}
    options = {**asked, "lora-rank": 3, "learning-rate": 0.02, "base": config["run"]["init_from"]}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    module = torchrun(2, "arbitor.finetune", *words, "--device", "cpu", "--out", str(folder / "module"))
    code, out, err = ended(module)
    assert code == 0, err
    summary = json.loads((folder / "module" / "summary.json").read_text())
    assert summary["ranks"] == 2 and out.count("adapters " + summary["adapter_sha256"][:16]) == 1
    # Numbers of a GPU and of a CPU differ.
    if config["run"]["device"] == "cpu":
        assert summary["adapter_sha256"] == ranks[0]["finetunes"]["digests"]["saved"]


@both
def test_ranks_whose_adapters_differ_are_refused(found: Found) -> None:
    """Their base is the same. One rank found an older checkpoint; and AdamW moved one rank's matrices elsewhere."""
    says = [of_rank["refuses_ranks_whose_adapters_differ"] for of_rank in found[1]]
    assert all(one == says[0] for one in says)
    for name, fact in (("behind", "checkpoint_adapter_sha256"), ("drifted", "adapter_sha256")):
        wanted = (
            f"rank {len(says) - 1} has '[0-9a-f]{{64}}' for {fact}, but rank 0 has '[0-9a-f]{{64}}', and .*"
        )
        assert re.fullmatch(wanted, says[0][name]), says[0][name]


@both
def test_triton_and_the_reference_agree_on_ranks(found: Found) -> None:
    reference, triton = found[1][0]["agrees_on_triton"]
    assert reference == triton is not None


@both
@pytest.mark.parametrize("case", passes_at_work.CASES)
def test_recorded_passes_of_ranks_are_those_that_are_launched(found: Found, case: str) -> None:
    """Nats, states and bytes received are equal, and a loss that is not finite on one rank changes nothing."""
    of_ranks = [of_rank["replays_what_it_launches"][case] for of_rank in found[1]]
    for each in of_ranks:
        assert each["RecordedPasses"] == each["Passes"]
        assert each["Passes"]["received"] > 0 and None not in each["Passes"]["nats"]
        assert each["Passes"]["refused"] is None and len(set(each["Passes"]["states"])) == 1
        # The pass that is refused is replayed too, and leaves nothing to step.
        graphs = each["graphs of a step"]
        assert graphs > (2 if case == "every module" else 1), "one of the tables, and those of pieces"
        assert (
            each["replays"]
            == 2 * (passes_at_work.REPLAYED_PASSES + 1) + graphs * passes_at_work.REPLAYED_STEPS
        )
    digests = [each["Passes"]["states"] for each in of_ranks]
    assert [each[0] is None for each in digests] == [False] + [True] * (len(digests) - 1)


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
    assert "cuda_graph" in sentences[0]["cuda_graph"] and f"{last + 1} ranks" in sentences[0]["cuda_graph"]
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
    assert survivor["seconds"] < 60
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two")
    agents = [
        torchrun(
            1, "conformance.system.nano_arb", "no-pictures", "train", "--preset", "nano", "--data", str(folder / "text.txt"),
            "--device", "cpu", "--steps", "6", "--batch", str(ranks_at_work.BATCH), "--log-interval", "2",
            "--out", str(folder / "nodes"), nodes=nodes,
        )
        for _ in range(2)
    ]  # fmt: skip
    printed = ""
    for code, out, err in map(ended, agents):
        assert code == 0, err
        printed += out
    assert printed.count("6 steps in") == 1, "rank 0 alone prints what the run came to"
    summary = json.loads((folder / "nodes" / "summary.json").read_text())
    assert summary["state_sha256"] == ranks[0]["trains"]["hashes"][1]


@both
def test_one_process_goes_on_with_a_run_of_many(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    (folder, ranks), shown = found, io.StringIO()
    summary = train(
        TrainOptions(run=folder / "unfinished", resume=True), console=Console(file=shown, width=999)
    ).summary
    assert summary["steps"] == 6
    assert f"at step 3\nthe run had {len(ranks)} ranks and goes on with 1 rank: " in shown.getvalue()
    finished = train(TrainOptions(run=folder / "run", resume=True)).summary
    assert finished["state_sha256"] == ranks[0]["trains"]["hashes"][1]
    with_means = gone_on(folder / "alone")
    took_up_the_means(with_means)
    assert with_means["state_sha256"] == ranks[0]["goes_on_with_a_run_of_one"]["state_sha256"]


@both
def test_many_go_on_with_a_run_of_one(found: Found) -> None:
    first, *others = (of_rank["goes_on_with_a_run_of_one"] for of_rank in found[1])
    assert f"at step 3\nthe run had 1 rank and goes on with {len(found[1])} ranks: " in first["shown"]
    assert first["steps"] == 6 and not any(other["shown"] for other in others)
    took_up_the_means(first)


def took_up_the_means(run: dict[str, Any]) -> None:
    """Refuse a run that went on from another state than that of its checkpoint, or without means."""
    checkpoint, held, means = run["taken_up"]
    assert checkpoint == held and means > 100
