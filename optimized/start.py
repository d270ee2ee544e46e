"""What ``arb`` runs first: from here on Ctrl-C ends it in a sentence, also while it imports its command line."""

from __future__ import annotations

from typing import NoReturn

from arbitor.optimized.interrupts import interruptible


def main() -> NoReturn:
    """Run the command line of ``arb`` and exit."""
    with interruptible():
        from arbitor.optimized.cli import main as run

        run()
