"""The table of settings: a new one is a row, and what other files say of a setting agrees with its row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import click
import pytest

from arbitor.optimized import cli
from arbitor.optimized.training.data import MIN_CONTEXT
from arbitor.optimized.training.options import (
    ADAPTERS,
    BEFORE,
    BOUND,
    CHANGES,
    FINETUNE_DEFAULTS,
    PRESET_DEFAULTS,
    ROWS,
    preset_defaults,
)
from arbitor.reference.config import MAX_MOE_ITERS, ArbConfig
from arbitor.reference.graph.adapters import ALL_LINEAR, DEFAULT_ALPHA, DEFAULT_RANK
from arbitor.reference.presets import PRESETS
from conformance.system.command import REPOSITORY, environment

ROW = '    volume: Annotated[int, Option(help="How loud", default=3, low=1, high=11, bound=True, before=4)]\n'
"""A setting that no trainer has."""

COMMANDS = """
import sys
import pytest
from conformance.training import nano
patch = pytest.MonkeyPatch()
nano.register(patch)
nano.without_pictures(patch)
from arbitor.optimized import cli
from arbitor.optimized.training.options import Settings, TrainOptions
from arbitor.optimized.training.plan import decide

settings: Settings = decide(TrainOptions(preset="nano", volume=5), None)
recorded = settings.as_json()
assert settings.volume == 5 and decide(TrainOptions(), recorded).volume == 5
del recorded["volume"]
assert decide(TrainOptions(volume=4), recorded).volume == 4 and decide(TrainOptions(preset="nano"), None).volume == 3
data, run = sys.argv[1:]
new = ["train", "--preset", "nano", "--data", data, "--device", "cpu", "--steps", "1", "--run", run]
resumed = ["train", "--run", run, "--resume"]
codes = []
for command in (
    ["train", "--help"], [*new, "--volume", "12"], [*new, "--volume", "7"], [*resumed, "--volume", "7"],
    [*resumed, "--volume", "8"]
):
    try:
        cli.main(command)
    except SystemExit as end:
        codes.append(end.code)
print(codes)
"""


def test_a_setting_is_one_row(text: Path, tmp_path: Path) -> None:
    """Added to a copy of the trainer, it is on the command line, in the settings, in config.json, and refused on resume."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("arbitor", "optimized"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored, symlinks=True)
    for name in ("reference", "sidecars"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    table = tmp_path / "optimized" / "training" / "options.py"
    before, row, after = table.read_text().partition("    device: Annotated[")
    assert row
    table.write_text(before + ROW + row + after)
    run = tmp_path / "run"
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    command = [sys.executable, "-c", COMMANDS, str(text), str(run)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 2, 0, 0, 1]", (done.stdout, done.stderr)
    assert "--volume WHOLE NUMBER" in done.stdout and "How loud [3]." in done.stdout
    assert json.loads((run / "config.json").read_text())["run"]["volume"] == 7
    too_loud, refused = done.stderr.splitlines()
    assert "--volume" in too_loud and "12 is not in the range 1<=x<=11" in too_loud
    assert refused == "arb: the run was started with volume 7 and cannot go on with volume 8."


def test_rows_agree_with_what_they_describe() -> None:
    assert ROWS["context"].option.low == MIN_CONTEXT
    assert ROWS["max_moe_iters"].option.high == MAX_MOE_ITERS
    assert set(CHANGES) < set(BOUND)
    assert set(ADAPTERS) < set(FINETUNE_DEFAULTS)
    assert (FINETUNE_DEFAULTS["lora_rank"], FINETUNE_DEFAULTS["lora_alpha"]) == (DEFAULT_RANK, DEFAULT_ALPHA)
    assert FINETUNE_DEFAULTS["lora_targets"] == ALL_LINEAR
    assert {"nano", "whole"} < PRESET_DEFAULTS.keys() <= PRESETS.keys()
    for preset in PRESETS:
        for name, value in preset_defaults(preset).items():
            ROWS[name].check(value)


def test_what_is_added_says_what_older_runs_have() -> None:
    """A bound setting without `before`, or a field without a default, would refuse every run from before there was one."""
    first = {"preset", "steps", "batch", "context", "accum", "seed", "eval_windows"}
    assert set(BOUND) - BEFORE.keys() == first
    for name, value in BEFORE.items():
        ROWS[name].check(value)
    sizes = "name embed_dim width num_layers num_heads head_dim rotary_dim query_latent kv_latent shared_inner num_experts top_k"
    without = {field.name for field in fields(ArbConfig) if field.default is MISSING}
    assert without == {*sizes.split(), "expert_rank", "head_inner"}


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_help_says_every_default(name: str) -> None:
    for option in cli.cli.commands[name].params:
        if isinstance(option, click.Argument):
            # An argument has no help of its own: that of the command speaks of it.
            assert option.human_readable_name.strip("[].") in (cli.cli.commands[name].help or "")
            continue
        assert isinstance(option, click.Option)
        assert option.required or (option.help or "").endswith("]."), option.name
