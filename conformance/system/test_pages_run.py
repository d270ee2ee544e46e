"""The commands of README and of the tutorials run one after another, as a reader types them: with a nano model and fewer steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import PRESET_DEFAULTS
from arbitor.reference.presets import PRESETS
from conformance import pages
from conformance.system.command import Here
from conformance.training import nano
from conformance.training.runs import options

TAKEN_FOR_GRANTED = {
    "README.md": (),
    "docs/tutorials/your-text.md": (),
    "docs/tutorials/finetune.md": ("runs/demo",),
}
"""Pages, and the run that each needs before its first command."""

ELSEWHERE = {
    "--device cuda": "it needs a GPU",
    "--data-image": "pictures need sidecars, and tests of their own run them",
}
"""What a line has that does not run here, with the reason."""


def shorter(words: list[str]) -> list[str]:
    """Return a command with a hundredth of its steps and a twentieth of its bytes."""
    parts = {"--steps": 100, "--bytes": 20}
    return [
        str(int(word) // parts[before]) if before in parts else word
        for before, word in zip(["", *words], words, strict=False)
    ]


@pytest.mark.parametrize("page", TAKEN_FOR_GRANTED)
def test_the_commands_of_a_page_run_in_their_order(
    page: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", nano.NANO)
    monkeypatch.setitem(PRESET_DEFAULTS, "tiny", nano.NANO_DEFAULTS)
    monkeypatch.chdir(tmp_path)
    commands = [
        list(each.words[1:])
        for each in pages.shown()
        if each.page == page and each.whole and each.words[0] == "arb"
    ]
    assert len(commands) > 5
    for folder in sorted(set(re.findall(r"--data (\S+)", "\n".join(map(" ".join, commands))))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(nano.TEXT + folder.encode())
    for run in TAKEN_FOR_GRANTED[page]:
        train(options(tmp_path / "other-texts" / "a.txt", tmp_path / run, preset="tiny"))
    left_out = 0
    for words in commands:
        if any(part in " ".join(words) for part in ELSEWHERE):
            left_out += 1
            continue
        result = here(*shorter(words))
        assert result.returncode == 0, (words, result.stderr.decode())
    assert left_out <= 1
