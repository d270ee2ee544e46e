"""Tests of the scripts beside the benchmarks: what they measure is what they say."""

from __future__ import annotations

import json
import math
import os
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from arbitor.optimized.training.checkpoint import save_checkpoint
from arbitor.reference.audit import audit
from arbitor.reference.config import with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import preset
from bench import ablation, codes, generation, goals, large, machine, parts, recall
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
    assert not [value for value in result.values() if isinstance(value, str) and value.startswith("/")]
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
    assert not {"quantize", "modulations", "all_modulations"} & {
        name for part in model.modules() for name in vars(part)
    }


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
            *("--presets", "tiny", "--ctx", "2", "4", "--windows", "3", "--recorded"),
            *("--checkpoint", "tiny", "--device", "cpu"),
            *("--out", str(tmp_path / "large")),
        ]
    )
    report = json.loads((tmp_path / "large.json").read_text())
    refused, row = report["rows"]
    assert status == 1 and "at least 4 bytes" in refused["failed"] and refused["context"] == 2
    assert (
        (row["context"], row["windows"]) == (4, 3)
        and row["weights"] == audit(preset("tiny")).weights
        and row["seed"] is None
    )
    assert min(row[name] for name in row if name.endswith("_seconds")) > 0 and row["step_seconds"] > 0
    assert of_goals("large", "large-step", "large-cold") <= {*row, *report}
    [entry] = report["checkpoints"]
    assert entry["same_state"] and len(entry["stages"]) == 5
    # The canonical state, and integer tables.
    assert 1.36 < entry["file_bytes"] / row["weights"] < 1.7
    shown = capsys.readouterr().out
    assert (
        "| tiny | 3 | 2 | ValueError" in shown
        and "| tiny | 3 | 4 |" in shown
        and "the same state came back" in shown
    )
    assert "| first forward s |" in shown and "| cold forward s |" in large.tables({**report, "cold": True})


def of_goals(*scripts: str) -> set[str]:
    """Return the fields that goals read of what scripts have stored, without what follows a dot."""
    figures = [each for goal in goals.GOALS for each in goal.figures if isinstance(each, goals.Figure)]
    named = [(*each.where, *each.fields, each.rows) for each in figures if each.script in scripts]
    return {name.split(".")[0] for names in named for name in names}


def test_a_cold_process_has_no_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither of Triton nor in CUDA C++."""
    for name in ("TRITON_CACHE_DIR", "ARB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    for cold in (False, True):
        with large.a_process(cold=cold) as pool:
            for name in ("TRITON_CACHE_DIR", "ARB_CACHE"):
                folder = pool.submit(os.getenv, name).result()
                assert (folder != str(tmp_path)) is cold and not list(Path(folder).iterdir())


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
    figures = [each for goal in goals.GOALS for each in goal.figures if isinstance(each, goals.Figure)]
    assert {each.where["model"] for each in figures if each.script.startswith("large")} <= set(large.MODELS)
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
    assert row["length"] == 40 and of_goals("generation") <= {*row, *report}
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


@pytest.mark.parametrize(
    ("given", "in_notebook", "found"),
    [
        (["5", "--preset", "nano.json"], False, (5, "nano")),
        (["--preset", "nano.json"], False, (150, "nano")),
        ([], False, (150, "tiny")),
        (["--f=/run/kernel-1.json"], True, (150, "tiny")),
    ],
)
def test_a_script_reads_its_arguments_and_not_those_of_a_notebook(
    given: list[str],
    in_notebook: bool,
    found: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/scripts/train_and_look.py is run from a command line, and cell by cell."""
    text = (machine.ROOT / "docs" / "scripts" / "train_and_look.py").read_text()
    (tmp_path / "nano.json").write_text(NANO.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *given])
    if in_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    names: dict[str, Any] = {}
    exec(text[: text.index("sources = ")], names)
    assert (names["STEPS"], names["config"].name) == found
