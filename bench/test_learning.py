"""`bench.learning`: every rule learns from the same windows, and what it came to is reported as it was measured."""

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
from arbitor.optimized.training.data import (
    Corpus,
    load_corpus,
    split_corpus,
    training_batch,
    validation_windows,
)
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import SIGN_VOTES
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import preset
from bench import machine
from bench.learning import __main__ as learning
from bench.learning import jobs, learner, report, rules, training
from bench.learning.dense import DenseOps, DenseWeight
from conformance.compare import exact
from conformance.graph.models import WHOLE


def job_of(rule: str, **changes: Any) -> jobs.Job:
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
    # At a quarter of the rate 12 steps bring no weight over its threshold.
    steps = 120 if rule == "long averaged" else 12
    result = training.train(*given, seed=3, steps=steps, device="cpu", evaluations=2)
    want = [training_batch(corpus, split, batch=2, context=32, seed=3, micro_step=n) for n in range(steps)]
    assert all(torch.equal(one, other) for one, other in zip(seen, want, strict=True))
    assert [step for step, _ in result["curve"]] == [0, steps // 2, steps]
    assert result["curve"][-1][1] == result["val_bpb"] < result["curve"][0][1], "steps on one sequence"
    width = 64
    assert result["weights"] == 12 * width**2 + (256 + 32 + 256) * width
    # A mean has a byte for each element of a matrix, and one for each row.
    means = 12 * width**2 + 9 * width if "average_gradients" in rules.RULES[rule].config else 0
    per_weight = (result["state_bytes"] - means) / result["weights"]
    if rules.RULES[rule].kind == "integer":
        # 2 / 12 for whole groups; rows of 64 columns have six.
        assert 1.2 + 2 / 12 < per_weight < 1.2 + 2 * 6 / 64 + 1e-4
    elif rules.RULES[rule].muon:
        # 12 for the matrices; tables and classes have AdamW.
        assert result["state_bytes"] == 12 * 12 * width**2 + 16 * (256 + 32 + 256) * width
    else:
        assert per_weight == 16
    assert result["tokens"] == steps * 2 * 32


def test_a_compiled_step_is_the_step() -> None:
    """The graphs of torch.compile hold every vote."""
    architecture, start = replace(jobs.SIZES["toy"], batch=2, context=16), torch.Generator().manual_seed(5)
    plain, compiled = (
        learner.Learner(architecture, rules.RULES["integer"], seed=3, device="cpu", compiled=compiled)
        for compiled in (False, True)
    )
    before = compiled.trits()
    for _ in range(5):
        ids_BT = torch.randint(256, (2, 16), generator=start)
        exact(compiled.step(ids_BT, 1.0), plain.step(ids_BT, 1.0))
    assert any(compiled.flip_rates(before).values())
    exact(tuple(compiled.tensors().values()), tuple(plain.tensors().values()))


def test_the_rules_are_those_of_the_product() -> None:
    """The integer rule is what a preset has; the seeds' rule is what `arb train --sign-votes` has."""
    assert rules.RULES["integer"] == rules.Rule("integer", schedule.GAIN, None)
    assert jobs.rule_of(job_of("integer", steps=6000)).decay == schedule.decay_of(6000) == 1
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
    run = jobs.record_of(job_of("integer"))
    documents = [
        {"machine": {"device": "a"}, "command": "", "runs": [{**run, "data_sha256": text}]}
        for text in ("one", "other")
    ]
    with pytest.raises(ValueError, match="has runs on 2 texts called stdlib"):
        learning.merged(documents)
    learning.merged(documents[:1])


def test_a_row_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    """Also where the rule of that name has changed; and a run of the rule as it was counts for nothing with `--without`."""
    old = {**jobs.record_of(job_of("sign")), "commit": "old", "data_sha256": "a"}
    other = {**old, **jobs.record_of(job_of("integer"))}
    new = {**old, "commit": "new", "config": {**old["config"], "theta": 33}}
    failed = {**old, "commit": "later", "failed": "no memory"}
    documents = [
        {"machine": {"device": "a"}, "command": str(number), "runs": runs}
        for number, runs in enumerate(([other, old], [new], [failed]))
    ]
    found = learning.merged(documents)["runs"]
    assert [(run["rule"], run["commit"]) for run in found] == [("integer", "old"), ("sign", "new")]
    assert jobs.measured(job_of("sign"), [old]) and not jobs.measured(job_of("sign"), [new])
    wider = {**old, "architecture": {**old["architecture"], "width": 65}}
    assert not jobs.measured(job_of("sign"), [wider]), "a size of that name was another one"
    del old["config"], old["architecture"]
    assert jobs.measured(job_of("sign"), [old]), (
        "files from before rules were recorded name their commit alone"
    )


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
    assert "no memory" in stored["runs"][0]["failed"]
    assert stored["command"] == shlex.join(["python", "-m", "bench.learning", *options, "--out", "failed"])
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


def text_in(path: Path, number: int = 0, size: int = 3000) -> Path:
    """Write a text of its own in few letters."""
    draws = torch.randint(97, 101, (size,), generator=torch.Generator().manual_seed(number))
    path.write_bytes(bytes(draws.tolist()))
    return path


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
    corpus = load_corpus(str(text_in(tmp_path / "text")))
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
    drawn = {**jobs.record_of(job_of("integer")), **found}
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


def test_a_curve_is_of_one_setting_and_of_the_best(tmp_path: Path) -> None:
    """A mean over the runs of several suites is a mean of nothing."""
    runs = [
        {
            **jobs.record_of(job_of("integer", suite=suite, rate=rate, seed=seed)),
            "commit": "a",
            "val_bpb": rate,
        }
        for suite, rate in (("table", 1.0), ("best", 2.0), ("toy", 3.0), ("tune", 4.0))
        for seed in range(2)
    ]
    [by_rule] = report.panels_of(runs).values()
    assert [run["learning_rate"] for run in by_rule["integer"]] == [2.0, 2.0]
    [by_rule] = report.panels_of([run for run in runs if run["suite"] != "best"]).values()
    assert [run["learning_rate"] for run in by_rule["integer"]] == [3.0, 3.0]


def _trits(model: learner.Learner) -> dict[str, torch.Tensor]:
    """Return the trits of each weight by the last part of its name and its layer."""
    weights = {name: module.weight for name, module in model.model.ternary_modules().items()}
    if model.rule.kind == "straight-through":
        return {name: weight.value.sign() for name, weight in weights.items()}  # type: ignore[attr-defined]
    return {name: reference_ops.unpack_trits(weight.packed, weight.shape) for name, weight in weights.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["integer", "straight-through", "float AdamW"])
def test_flips_of_each_kind_are_those_of_the_trits(name: str, tmp_path: Path) -> None:
    """In the step before each validation, of integers and behind straight-through weights; floats have none."""
    architecture = replace(jobs.SIZES["toy"], batch=2, context=32)
    corpus = load_corpus(str(text_in(tmp_path / "text")))
    split = split_corpus(corpus, 32)
    windows = validation_windows(corpus, split, count=1, context=32)
    rule = rules.RULES[name]
    how: dict[str, Any] = {"seed": 0, "steps": 4, "device": "cpu", "evaluations": 2}
    found = training.train(architecture, rule, corpus, split, windows, **how)
    if name == "float AdamW":
        assert "flips" not in found
        return
    assert [step for step, _ in found["flips"]] == [2, 4]
    model, trits = learner.Learner(architecture, rule, seed=0, device="cpu"), []
    for step in range(2):
        trits.append(_trits(model))
        batch = training_batch(corpus, split, batch=2, context=32, seed=0, micro_step=step)
        model.step(batch, schedule.rate(step, 4, theta=1, gain=1.0, decay=rule.decay))
    before, after = trits[-1], _trits(model)
    named: dict[str, tuple[str, ...]] = {
        "embedding": ("bytes", "positions"),
        "attention": ("qkv", "output"),
        "feed-forward": ("up", "down"),
        "head": ("head",),
    }
    rates = found["flips"][0][1]
    assert rates.keys() == named.keys() and sum(rates.values()) > 0
    for kind, last_parts in named.items():
        names = [key for key in after if key.split(".")[-1] in last_parts]
        flipped = sum(int((before[key] != after[key]).sum()) for key in names)
        assert rates[kind] == flipped / sum(after[key].numel() for key in names)


def test_the_page_tells_the_rates_that_the_schedule_has() -> None:
    """Each row of the table of lengths: warm-up, flat part, decay, and the sum of the shares of the rate."""
    lines = (machine.ROOT / "docs" / "learning.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| steps | warm-up |")) + 2
    rows = [line.strip("| ").replace(",", "").replace(" %", "").split(" | ") for line in lines[first:]]
    rows = rows[: rows.index([""])]
    for steps, warmup, flat, falls, at_full in (map(int, row) for row in rows):
        decay = schedule.decay_of(steps)
        shares = [schedule.share_of_rate(step, steps, decay=decay) for step in range(steps)]
        assert warmup == math.ceil(schedule.WARMUP_FRACTION * steps)
        assert flat == max(warmup, steps - math.ceil(decay * steps)) and falls == round(100 * decay)
        assert at_full == round(sum(shares))
    assert len(rows) >= 6
