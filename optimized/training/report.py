"""The pictures of a run: loss.png, the curve alone, and report.png, one page that says how each kind of weight fared."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arbitor.optimized.training.census import KINDS
from arbitor.optimized.training.facts import RunFacts
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.whole_file import told, write_whole
from arbitor.reference.constants import ACCUM_MAX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE_INCHES, PAGE_DPI = (17.0, 11.0), 100
"""Size of the page, and dots per inch: 1700 by 1100 points."""

NUM_COLOURS = 10
"""Colours of matplotlib's cycle: from the eleventh kind on they come again, dashed."""

STROKES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
"""Strokes of the baselines, whose colours are near to each other."""

FEW_POINTS = 20
"""Points of a line below which each is marked."""

COMMON_PARTS = ("shared_vq", "bridge", "tables", "codebook", "moe_graph", "moe")
"""Parts of the names of codebooks and of experts that a legend leaves out."""

NAMED_COLOURS = "Dark2"
"""Colours of codebooks and layers: none of those of the kinds."""

SHARES = (
    ("flip_rate", "flips: trits changed by a step", True),
    ("drift", "drift: trits changed since the line before", True),
    ("rail_share", "at the rail: pushed where a trit can't go", False),
    ("zero_share", "trits that are zero", False),
)
"""What the middle row shows of every kind: name in the metrics, title, whether the axis is logarithmic."""

OF_ADAPTERS = (
    ("grad_norm", "gradient of the adapters", "norm of the mean gradient of a step"),
    ("adapter_norm", "change by the adapters", "norm of (alpha / R) B A of all adapters"),
)
"""What a run with adapters shows of them: name in the metrics, title, label."""

Metrics = Sequence[Mapping[str, Any]]
"""Lines of metrics, as ``read_metrics`` gives them."""


def plot_loss(path: Path, metrics: Metrics, baselines: Mapping[str, float]) -> None:
    """Draw training and validation bits per byte over steps, with each baseline as a horizontal line.

    Args:
        path: PNG file to write.
        metrics: lines of metrics.
        baselines: name to bits per byte.

    Raises:
        TrainingError: the file cannot be written; what was there before is intact.
    """
    figure = _figure((8, 5), layout="constrained")
    _draw_loss(figure.add_subplot(), metrics, baselines)
    _write(path, figure, dpi=120)


def draw_page(path: Path, facts: RunFacts) -> None:
    """Draw the page of a run from all that is known of it; see `write_report`.

    Args:
        path: PNG file to write.
        facts: of the run, its lines of metrics among them.

    Raises:
        TrainingError: the file cannot be written; what was there before is intact.
    """
    write_report(
        path,
        facts.metrics,
        facts.words(),
        baselines=facts.baselines,
        steps=facts.run["steps"],
        planned_rate=facts.planned_rate(),
        rate_in_words=facts.rate_in_words(),
    )


def write_report(
    path: Path,
    metrics: Metrics,
    facts: Mapping[str, str],
    *,
    baselines: Mapping[str, float],
    steps: int,
    planned_rate: Callable[[int], float],
    rate_in_words: tuple[str, str] = ("rate of the votes", "votes per rms of a row"),
) -> None:
    """Draw the page of a run. What the lines do not have (no codes, no experts, no census, no adapters) has no panel.

    Args:
        path: PNG file to write.
        metrics: lines of metrics.
        facts: what the page says in words, by name.
        baselines: name to bits per byte.
        steps: length of the whole run.
        planned_rate: the rate of a step, from 0 to ``steps - 1``.
        rate_in_words: title and unit of the rate.

    Raises:
        TrainingError: the file cannot be written; what was there before is intact.
    """
    figure = _figure(PAGE_INCHES)
    lines = [line for line in metrics if "kinds" in line]
    kinds = [kind for kind in KINDS if lines and kind in lines[-1]["kinds"]]
    reached = facts.get("steps", f"{metrics[-1]['step'] if metrics else 0:,} of {steps:,}")
    # A dollar sign in a name begins no formula.
    figure.suptitle(shown(f"{facts.get('preset', 'run')}: {reached} steps"), parse_math=False)
    margins = {"left": 0.045, "right": 0.985, "top": 0.93, "bottom": 0.09 if kinds else 0.12, "hspace": 0.3}
    adapted = [line for line in metrics if line.get("adapter_norm") is not None]
    rows = figure.add_gridspec(3 if kinds else 2 if adapted else 1, 1, **margins)
    top = rows[0].subgridspec(1, 3, width_ratios=(2, 1, 1), wspace=0.22)
    _draw_loss(figure.add_subplot(top[0]), metrics, baselines)
    _draw_rate(figure.add_subplot(top[1]), metrics, steps, planned_rate, rate_in_words)
    _draw_facts(figure.add_subplot(top[2]), facts)
    if adapted and not kinds:
        middle = rows[1].subgridspec(1, len(OF_ADAPTERS), wspace=0.16)
        for i, (what, title, label) in enumerate(OF_ADAPTERS):
            _draw_adapters(figure.add_subplot(middle[i]), metrics, what, title, label)
    if kinds:
        middle = rows[1].subgridspec(1, len(SHARES), wspace=0.22)
        for i, (what, title, logarithmic) in enumerate(SHARES):
            _draw_kinds(figure.add_subplot(middle[i]), lines, kinds, what, title, logarithmic=logarithmic)
        panels = [_draw_saturation, _draw_exponents]
        panels += [_draw_codes] if any("codebooks" in line for line in lines) else []
        panels += [_draw_experts] if any("experts" in line for line in lines) else []
        bottom = rows[2].subgridspec(1, len(panels), wspace=0.3)
        for i, draw in enumerate(panels):
            draw(figure.add_subplot(bottom[i]), lines, kinds)
        _draw_legend(figure, kinds)
    _write(path, figure, dpi=PAGE_DPI)


def compare_runs(path: Path, runs: Mapping[str, Metrics]) -> None:
    """Draw the bits per byte of several runs, over steps and over hours: validation solid, training thin.

    Args:
        path: PNG file to write.
        runs: lines of metrics, by the name that the legend has.

    Raises:
        TrainingError: the file cannot be written; what was there before is intact.
    """
    figure = _figure((14, 6), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for place, (name, metrics) in enumerate(runs.items()):
        look = {"color": f"C{place % NUM_COLOURS}", "linestyle": "-" if place < NUM_COLOURS else "--"}
        best = min((line["val_bpb"] for line in metrics if line.get("val_bpb") is not None), default=None)
        # A dollar sign in a name begins no formula, and a name of a line that begins with _ would have no entry.
        label = shown(name).replace("$", r"\$") + ("" if best is None else f": {best:.3f}")
        for what, width in (("train_bpb", 0.5), ("val_bpb", 1.5)):
            lines = [line for line in metrics if line.get(what) is not None]
            steps = [(line["step"], line[what]) for line in lines]
            hours = [
                (line["seconds"] / 3600, line[what]) for line in lines if line.get("seconds") is not None
            ]
            for axes, points in ((over_steps, steps), (over_time, hours)):
                _draw_line(axes, points, linewidth=width, **look)
        over_steps.plot([], [], label="\N{ZERO WIDTH SPACE}" + label, **look)
    over_steps.legend(fontsize=9)
    _label(over_steps, "loss: validation, and training thin", xlabel="step", ylabel="bits per byte")
    over_time.set(title="the same over time", xlabel="hours of training")
    over_time.grid(alpha=0.3)
    _write(path, figure, dpi=100)


def _figure(inches: tuple[float, float], **options: Any) -> Figure:
    """Return a figure that no display knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, **options)
    FigureCanvasAgg(figure)
    return figure


def _write(path: Path, figure: Figure, *, dpi: int) -> None:
    """Render in memory, then write the file whole."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are boxes in the picture, and no lines on the terminal.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(content, format="png", dpi=dpi)
    with told(repr(str(path))):
        write_whole(path, content.getvalue())


def _look(kind: str) -> dict[str, Any]:
    """Return colour and stroke of a kind: the same in every panel of every run."""
    place = KINDS.index(kind)
    return {"color": f"C{place % NUM_COLOURS}", "linestyle": "-" if place < NUM_COLOURS else "--"}


def _marker(points: Sequence[Any]) -> dict[str, Any]:
    """Return the marker of the points of a line: few are marked, as a line through one point shows nothing."""
    return {"marker": "o" if len(points) < FEW_POINTS else ""}


def _draw_line(axes: Axes, points: Sequence[Any], **look: Any) -> None:
    """Draw a line through some points, if there are any."""
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3, **_marker(points), **look)


def _colour(place: int) -> Any:
    """Colour of a codebook or layer by its place among those of a panel."""
    from matplotlib import colormaps

    colours = colormaps[NAMED_COLOURS].resampled(8)
    return colours(place % 8)


def _label(axes: Axes, title: str, **labels: Any) -> None:
    """Title and labels of a panel; steps and exponents, which all panels have below, are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_title(title, fontsize=10)
    axes.set(**labels)
    axes.grid(alpha=0.3)


def _draw_loss(axes: Axes, metrics: Metrics, baselines: Mapping[str, float]) -> None:
    for name, label, style in (("train_bpb", "training", "-"), ("val_bpb", "validation", "-")):
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        _draw_line(axes, points, label=label, linestyle=style, linewidth=1)
    for i, (name, bpb) in enumerate(baselines.items()):
        stroke = STROKES[i % len(STROKES)]
        axes.axhline(bpb, linestyle=stroke, linewidth=1, color=f"C{i + 2}", label=f"{name} {bpb:.2f}")
    _label(axes, "loss", xlabel="step", ylabel="bits per byte")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)


def _draw_rate(
    axes: Axes,
    metrics: Metrics,
    steps: int,
    planned_rate: Callable[[int], float],
    in_words: tuple[str, str],
) -> None:
    """The schedule of the whole run, and the part of it that is done."""
    at = sorted({round(i * (steps - 1) / 200) for i in range(201)})
    planned = [planned_rate(step) for step in at]
    axes.plot([step + 1 for step in at], planned, color="0.8", linewidth=4, label="planned")
    points = [(line["step"], line["rate"]) for line in metrics if line.get("rate") is not None]
    _draw_line(axes, points, color="C0", label="done")
    axes.set_ylim(bottom=0)
    _label(axes, in_words[0], xlabel="step", ylabel=in_words[1])
    axes.legend(fontsize=9, loc="lower center")


def _draw_adapters(axes: Axes, metrics: Metrics, what: str, title: str, label: str) -> None:
    """One norm of the adapters over steps."""
    points = [(line["step"], line[what]) for line in metrics if line.get(what) is not None]
    _draw_line(axes, points, color="C0")
    axes.set_ylim(bottom=0)
    _label(axes, title, xlabel="step", ylabel=label)


def _draw_facts(axes: Axes, facts: Mapping[str, str]) -> None:
    axes.set_axis_off()
    lines = []
    for name, fact in ((name, shown(fact)) for name, fact in facts.items()):
        pieces = [fact[i : i + 32] for i in range(0, len(fact), 32)] or [""]
        lines += [f"{name:<13}{pieces[0]}", *(f"{'':<13}{piece}" for piece in pieces[1:])]
    axes.text(
        -0.08,
        1.0,
        "\n".join(lines),
        family="monospace",
        fontsize=9,
        va="top",
        linespacing=1.25,
        parse_math=False,
    )


def _draw_kinds(
    axes: Axes, lines: Metrics, kinds: Sequence[str], what: str, title: str, *, logarithmic: bool
) -> None:
    """One share of every kind over steps; on a logarithmic axis what is 0 has no point."""
    drawn = []
    for kind in kinds:
        points = [(line["step"], line["kinds"].get(kind, {}).get(what)) for line in lines]
        points = [(step, 100 * y) for step, y in points if y is not None and (y > 0 or not logarithmic)]
        drawn += [y for _, y in points]
        _draw_line(axes, points, linewidth=1.2, **_look(kind))
    first, last = lines[0]["step"], lines[-1]["step"]
    if drawn and logarithmic:
        axes.set_yscale("log")
        # At least a whole power of ten, so that there is a number on the axis.
        if max(drawn) / min(drawn) < 10:
            axes.set_ylim(min(drawn) / 3, max(drawn) * 3)
    elif any(drawn):
        axes.set_ylim(bottom=0)
    else:
        nothing = "0 throughout" if drawn else "nothing to show yet"
        axes.text(0.5, 0.5, nothing, ha="center", transform=axes.transAxes, color="0.4")
        axes.set(xlim=(first, max(last, first + 1)), ylim=(0, 1))
    _label(axes, title, xlabel="step", ylabel="% of the kind's trits")


def _draw_saturation(axes: Axes, lines: Metrics, kinds: Sequence[str]) -> None:
    title = f"saturated: {ACCUM_MAX} votes, more are lost"
    _draw_kinds(axes, lines, kinds, "saturation", title, logarithmic=False)


def _draw_exponents(axes: Axes, lines: Metrics, kinds: Sequence[str]) -> None:
    """A row of each kind: how its groups are spread over exponents at the end."""
    counts = {kind: lines[-1]["kinds"][kind]["exponents"]["counts"] for kind in kinds}
    held = [int(exponent) for of_kind in counts.values() for exponent in of_kind]
    low, high = min(held), max(held)
    rows = [
        [100 * of_kind.get(str(e), 0) / sum(of_kind.values()) for e in range(low, high + 1)]
        for of_kind in counts.values()
    ]
    extent = (low - 0.5, high + 0.5, len(kinds) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=100, extent=extent)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("% of the kind's groups", fontsize=9)
    _label(axes, f"exponents at step {lines[-1]['step']:,}", xlabel="exponent")
    axes.grid(visible=False)


def _draw_codes(axes: Axes, lines: Metrics, kinds: Sequence[str]) -> None:
    """Codes used, dead and effective, as shares of each codebook; the codebooks have colours of their own."""
    names = list(dict.fromkeys(name for line in lines for name in line.get("codebooks", {})))
    styles = {"used": "-", "perplexity": "--", "dead": ":"}
    for i, name in enumerate(names):
        for what, style in styles.items():
            uses = [(line["step"], line.get("codebooks", {}).get(name, {})) for line in lines]
            points = [(step, 100 * use[what] / use["codes"]) for step, use in uses if what in use]
            label = _short(name) if what == "used" else None
            _draw_line(axes, points, color=_colour(i), linestyle=style, linewidth=1.2, label=label)
    for what, style in styles.items():
        axes.plot([], [], color="0.3", linestyle=style, linewidth=1.2, label=what)
    # Room for the legend.
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    _label(axes, "codes", xlabel="step", ylabel="% of the codebook")


def _draw_experts(axes: Axes, lines: Metrics, kinds: Sequence[str]) -> None:
    """The busiest and the idlest expert of each layer over an even share; the layers have colours of their own."""
    names = list(dict.fromkeys(name for line in lines for name in line.get("experts", {})))
    for i, name in enumerate(names):
        for what, style in (("max_over_mean", "-"), ("min_over_mean", "--")):
            loads = [(line["step"], line.get("experts", {}).get(name)) for line in lines]
            points = [(step, load[what]) for step, load in loads if load]
            label = _short(name) if what == "max_over_mean" else None
            _draw_line(axes, points, color=_colour(i), linestyle=style, linewidth=1.2, label=label)
    axes.axhline(1, color="0.6", linewidth=0.8)
    # Room for the legend.
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    _label(
        axes,
        "experts: busiest (-) and idlest (--) of a layer",
        xlabel="step",
        ylabel="load over an even load",
    )


def _short(name: str) -> str:
    """A module's name without the parts that say nothing beside others of its sort: ``text``, ``composite``, ``layers.0``."""
    return ".".join(part for part in name.split(".") if part not in COMMON_PARTS) or name


def _draw_legend(figure: Figure, kinds: Sequence[str]) -> None:
    """The kinds, once for the page."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2, label=kind, **_look(kind)) for kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=len(kinds), fontsize=9, frameon=False)
