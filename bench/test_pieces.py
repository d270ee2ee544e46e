"""`bench.learning`: runs in pieces end with the bits of runs in one, and results are gone on with only where they fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.training.data import load_corpus, split_corpus, validation_windows
from bench import machine
from bench.learning import __main__ as learning
from bench.learning import jobs, learner, pieces, rules, training
from bench.test_learning import text_in
from conformance.compare import exact
from conformance.graph.models import NANO, WHOLE


@pytest.mark.parametrize(
    "rule", ["integer", "averaged", "sign", "straight-through", "float AdamW", "float Muon"]
)
def test_a_run_in_pieces_is_the_run_in_one(rule: str, tmp_path: Path) -> None:
    """Every weight, count and moment is as without a break, and so is the curve."""
    architecture = replace(jobs.SIZES["toy"], batch=2, context=32)
    corpus = load_corpus(str(text_in(tmp_path / "text")))
    split = split_corpus(corpus, 32)
    windows = validation_windows(corpus, split, count=2, context=32)
    given = (architecture, rules.RULES[rule], corpus, split, windows)
    how: dict[str, Any] = {"seed": 1, "steps": 5, "device": "cpu", "evaluations": 2, "job": {"rule": rule}}
    whole = training.train(*given, **how, piece=tmp_path / "whole")
    taken = []
    for commit in ("a", "b", "b", "c", "d"):
        cut = training.train(*given, **how, piece=tmp_path / "cut", until=-1.0, commit=commit)
        taken.append(cut.get("unfinished"))
    assert taken == [1, 2, 3, 4, None] and cut["commit"] == "a, then b, then c, then d"
    for name in ("curve", "val_bpb", "flips"):
        assert cut.get(name) == whole.get(name)
    found = []
    for name in ("whole", "cut"):
        model = learner.Learner(*given[:2], seed=1, device="cpu")
        pieces.load(tmp_path / name, model, {"rule": rule})
        found.append({name: tensor.detach().clone() for name, tensor in model.tensors().items()})
    assert found[0].keys() == found[1].keys()
    exact(*(tuple(each.values()) for each in found))
    again = training.train(*given, **how, piece=tmp_path / "cut", until=-1.0, commit="d")
    assert again == cut, "a run that ended takes no step"


def test_a_run_that_goes_on_warms_up_before_it_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: a process has kernels to compile, whatever steps another process took. Here replays do nothing."""
    recorded: list[int] = []

    def record(self: learner.Learner, size: int) -> tuple[Any, torch.Tensor]:
        recorded.append(self.taken)
        return SimpleNamespace(replay=lambda: None), torch.zeros(())

    monkeypatch.setattr(learner.Learner, "_record", record)
    architecture = replace(jobs.SIZES["toy"], batch=2, context=16)
    for _ in range(2):
        model = learner.Learner(architecture, rules.RULES["integer"], seed=0, device="cpu")
        model.capture = True
        pieces.load(tmp_path / "piece", model, {})
        for _ in range(learner.EAGER_STEPS + 2):
            model.step(torch.zeros(2, 16, dtype=torch.int64), 1.0)
        pieces.save(tmp_path / "piece", model, pieces.History(taken=model.taken), {})
    assert recorded == [learner.EAGER_STEPS, 2 * learner.EAGER_STEPS + 2]


def test_a_run_that_failed_is_done_again_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed once is forgotten when it is done, and results of another device are not gone on with."""
    out = tmp_path / "out.json"
    options = ["--suite", "toy", "--rules", "integer", "--seeds", "0", "--device", "cpu", "--steps", "1"]
    options += ["--data", str(text_in(tmp_path / "text")), "--pieces", "--out", str(out), "--commit", "abc"]
    monkeypatch.setattr(learning, "WINDOWS", 2)
    monkeypatch.setitem(jobs.SIZES, "toy", replace(jobs.SIZES["toy"], batch=2, context=32))
    with monkeypatch.context() as patch:
        patch.setattr(learning, "train", None)
        assert learning.main(options) == 1
    [failed] = json.loads(out.read_text())["runs"]
    assert "TypeError" in failed["failed"]
    assert learning.main(options) == 0
    [done] = json.loads(out.read_text())["runs"]
    assert "failed" not in done and done["commit"] == "abc"
    document = json.loads(out.read_text())
    document["machine"]["device"] = "another"
    out.write_text(json.dumps(document))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        learning.main(options)
    assert stopped.value.code == 2
    own = machine.machine_info()["device"]
    assert capsys.readouterr().err.endswith(f"whose runs are of another, but must be of this device, {own}\n")


def test_a_piece_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    architecture = replace(jobs.SIZES["toy"], batch=2, context=32)
    model = learner.Learner(architecture, rules.RULES["integer"], seed=0, device="cpu")
    pieces.save(tmp_path / "piece", model, pieces.History(), {"seed": 0})
    assert pieces.load(tmp_path / "none", model, {"seed": 0}) is None
    with pytest.raises(
        ValueError, match=r"is a piece of another run: \{'seed': 0\}, where \{'seed': 1\} was asked"
    ):
        pieces.load(tmp_path / "piece", model, {"seed": 1})
    other = learner.Learner(replace(architecture, width=128), rules.RULES["integer"], seed=0, device="cpu")
    with pytest.raises(ValueError, match="holds other tensors"):
        pieces.load(tmp_path / "piece", other, {"seed": 0})
    (tmp_path / "piece").write_bytes((tmp_path / "piece").read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no piece of a run: it has"):
        pieces.load(tmp_path / "piece", model, {"seed": 0})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("text", "argument --data: is a text 'text' with other bytes than that of the runs at hand"),
        ("size", "argument --size: is another 'nano.json' than that of the runs at hand"),
    ],
)
def test_a_name_that_stands_for_something_else_is_refused(
    changed: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs are looked for by name: those of another text or model under that name would be taken for the ones asked for."""
    monkeypatch.setattr(learning, "WINDOWS", 2)
    config, text = tmp_path / "nano.json", text_in(tmp_path / "text", size=6000)
    config.write_text(NANO.to_json())
    options = ["--suite", "toy", "--size", str(config), "--rules", "integer", "--seeds", "0", "--steps", "1"]
    options += ["--data", str(text), "--device", "cpu", "--pieces", "--out", str(tmp_path / "out.json")]
    assert learning.main(options) == 0
    [run] = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (run["size"], run["data"]) == ("nano.json", "text"), "no path of this machine"
    assert jobs.architecture_in(run) == jobs.architecture_of(str(config))
    assert learning.main(options) == 0, "nothing is left"
    corpus = load_corpus(str(text))
    split = split_corpus(corpus, run["architecture"]["context"])
    assert (corpus.sha256, split.validation_sha256()) == (run["data_sha256"], run["validation_sha256"])
    windows = validation_windows(corpus, split, count=run["windows"], context=run["architecture"]["context"])
    given = (jobs.architecture_in(run), jobs.rule_in(run), corpus, split, windows)
    again = training.train(*given, seed=run["seed"], steps=run["steps"], device="cpu")
    assert again["val_bpb"] == run["val_bpb"], "a record says all that it takes"
    if changed == "text":
        text_in(tmp_path / "text", 1, 6000)
    else:
        config.write_text(replace(NANO, head_inner=NANO.head_inner + 12).to_json())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        learning.main(options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    (tmp_path / "more").mkdir()
    twice = {"text": ["--data", str(text), str(text_in(tmp_path / "more" / "text", 2))]}
    other = tmp_path / "more" / "nano.json"
    other.write_text(NANO.to_json())
    twice["size"] = ["--size", str(config), str(other)]
    with pytest.raises(SystemExit):
        learning.main([*options, *twice[changed], "--out", str(tmp_path / "new.json")])
    assert "must name each once" in capsys.readouterr().err


def test_what_a_step_takes_is_told_by_steps_that_neither_warm_up_nor_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A piece that begins just before a validation compiles within a step, which took the place of many in the sum."""
    now = [0.0]
    monkeypatch.setattr("bench.learning.training.time.perf_counter", lambda: now[0])
    history = pieces.History()

    def take(clock: training.Clock, first: int, last: int, seconds: float, *, slow: bool = False) -> None:
        clock.start(first)
        now[0] += seconds * (last - first)
        clock.stop(last, slow=slow)

    clock = training.Clock(history, warm=4, device="cpu")
    take(clock, 0, 4, 50.0)
    assert clock.seconds_a_step() == 50, "nothing else is known"
    take(clock, 4, 9, 0.5)
    take(clock, 9, 10, 7.0, slow=True)
    assert (clock.seconds_a_step(), history.timed, history.slow) == (0.5, 5, 5)
    again = training.Clock(history, warm=14, device="cpu")
    take(again, 10, 11, 90.0)
    assert again.seconds_a_step() == 0.5


def test_a_graph_in_pieces_is_the_graph_in_one(tmp_path: Path) -> None:
    """Its tables too: uses and ages of codes, neighbours, memory, handicaps; and a mean of gradients."""
    (tmp_path / "nano.json").write_text(WHOLE.to_json())
    architecture = replace(jobs.architecture_of(str(tmp_path / "nano.json")), batch=2, context=16)
    corpus = load_corpus(str(text_in(tmp_path / "text")))
    split = split_corpus(corpus, 16)
    windows = validation_windows(corpus, split, count=2, context=16)
    given = (architecture, rules.RULES["averaged"], corpus, split, windows)
    how: dict[str, Any] = {"seed": 1, "steps": 3, "device": "cpu", "evaluations": 1}
    whole = training.train(*given, **how, piece=tmp_path / "whole")
    for _ in range(3):
        cut = training.train(*given, **how, piece=tmp_path / "cut", until=-1.0)
    assert {**cut, "seconds": 0} == {**whole, "seconds": 0}
    found = []
    for name in ("whole", "cut"):
        model = learner.Learner(*given[:2], seed=1, device="cpu")
        pieces.load(tmp_path / name, model, {})
        found.append({name: tensor.clone() for name, tensor in model.tensors().items()})
    assert any("usage" in name for name in found[0]) and found[0].keys() == found[1].keys()
    exact(*(tuple(each.values()) for each in found))
