"""Tests of the scripts beside the benchmarks: what they measure is what they say."""

from __future__ import annotations

import json
import math
import weakref
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import schedule
from arbitor.optimized.training.checkpoint import save_checkpoint
from arbitor.optimized.training.data import Corpus, split_corpus, training_batch, validation_windows
from arbitor.reference.audit import audit
from arbitor.reference.config import SIGN_VOTES, with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import preset
from bench import ablation, codes, generation, large, machine, parts, recall
from bench.learning import __main__ as learning
from bench.learning import learner, report, rules
from bench.learning.dense import DenseOps, DenseWeight
from conformance.graph.models import NANO, WHOLE, random_ids


def test_variants_of_the_ablation_differ_in_the_module_they_name() -> None:
    whole = ablation.full(preset("small"))
    assert (whole.num_codes, whole.num_hops, whole.memory_rows, whole.max_moe_iters) == (4096, 2, 16_384, 2)
    configs = {name: ablation.variant(whole, changes) for name, changes in ablation.VARIANTS.items()}
    assert len(set(configs.values())) == len(configs), "two variants are one model"
    assert configs["no composites"] == with_fields(whole, composite_codes=0) and whole.composite_codes == 4096
    assert configs["no graph"].composite_codes == configs["no graph"].num_hops == 0
    assert ablation.full(preset("tiny")) == preset("tiny")


def test_the_table_of_the_ablation_is_a_mean_over_seeds() -> None:
    results = [
        {"variant": name, "seed": seed, "val_bpb": bpb, "weights": 7}
        for name, seed, bpb in (
            ("no graph", 1, 2.0),
            ("every module", 1, 1.5),
            ("every module", 0, 1.0),
            ("no codes", 0, None),
        )
    ]
    rows = ablation.table(results).splitlines()[2:]
    assert rows == [
        "| every module | 7 | 1.250 | 1.000, 1.500 | +0.000 |",
        "| no graph | 7 | 2.000 | 2.000 | +0.750 |",
        "| no codes | 7 | nan | nan | +nan |",
    ]


def test_a_run_of_the_ablation_is_a_run_of_the_trainer(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes((machine.ROOT / "README.md").read_bytes()[:3000])
    extra = ("--data", str(text), "--device", "cpu", "--batch", "2", "--context", "16")
    [result] = ablation.runs(NANO, [("one turn", 3)], side_by_side=1, steps=2, extra=extra)
    assert (result["variant"], result["seed"], result["steps"]) == ("one turn", 3, 2)
    assert result["model"]["max_moe_iters"] == 1 and result["curve"][-1] == (2, result["val_bpb"])


def test_a_failed_run_of_the_ablation_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    extra = ("--data", "no such file", "--device", "cpu")
    assert not list(ablation.runs(NANO, [("no graph", 0)], side_by_side=1, steps=1, extra=extra))
    assert "no graph" in (said := capsys.readouterr().err) and "no such file" in said


def test_codes_and_experts_are_counted_as_the_model_uses_them() -> None:
    model = ArbModel(WHOLE, seed=3)
    windows_WT = random_ids(5, 12)
    found = codes.measure(model, windows_WT, batch=2)
    ids = model.trunk(windows_WT).codes.flatten()
    use = found["codebooks"]["shared_vq.bridge.tables.text"]
    assert found["positions"] == use["vectors"] == ids.numel() == 50
    shares = torch.bincount(ids).double() / 50
    entropy = -float((shares[shares > 0] * shares[shares > 0].log()).sum())
    assert (use["codes"], use["used"]) == (40, len(ids.unique()))
    assert use["perplexity"] == pytest.approx(math.exp(entropy))
    assert 0.1 < use["error"] < 1
    # Of 50 positions each has two of four experts, twice in the layer that turns twice.
    first, last = found["experts"].values()
    assert sum(first["load"]) == 100 and sum(last["load"]) == 200
    assert first["max_over_mean"] == max(first["load"]) / 25
    assert found["val_bpb"] == pytest.approx(model.loss(windows_WT).item() / math.log(2), rel=1e-5)
    assert not {"quantize", "modulations"} & {name for part in model.modules() for name in vars(part)}


def test_runs_of_bytes_are_those_that_a_code_can_tell_apart() -> None:
    windows_WT = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8], [9, 2, 3, 4, 5, 6, 7]])
    assert codes.runs_of_bytes(windows_WT, 3)["different"] == 7
    # 123, 234, 345, 123456 and 234567; 234568; 923 and 923456.
    assert codes.runs_of_bytes(windows_WT, 6)["different"] == 8
    assert codes.runs_of_bytes(windows_WT[:1], 6)["perplexity"] == pytest.approx(5)


def test_codes_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, file = tmp_path / "text", tmp_path / "one.safetensors"
    text.write_bytes((machine.ROOT / "README.md").read_bytes() * 3)
    model = ArbModel(replace(NANO, num_codes=40, code_dim=18), seed=3)
    how = {"step": 1, "seed": 3, "best_bpb": None, "progress": {}, "run": {"data": str(text), "context": 16}}
    save_checkpoint(file, model.state(), config=json.loads(model.config.to_json()), **how)
    given = ["--run", str(file), "--positions", "100", "--device", "cpu"]
    assert codes.main([*given, "--json", str(tmp_path / "codes.json")]) == 0
    found = json.loads((tmp_path / "codes.json").read_text())
    assert found["positions"] == 7 * 14 and found["steps"] == 1
    assert "| shared_vq.bridge.tables.text | 40 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        codes.main([*given[:2], "--positions", "13", "--device", "cpu"])
    assert "argument --positions: is 13, but must be at least 14" in capsys.readouterr().err


def test_large_measures_each_length_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of two bytes is refused, and costs no other row."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = large.main(
        [
            *("--presets", "tiny", "--ctx", "2", "4", "--checkpoint", "tiny", "--device", "cpu"),
            *("--out", str(tmp_path / "large")),
        ]
    )
    report = json.loads((tmp_path / "large.json").read_text())
    refused, row = report["rows"]
    assert status == 1 and "at least 4 bytes" in refused["failed"] and refused["context"] == 2
    assert row["context"] == 4 and row["weights"] == audit(preset("tiny")).weights and row["seed"] is None
    assert min(row[name] for name in row if name.endswith("_seconds")) > 0
    [entry] = report["checkpoints"]
    assert entry["same_state"] and len(entry["stages"]) == 5
    # The canonical state, and integer tables.
    assert 1.36 < entry["file_bytes"] / row["weights"] < 1.7
    shown = capsys.readouterr().out
    assert (
        "| tiny | 2 | ValueError" in shown and "| tiny | 4 |" in shown and "the same state came back" in shown
    )
    assert "| first forward s |" in shown and "| cold forward s |" in large.tables({**report, "cold": True})


def test_stages_before_one_that_fails_are_kept() -> None:
    entry = {"model": "r14", "stages": {"initialise": {"seconds": 1.0, "peak_bytes": 2**30}}}
    report = {"cold": False, "rows": [], "checkpoints": [{**entry, "failed": parts.OUT_OF_MEMORY}]}
    assert large.tables(report).splitlines()[-3:] == [
        "| initialise | 1.00 | 1,024 |",
        "",
        "No further: out of memory.",
    ]


def test_every_seed_figure_is_of_a_model_that_is_measured() -> None:
    assert {name for name, _ in large.SEED_FIGURES} <= set(large.MODELS)
    dense = [name for name in large.MODELS if large.config_of(name).dense_dispatch_max_tokens]
    assert dense == ["r12, every expert runs", "tiny, every expert runs"]


def test_a_part_that_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: Exception) -> dict[str, Any]:
        raise error

    full = parts.attempt(lambda: fails(torch.cuda.OutOfMemoryError("tried to allocate")))
    wrong = parts.attempt(lambda: fails(KeyError("N")))
    assert (full, wrong) == ({"failed": "out of memory"}, {"failed": "KeyError: 'N'"})
    assert parts.exit_status([{"seconds": 1}]) == 0 and parts.exit_status([{"seconds": 1}, full]) == 1
    said = capsys.readouterr().err
    assert "1 of 2 parts failed" in said and "Traceback" in said and "tried to allocate" not in said


def test_a_report_is_whole_or_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "report.json"
    parts.write(path, {"rows": [1]})
    with pytest.raises(TypeError):
        parts.write(path, {"rows": [1, object()]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    parts.write(None, {})


def test_generation_takes_a_file_and_adds_modules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the lengths fails, and costs no other."""
    file = tmp_path / "nano.json"
    file.write_text(NANO.to_json())
    measured = generation.measured

    def some(model: ArbModel, length: int, **options: Any) -> dict[str, Any]:
        return measured(model, length if length == 40 else -1, **options)

    monkeypatch.setattr(generation, "measured", some)
    status = generation.main(
        [
            *("--preset", str(file), "--every-module", "--lengths", "7", "40", "--bytes", "3"),
            *("--device", "cpu", "--out", str(tmp_path / "generation")),
        ]
    )
    report = json.loads((tmp_path / "generation.json").read_text())
    assert report["model"] == json.loads(ablation.full(NANO).to_json()) and report["model"]["composite_codes"]
    failed, row = report["with_ledger"]
    assert status == 1 and failed["length"] == 7 and "failed" in failed
    assert row["length"] == 40
    for steps in (row["steps"], report["without_ledger"]["steps"]):
        assert steps.keys() == {"launched"} and steps["launched"]["p50_seconds"] > 0, (
            "there is no graph on a CPU"
        )
    shown = capsys.readouterr().out
    assert "| 7 | 1 | RuntimeError" in shown and "| 40 | 1 |" in shown and "the last 512" in shown


@pytest.mark.parametrize(
    ("codes", "chosen"),
    [(2048, (512, 512, 40)), (34_108, (8527, 8527, 40)), (10_000_000, (200_000, 65_536, 300))],
)
def test_training_of_a_table_follows_from_its_size(codes: int, chosen: tuple[int, int, int]) -> None:
    open_options = {"codes": codes, "clusters": None, "batch": None, "steps": None}
    settled = recall.settled(Namespace(**open_options))
    assert (settled.clusters, settled.batch, settled.steps) == chosen
    assert recall.settled(Namespace(**{**open_options, "steps": 7})).steps == 7


def test_recall_holds_one_table_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second table fails after the first, and costs none of its rows."""
    built: list[weakref.ref[Any]] = []

    def codebook(options: Namespace, sign_bits: int) -> Any:
        assert all(table() is None for table in built), "the table before is still there"
        if sign_bits == 3:
            raise torch.cuda.OutOfMemoryError
        table = make(options, sign_bits)
        built.append(weakref.ref(table))
        return table

    make = recall.codebook
    monkeypatch.setattr(recall, "codebook", codebook)
    status = recall.main(
        [
            *("--codes", "64", "--width", "12", "--vectors", "9", "--sign-bits", "2", "3", "4"),
            *(
                "--probes",
                "1",
                "4",
                "--steps",
                "4",
                "--repeats",
                "2",
                "--json",
                str(tmp_path / "recall.json"),
            ),
        ]
    )
    result = json.loads((tmp_path / "recall.json").read_text())
    assert status == 1 and len(built) == 2
    assert [row["sign_bits"] for row in result["rows"]] == [2] * 4 + [4] * 4
    assert all(row["recall"] == 1 for row in result["rows"] if row["candidates"] == 64)
    trained, failed, other = result["tables"]
    assert failed["failed"] == "out of memory" and set(other["stages"]) == {"initialise", "train"}
    assert 0 < trained["in_use"] <= trained["found"] <= 1
    assert "| 3 |  |  |  |  |  |  | out of memory |  |" in capsys.readouterr().out


def test_codes_are_in_use_if_the_last_half_of_training_found_them() -> None:
    options = Namespace(codes=32, width=8, probes=[1], seed=0)
    table = recall.codebook(options, 1)
    one, other = (torch.full((5, 8), value) for value in (1.0, -1.0))
    drawn = iter((one, one, other, other))
    found_by = {value: int(table.search(value[:1])) for value in (one, other)}
    assert len(set(found_by.values())) == 2
    shares = recall.train(table, lambda: next(drawn).clone(), 4)
    assert shares["in_use"] < shares["found"]


def _job(rule: str, **changes: Any) -> learning.Job:
    return replace(learning.Job("toy", "toy", rule, 0, 4, "stdlib"), **changes)


@pytest.mark.parametrize("rule", learning.RULES)
def test_every_rule_learns_from_the_same_windows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights move, the curve is of the fixed windows, and a rule sees the windows of the seed and no others."""
    architecture = replace(learning.SIZES["toy"], batch=2, context=32)
    seen: list[torch.Tensor] = []
    whole = learner.Learner.step

    def step(self: Any, ids_BT: torch.Tensor, share: float) -> None:
        seen.append(ids_BT)
        whole(self, ids_BT, share)

    monkeypatch.setattr(learner.Learner, "step", step)
    corpus = Corpus("text", torch.arange(4000, dtype=torch.int64).remainder(251).to(torch.uint8), "", 1)
    split = split_corpus(corpus, 32)
    windows = validation_windows(corpus, split, count=4, context=32)
    given = (architecture, learning.RULES[rule], corpus, split, windows)
    result = learner.train(*given, seed=3, steps=12, device="cpu", evaluations=2)
    want = [training_batch(corpus, split, batch=2, context=32, seed=3, micro_step=n) for n in range(12)]
    assert all(torch.equal(one, other) for one, other in zip(seen, want, strict=True))
    assert [step for step, _ in result["curve"]] == [0, 6, 12]
    assert result["curve"][-1][1] == result["val_bpb"] < result["curve"][0][1], "12 steps on one sequence"
    width = 64
    assert result["weights"] == 12 * width**2 + (256 + 32 + 256) * width
    per_weight = result["state_bytes"] / result["weights"]
    if learning.RULES[rule].kind == "integer":
        # 2 / 12 for whole groups; rows of 64 columns have six.
        assert 1.2 + 2 / 12 < per_weight < 1.2 + 2 * 6 / 64 + 1e-4
    elif learning.RULES[rule].muon:
        # 12 for the matrices; tables and classes have AdamW.
        assert result["state_bytes"] == 12 * 12 * width**2 + 16 * (256 + 32 + 256) * width
    else:
        assert per_weight == 16
    assert result["tokens"] == 12 * 2 * 32


def test_the_rules_are_those_of_the_product() -> None:
    """The integer rule is what a preset has; the seeds' rule is what `arb train --sign-votes` has."""
    assert learning.RULES["integer"] == rules.Rule("integer", schedule.GAIN, schedule.DECAY_FRACTION)
    model = learner.Learner(learning.SIZES["toy"], learning.RULES["integer"], seed=0, device="cpu")
    assert model.config == preset("tiny")
    assert learning.RULES["sign"].config == SIGN_VOTES


def test_straight_through_weights_are_ternary_in_products_and_float_behind_them() -> None:
    rule, architecture = learning.RULES["straight-through"], learning.SIZES["toy"]
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
    options += ["--device", "cpu", "--seeds", "0", "1"]
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
    assert all(run["date"] and "commit" in run for run in runs)
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
    old = {**asdict(_job("sign")), **learning.settings_of(_job("sign")), "commit": "old", "data_sha256": "a"}
    other = {**old, **asdict(_job("integer")), **learning.settings_of(_job("integer"))}
    new = {**old, "commit": "new", "config": {**old["config"], "theta": 33}}
    failed = {**old, "commit": "later", "failed": "no memory"}
    documents = [
        {"machine": {"device": "a"}, "command": str(number), "runs": runs}
        for number, runs in enumerate(([other, old], [new], [failed]))
    ]
    found = learning.merged(documents)["runs"]
    assert [(run["rule"], run["commit"]) for run in found] == [("integer", "old"), ("sign", "new")]
    assert learning.measured(_job("sign"), old) and not learning.measured(_job("sign"), new)
    del old["config"]
    assert learning.measured(_job("sign"), old), (
        "files from before rules were recorded name their commit alone"
    )


def test_what_is_left_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--suite", "toy", "--rules", "sign", "--seeds", "0", "--device", "cpu"]
    assert learning.main([*options, "--seconds", "-1"]) == 1
    assert capsys.readouterr().err == "1 of 1 runs not started: time is over\n"


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
    plans = {
        suite: list(learning.jobs_of(suite, seeds=(0,), steps=1500, data="stdlib"))
        for suite in learning.SUITES
    }
    assert {job.steps for job in (*plans["long"], *plans["long-sweep"])} == {6000}
    assert {job.steps for job in plans["time"]} == {1125}
    assert {learning.SIZES[job.size].width for job in plans["wide"]} == {768}
    for table, sweep in (("table", "sweep"), ("long", "long-sweep")):
        tried = [(job.rule, learning.rule_of(job)) for job in (*plans[table], *plans[sweep])]
        assert all(tried.count(each) == 1 for each in tried)
