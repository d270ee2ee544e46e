"""Options and arguments as users type them out of habit: each works, or the sentence says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from arbitor.optimized.cli import cli
from arbitor.optimized.commands.command import HABITS
from conformance.system.command import REPOSITORY, Here, check_refused, environment
from conformance.training import nano

SINGLE = [
    (name, option)
    for name, command in cli.commands.items()
    for option in command.params
    if isinstance(option, click.Option) and not option.multiple
]
"""Each option that holds one value, with its command."""


@pytest.mark.parametrize(("name", "option"), SINGLE, ids=lambda value: getattr(value, "name", value))
def test_an_option_that_holds_one_value_is_given_once(here: Here, name: str, option: click.Option) -> None:
    """The value before was lost without a word: half of the data, with `--data A --data B`."""
    last = option.opts[-1]
    words = [option.opts[0], last] if option.is_flag else [option.opts[0], "1", last, "2"]
    check_refused(here(name, *words), 2, f"{option.opts[0]}", "was given 2 times, but may be given once")


def test_an_option_and_its_opposite_are_one(here: Here) -> None:
    check_refused(here("train", "--cuda-graph", "--no-cuda-graph"), 2, "--no-cuda-graph was given 2 times")
    check_refused(here("train", "--data", "a", "--data-text", "b"), 2, "a folder may hold many files")


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train", "--lr", "--rate"),
        ("train", "--learning-rate", "--rate"),
        ("finetune", "--lr", "--learning-rate"),
        ("finetune", "--rate", "--learning-rate"),
        ("finetune", "--rank", "--lora-rank"),
        ("finetune", "--init-from", "--base"),
        ("finetune", "--model", "--base"),
        ("train", "--base", "--init-from"),
        ("train", "--epochs", "--steps"),
        ("train", "--model", "--preset"),
        ("train", "--out_dir", "--run"),
        ("train", "--log_interval", "--log-interval"),
        ("train", "--batch-size", "--batch"),
        ("generate", "--length", "--bytes"),
        ("generate", "--max-tokens", "--bytes"),
        ("generate", "--max_new_tokens", "--bytes"),
        ("generate", "--model", "--run"),
        ("generate", "--out", "--to"),
        ("eval", "--out", "--run"),
        ("train", "--step", "--steps"),
    ],
)
def test_a_habit_is_told_what_is_meant(here: Here, command: str, typed: str, meant: str) -> None:
    check_refused(here(command, typed, "1"), 2, f"No such option '{typed}'. Did you mean '{meant}'?")


def test_a_word_of_other_programs_is_told_what_is_meant(here: Here) -> None:
    check_refused(
        here("train", "--device", "gpu"), 2, "'gpu' is not one of 'auto', 'cpu', 'cuda': did you mean 'cuda'?"
    )
    check_refused(here("eval", "x", "--data", "y", "--dtype", "bf16"), 2, "did you mean 'bfloat16'?")


def test_a_habit_names_options_that_are() -> None:
    options = {each for command in cli.commands.values() for param in command.params for each in param.opts}
    assert {meant for each in HABITS.values() for meant in each} <= options


def test_a_run_is_named_with_and_without_its_option(
    here: Here, finished: Path, text: Path, tmp_path: Path
) -> None:
    run, named = str(finished), ("--run", str(finished))
    for command, *more in (("info", "--json"), ("eval", "--data", str(text)), ("generate", "--bytes", "2")):
        one, other = here(command, run, *more), here(command, *named, *more)
        assert one.returncode == other.returncode == 0, one.stderr + other.stderr
        assert one.stdout == other.stdout != b""
        check_refused(here(command, run, *named, *more), 2, "Got unexpected extra argument")
        check_refused(
            here(command, *more), 2, "--run is missing: a run, a folder of arb export, or a checkpoint"
        )
    page = ("--picture", str(tmp_path / "page.png"))
    assert here("report", run, *page).stdout == here("report", *named, *page).stdout != b""
    check_refused(here("report", *page), 2, "--run is missing")
    for folder, words in (("a", (run, str(tmp_path / "a"))), ("b", (str(tmp_path / "b"), *named))):
        assert here("export", *words).returncode == 0
        assert (tmp_path / folder / "model.safetensors").exists()
    check_refused(here("export", run), 2, "RUN and FOLDER are needed")
    check_refused(here("export", "a", "b", *named), 2, "Got unexpected extra argument (b)")
    check_refused(here("train", "--resume", run), 2, "named by --run, as in --resume --run runs/mine")


def test_an_export_takes_the_place_of_nothing(here: Here, finished: Path, tmp_path: Path) -> None:
    """`arb train` refuses a folder in use, and so does `arb export`, which replaced an earlier model."""
    result = here("export", str(finished), str(tmp_path / "model"))
    assert result.stdout.decode() == f"wrote nano after 15 steps to {tmp_path / 'model'}\n"
    before = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    check_refused(here("export", str(finished), str(tmp_path / "model")), 2, "but must be new or empty")
    assert (tmp_path / "model" / "config.json").stat().st_mtime_ns == before


def test_help_is_a_command(here: Here) -> None:
    assert here("help").stdout == here("--help").stdout != b""
    assert here("help", "train").stdout == here("train", "--help").stdout != b""
    check_refused(here("help", "trian"), 2, "No such command 'trian'. Did you mean 'train'?")


def test_the_list_of_commands_is_not_cut(here: Here) -> None:
    shown = " ".join(here("--help").stdout.decode().split("Commands:")[1].split())
    assert "..." not in shown
    for name, command in cli.commands.items():
        assert command.hidden or f"{name} {command.get_short_help_str()}" in shown


def test_what_is_no_model_is_said_to_be_none(here: Here, finished: Path, text: Path) -> None:
    check_refused(here("generate", "none"), 1, "there is no run, folder or checkpoint 'none'")
    result = here("generate", str(text))
    check_refused(result, 1, "is damaged or not a safetensors file: it does not begin as one")
    result = here("train", "--resume", "--run", str(finished), "--steps", "3")
    check_refused(result, 1, "cannot go on with steps 3; more steps are possible")


def test_data_that_look_like_no_text_are_named(here: Here, tmp_path: Path) -> None:
    """A folder leaves such a file out. Asked for by name it is learned from, and the first lines say so."""
    (tmp_path / "a.zip").write_bytes(b"PK\x03\0" + bytes(range(256)) * 8)
    words = ("train", "--preset", "nano", "--device", "cpu", "--steps", "1", "--no-save", "--data")
    said = here(*words, str(tmp_path / "a.zip"))
    assert said.returncode == 0
    assert (
        b"it looks like no text (NUL bytes in its first 8 KiB), and is learned from as it is" in said.stdout
    )


def test_the_ends_of_files_are_said_to_be_the_validation(here: Here, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(nano.TEXT)
    words = ("train", "--preset", "nano", "--device", "cpu", "--steps", "1", "--no-save", "--data")
    said = here(*words, str(tmp_path)).stdout.decode()
    assert "bytes, the last tenth of files (2 pieces); --val-data names other bytes; judged on " in said


def test_a_speed_is_not_glued_to_the_text(finished: Path) -> None:
    """Both go into one pipe, as with `2>&1`."""
    words = ["generate", str(finished), "--prompt", "7", "--bytes", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "conformance.system.nano_arb", *words]
    said = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout
    assert said.startswith(b"7") and said[4:].startswith(b"\narb: 3 bytes in ")
