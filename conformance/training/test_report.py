"""The pictures of a run: valid PNG files that show what the lines of metrics hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import pytest

from arbitor.optimized.training.census import KINDS
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.report import plot_loss, write_report
from arbitor.optimized.training.schedule import rate


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def numbers(flips: float, **more: Any) -> dict[str, Any]:
    shares = {"zero_share": 0.4, "rail_share": 0.1, "saturation": 0.0}
    exponents = {"min": -4, "mean": -3.5, "max": -3, "counts": {"-4": 5, "-3": 5}}
    return {"weights": 60, "flip_rate": flips, **shares, "exponents": exponents, **more}


CODES = {"shared_vq.bridge.tables.text": {"codes": 8, "vectors": 9, "used": 4, "dead": 1, "perplexity": 3.5}}
EXPERTS = {"layers.0.moe_graph.moe": {"load": [3, 1], "max_over_mean": 1.5, "min_over_mean": 0.5}}


def lines(**groups: Any) -> list[dict[str, Any]]:
    """A validation before the first step, then two reports: the second has drift, as in a run."""
    kinds = ({kind: numbers(0.01) for kind in KINDS}, {kind: numbers(0.02, drift=0.05) for kind in KINDS})
    measured = [{"step": 10 * i, "train_bpb": 6.0 - i, "rate": 1.25} for i in (1, 2)]
    return [
        {"step": 0, "val_bpb": 8.0},
        *({**line, "kinds": of, **groups} for line, of in zip(measured, kinds, strict=True)),
    ]


def test_plot_loss_draws_curves_and_baselines(tmp_path: Path) -> None:
    def size(*arguments: object) -> bytes:
        plot_loss(tmp_path / "loss.png", *arguments)  # type: ignore[arg-type]
        return (tmp_path / "loss.png").read_bytes()

    metrics = [{"step": 0, "val_bpb": 8.0}, {"step": 5, "train_bpb": 5.0, "val_bpb": None}]
    full = size(metrics, {"uniform": 8.0, "bigram": 3.5})
    assert full.startswith(b"\x89PNG\r\n\x1a\n")
    assert (
        len({full, size(metrics, {}), size(metrics[:1], {"uniform": 8.0, "bigram": 3.5}), size([], {})}) == 4
    )


def test_a_single_report_shows_its_points(tmp_path: Path) -> None:
    """A line through one point has no length. A name is no formula, and may be of any bytes."""
    facts = {"preset": "$\\frac{$", "data": "[/x]$_{\udcff\x1b"}

    def page(metrics: list[dict[str, Any]]) -> Any:
        plot_loss(tmp_path / "loss.png", metrics, {})
        write_report(tmp_path / "p.png", metrics, facts, baselines={}, steps=5, planned_rate=lambda step: 0.0)
        return pixels(tmp_path / "loss.png"), pixels(tmp_path / "p.png")

    with_point, without = page([{"step": 5, "train_bpb": 5.0}]), page([{"step": 5, "train_bpb": 5.0}] * 30)
    blue = numpy.array([31, 119, 180]) / 255

    def count(picture: Any) -> int:
        return int((abs(picture[..., :3] - blue).max(-1) < 0.05).sum())

    # Thirty lines of one step are too many to mark each, so that only the legend is blue.
    assert count(with_point[0]) > count(without[0])


def test_the_page_shows_what_the_lines_hold(tmp_path: Path) -> None:
    path, facts = tmp_path / "report.png", {"preset": "nano", "state_sha256": "ab" * 32}

    def page(metrics: list[dict[str, Any]]) -> bytes:
        write_report(
            path,
            metrics,
            facts,
            baselines={"bigram": 3.5},
            steps=30,
            planned_rate=lambda step: rate(step, 30),
        )
        return path.read_bytes()

    full = page(lines(codebooks=CODES, experts=EXPERTS))
    image = pixels(path)
    assert image.shape[:2] == (1100, 1700)
    assert len(numpy.unique(image.reshape(-1, image.shape[2]), axis=0)) > 100
    # Neither blank nor black.
    assert 0.02 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5
    fewer = [page(lines(**groups)) for groups in ({"codebooks": CODES}, {"experts": EXPERTS}, {})]
    # There is no drift yet, then no report, then nothing at all.
    short = [page(lines()[:2]), page(lines()[:1]), page([])]
    assert len({full, *fewer, *short}) == 7
    assert [other.name for other in tmp_path.iterdir()] == ["report.png"]


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.png"
    path.write_bytes(b"before")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(TrainingError, match=r"cannot write .*report\.png.*No space left"):
        write_report(path, lines(), {}, baselines={}, steps=30, planned_rate=lambda step: rate(step, 30))
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
