"""Every command that a page shows is understood by what it calls, and every block of a page is looked at by some test."""

from __future__ import annotations

import json
import re

import pytest

from conformance import pages
from conformance.front.test_examples import PAGES
from conformance.import_lint import ROOT
from conformance.report import skip

GENERATED = {"docs/api.md", "docs/ops.md"}
"""Pages whose blocks are signatures, made from the code."""

OF_MEDIA = {"docs/media.md", "docs/spec/sidecars.md"}
"""Pages whose examples run with small sidecars, in conformance/sidecars/test_pages_of_media.py."""

COMMANDS = [each for each in (*pages.shown(), *pages.helped()) if not pages.is_of_bench(each)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_understood(command: pages.Shown, pytestconfig: pytest.Config) -> None:
    if "-n" in command.words and not pytestconfig.pluginmanager.hasplugin("xdist"):
        skip("pytest -n", "it needs pytest-xdist, which is not installed or not loaded")
    pages.understood(command, of_pytest=pytestconfig._parser)


@pytest.mark.parametrize(
    ("line", "whole", "sentence"),
    [
        ("arb fly", True, "there is no command fly"),
        ("arb train --wings 2", True, "No such option"),
        ("arb train --wings", False, "there is no option --wings"),
        ("arb generate --[no-]wings", False, "there is no option --wings"),
        ("torchrun --wings 2 -m arbitor.train", True, "2"),
        ("torchrun -m arbitor.train --wings", True, "No such option"),
        ("torchrun -m arbitor.finetune --wings", True, "No such option"),
        ("torchrun -m arbitor.wings", True, "there is no module arbitor.wings"),
        ("torchrun -m bench.largest --wings", False, "there is no option --wings"),
        ("python -m conformance.wings", True, "no module conformance.wings"),
        ("python -m conformance.system.fuzz --wings 2", True, "2"),
        ("python -m conformance.system.fuzz --wings", False, "there is no option --wings"),
        ("python -m arbitor.convert --wings", True, "2"),
        ("python -m conformance.import_lint.py", True, "no module"),
        ("python -m conformance.ops", True, "no module conformance.ops"),
        ("pytest conformance --wings", True, "unrecognized arguments"),
        ("python -m pytest conformance --wings", True, "unrecognized arguments"),
        ("python -m pytest conformance --family wings", True, "there is no family wings"),
        ("pytest conformance/test_wings.py", True, "there is no conformance/test_wings.py"),
        ("pytest conformance --family wings", True, "there is no family wings"),
        ('pip install "arbitor[wings]"', True, "no such extra"),
        ("pip install torch==2.0", True, "not what constraints.txt pins"),
        ("make wings", True, "make knows no wings"),
        ("make test WINGS=2", True, "make knows no WINGS"),
        ("fly --high", True, "no program is called fly"),
    ],
)
def test_a_command_that_is_none_is_noticed(
    line: str, whole: bool, sentence: str, pytestconfig: pytest.Config
) -> None:
    with pytest.raises((AssertionError, Exception, SystemExit), match=sentence):
        pages.understood(pages.Shown("a page", pages.typed(line), whole), of_pytest=pytestconfig._parser)


def test_every_block_is_of_a_kind_that_something_looks_at() -> None:
    """Commands are parsed here, JSON too, and Python runs."""
    kinds: dict[str, set[str]] = {}
    for page in pages.PAGES:
        for language, text in pages.fences(page):
            kinds.setdefault(language, set()).add(str(page.relative_to(ROOT)))
            if language == "json":
                json.loads(text)
    assert kinds.keys() == {"", "json", "python", "text"} and kinds["text"] <= GENERATED
    assert kinds["python"] == {*PAGES} | OF_MEDIA | GENERATED


def test_the_site_shows_every_page() -> None:
    """A page that stands in no part of the site's navigation would fail its build, which only `make docs` runs."""
    shown = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert shown == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
