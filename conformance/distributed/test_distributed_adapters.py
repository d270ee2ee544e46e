"""Adapters that several ranks train together: one batch, one step of AdamW, one file."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from conformance.distributed import adapters_at_work
from conformance.distributed.started import Found, both, copied, two
from conformance.training import nano


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


@two
def test_ranks_that_finetune_keep_the_same_adapters(found: Found) -> None:
    """Left alone, killed and resumed, and stopped by a signal to one rank and resumed, each with checkpoints of other steps."""
    each = [of_rank["finetunes"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert len({digest for one in each for digest in one["digests"].values()}) == 1
    assert {one["stopped"] for one in each} == {
        "stopped by SIGTERM after step 2 of 6; the checkpoint is written, go on with --resume"
    }


@two
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


@two
def test_one_process_goes_on_with_adapters_of_many(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    (folder, ranks), shown = found, io.StringIO()
    left = TrainOptions(run=copied(folder / "adapted-left", tmp_path), resume=True, finetune=True)
    assert train(left, console=Console(file=shown, width=999)).summary["steps"] == 6
    assert f"at step 3\nthe run had {len(ranks)} ranks and goes on with 1 rank: " in shown.getvalue()
    finished = train(TrainOptions(run=copied(folder / "adapted", tmp_path), resume=True)).summary
    assert finished["adapter_sha256"] == ranks[0]["finetunes"]["digests"]["saved"]


@two
def test_the_module_finetunes_on_ranks_that_torchrun_started(found: Found) -> None:
    """It takes the options of `arb finetune`, and ends with the adapters of the runs above. Rank 0 alone prints."""
    folder, ranks = found
    first, *others = (of_rank["finetunes"]["module"] for of_rank in ranks)
    assert not any(other["printed"] for other in others)
    assert [each["code"] for each in (first, *others)] == [0] * len(ranks)
    summary = json.loads((folder / "module" / "summary.json").read_text())
    assert summary["ranks"] == len(ranks)
    assert summary["adapter_sha256"] == ranks[0]["finetunes"]["digests"]["saved"]
    assert first["printed"].count("adapters " + summary["adapter_sha256"][:16]) == 1


@two
def test_ranks_whose_adapters_differ_are_refused(found: Found) -> None:
    """Their base is the same. One rank found an older checkpoint; and AdamW moved one rank's matrices elsewhere."""
    says = [of_rank["refuses_ranks_whose_adapters_differ"] for of_rank in found[1]]
    assert all(one == says[0] for one in says)
    for name, fact in (("behind", "checkpoint_adapter_sha256"), ("drifted", "adapter_sha256")):
        wanted = (
            f"rank {len(says) - 1} has '[0-9a-f]{{64}}' for {fact}, but rank 0 has '[0-9a-f]{{64}}', and .*"
        )
        assert re.fullmatch(wanted, says[0][name]), says[0][name]
