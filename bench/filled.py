"""Tables and lists within pages that are written by hand. A function makes each, and `python -m bench.report` puts it in.

<!-- made by bench.scaling.plan.table_of_bytes -->

| ranks | kept | received, bfloat16 |
...

<!-- until here -->
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from bench.machine import ROOT

BEGINS, ENDS = "<!-- made by ", "<!-- until here -->"
"""What stands around what a function has made, each in a line of its own."""

BEGUN = re.compile(rf"^{BEGINS}", re.MULTILINE)
"""Where something begins. A page that tells of the comments has them within a line."""

MADE = re.compile(
    rf"{BEGUN.pattern}(bench\.[\w.]+)\.(\w+) -->\n\n(?:(?!<!--).)*?\n\n{ENDS}$", re.DOTALL | re.MULTILINE
)
"""What a function has made, and the comments around it. The first names the module and the function, which takes no argument."""


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Return the text of every page that has something made in it, by its path: of `docs`, and of those beside it."""
    texts = {path: path.read_text() for path in [*root.glob("*.md"), *sorted((root / "docs").rglob("*.md"))]}
    return {path: filled(path, text) for path, text in texts.items() if BEGUN.search(text)}


def filled(path: Path, text: str) -> str:
    """Return the text of a page with everything made anew.

    Raises:
        ValueError: a comment begins what no other ends, or names no function below `bench`.
    """

    def made(match: re.Match[str]) -> str:
        module, function = match.groups()
        try:
            content = getattr(import_module(module), function)()
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"{path.name} names {module}.{function}: {error}") from None
        return f"{BEGINS}{module}.{function} -->\n\n{content}\n\n{ENDS}"

    text, number = MADE.subn(made, text)
    if number != (begun := len(BEGUN.findall(text))):
        raise ValueError(
            f"{path.name} has {begun} times '{BEGINS}', but only {number} of them name a function below bench, and "
            f"have an empty line, what it has made, an empty line and '{ENDS}' behind them"
        )
    return text
