"""The pictures of a run: valid PNG files that show what the lines of metrics hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.ticker import MaxNLocator

from arbitor.optimized.training import report
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


def described(figure: Any) -> list[dict[str, Any]]:
    """Return what the panels of a figure show, without colours and strokes."""
    return [
        {
            "title": axes.get_title(),
            "labels": (axes.get_xlabel(), axes.get_ylabel()),
            "scale": axes.get_yscale(),
            "bottom": round(axes.get_ylim()[0], 6),
            "grid": any(line.get_visible() for line in axes.xaxis.get_gridlines()),
            "whole": isinstance(axes.xaxis.get_major_locator(), MaxNLocator),
            "lines": [
                (line.get_label().lstrip("\N{ZERO WIDTH SPACE}"), line.get_xydata().round(6).tolist())
                for line in axes.lines
                if len(line.get_xydata()) < 100
            ],
            "images": [
                (image.get_array().round(3).tolist(), list(image.get_extent())) for image in axes.images
            ],
            "texts": [text.get_text() for text in axes.texts],
            "legend": [text.get_text() for text in axes.get_legend().get_texts()]
            if axes.get_legend()
            else None,
        }
        for axes in figure.axes
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that are drawn from now on, in place of files."""
    drawn: list[Any] = []
    monkeypatch.setattr(report, "_write", lambda path, figure, dpi: drawn.append((figure, dpi)))
    return drawn


def test_each_panel_of_the_page_says_what_it_shows(figures: list[Any]) -> None:
    """Title, labels, legend and points of each panel, for two reports of a run of thirty steps."""
    metrics = lines(codebooks=CODES, experts=EXPERTS)
    facts = {"preset": "nano$", "data": "a name of more than thirty-two letters"}
    write_report(
        Path("page"), metrics, facts, baselines={"bigram": 3.5}, steps=30, planned_rate=lambda step: step / 10
    )
    ((figure, dpi),) = figures
    assert (dpi, figure._suptitle.get_text()) == (100, "nano$: 20 of 30 steps")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(KINDS)
    loss, pace, words, *rest = described(figure)
    assert loss["lines"] == [
        ("training", [[10.0, 5.0], [20.0, 4.0]]),
        ("validation", [[0.0, 8.0]]),
        ("bigram 3.50", [[0.0, 3.5], [1.0, 3.5]]),
    ]
    assert (loss["title"], loss["labels"], loss["legend"]) == (
        "loss",
        ("step", "bits per byte"),
        ["training", "validation", "bigram 3.50"],
    )
    assert pace["lines"] == [
        ("planned", [[step + 1.0, step / 10] for step in range(30)]),
        ("done", [[10.0, 1.25], [20.0, 1.25]]),
    ]
    assert (pace["title"], pace["labels"], pace["bottom"], pace["legend"]) == (
        "rate of the votes",
        ("step", "votes per rms of a row"),
        0.0,
        ["planned", "done"],
    )
    assert words["texts"] == [
        "preset       nano$\ndata         a name of more than thirty-two l\n             etters"
    ]
    assert not words["grid"]
    shares = {
        "flips: trits changed by a step": ("log", [[10.0, 1.0], [20.0, 2.0]]),
        "drift: trits changed since the line before": ("log", [[20.0, 5.0]]),
        "at the rail: pushed where a trit can't go": ("linear", [[10.0, 10.0], [20.0, 10.0]]),
        "trits that are zero": ("linear", [[10.0, 40.0], [20.0, 40.0]]),
        "saturated: 127 votes, more are lost": ("linear", [[10.0, 0.0], [20.0, 0.0]]),
    }
    for (title, (scale, points)), panel in zip(shares.items(), rest, strict=False):
        assert (panel["title"], panel["labels"], panel["scale"]) == (
            title,
            ("step", "% of the kind's trits"),
            scale,
        )
        assert [each for _, each in panel["lines"]] == [points] * len(KINDS)
        assert panel["texts"] == (["0 throughout"] if title.startswith("saturated") else [])
        assert panel["bottom"] == (0.0 if scale == "linear" else pytest.approx(min(y for _, y in points) / 3))
    exponents, bar, codes, experts = rest[len(shares) :]
    assert exponents["title"] == "exponents at step 20" and exponents["labels"][0] == "exponent"
    assert exponents["images"] == [([[50.0, 50.0]] * len(KINDS), [-4.5, -2.5, len(KINDS) - 0.5, -0.5])]
    assert exponents["grid"] is False and bar["labels"][1] == "% of the kind's groups"
    assert codes["lines"] == [
        ("text", [[10.0, 50.0], [20.0, 50.0]]),
        ("_child1", [[10.0, 43.75], [20.0, 43.75]]),
        ("_child2", [[10.0, 12.5], [20.0, 12.5]]),
        *((name, []) for name in ("used", "perplexity", "dead")),
    ]
    assert (codes["title"], codes["labels"], codes["legend"], codes["bottom"]) == (
        "codes",
        ("step", "% of the codebook"),
        ["text", "used", "perplexity", "dead"],
        0.0,
    )
    assert experts["lines"] == [
        ("layers.0", [[10.0, 1.5], [20.0, 1.5]]),
        ("_child1", [[10.0, 0.5], [20.0, 0.5]]),
        ("_child2", [[0.0, 1.0], [1.0, 1.0]]),
    ]
    assert (experts["title"], experts["labels"], experts["legend"], experts["bottom"]) == (
        "experts: busiest (-) and idlest (--) of a layer",
        ("step", "load over an even load"),
        ["layers.0"],
        0.0,
    )
    for panel in (loss, pace, *rest[: len(shares)], exponents, codes, experts):
        assert panel["whole"] and (panel["grid"] or panel is exponents), panel["title"]


def test_runs_are_compared_over_steps_and_over_hours(figures: list[Any]) -> None:
    """A run without times is drawn over steps alone, and a name that looks like a formula or is hidden has its entry."""
    timed = [
        {"step": 10 * i, "train_bpb": 6.0 - i, "val_bpb": 5.5 - i, "seconds": 1800.0 * i} for i in (1, 2)
    ]
    runs = {"_a$": timed, "b": [{"step": 5, "train_bpb": 4.0, "val_bpb": None}]}
    report.compare_runs(Path("both"), runs)
    ((figure, dpi),) = figures
    over_steps, over_time = described(figure)
    assert dpi == 100
    assert [each for _, each in over_steps["lines"]] == [
        [[10.0, 5.0], [20.0, 4.0]],
        [[10.0, 4.5], [20.0, 3.5]],
        [],
        [[5.0, 4.0]],
        [],
    ]
    assert [each for _, each in over_time["lines"]] == [[[0.5, 5.0], [1.0, 4.0]], [[0.5, 4.5], [1.0, 3.5]]]
    assert over_steps["legend"] == ["\N{ZERO WIDTH SPACE}_a\\$: 3.500", "\N{ZERO WIDTH SPACE}b"]
    assert (over_steps["title"], over_steps["labels"]) == (
        "loss: validation, and training thin",
        ("step", "bits per byte"),
    )
    assert (over_time["title"], over_time["labels"][0]) == ("the same over time", "hours of training")
    assert over_steps["grid"] and over_time["grid"]
