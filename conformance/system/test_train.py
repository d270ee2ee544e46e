"""`arb train` from the command line: what it refuses, prints and trains."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import loop
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.options import CHANGES
from arbitor.reference.audit import audit
from arbitor.reference.config import MEMORY_ROWS, SIGN_VOTES, with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from conformance.system.command import Here, check_refused, last_counts, resume_line, train_line
from conformance.training.nano import TEXT, WHOLE

NO_GRAPH = {"num_hops": 0, "composite_codes": 0}
"""What is left out of a configuration without the graph."""


@pytest.mark.parametrize(
    ("content", "more", "code", "parts"),
    [
        (None, [], 1, ["cannot read the data", "No such file"]),
        (b"", [], 1, ["is empty"]),
        (TEXT[:100], ["--context", "64"], 1, ["has 100 bytes", "context of 64", "128 bytes"]),
        (TEXT, ["--preset", "huge"], 2, ["'huge'", "'tiny'", "or a file that ends in .json"]),
        (TEXT, ["--preset", "tinny"], 2, ["did you mean 'tiny'?\n"]),
        (TEXT, ["--backend", "triton"], 1, ["TRITON_INTERPRET"]),
        (
            TEXT,
            ["--cuda-graph"],
            2,
            ["cuda_graph is True", "device cpu", "only the triton backend on cuda with stochastic votes"],
        ),
    ],
    ids=["missing", "empty", "short", "preset", "misspelt", "backend", "graph"],
)
def test_train_refuses(
    here: Here, tmp_path: Path, content: bytes | None, more: list[str], code: int, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    check_refused(here(*train_line(tmp_path / "data", tmp_path / "run", *more)), code, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "there"),
    [
        (lambda path: path.write_bytes(b"mine"), "a file"),
        (lambda path: path.symlink_to("nowhere"), "a link to no folder"),
        (lambda path: path.symlink_to(path.name), "a link to no folder"),
        (lambda path: os.mkfifo(path), "a pipe"),
    ],
    ids=["file", "dangling", "loop", "pipe"],
)
def test_a_run_folder_that_is_none_is_refused_before_anything_is_read(
    here: Here, tmp_path: Path, make: Callable[[Path], object], there: str
) -> None:
    make(tmp_path / "run")
    result = here(*train_line(tmp_path / "missing", tmp_path / "run"))
    check_refused(result, 1, f"the run folder '{tmp_path / 'run'}' is {there}, but must be a folder")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
            ["the GPU has not enough memory", "--no-cuda-graph"],
        ),
        (MemoryError(), ["the machine has not enough memory: a smaller --batch or --context"]),
    ],
    ids=["GPU", "machine"],
)
def test_train_says_what_needs_less_memory(
    here: Here,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    parts: list[str],
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "train", full)
    check_refused(here(*train_line(text, tmp_path / "run")), 1, *parts)


def test_the_memory_of_the_machine_is_named_where_torch_finds_none(
    here: Here, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it: an exabyte fits no address space."""

    def asks(*args: Any, **kwargs: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(loop, "train", asks)
    check_refused(here(*train_line(text, tmp_path / "run")), 1, "the machine has not enough memory")


def test_train_refuses_a_folder_without_text(here: Here, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    check_refused(here(*train_line(tmp_path, tmp_path / "run")), 1, "holds no text")


def test_train_takes_bytes_that_are_no_text(here: Here, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(255, -1, -1)) * 8)
    result = here(*train_line(tmp_path / "data", tmp_path / "run", "--steps", "1", "--no-save"))
    assert result.returncode == 0, result.stderr.decode()
    sample = (tmp_path / "run" / "sample.txt").read_bytes()
    with pytest.raises(UnicodeDecodeError):
        sample.decode()
    # While what is printed can be read.
    result.stdout.decode()


def test_train_prints_a_table_and_a_sample(finished: Path) -> None:
    out = (finished / "stdout").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    for name, bpb in (*summary["baselines"].items(), ("arb nano", summary["val_bpb"])):
        assert any(name in line and f"{bpb:.3f}" in line for line in out.splitlines()), name
    assert "step 15/15" in out and "\x1b" not in out
    assert "sample" in out and str(finished) in out


def test_train_refuses_to_start_twice(here: Here, finished: Path, text: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    check_refused(here(*train_line(text, finished)), 1, "already holds a run", "--resume")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "value", "was"), [("--steps", "14", "15"), ("--batch", "3", "2"), ("--preset", "tiny", "nano")]
)
def test_resume_refuses_another_run(here: Here, finished: Path, option: str, value: str, was: str) -> None:
    result = here("train", "--run", str(finished), "--resume", option, value)
    check_refused(result, 1, f"started with {option[2:]} {was}", f"with {option[2:]} {value}")


@pytest.mark.parametrize(
    ("flags", "fields", "settings"),
    [
        (
            ["--disable-vq"],
            {"num_codes": 0, "image_codes": 0, "audio_codes": 0, "memory_rows": 0, **NO_GRAPH},
            {"disable_vq": True},
        ),
        (["--disable-graph"], NO_GRAPH, {"disable_graph": True}),
        (["--disable-moe"], {"use_moe": False}, {"disable_moe": True}),
        (["--enable-memory"], {"memory_rows": MEMORY_ROWS}, {"enable_memory": True}),
        (["--enable-image"], {"image_features": 384, "image_codes": 8192}, {"enable_image": True}),
        (["--max-moe-iters", "3"], {"max_moe_iters": 3}, {"max_moe_iters": 3}),
        (["--sign-votes"], dict(SIGN_VOTES), {"sign_votes": True}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_trains_the_model_that_its_options_name(
    here: Here,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    fields: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    off = {"--enable-memory": {"memory_rows": 0}, "--enable-image": {"image_features": 0}}
    preset = with_fields(WHOLE, **off.get(flags[0], {}))
    monkeypatch.setitem(PRESETS, "whole", preset)
    run, expected = tmp_path / "run", with_fields(preset, **fields)
    result = here(*train_line(text, run, "--preset", "whole", "--steps", "1", *flags))
    assert result.returncode == 0, result.stderr.decode()
    summary, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    assert summary["weights"] == audit(expected).weights
    assert config["model"] == json.loads(expected.to_json()) != json.loads(preset.to_json())
    unset = {**dict.fromkeys(CHANGES, False), "max_moe_iters": None}
    assert {name: config["run"][name] for name in CHANGES} == {**unset, **settings}
    trained = load_checkpoint(run / "final.safetensors")
    assert trained.state.keys() == ArbModel(expected, device="meta").state().keys()

    same = resume_line(run, *flags)
    assert here(*same).returncode == 0
    other = "moe" if "--disable-graph" in flags else "graph"
    says = f"started with disable_{other} False and cannot go on with disable_{other} True"
    check_refused(here(*same, f"--disable-{other}"), 1, says)
    says = f"started with max_moe_iters {settings.get('max_moe_iters')} and cannot go on with max_moe_iters 2"
    check_refused(here(*last_counts(*same, "--max-moe-iters", "2")), 1, says)
