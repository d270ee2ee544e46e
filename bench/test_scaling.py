"""The plan of docs/scaling.md is what its formulas say, and the scripts that measure ranks and the largest model measure them."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.distributed.run import kept_rows
from arbitor.optimized.distributed.sizes import read_bytes
from arbitor.optimized.distributed.world import World
from arbitor.reference.audit import audit
from arbitor.reference.constants import VOTED_IN
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.presets import preset
from bench import largest, machine
from bench.scaling import __main__ as scaling
from bench.scaling import plan, tables
from bench.scaling.at_work import MODELS, PARTS, trunk_of
from conformance.distributed.cuts_at_work import CUT
from conformance.distributed.started import torchrun

PAGE = machine.ROOT / "docs" / "scaling.md"

NUMBERS = {
    "seconds": 0.5,
    "bytes_a_step": 256,
    "received_bytes_a_weight": 0.0,
    "peak_bytes": None,
    "state_sha256": "0",
}
"""What a part may find, for the tables."""


def test_the_page_is_told_its_tables() -> None:
    """All of the plan and of the stored report. `test_generated_pages_are_fresh` compares them."""
    made = {
        f"{module.__name__}.{name}"
        for module in (plan, tables)
        for name in vars(module)
        if name.startswith(("table_of", "stored"))
    }
    assert " for `r12`" in tables.stored_gains(), "the stored report has no ranks of ours"
    made -= {"bench.scaling.tables.stored_gains"}
    assert len(made) == 7 and all(f"<!-- made by {name} -->" in PAGE.read_text() for name in made)


@pytest.mark.parametrize("count", [1, 2, 64])
def test_the_formulas_of_the_page(count: int) -> None:
    assert plan.kept(count) == pytest.approx(1 / 4 + 1 / 12 + (1 + 1 / 12) / count)
    for gradients, size in (("bfloat16", 2), ("mxint8", 33 / 32)):
        wanted = (count - 1) / count * (size + 1 / 765 + 2 * plan.CHANGED_BYTES)
        assert plan.received(count, gradients) == pytest.approx(wanted, rel=1e-4)


def test_a_fifth_of_fsdp2_takes_eight_bits() -> None:
    shares = {name: plan.received(8, name) / plan.of_floats(8, "FSDP2") for name in plan.GRADIENT_BYTES}
    assert shares["mxint8"] < 1 / 5 < 1 / 3 < shares["bfloat16"]


def test_links_between_hosts_are_counted_for_what_comes_from_other_hosts() -> None:
    inside, outside = plan.step(1e9, 8, "bfloat16"), plan.step(1e9, 16, "bfloat16")
    assert inside.exchange == pytest.approx(inside.received / plan.NVLINK)
    assert outside.exchange == pytest.approx(outside.received * 8 / 15 / plan.NETWORK)
    assert outside.orthogonal == pytest.approx(inside.orthogonal / 2)
    assert outside.products == inside.products


def test_experts_are_counted_as_the_model_has_them() -> None:
    modules = ArbModel(preset("r12"), device="meta").ternary_modules()
    stacks = [m.weight.shape for name, m in modules.items() if name.endswith(("expert_down", "expert_up"))]
    assert plan.experts("r12")[0] == sum(rows * columns for rows, columns in stacks)


def test_the_110m_model_has_its_weights() -> None:
    assert audit(trunk_of("110M")).weights == pytest.approx(110e6, rel=0.02)


def test_a_trunk_has_at_least_the_weights_that_are_asked_for() -> None:
    config = largest.of_weights(3e6, 128)
    assert audit(config).weights >= 3e6 > audit(largest.trunk(128, config.num_layers - 1)).weights
    with pytest.raises(
        ValueError,
        match=r"weights is 10, but must be finite and at least [\d,]+, which one layer of width 128 has",
    ):
        largest.of_weights(10, 128)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (("10", "128"), "weights is 10, but must be finite and at least"),
        (("inf", "128"), "weights is inf, but must be finite and at least"),
        (("nan", "128"), "weights is nan, but must be finite and at least"),
        (("1e9", "0"), "width is 0, but must be at least 4"),
        (("1e9", "10"), "rotary_dim is 5, but must be even"),
    ],
)
def test_a_size_that_no_trunk_has_is_refused_in_one_sentence(
    size: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, width = size
    with pytest.raises(SystemExit) as stopped:
        largest.main(["--weights", weights, "--width", width, "--device", "cpu"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_largest_model_is_stepped_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "largest.json"
    arguments = ["--weights", "1e5", "--width", "32", "--context", "16", "--device", "cpu", "--out", str(out)]
    assert largest.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["weights"] >= 1e5 and 1.38 < report["bytes_a_weight"] < 1.5
    first, second = report["steps"]
    assert second["bits_per_byte"] < first["bits_per_byte"] and min(first["changed_bytes_of_trits"]) > 0
    assert f"{report['weights']:,} weights" in capsys.readouterr().out


def asked(**changes: object) -> Namespace:
    plain = {"ranks": [1, 2, 3], "models": ["small"], "windows": 4, "length": 64, "steps": 1, "device": "cpu"}
    plain["scalings"] = ["weak", "strong"]
    return Namespace(
        **{**plain, "exchanged_bytes": 2**12, "share_gpu": False, "parts": list(PARTS), **changes}
    )


def test_a_check_comes_before_what_it_is_for() -> None:
    parts = list(scaling.planned(asked()))
    assert [each["part"] for each in parts if "model" not in each] == ["check", "rates"] * 3
    assert [(e["ranks"], e["scaling"], e["windows"]) for e in parts if e["part"] == "ours"] == [
        (1, "weak", 4), (1, "weak", 8), (1, "weak", 12), (2, "weak", 4), (2, "strong", 2), (3, "weak", 4),
    ]  # fmt: skip
    assert not any(each["part"] == "mxint8" for each in parts if each["ranks"] == 1)
    assert {
        e["scaling"] for e in scaling.planned(asked(scalings=["strong"])) if e["ranks"] > 1 and "model" in e
    } == {"strong"}


def run(*of_ranks: dict[str, Any], **changes: object) -> list[dict[str, Any]]:
    """Return what came out of parts that share a start."""
    return list(scaling.run(of_ranks, asked(part_seconds=120.0, **changes), lambda: 120.0))


def test_two_ranks_are_checked() -> None:
    (found,) = run({"ranks": 2, "part": "check"})
    assert len(found["state_sha256"]) == 64 and found["compared_with_a_process_alone"] is False, found


def test_a_step_is_timed_with_gradients_in_eight_bits_too() -> None:
    """On a CPU they take 33/32 bytes an element, where they took four. Which matrices votes leave as they are is alike."""
    two = {"ranks": 2, "model": "tiny", "scaling": "weak", "windows": 1}
    of_ranks = [{**two, "part": part} for part in ("ours", "mxint8")]
    found = run(*of_ranks)
    full, compact = (each["received_bytes_a_weight"] for each in found)
    assert 1 / 4 < compact / full < 1 / 2, found
    parts = [{**part, **each} for part, each in zip(of_ranks, found, strict=True)]
    rows = [row for part in parts for row in tables.rows_of(part)]
    assert [(row["way"], row["received"]) for row in rows] == [("ours", full), ("ours, mxint8", compact)]
    assert f"| tiny | weak | 2 | ours, mxint8 | 1 | {found[1]['seconds']:.4f} |" in tables.tables(
        {"ranks": [2], "parts": parts}
    )


def test_a_part_that_fails_is_the_last_of_its_start(capfd: pytest.CaptureFixture[str]) -> None:
    """Batches of no window have no loss. What came before is kept, and what follows has a start of its own."""
    two = {"ranks": 1, "model": "tiny", "scaling": "weak", "part": "ours"}
    good, bad = run({**two, "windows": 1}, {**two, "windows": 0}, {**two, "windows": 1})
    assert good["seconds"] > 0 and "Error" in bad["failed"], bad
    assert bad["failed"] in capfd.readouterr().err
    began = time.monotonic()
    (late,) = scaling.run([{**two, "windows": 1}], asked(part_seconds=1.0), lambda: 120.0)
    assert late == {"failed": "took more than 1 s"} and time.monotonic() - began < 60


def test_ranks_are_compared_with_a_process_alone_that_reads_as_much() -> None:
    """Two ranks of four windows read 100 bytes a second. A process alone reads 40 with four windows, and 80 with eight."""
    steps = [(1, 4, 40.0), (1, 8, 80.0), (2, 4, 100.0)]
    report = {
        "ranks": [1, 2],
        "parts": [
            {**NUMBERS, "model": "tiny", "scaling": "weak", "part": "ours"}
            | {"ranks": ranks, "windows": windows, "bytes_per_second": speed}
            for ranks, windows, speed in steps
        ],
    }
    lines = tables.tables(report).splitlines()
    assert "| tiny | weak | 2 | ours | 4 | 0.5000 | 100 | 1.250 | 0.625 | 0.000 |  |  |" in lines
    assert "| tiny | weak | 1 | ours | 8 | 0.5000 | 80 | 1.000 | 1.000 | 0.000 |  |  |" in lines
    assert tables.gains({**report, "device": "GPU"}).endswith(
        " on one with as many windows a GPU: 2.50 for `tiny`."
    )


def test_ranks_step_a_model_together_and_keep_less_each(tmp_path: Path) -> None:
    out = tmp_path / "largest.json"
    size = ("--weights", "1e5", "--width", "32", "--context", "16", "--device", "cpu", "--out", str(out))
    process = torchrun(2, "bench.largest", *size)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    report = json.loads(out.read_text())
    assert report["ranks"] == 2 and 0.7 < report["bytes_a_weight"] < 1.0
    assert min(report["steps"][-1]["changed_bytes_of_trits"]) > 0


def test_accumulators_of_some_experts_are_bytes_that_a_rank_keeps() -> None:
    """Two ranks keep the accumulators of all weights with an owner once, beside a byte where another rank keeps them."""
    models = [
        ArbModel(CUT, kept_rows=kept_rows(CUT, World(number, 2), {}, starts_rows_anew=False))
        for number in (0, 1)
    ]
    wanted = 0
    for whole, *parts in zip(
        ArbModel(CUT, device="meta").modules(), *(model.modules() for model in models), strict=True
    ):
        if isinstance(whole, TernaryModule):
            tensors, has_owner = whole.weight.tensors(), any(part.kept_rows is not None for part in parts)
            wanted += 2 * read_bytes(whole.weight)
            wanted += (1 if has_owner else 2) * sum(tensors[name].nbytes for name in VOTED_IN)
    found = sum(map(largest.state_bytes, models))
    assert wanted <= found <= wanted + 4 * len(models[0].ternary_modules())


def test_a_check_that_fails_stops_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[str] = []

    def failing(parts: list[dict[str, str]], *_: object) -> Iterator[dict[str, str]]:
        run.append(parts[0]["part"])
        yield {"failed": "RuntimeError: ranks differ"}

    monkeypatch.setattr(scaling, "run", failing)
    assert scaling.main(["--ranks", "2", "--models", *MODELS[:1], "--out", str(tmp_path / "out.json")]) == 1
    assert run == ["check"]
    assert "| 2 | RuntimeError: ranks differ |" in capsys.readouterr().out


def test_ranks_have_ended_before_others_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    def took(parts: list[dict[str, Any]], *_: object) -> Iterator[dict[str, Any]]:
        seen.append(f"{parts[0]['ranks']} start")
        for _ in parts:
            yield {"state_sha256": "0"}
        seen.append(f"{parts[0]['ranks']} end")

    monkeypatch.setattr(scaling, "run", took)
    given = [
        "--parts",
        "check",
        "--device",
        "cpu",
        "--commit",
        "0123456",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert scaling.main(["--ranks", "1", "2", *given]) == 0
    assert seen == ["1 start", "1 end", "2 start", "2 end"]


def test_a_measurement_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts that failed and parts that are new are run, each after a check of its ranks, and no others."""
    out, ran = tmp_path / "out.json", list[tuple[int, str]]()
    fails = {(2, "ours")}

    def took(parts: list[dict[str, Any]], *_: object) -> Iterator[dict[str, Any]]:
        for part in parts:
            ran.append(key := (part["ranks"], part["part"]))
            if key in fails:
                yield {"failed": "took more than 1 s"}
                return
            yield {"bytes_per_second": 1, **NUMBERS}

    monkeypatch.setattr(scaling, "run", took)
    given = [
        "--models",
        "tiny",
        "--parts",
        "check",
        "ours",
        "--device",
        "cpu",
        "--windows",
        "1",
        "--out",
        str(out),
    ]
    assert scaling.main(["--ranks", "1", "2", "--commit", "0123456", *given]) == 1
    assert ran == [(1, "check"), (1, "ours"), (1, "ours"), (2, "check"), (2, "ours")]
    ran.clear(), fails.clear()
    assert scaling.main(["--ranks", "1", "2", "--commit", "abcdefg", *given]) == 0
    assert ran == [(2, "check"), (2, "ours")]
    stored = json.loads(out.read_text())
    assert {(each["ranks"], each["part"]): each["commit"] for each in stored["parts"]} == {
        (1, "check"): "0123456", (1, "ours"): "0123456", (2, "check"): "abcdefg", (2, "ours"): "abcdefg",
    }  # fmt: skip
    ran.clear()
    assert scaling.main(["--ranks", "3", *given]) == 0
    assert ran == [(3, "check"), (3, "ours")] and json.loads(out.read_text())["ranks"] == [1, 2, 3]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        scaling.main(["--ranks", "2", *given, "--length", "7"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        f"--out is {out}, which has results with length 256, but must be a file with length 7, or a new one"
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "CPU"}'])
def test_a_file_of_something_else_is_not_written_over(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text(text)
    with pytest.raises(SystemExit):
        scaling.main(["--ranks", "1", "--device", "cpu", "--out", str(out)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"--out is {out}, but must be a file that bench.scaling wrote, or a new one")
    assert out.read_text() == text


def test_why_a_rank_failed_is_found_in_what_torchrun_wrote() -> None:
    err = "[rank0]: Traceback (most recent call last):\n[rank0]: RuntimeError: the loss is not finite\nerror_file: <N/A>"
    assert scaling.reason_of(err) == "RuntimeError: the loss is not finite"
    assert scaling.reason_of("Signal 9") == "a rank ended without a word"


@pytest.mark.parametrize("name", ["largest", "largest-2"])
def test_the_page_tells_the_stored_step_of_the_largest_model(name: str) -> None:
    """docs/scaling.md has its numbers from bench/results."""
    stored = json.loads((machine.RESULTS / "nvidia-h200" / f"{name}.json").read_text())
    text = " ".join(PAGE.read_text().split())
    kept = stored["state_bytes"] / 2**30
    for figure in (
        f"{stored['weights']:,} weights",
        f"{kept:.1f} GiB ({stored['bytes_a_weight']:.3f} bytes a weight)",
        f"{max(step['peak_bytes'] for step in stored['steps']) / 2**30:.1f} GiB",
        f"{stored['layers']} layers",
    ):
        assert figure in text, figure
