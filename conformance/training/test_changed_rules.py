"""Files of a model that learned by other rules are refused by name, and a run may begin with the rest of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor import ArbModel
from arbitor.optimized.training.beginning import begin_with
from arbitor.optimized.training.checkpoint import CheckpointError, load_checkpoint, load_header
from arbitor.optimized.training.loop import train
from arbitor.reference.config import with_fields
from conformance.training.forge import Change, forged
from conformance.training.nano import NANO, WHOLE
from conformance.training.runs import options, train_until_killed

BEFORE = "learned before the rule 'it reads normed rows'"


def say(rules: Any) -> Change:
    """State some rules, or none at all as old files do."""

    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["rules"] = rules
        if rules is None:
            del header["rules"]

    return change


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ArbModel(WHOLE, device="cpu", seed=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def old(folder: Path) -> Path:
    """A folder from before the video head read normed rows."""
    forged(folder / "model.safetensors", say(None))
    return folder


def test_a_file_says_the_rules_of_its_parts(folder: Path, finished: Path) -> None:
    path = folder / "model.safetensors"
    assert load_header(path)["rules"] == {"video_head": ["it reads normed rows"]}
    assert load_checkpoint(path).other_rules == {}
    # A run of a model without such a part.
    assert load_header(finished / "best.safetensors")["rules"] == {}


def test_an_old_file_without_such_a_part_loads_as_before(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(finished / "best.safetensors", tmp_path / "old.safetensors"))
    before = load_checkpoint(path).state_sha256
    assert load_checkpoint(forged(path, say(None))).state_sha256 == before


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (None, f"its video_head {BEFORE}"),
        ({}, f"its video_head {BEFORE}"),
        ({"video_head": ["it sings"]}, f"its video_head {BEFORE}"),
        (
            {"video_head": ["it reads normed rows", "it sings"]},
            "its video_head learned by the rule 'it sings', which this program does not have; another version",
        ),
        (
            {"video_head": ["it reads normed rows"], "byte_head": ["it sings"]},
            "its byte_head learned by the rule 'it sings'",
        ),
        ([], "malformed"),
        ({"video_head": 3}, "malformed"),
    ],
)
def test_other_rules_are_refused_by_name(folder: Path, rules: Any, says: str) -> None:
    path = forged(folder / "model.safetensors", say(rules))
    for load in (lambda: load_checkpoint(path), lambda: ArbModel.from_pretrained(folder, device="cpu")):
        with pytest.raises(CheckpointError, match=says):
            load()


@pytest.fixture
def old_run(text: Path, tmp_path: Path) -> Path:
    """A run that was stopped, and all of whose checkpoints are from before."""
    run = tmp_path / "run"
    train_until_killed(5, options(text, run, preset="whole"))
    files = sorted(run.glob("*.safetensors"))
    assert len(files) >= 2
    for path in files:
        forged(path, say(None))
    return run


def test_a_run_is_refused_with_one_sentence(old_run: Path, text: Path, recwarn: Any) -> None:
    """All of its files learned by the same rules, so that none of them takes the place of another."""
    calls: tuple[Callable[[], object], ...] = (
        lambda: ArbModel.from_pretrained(old_run, device="cpu"),
        lambda: train(options(text, old_run, preset=None, resume=True)),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=BEFORE) as caught:
            call()
        assert str(caught.value).count(BEFORE) == 1
    assert not [each for each in recwarn if BEFORE in str(each.message)]


def test_a_run_begins_with_all_that_learned_by_the_rules_of_now(old: Path) -> None:
    model, drawn = ArbModel(WHOLE, device="cpu", seed=9), ArbModel(WHOLE, device="cpu", seed=9)
    source = load_checkpoint(old / "model.safetensors", any_rules=True)
    beginning = begin_with(model, str(old))
    anew = [name for name in model.state() if name.startswith("video_head.")]
    assert anew and set(anew) == set(beginning.fresh)
    assert beginning.all_warnings()[0].endswith(source.other_rules["video_head"])
    for name, weight in model.weights().items():
        same = drawn.weights()[name] if name in anew else source.state[name]
        assert torch.equal(weight.packed, same.packed), name
    assert json.dumps(beginning.fresh)


def test_a_run_without_the_part_leaves_it_out_as_ever(old: Path) -> None:
    model = ArbModel(with_fields(WHOLE, video_latent=0), device="cpu", seed=9)
    beginning = begin_with(model, str(old))
    assert any(name.startswith("video_head.") for name in beginning.left_out)
    assert not [each for each in beginning.all_warnings() if BEFORE in each]


def test_adapters_need_a_base_by_the_rules_of_now(old: Path) -> None:
    with pytest.raises(CheckpointError, match=BEFORE):
        begin_with(ArbModel(WHOLE, device="cpu", seed=9), str(old), as_base=True)


def test_a_model_of_text_is_never_asked(finished: Path) -> None:
    assert begin_with(ArbModel(NANO, device="cpu"), str(finished)).fresh == ()
