"""`bench.learning`: every rule learns, runs are resumed bit for bit, choices are made on one text and judged on another."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.training import schedule
from arbitor.optimized.training.data import (
    Corpus,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.reference.config import SIGN_VOTES
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import preset
from bench import machine
from bench.learning import __main__ as learning
from bench.learning import jobs, judging, learner, pieces, report, rules, training
from bench.learning.dense import DenseOps, DenseWeight
from conformance.compare import exact
from conformance.graph.models import WHOLE


def _job(rule: str, **changes: Any) -> jobs.Job:
    return replace(jobs.Job("toy", "toy", rule, 0, 4, "stdlib"), **changes)


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule_learns_from_the_same_windows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights move, the curve is of the fixed windows, and a rule sees the windows of the seed and no others."""
    architecture = replace(jobs.SIZES["toy"], batch=2, context=32)
    seen: list[torch.Tensor] = []
    whole = learner.Learner.step

    def step(self: Any, ids_BT: torch.Tensor, share: float) -> None:
        seen.append(ids_BT)
        whole(self, ids_BT, share)

    monkeypatch.setattr(learner.Learner, "step", step)
    corpus = Corpus("text", torch.arange(4000, dtype=torch.int64).remainder(251).to(torch.uint8), "", 1)
    split = split_corpus(corpus, 32)
    windows = validation_windows(corpus, split, count=4, context=32)
    given = (architecture, rules.RULES[rule], corpus, split, windows)
    result = training.train(*given, seed=3, steps=12, device="cpu", evaluations=2)
    want = [training_batch(corpus, split, batch=2, context=32, seed=3, micro_step=n) for n in range(12)]
    assert all(torch.equal(one, other) for one, other in zip(seen, want, strict=True))
    assert [step for step, _ in result["curve"]] == [0, 6, 12]
    assert result["curve"][-1][1] == result["val_bpb"] < result["curve"][0][1], "12 steps on one sequence"
    width = 64
    assert result["weights"] == 12 * width**2 + (256 + 32 + 256) * width
    # A mean has a byte for each element of a matrix, and one for each row.
    means = 12 * width**2 + 9 * width if rule == "averaged" else 0
    per_weight = (result["state_bytes"] - means) / result["weights"]
    if rules.RULES[rule].kind == "integer":
        # 2 / 12 for whole groups; rows of 64 columns have six.
        assert 1.2 + 2 / 12 < per_weight < 1.2 + 2 * 6 / 64 + 1e-4
    elif rules.RULES[rule].muon:
        # 12 for the matrices; tables and classes have AdamW.
        assert result["state_bytes"] == 12 * 12 * width**2 + 16 * (256 + 32 + 256) * width
    else:
        assert per_weight == 16
    assert result["tokens"] == 12 * 2 * 32


def test_the_rules_are_those_of_the_product() -> None:
    """The integer rule is what a preset has; the seeds' rule is what `arb train --sign-votes` has."""
    assert rules.RULES["integer"] == rules.Rule("integer", schedule.GAIN, None)
    assert jobs.rule_of(_job("integer", steps=6000)).decay == schedule.decay_of(6000) == 1
    model = learner.Learner(jobs.SIZES["toy"], rules.RULES["integer"], seed=0, device="cpu")
    assert model.config == preset("tiny")
    assert rules.RULES["sign"].config == SIGN_VOTES


def test_straight_through_weights_are_ternary_in_products_and_float_behind_them() -> None:
    rule, architecture = rules.RULES["straight-through"], jobs.SIZES["toy"]
    model = learner.Learner(replace(architecture, batch=2, context=16), rule, seed=0, device="cpu")
    for _ in range(2):
        model.step(torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0)), 1.0)
    for weight in model.ops.weights:
        assert weight.value.unique().numel() <= 3 and weight.master.unique().numel() > 3
        scale = weight.master.detach().abs().mean()
        assert torch.equal(weight.value, (weight.master.detach() / scale).round().clamp(-1, 1) * scale)


def test_learning_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((machine.ROOT / "README.md").read_bytes() * 9)
    options = ["--suite", "toy", "--steps", "2", "--rules", "integer", "sign", "--data", str(text)]
    options += ["--device", "cpu", "--seeds", "0", "1", "--commit", "abc"]
    for worker in ("0", "1"):
        assert learning.main([*options, "--worker", f"{worker}/2", "--out", str(tmp_path / worker)]) == 0
    parts_of_it = [str(tmp_path / f"{worker}.json") for worker in ("0", "1")]
    capsys.readouterr()
    assert learning.main(["--report", *parts_of_it, "--out", str(tmp_path / "both")]) == 0
    assert learning.main(["--report", *parts_of_it, parts_of_it[0], "--out", str(tmp_path / "both")]) == 0
    capsys.readouterr()
    assert learning.main(["--report", str(tmp_path / "both.json"), "--out", str(tmp_path / "both")]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    runs = json.loads((tmp_path / "both.json").read_text())["runs"]
    assert [(row[4], row[9]) for row in rows] == [("integer", "2"), ("sign", "2")]
    assert [(run["rule"], run["seed"]) for run in runs] == [
        ("integer", 0), ("integer", 1), ("sign", 0), ("sign", 1)
    ], "one worker measured seed 0, the other seed 1; rules stand together"  # fmt: skip
    for row in rows:
        values = [run["val_bpb"] for run in runs if run["rule"] == row[4]]
        assert row[7] == f"{sum(values) / 2:.3f}" and row[8] == f"{max(values) - min(values):.3f}"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert {run["data"] for run in runs} == {"text.txt"}, "no path of this machine"
    assert all(run["date"] and run["commit"] == "abc" for run in runs)
    more = [*options, "--seeds", "0", "1", "2", "--without", *parts_of_it, "--out", str(tmp_path / "more")]
    assert learning.main(more) == 0
    added = json.loads((tmp_path / "more.json").read_text())["runs"]
    assert {(run["rule"], run["seed"]) for run in added} == {("integer", 2), ("sign", 2)}


@pytest.mark.parametrize("sizes", [(4, 12, 20, 33), (3, 16, 24, 17), (5, 7, 9, 50)])
def test_grouped_products_of_float_weights(sizes: tuple[int, int, int, int]) -> None:
    """With widths that the library's product takes and with others; one expert has no slot."""
    num_groups, num_rows, num_columns, num_slots = sizes
    generator = torch.Generator().manual_seed(0)
    w_ENK, x_MK, grad_MN = (
        torch.randn(shape, generator=generator)
        for shape in ((num_groups, num_rows, num_columns), (num_slots, num_columns), (num_slots, num_rows))
    )
    experts_M = torch.randint(0, num_groups - 1, (num_slots,), generator=generator)
    experts_M[experts_M == 1] = num_groups - 1
    ops, w = DenseOps(torch.float32), w_ENK.flatten(0, 1)
    weight, of_slot = DenseWeight(w, torch.nn.Parameter(w.clone())), w_ENK[experts_M]
    want_grad = torch.zeros_like(w_ENK).index_add_(0, experts_M, grad_MN[:, :, None] * x_MK[:, None])
    for got, want in (
        (
            ops.grouped_linear(x_MK, weight, experts_M, num_groups=num_groups),
            (of_slot @ x_MK[..., None])[..., 0],
        ),
        (
            ops.grouped_linear_input_grad(grad_MN, weight, experts_M, num_groups=num_groups),
            (grad_MN[:, None] @ of_slot)[:, 0],
        ),
        (
            ops.grouped_linear_weight_grad(grad_MN, x_MK, experts_M, num_groups=num_groups),
            want_grad.flatten(0, 1),
        ),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "option",
    [
        ("--worker", "2/2"),
        ("--worker", "x"),
        ("--steps", "0"),
        ("--without", "README.md"),
        ("--report", "none.json"),
    ],
)
def test_learning_refuses_in_one_sentence(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        learning.main(["--suite", "toy", *option])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option[0]}: is" in last and option[1] in last and "must be" in last


def test_results_of_different_devices_are_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"machine": {"device": name}, "runs": []}))
    with pytest.raises(SystemExit) as stopped:
        learning.main(["--report", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("argument --report: is of a and b, but must be of one device")


def test_results_on_texts_that_share_a_name_are_not_merged() -> None:
    """The sources of one Python are not those of another."""
    run = {**asdict(_job("integer")), "learning_rate": 1.0, "decay": 0.6}
    documents = [
        {"machine": {"device": "a"}, "command": "", "runs": [{**run, "data_sha256": text}]}
        for text in ("one", "other")
    ]
    with pytest.raises(ValueError, match="has runs on 2 texts called stdlib"):
        learning.merged(documents)
    learning.merged(documents[:1])


def test_a_row_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    """Also where the rule of that name has changed; and a run of the rule as it was counts for nothing with `--without`."""
    old = {**asdict(_job("sign")), **jobs.settings_of(_job("sign")), "commit": "old", "data_sha256": "a"}
    other = {**old, **asdict(_job("integer")), **jobs.settings_of(_job("integer"))}
    new = {**old, "commit": "new", "config": {**old["config"], "theta": 33}}
    failed = {**old, "commit": "later", "failed": "no memory"}
    documents = [
        {"machine": {"device": "a"}, "command": str(number), "runs": runs}
        for number, runs in enumerate(([other, old], [new], [failed]))
    ]
    found = learning.merged(documents)["runs"]
    assert [(run["rule"], run["commit"]) for run in found] == [("integer", "old"), ("sign", "new")]
    assert jobs.measured(_job("sign"), old) and not jobs.measured(_job("sign"), new)
    del old["config"]
    assert jobs.measured(_job("sign"), old), "files from before rules were recorded name their commit alone"


def test_what_is_left_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--suite", "toy", "--rules", "sign", "--seeds", "0", "--device", "cpu"]
    assert learning.main([*options, "--seconds", "-1"]) == 1
    assert capsys.readouterr().err == "1 runs not done: time is over\n"


def test_runs_that_failed_are_merged_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> dict[str, Any]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(learning, "train", fail)
    options = ["--suite", "toy", "--rules", "integer", "--seeds", "0", "--device", "cpu", "--steps", "2"]
    assert learning.main([*options, "--out", str(tmp_path / "failed")]) == 1
    stored = json.loads((tmp_path / "failed.json").read_text())
    assert "no memory" in stored["runs"][0]["failed"] and stored["command"].startswith(
        "python -m bench.learning"
    )
    capsys.readouterr()
    assert learning.main(["--report", str(tmp_path / "failed.json"), "--out", str(tmp_path / "both")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2, "a table without rows"


@pytest.mark.parametrize(
    "file", sorted(machine.RESULTS.glob("*/learning.json")), ids=lambda file: file.parent.name
)
def test_the_page_of_what_was_learned_is_of_what_is_stored(file: Path) -> None:
    assert file.with_suffix(".md").read_text() == report.page(json.loads(file.read_text()))


def test_every_suite_of_learning_names_what_differs() -> None:
    """Four times the steps, three quarters of them, four times the weights; and no run of a sweep twice, or as in the table."""
    # `best` asks what `tune` found.
    suites = [suite for suite in jobs.SUITES if suite != "best"]
    plans = {suite: list(jobs.jobs_of(suite, seeds=(0,), steps=1500, data="stdlib")) for suite in suites}
    assert {job.steps for job in (*plans["long"], *plans["long-sweep"])} == {6000}
    assert {job.steps for job in plans["time"]} == {1125}
    assert {jobs.SIZES[job.size].width for job in plans["wide"]} == {768}
    assert len(plans["tune"]) == len(set(plans["tune"])) == 6 * len(jobs.TUNED)
    for table, sweep in (("table", "sweep"), ("long", "long-sweep")):
        tried = [(job.rule, jobs.rule_of(job)) for job in (*plans[table], *plans[sweep])]
        assert all(tried.count(each) == 1 for each in tried)


def _text(path: Path, number: int = 0, size: int = 3000) -> Path:
    """Write a text of its own in few letters."""
    draws = torch.randint(97, 101, (size,), generator=torch.Generator().manual_seed(number))
    path.write_bytes(bytes(draws.tolist()))
    return path


@pytest.mark.parametrize("rule", ["integer", "sign", "straight-through", "float AdamW", "float Muon"])
def test_a_run_in_pieces_is_the_run_in_one(rule: str, tmp_path: Path) -> None:
    """Every weight, count and moment is as without a break, and so is the curve."""
    architecture = replace(jobs.SIZES["toy"], batch=2, context=32)
    corpus = load_corpus(str(_text(tmp_path / "text")))
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
    assert (cut["curve"], cut["val_bpb"]) == (whole["curve"], whole["val_bpb"])
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
    options += ["--data", str(_text(tmp_path / "text")), "--pieces", "--out", str(out), "--commit", "abc"]
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


def test_the_graph_learns_with_all_its_losses(tmp_path: Path) -> None:
    """A preset trains as `arb train` does: its codebook moves, which the loss of bytes alone does not reach."""
    (tmp_path / "nano.json").write_text(WHOLE.to_json())
    architecture = replace(jobs.architecture_of(str(tmp_path / "nano.json")), batch=2, context=16)
    assert architecture.name == "nano.json" and architecture.has_codes
    model = learner.Learner(architecture, rules.RULES["integer"], seed=0, device="cpu")
    twin = ArbModel(WHOLE, seed=0)
    ids_BT = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = model.step(ids_BT, 1.0)
    losses = twin.losses(ids_BT)
    assert twin.backward(losses, rate=rules.RULES["integer"].rate * WHOLE.theta, step=0)
    twin.step()
    assert loss.item() == losses["bytes"].item()
    exact(tuple(model.model.state().values()), tuple(twin.state().values()))
    tables = sum(table.nbytes for part in twin.table_modules().values() for table in part.tables().values())
    assert model.state_bytes > tables + model.num_weights
    corpus = load_corpus(str(_text(tmp_path / "text")))
    split = split_corpus(corpus, 16)
    windows = validation_windows(corpus, split, count=3, context=16)
    given = (architecture, rules.RULES["integer"], corpus, split, windows)
    how: dict[str, Any] = {"seed": 0, "steps": 2, "device": "cpu", "evaluations": 1}
    found = training.train(*given, **how, piece=tmp_path / "piece")
    assert [step for step, _ in found["curve"]] == [0, 2] and len(found["use"]) == 2
    use = found["use"][1]["codebooks"]["shared_vq.bridge.tables.text"]
    assert use["codes"] == WHOLE.num_codes and 1 <= use["perplexity"] <= use["used"] <= 3 * 14
    assert len(found["use"][1]["experts"]) == WHOLE.num_layers
    assert training.train(*given, **how, piece=tmp_path / "piece") == found
    drawn = {**asdict(_job("integer")), **jobs.settings_of(_job("integer")), **found}
    report.curves([drawn], tmp_path / "page.png", title="test")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_are_names_presets_and_files() -> None:
    assert jobs.architecture_of("r12").batch == 32 and jobs.architecture_of("r12").has_codes
    trunk = jobs.architecture_of("r12/trunk")
    assert trunk.config is not None and (trunk.config.num_codes, trunk.config.max_moe_iters) == (0, 1)
    assert not trunk.has_codes and not jobs.architecture_of("small").has_codes
    weights = {"7 M": 7.4e6, "29 M": 28.9e6, "110 M": 114e6}
    for name, number in weights.items():
        size = jobs.SIZES[name]
        assert 12 * size.num_layers * size.width**2 + 768 * size.width == pytest.approx(number, rel=0.02)


def test_rules_are_tuned_then_run_then_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """`best` takes what `tune` found best and needs all of it; the text that judges is read once, and changes no choice."""
    monkeypatch.setattr(learning, "WINDOWS", 2)
    monkeypatch.setitem(jobs.GRID, "integer", ((1 / 64, 8 / 64), (0.6,)))
    out = tmp_path / "out"
    toy = replace(jobs.SIZES["toy"], batch=2, context=32)
    monkeypatch.setitem(jobs.SIZES, "toy", toy)
    options = ["--size", "toy", "--rules", "integer", "--steps", "3", "--data", str(_text(tmp_path / "text"))]
    options += ["--device", "cpu", "--out", str(out), "--pieces", "--seeds", "0", "1"]
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
    judge = ["--judge", str(_text(tmp_path / "other", 1)), "--out", str(out), "--device", "cpu"]
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "r13"), "is 'r13', but must be one of 7 M"),
        (("--size", "r12", "--rules", "float Muon"), "take 'r12/trunk'"),
        (("--pieces",), "argument --pieces: needs --out"),
        (("--judge", "text"), "argument --judge: needs --out"),
    ],
)
def test_what_cannot_be_is_said(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        learning.main(options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
