"""``arb preset``."""

from __future__ import annotations

from typing import Any

import click

from arbitor.optimized.commands.command import Command
from arbitor.optimized.commands.parameters import settings
from arbitor.optimized.training.options import CHANGES


@click.command(cls=Command)
@click.argument("name", required=False)
@settings(*CHANGES)
def preset(name: str | None, **changes: Any) -> None:
    """Print the configuration of the preset NAME as JSON, to edit it and train it with --preset FILE.json.

    Without NAME, list the presets.
    """
    import json

    from arbitor.optimized.training.plan import model_config
    from arbitor.reference.audit import audit
    from arbitor.reference.presets import PRESETS

    if name is None:
        given = [change for change, value in changes.items() if value]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} was given, but does nothing without NAME")
        for known, config in PRESETS.items():
            click.echo(f"{known:<8} {audit(config).weights:>15,} ternary weights")
        return
    click.echo(json.dumps(json.loads(model_config(name, **changes).to_json()), indent=2))
