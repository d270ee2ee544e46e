"""A mix on two ranks: each takes its share of the samples of a micro-batch, and together they learn from the batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.run_folder import CODEC_FILE
from conformance.compare import exact
from conformance.distributed.started import succeeded, torchrun
from conformance.sidecars.media_ranks import HELD_OUT, asked, held_out, shorten, tuned
from conformance.sidecars.media_runs import KINDS, options, outcome

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture(scope="module")
def folder(media: Path, short: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the runs of two ranks, `whole` and `killed`, and that of one process, `alone`."""
    shorten(short)
    folder = tmp_path_factory.mktemp("ranks")
    asked(media, folder, "whole")
    succeeded(torchrun(2, "conformance.sidecars.media_ranks", str(media), str(folder)))
    train(asked(media, folder, "alone"))
    train(tuned(media, folder, "tuned alone"))
    return folder


def test_shares_of_a_batch_are_the_batch(media: Path, cache: str) -> None:
    """Rows of one rank after those of the other, of one length, whatever the samples of a rank are."""
    with opened(options(media, None, *KINDS, feature_cache=cache, batch=4), None) as run:
        assert run.mix is not None
        seen = set()
        for micro_step in range(30):
            batch = run.mix.batch(micro_step)
            seen.add(batch.kind)
            shares = [batch.share(World(number, 2)) for number in range(2)]
            assert [each.kind for each in shares] == [batch.kind] * 2
            want, parts = batch.on("cpu"), [each.on("cpu") for each in shares]
            assert parts[0].keys() == parts[1].keys() == want.keys()
            for name in want.keys() - {"targets"}:
                exact(joined(*(part[name] for part in parts)), want[name], name)
            for name, value in vars(want["targets"]).items():
                exact(joined(*(getattr(part["targets"], name) for part in parts)), value, name)
        assert seen == {"text", *KINDS}


def joined(one: Any, other: Any) -> Any:
    """Return two shares one after the other, of equal size; None where both are."""
    if one is None or other is None:
        assert one is other
        return None
    assert one.shape == other.shape
    return one.new_tensor([*one.tolist(), *other.tolist()])


@pytest.mark.parametrize("names", [("whole", "alone"), ("tuned", "tuned alone")])
def test_two_ranks_learn_from_the_batches_of_one_process(folder: Path, names: tuple[str, str]) -> None:
    """Kinds come in the same order, and losses are alike before steps have told them apart."""
    lines = [list(read_metrics(folder / name / "metrics.jsonl")) for name in names]
    kinds = [[sorted(line.get("media", {})) for line in each] for each in lines]
    # Adapters learn no speech, and have no codec.
    spoken = {"speech"} if names[0] == "whole" else set()
    assert kinds[0] == kinds[1] and {kind for line in kinds[0] for kind in line} == {"text", *KINDS, *spoken}
    # The line of step 0 is of the model that nobody trained, and the losses of step 1 are of the same weights.
    compared = 0
    for ours, theirs in zip(lines[0][:2], lines[1][:2], strict=True):
        for kind, numbers in theirs.get("media", {}).items():
            assert ours["media"][kind] == pytest.approx(numbers, rel=1e-4), kind
            compared += len(numbers)
    assert compared > 5
    # Rank 0 has written the codec that each rank trained, as one process does.
    ours, theirs = (folder / name / CODEC_FILE for name in names)
    assert ours.exists() is bool(spoken) and (not spoken or ours.read_bytes() == theirs.read_bytes())


def test_a_mix_of_ranks_that_was_killed_goes_on_to_the_same_hash(folder: Path) -> None:
    whole, killed = (outcome(folder / name) for name in ("whole", "killed"))
    assert whole[:2] == killed[:2]
    assert whole[0] != outcome(folder / "alone")[0]


def test_a_file_that_one_rank_cannot_decode_ends_the_run_with_one_sentence(folder: Path) -> None:
    """Each rank leaves out what it cannot decode. Of ranks that exchanged other shapes one was aborted by gloo."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["refused"] for rank in range(2))
    assert first == second
    assert re.fullmatch(
        r"rank 1 has '.*[.]wav \([0-9a-f]{8}\)' for file \d of micro-batch \d+ that can be decoded, but rank 0 has "
        r"'.*/04[.]wav \([0-9a-f]{8}\)', and all ranks must have the same",
        first,
    )


def test_ranks_that_round_in_two_ways_keep_one_model(folder: Path) -> None:
    """All have the same numbers, so that they save together. A rank that saves alone is aborted."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["measured"] for rank in range(2))
    assert first == second and first[0] == first[1]
    assert load_checkpoint(folder / "measured" / "best.safetensors").step == 4


def test_ranks_share_the_measuring_of_what_is_held_out(folder: Path, media: Path) -> None:
    """Both have the numbers of one process: of no item, of one, and of a last batch that is not full."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["held out"] for rank in range(2))
    alone = held_out(media, folder, "held out alone")
    assert first == second and first.keys() == alone.keys() == {str(number) for number in HELD_OUT}
    for number in HELD_OUT:
        (bpb, of_kinds, rows), (want, of_kinds_alone, rows_alone) = first[str(number)], alone[str(number)]
        assert of_kinds.keys() == of_kinds_alone.keys() == {"text", *KINDS, "speech"}
        assert (want is None) is (number == 0)
        of_kinds["mean"], of_kinds_alone["mean"] = {"val_bpb": bpb}, {"val_bpb": want}
        for kind, numbers in of_kinds_alone.items():
            assert of_kinds[kind].keys() == numbers.keys()
            for name, value in numbers.items():
                near = None if value is None else pytest.approx(value, rel=1e-5)
                assert of_kinds[kind][name] == near, (number, kind, name)
        # Of seven, a batch of four and one of three: two, one, and the last one, which both ranks read.
        assert rows_alone == 4 * number and rows == 4 * -(-number // 2)
