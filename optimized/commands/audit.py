"""``arb audit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import MIB, setting, settings
from arbitor.optimized.training.options import CHANGES
from arbitor.optimized.training.shown import shown

if TYPE_CHECKING:
    from arbitor.reference.audit import AuditReport
    from arbitor.sidecars import SidecarAudit


@click.command(cls=Command)
@setting("preset", help="What to look at: tiny, small, ... or FILE.json", default="tiny")
@settings(*CHANGES)
@click.option(
    "--sidecars", is_flag=True, help="Also count frozen encoders of other projects, at full size [off]."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON [off].")
def audit(preset: str, sidecars: bool, as_json: bool, **changes: Any) -> None:
    """Count the weights and bytes of a preset, area by area, without building it."""
    import json
    from dataclasses import asdict

    from arbitor.optimized.layouts import resident_bytes
    from arbitor.optimized.training.plan import model_config
    from arbitor.reference.audit import audit as audit_config

    config, beside, counted = model_config(preset, **changes), None, 0.0
    if sidecars:
        from arbitor.sidecars import counted_mib, standard_audit

        beside = standard_audit()
        counted = counted_mib(beside)
    report = audit_config(config, resident_bytes=resident_bytes, sidecar_mib=counted)
    if as_json:
        extra = {} if beside is None else {"sidecars": [asdict(each) for each in beside]}
        click.echo(json.dumps({**json.loads(report.to_json()), **extra}, indent=2))
    else:
        _print_audit(report, beside)


def _print_audit(report: AuditReport, sidecars: Sequence[SidecarAudit] | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("area", title=Text(f"preset {shown(report.config_name)}"))
    for heading in ("ternary weights", "canonical MiB", "on a GPU MiB"):
        table.add_column(heading, justify="right")
    total = ("total", report.weights, report.canonical_bytes, report.resident_bytes)
    for section in (report.areas, None, report.apart):
        rows = [(a.name, a.weights, a.canonical_bytes, a.resident_bytes) for a in section or ()]
        for name, weights, canonical, resident in rows if section is not None else [total]:
            table.add_row(name, f"{weights:,}", f"{canonical / MIB:.2f}", f"{resident / MIB:.2f}")
        table.add_section()
    tables = Table("integer table, apart", "dtype", "shape")
    tables.add_column("MiB", justify="right")
    for entry in report.tables:
        shape = " x ".join(f"{size:,}" for size in entry.shape)
        tables.add_row(entry.name, entry.dtype, shape, f"{entry.bytes / MIB:.2f}")
    tables.add_section()
    tables.add_row("total", "", "", f"{report.table_bytes / MIB:.2f}")
    figures = Table("figure", "source")
    for heading in ("seed", "ours", "difference"):
        figures.add_column(heading, justify="right")
    figures.add_column()
    for figure in report.figures:
        numbers = [f"{figure.seed:,}", f"{figure.ours:,}", f"{figure.difference:+,}"]
        figures.add_row(figure.what, figure.source, *numbers, "" if figure.agrees else "(!)")

    console = Console()
    console.print(table)
    if report.tables:
        console.print(tables)
    if report.figures:
        console.print(figures)
    if not all(figure.agrees for figure in report.figures):
        console.print("(!) ours does not round to the seed's figure", highlight=False)
    console.print(f"trainable float parameters: {report.trainable_float_params}", highlight=False)
    console.print(f"float buffers: {report.float_buffers}", highlight=False)
    if sidecars is None:
        console.print(
            "sidecars: not counted (--sidecars counts the frozen encoders of other projects)", highlight=False
        )
    else:
        _print_sidecars(console, sidecars)


def _print_sidecars(console: Any, sidecars: Sequence[SidecarAudit]) -> None:
    from rich.table import Table

    table = Table("sidecar, frozen and apart", "modules in int8")
    for heading in ("weights", "stored MiB", "counted as float32, MiB"):
        table.add_column(heading, justify="right")
    for each in sidecars:
        modules = (
            ", ".join(f"{count} {name}" for name, count in each.modules.items()) or "none: kept in bfloat16"
        )
        sizes = [f"{size / MIB:.2f}" for size in (each.stored_bytes, each.counted_bytes)]
        table.add_row(each.name, modules, f"{each.weights:,}", *sizes)
    console.print(table)
    console.print(
        "REFACTOR11 counts an int8 weight as four bytes, since quanto reports float32 for it", highlight=False
    )
