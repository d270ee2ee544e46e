"""Tests of the demonstration of media: texts say what files show, and figures are what they say."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.training import media_speech
from arbitor.optimized.training.options import PRESET_DEFAULTS
from arbitor.sidecars import read_audio
from bench.media import __main__ as demo
from bench.media import mixed_step
from bench.media.beside import features_beside, make_features
from bench.media.render import SLOTS, TEMPLATES, render, slot_bits, values_of
from conformance.sidecars.small_checkpoints import sound_network, vision_network

LIBRARIES = ("transformers", "diffusers", "optimum", "PIL", "av")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
needs_sidecars = pytest.mark.skipif(bool(MISSING), reason=f"the demonstration needs {', '.join(MISSING)}")


def test_slots_come_back_from_texts() -> None:
    for kind, slots in SLOTS.items():
        values = [slot[-1] for slot in slots]
        assert values_of(kind, TEMPLATES[kind].format(*values).encode()) == values
    assert values_of("image", b"a red") == ["red", "", ""] and values_of("audio", b"") == ["", ""]
    assert slot_bits("audio") == 4.0 and slot_bits("video") == 4.0


def test_figures_by_hand() -> None:
    wanted = [["a", "x"], ["a", "y"], ["b", "y"]]
    assert demo.guessed(wanted) == pytest.approx(4 / 6)
    assert demo.share_right([["a", "x"], ["b", "y"], ["b", ""]], wanted) == pytest.approx(4 / 6)
    high, low = demo.Figure("one", 0.8, 0.5, 0.9), demo.Figure("two", 0.8, 1.0, 0.9, lower=True)
    assert not high.reached() and low.reached() and demo.Figure("three", 0.0, 0.0, None).reached()
    # A number that is not finite reaches nothing.
    assert not demo.Figure("four", float("nan"), 0.0, 1.0, lower=True).reached()
    assert "missed" in demo.table([high]) and "missed" not in demo.table([low])


@needs_sidecars
def test_rendered_files_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        render(tmp_path / name, count=3, seed=5)
    render(tmp_path / "c", count=3, seed=6)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").glob("*/*"))]
    assert len(files) == 18
    content = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert content["a"] == content["b"] != content["c"]


@needs_sidecars
def test_the_demonstration_is_a_run_that_says_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step teaches nothing: every figure is there, and the status says that goals are missed."""
    monkeypatch.setitem(PRESET_DEFAULTS, "tiny", {"sample_bytes": 4, "eval_windows": 4})
    arguments = ["--run", str(tmp_path / "run"), "--steps", "1", "--count", "12", "--batch", "2"]
    monkeypatch.setattr(media_speech, "CODEC_STEPS", 1)
    # The command takes one thread, and other tests have theirs.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    made: list[Path] = []

    @contextmanager
    def features_before(*arguments: Any, cache: str, **named: Any) -> Iterator[None]:
        """Make in this process, and first, what the command makes beside the run."""
        make_features(*arguments, cache=cache, **named)
        made.extend(Path(cache).iterdir())
        yield
        assert set(made) == set(Path(cache).iterdir()), "the run made other features"

    monkeypatch.setattr(demo, "features_beside", features_before)
    assert demo.main(arguments) == 1
    assert len(made) == 3 * 12
    figures = json.loads((tmp_path / "run" / "media.json").read_text())["figures"]
    assert [figure["name"].partition(":")[0] for figure in figures] == [
        "image",
        "image",
        "audio",
        "audio",
        *["video"] * 4,
        "speech",
        "router",
    ]
    assert not all(figure["reached"] for figure in figures)
    assert (tmp_path / "run" / "media.png").stat().st_size > 1000
    sound = read_audio(tmp_path / "run" / "media.wav")
    assert len(sound) == 16_000 and sound.abs().max() > 0
    assert "image: slots right" in capsys.readouterr().out


def test_another_process_ends_with_the_run(tmp_path: Path) -> None:
    """However the run ends. A folder that is not there ends the process at once, which is no fault of the run."""
    before = {process.pid for process in multiprocessing.active_children()}
    with (
        pytest.raises(KeyError, match="of the run"),
        features_beside({"image": str(tmp_path / "gone")}, {}, cache=str(tmp_path / "cache"), side=2),
    ):
        assert len({process.pid for process in multiprocessing.active_children()} - before) == 1
        raise KeyError("of the run")
    assert {process.pid for process in multiprocessing.active_children()} == before


@needs_sidecars
def test_a_mixed_step_says_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks of the same libraries: every sidecar is read, every loss is there, and every weight gets a vote."""
    import diffusers

    small = {
        "vision": lambda: vision_network(48),
        "audio": lambda: sound_network(52),
        "video": lambda: diffusers.AutoencoderKLWan(base_dim=4),
    }
    monkeypatch.setattr(
        mixed_step, "STANDARD", {mixed_step.KINDS[kind]: make for kind, make in small.items()}
    )
    monkeypatch.setattr(mixed_step, "SIDE", 32)
    out = tmp_path / "mixed.json"
    arguments = ["--preset", "tiny", "--device", "cpu", "--ctx", "16", "--passes", "3", "--out", str(out)]
    assert mixed_step.main(arguments) == 0
    report = json.loads(out.read_text())
    assert {"bytes", "route", "latent", "tokens"} <= set(report["steps"][-1]["losses"])
    assert report["steps"][0]["without_votes"] and report["steps"][-1]["without_votes"] == []
    for row in report["sidecars"].values():
        assert row["precision"] == "int8" and row["difference_to_cpu"] == 0
    monkeypatch.setattr(mixed_step, "without_votes", lambda model: ["embedding.table"])
    assert mixed_step.main(arguments) == 1
    assert "weights got no vote in 3 steps: embedding.table" in json.loads(out.read_text())["failed"]
