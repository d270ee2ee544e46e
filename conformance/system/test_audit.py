"""The tables that `arb audit` prints hold what `arb audit --json` counts, every row and every heading."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arbitor.optimized import cli
from conformance.system.command import Here, check_refused

MIB = 2**20


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what the command prints."""
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def rows_of(text: str) -> list[tuple[str, ...]]:
    """Return the cells of all rows of all tables, headings among them."""
    lines = [line.replace("┃", "│").strip() for line in text.splitlines()]
    cells = [tuple(cell.strip() for cell in line.strip("│").split("│")) for line in lines if "│" in line]
    return cells


def wanted(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows that a report asks for."""

    def area(name: str, of: dict[str, Any]) -> tuple[str, ...]:
        sizes = (f"{of[f'{form}_bytes'] / MIB:.2f}" for form in ("canonical", "resident"))
        return name, f"{of['weights']:,}", *sizes

    rows = [("area", "ternary weights", "canonical MiB", "on a GPU MiB")]
    rows += [area(each["name"], each) for each in report["areas"]]
    rows += [area("total", report), *(area(each["name"], each) for each in report["apart"])]
    if report["tables"]:
        rows += [("integer table, apart", "dtype", "shape", "MiB")]
        rows += [
            (
                each["name"],
                each["dtype"],
                " x ".join(f"{size:,}" for size in each["shape"]),
                f"{each['bytes'] / MIB:.2f}",
            )
            for each in report["tables"]
        ]
        rows += [("total", "", "", f"{report['table_bytes'] / MIB:.2f}")]
    if report["figures"]:
        rows += [("figure", "source", "seed", "ours", "difference", "")]
        rows += [
            (
                each["what"],
                each["source"],
                *(f"{each[name]:,}" for name in ("seed", "ours")),
                f"{each['ours'] - each['seed']:+,}",
            )
            for each in report["figures"]
        ]
    return rows


@pytest.mark.parametrize("preset", ["tiny", "r14"])
def test_every_row_is_printed(
    preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`r14` has integer tables, and figures of its seed."""
    monkeypatch.setenv("COLUMNS", "200")
    report = json.loads(printed(capsys, "--preset", preset, "--json"))
    rows, text = wanted(report), printed(capsys, "--preset", preset)
    assert [row[: len(want)] for row, want in zip(rows_of(text), rows, strict=True)] == rows
    assert [line for line in text.splitlines() if ": " in line] == [
        "trainable float parameters: 0",
        "float buffers: 0",
        "sidecars: not counted (--sidecars counts the frozen encoders of other projects)",
    ]
    assert bool(report["figures"]) == (preset == "r14") and report["tables"]


def test_audit_counts_weights_and_no_floats(here: Here) -> None:
    result = here("audit", "--preset", "tiny", "--json")
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["weights"] == sum(area["weights"] for area in report["areas"]) > 100_000
    assert report["trainable_float_params"] == report["float_buffers"] == 0
    for area in report["areas"]:
        assert 1.3 < area["canonical_bytes"] / area["weights"] < 1.5
        assert area["canonical_bytes"] < area["resident_bytes"] < 1.2 * area["canonical_bytes"]
    table = here("audit", "--preset", "tiny").stdout.decode()
    assert f"{report['weights']:,}" in table
    check_refused(here("audit", "--preset", "huge"), 2, "'huge'")


def test_audit_shows_the_seeds_figures(here: Here) -> None:
    whole = here("audit", "--preset", "r14").stdout.decode()
    for text in ("MoEGraph", "3,011,944,672", "edge signs", "int32", "REFACTOR14", "+24,736", "sidecars"):
        assert text in whole
    off = ("--disable-vq", "--disable-graph", "--disable-moe")
    core = here("audit", "--preset", "r12", *off).stdout.decode()
    for text in ("124,145,088", "123,996,160", "+148,928", "(!)"):
        assert text in core
    assert "(!)" not in whole and "MoEGraph" not in core
