"""`bench.learning`: rates are tuned until the best lies within what was tried; a text that no choice was made on judges, once."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import schedule
from arbitor.optimized.training.data import load_corpus, split_corpus, training_batch, validation_windows
from arbitor.reference.audit import audit
from bench import machine
from bench.learning import __main__ as learning
from bench.learning import copies, jobs, judging, learner, rules, wanted
from bench.test_learning import job_of, text_in


def test_rules_are_tuned_then_run_then_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """`best` takes what `tune` found best and needs all of it; the text that judges is read once, and changes no choice."""
    monkeypatch.setattr(learning, "WINDOWS", 2)
    monkeypatch.setitem(jobs.GRID, "integer", ((1 / 64, 8 / 64), (0.6,)))
    out = tmp_path / "out"
    toy = replace(jobs.SIZES["toy"], batch=2, context=32)
    monkeypatch.setitem(jobs.SIZES, "toy", toy)
    options = [
        "--size",
        "toy",
        "--rules",
        "integer",
        "--steps",
        "3",
        "--data",
        str(text_in(tmp_path / "text")),
    ]
    options += ["--device", "cpu", "--out", str(out), "--pieces", "--seeds", "0", "1"]
    monkeypatch.setattr(jobs, "GROWTH", 0)
    assert learning.main(["--suite", "best", *options]) == 1
    [lacking] = capsys.readouterr().err.splitlines()
    assert "the best rate and decay are not known, since 2 of them" in lacking
    assert learning.main(["--suite", "tune", "best", *options, "--seconds", "-1"]) == 1
    assert capsys.readouterr().err == "2 runs not done: time is over\n"
    assert learning.main(["--suite", "tune", "best", *options]) == 0
    said = capsys.readouterr()
    assert "the best rate 0.125 is the largest that was tried" in said.err
    runs = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert [(run["suite"], run["learning_rate"], run["seed"]) for run in runs] == [
        ("tune", 1 / 64, 0), ("tune", 8 / 64, 0), ("best", 8 / 64, 0), ("best", 8 / 64, 1)
    ]  # fmt: skip
    assert runs[1]["val_bpb"] == runs[2]["val_bpb"] < runs[0]["val_bpb"]
    judge = ["--judge", str(text_in(tmp_path / "other", 1)), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit):
        learning.main(judge)
    assert "learned from 'text', which --data must name too" in capsys.readouterr().err
    judge += ["--data", str(tmp_path / "text")]
    with pytest.raises(SystemExit):
        learning.main(["--judge", str(tmp_path / "text"), *judge[2:]])
    assert "is the text that a run learned from" in capsys.readouterr().err
    assert learning.main(judge) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    held_out = [
        run.get("held_out", {}).get("bpb") for run in json.loads(out.with_suffix(".json").read_text())["runs"]
    ]
    assert held_out[:2] == [None, None] and rows[-1][-2] == f"{sum(held_out[2:]) / 2:.3f}"
    corpus = load_corpus(str(tmp_path / "other"))
    windows = validation_windows(corpus, judging.whole(corpus), count=2, context=32)
    model = learner.Learner(toy, rules.RULES["integer"], seed=1, device="cpu")
    for step in range(3):
        text = load_corpus(str(tmp_path / "text"))
        batch = training_batch(text, split_corpus(text, 32), batch=2, context=32, seed=1, micro_step=step)
        model.step(batch, schedule.rate(step, 3, theta=1, gain=1.0) * 8 / 6)
    assert held_out[3] == model.bits_per_byte(windows)
    with pytest.raises(SystemExit):
        learning.main(judge)
    assert "a held-out text is read once" in capsys.readouterr().err
    for run in (document := json.loads(out.with_suffix(".json").read_text()))["runs"]:
        run.pop("held_out", None)
    out.with_suffix(".json").write_text(json.dumps(document))
    losses = iter((1.5, math.nan))
    monkeypatch.setattr(learner.Learner, "bits_per_byte", lambda *_: next(losses))
    assert learning.main(judge) == 0, "a model that lost its way is a result"
    assert "| not finite |" in capsys.readouterr().out.splitlines()[-1]


def _tuned(rates: dict[float, float], rule: str = "float AdamW") -> list[dict[str, Any]]:
    """Return runs of the suite `tune` that ended with these bits per byte by rate, a little worse with the second decay."""
    return [
        {
            **jobs.record_of(job_of(rule, suite="tune", rate=rate, decay=decay)),
            "val_bpb": bpb + 0.1 * place,
            "data_sha256": "",
        }
        for rate, bpb in rates.items()
        for place, decay in enumerate(jobs.GRID[rule][1])
    ]


def test_a_grid_grows_until_the_best_rate_lies_within() -> None:
    """As far as GROWTH goes; and until the runs of a grid are there, nothing is added to it."""
    setting = jobs.setting_of(jobs.record_of(job_of("float AdamW")))
    low, middle, high = jobs.GRID["float AdamW"][0]
    within = _tuned({low: 3.0, middle: 1.0, high: 2.0})
    assert jobs.rates_to_try(setting, within) == [low, middle, high]
    above = _tuned({low: 3.0, middle: 2.0, high: 1.0})
    assert jobs.rates_to_try(setting, above) == [low, middle, high, high * (high / middle)]
    assert jobs.rates_to_try(setting, above[:-1]) == [low, middle, high]
    below = _tuned({low: 1.0, middle: 2.0, high: 3.0})
    assert jobs.rates_to_try(setting, below) == [low * (low / middle), low, middle, high]
    how: dict[str, Any] = {
        "seeds": (0,),
        "steps": 4,
        "data": "stdlib",
        "sizes": ["toy"],
        "rules": ["float AdamW"],
    }
    with pytest.raises(ValueError, match="since 2 of them have no run"):
        list(jobs.jobs_of("best", runs=above, **how))
    [best] = jobs.jobs_of("best", runs=within, **how)
    assert (best.rate, best.decay) == (middle, jobs.GRID["float AdamW"][1][0])
    rates = {low: 9.0, middle: 8.0, high: 7.0}
    for number in range(jobs.GROWTH + 2):
        rates = {rate: 9.0 - place for place, rate in enumerate(jobs.rates_to_try(setting, _tuned(rates)))}
        assert len(rates) == 3 + min(number + 1, jobs.GROWTH)
    [sentence] = jobs.at_an_end(_tuned(rates))
    assert f"the best rate {max(rates):.4g} is the largest that was tried" in sentence


def test_a_rate_with_which_a_run_lost_its_way_is_not_the_best() -> None:
    """No number is larger than NaN, and none is smaller: whichever run came first would have been the best."""
    low, middle, high = jobs.GRID["float AdamW"][0]
    for rates in ({low: math.nan, middle: 1.0, high: 2.0}, {low: 2.0, middle: 1.0, high: math.nan}):
        [best] = jobs.best_of(_tuned(rates)).values()
        assert best["val_bpb"] == 1.0
    lost = {low * (low / middle) ** n: math.nan for n in range(jobs.GROWTH + 1)} | {
        middle: math.nan,
        high: math.nan,
    }
    how: dict[str, Any] = {
        "seeds": (0,),
        "steps": 4,
        "data": "stdlib",
        "sizes": ["toy"],
        "rules": ["float AdamW"],
    }
    setting = jobs.setting_of(jobs.record_of(job_of("float AdamW")))
    lost = dict.fromkeys((low, middle, high), math.nan)
    for _ in range(jobs.GROWTH):
        lost = dict.fromkeys(jobs.rates_to_try(setting, _tuned(lost)), math.nan)
    assert min(lost) < low and max(lost) == high, "smaller rates are tried"
    with pytest.raises(ValueError, match="no rate is the best, since the loss is not finite"):
        list(jobs.jobs_of("best", runs=_tuned(lost), **how))


def test_tune_tries_on_in_one_call_and_workers_share_what_it_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, each of which knows what the other has done, do every run once."""
    monkeypatch.setattr(learning, "WINDOWS", 2)
    monkeypatch.setattr(jobs, "GROWTH", 1)
    monkeypatch.setitem(jobs.SIZES, "toy", replace(jobs.SIZES["toy"], batch=1, context=32))
    monkeypatch.setitem(jobs.GRID, "integer", ((8 / 64, 16 / 64), (0.6,)))
    options = ["--suite", "tune", "--size", "toy", "--rules", "integer", "--steps", "3", "--device", "cpu"]
    options += ["--data", str(text_in(tmp_path / "text"))]
    assert learning.main([*options, "--out", str(tmp_path / "all")]) == 0
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert [run["learning_rate"] for run in runs] == [8 / 64, 16 / 64, 32 / 64]
    files = [tmp_path / f"{worker}.json" for worker in range(2)]
    for _ in range(2):
        for worker, file in enumerate(files):
            known = [str(other) for other in files if other != file and other.exists()]
            more = ["--worker", f"{worker}/2", "--pieces", "--out", str(file)]
            assert learning.main([*options, *more, *(("--without", *known) if known else ())]) == 0
    shared = [json.loads(file.read_text())["runs"] for file in files]
    assert [[run["learning_rate"] for run in of] for of in shared] == [[8 / 64, 32 / 64], [16 / 64]]


def test_windows_that_a_text_has_a_copy_of() -> None:
    """At any place and in any piece, at its end too; and a window that differs in one byte of its middle is no copy."""
    draws = torch.Generator().manual_seed(0)
    data_N = torch.randint(0, 256, (5000,), generator=draws, dtype=torch.uint8)
    starts = [*range(1000, 1033), 0, 5000 - 64]
    windows_WT = torch.stack([data_N[start : start + 64] for start in starts]).long()
    assert copies.copied(windows_WT, data_N).all()
    assert not copies.copied(windows_WT.flip(1), data_N).any()
    windows_WT[:, 32] ^= 1
    assert not copies.copied(windows_WT, data_N).any()
    assert not copies.copied(windows_WT[:, :62], data_N).any(), "shorter than two blocks"
    assert not copies.copied(windows_WT, data_N[:31]).any()


def test_a_held_out_text_is_judged_without_what_was_learned_from(tmp_path: Path) -> None:
    learned, other = (load_corpus(str(text_in(tmp_path / str(number), number, 640))) for number in (0, 1))
    (tmp_path / "both").write_bytes((tmp_path / "1").read_bytes() + (tmp_path / "0").read_bytes()[64:576])
    windows_WT, left_out = judging._windows(
        load_corpus(str(tmp_path / "both")), learned, count=50, context=64
    )
    assert (windows_WT.shape[0], left_out) == (10, 8)
    assert torch.equal(windows_WT.flatten(), other.data_N.long())
    with pytest.raises(ValueError, match=r"all 10 windows of .* stand in the text"):
        judging._windows(learned, learned, count=50, context=64)


def test_the_runs_that_are_wanted_can_be_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page shows them, each fits a call, and those of this program lay out as many runs as were meant."""
    monkeypatch.chdir(tmp_path)
    assert wanted.main(["--out", "wanted"]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = (machine.ROOT / "docs" / "learning.md").read_text()
    assert wanted.commands().splitlines() == ["```", *printed, "```"]
    assert all(f"<!-- made by bench.learning.wanted.{name} -->" in page for name in ("table", "commands"))
    assert all(each.seconds <= wanted.CALL_SECONDS for each in wanted.WANTED)
    found = []
    for line in printed:
        words = shlex.split(line.split("  # ")[0])
        if words[2] == "bench.learning" and "--judge" not in words:
            args = learning.parser_of().parse_args(words[3:])
            learning.check_sizes(learning.parser_of(), args)
            found.append(len(learning.planned(args, args.suite[0], [])))
    assert found == [6 * len(jobs.TUNED), 15]
    weights = sum(area.weights for area in audit(wanted.CONFIGS["wide.json"]).areas)
    assert weights == pytest.approx(105e6, rel=0.01)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        wanted.main(["--out", "file"])
    assert "argument --out: is 'file', but must be a folder" in capsys.readouterr().err
