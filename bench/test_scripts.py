"""Tests of the scripts beside the benchmarks: what they measure is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arbitor.reference.config import with_modules
from arbitor.reference.presets import preset
from bench import ablation, large, machine
from conformance.graph.models import NANO


def test_variants_of_the_ablation_differ_in_the_module_they_name() -> None:
    whole = ablation.full(preset("small"))
    assert (whole.num_codes, whole.num_hops, whole.memory_rows, whole.max_moe_iters) == (4096, 2, 16_384, 2)
    configs = [with_modules(whole, **changes) for changes in ablation.VARIANTS.values()]
    assert len(set(configs)) == len(configs), "two variants are one model"
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
    text.write_bytes((machine.ROOT / "README.md").read_bytes() * 3)
    extra = ("--data", str(text), "--device", "cpu", "--batch", "2", "--context", "16")
    [result] = ablation.runs(NANO, [("one turn", 3)], side_by_side=1, steps=2, extra=extra)
    assert (result["variant"], result["seed"], result["steps"]) == ("one turn", 3, 2)
    assert result["model"]["max_moe_iters"] == 1 and result["curve"][-1] == (2, result["val_bpb"])


def test_a_failed_run_of_the_ablation_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    extra = ("--data", "no such file", "--device", "cpu")
    assert not list(ablation.runs(NANO, [("no graph", 0)], side_by_side=1, steps=1, extra=extra))
    assert "no graph" in (said := capsys.readouterr().err) and "no such file" in said


def test_large_measures_cold_and_warm_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    large.main(
        [
            *("--presets", "tiny", "--ctx", "4", "--checkpoint", "tiny", "--device", "cpu"),
            *("--out", str(tmp_path / "large")),
        ]
    )
    report = json.loads((tmp_path / "large.json").read_text())
    [row] = report["rows"]
    assert row["context"] == 4 and row["weights"] == 810_780 and row["seed"] is None
    assert min(row[name] for name in row if name.endswith("_seconds")) > 0
    [entry] = report["checkpoints"]
    assert entry["same_state"] and len(entry["stages"]) == 5
    assert 1.36 < entry["file_bytes"] / row["weights"] < 1.7  # the canonical state, and integer tables
    shown = capsys.readouterr().out
    assert "| tiny | 4 |" in shown and "the same state came back" in shown


def test_every_seed_figure_is_of_a_model_that_is_measured() -> None:
    assert {name for name, _ in large.SEED_FIGURES} <= set(large.MODELS)
