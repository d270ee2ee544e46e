"""What all commands have in common: help, refusals, streams that fail, and warnings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.cli import cli
from conformance.system.command import (
    PLAIN,
    REPOSITORY,
    Here,
    arb,
    check_refused,
    environment,
    generate_line,
    train_line,
)

HELP = """
import sys
from arbitor.optimized.cli import cli, main
for words in (["--help"], ["-h"], [], *([name, "--help"] for name in cli.commands)):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
    heavy = {"torch", "numpy", "rich", "matplotlib", "tensorboard", "triton"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
"""Each command says its help, in one process, and nothing heavy is imported for any of them."""


def test_help_needs_no_torch() -> None:
    """Help is quick because nothing heavy is imported for it: counted, not timed."""
    out = subprocess.run([sys.executable, "-c", HELP], env=environment(), cwd=REPOSITORY, capture_output=True)
    assert out.returncode == 0, out.stderr.decode()
    assert out.stdout.count(b"Usage: ") == 3 + len(cli.commands)


def test_a_run_imports_no_compiler() -> None:
    """The compiler of torch takes seconds to import: for the size of a model, for its weights, and for runs that repeat."""
    code = (
        "import sys\nfrom arbitor.optimized.training.runtime import deterministic\n"
        "from arbitor.optimized.training.sizes import least_state_bytes\n"
        "from conformance.graph.models import WHOLE, ArbModel\n"
        "with deterministic():\n    assert least_state_bytes(WHOLE) > 0 and ArbModel(WHOLE)\n"
        "print(sorted({'torch', 'torch._dynamo', 'torch._inductor', 'sympy', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, capture_output=True)
    assert out.returncode == 0, out.stderr.decode()
    assert out.stdout.decode() == "['torch']\n"


def test_help_is_quick() -> None:
    """Under half a second of processor time, interpreter start included, in the best of three."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert arb("--help", module=PLAIN).returncode == 0
        after = os.times()
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(seconds) < 0.5


def test_version(here: Here) -> None:
    result = here("--version")
    assert result.returncode == 0
    name, version = result.stdout.decode().split()
    assert name == "arb" and (version == "unknown" or version[0].isdigit())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fly"], ["No such command 'fly'"]),
        (["train", "--bogus"], ["No such option", "--bogus"]),
        (["train", "--steps", "0"], ["--steps", "0 is not in the range"]),
        (["train", "--context", "3"], ["--context"]),
        (["train", "--batch", "many"], ["--batch", "'many' is not a valid whole number"]),
        (["train", "--rate", "nan"], ["--rate", "'nan' is not a finite number"]),
        (["train", "--device", "tpu"], ["--device", "'tpu'"]),
        (["train", "--seed", "-1"], ["--seed"]),
        (["train", "--resume"], ["--resume needs --run"]),
        (["generate"], ["--run"]),
        (["generate", "--run", "x", "--temperature", "-1"], ["--temperature"]),
        (["generate", "--run", "x", "--temperature", "inf"], ["--temperature", "'inf' is not a finite"]),
        (["generate", "--run", "x", "--top-k", "0"], ["--top-k", "0 is not in the range"]),
        (["generate", "--run", "x", "--top-p", "0"], ["--top-p", "0.0 is not in the range"]),
        (["generate", "--context", "2", "--run", "x"], ["--context", "2 is not in the range"]),
        (
            ["generate", "--prompt-file", "b", "--prompt", "", "--run", "x"],
            ["--prompt-file 'b'", "--prompt, but only one may be"],
        ),
        (["smoke", "--ctx", "3"], ["--ctx"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_usage_errors(here: Here, arguments: list[str], parts: list[str]) -> None:
    check_refused(here(*arguments), 2, *parts)


@pytest.mark.parametrize(
    ("command", "more", "sentence"),
    [
        ("train", ["--no-save", "--save-interval", "3"], "save_interval is 3, but does nothing"),
        ("train", ["--preset", "small", "--disable-vq"], "disable_vq is True, but changes nothing"),
        ("audit", ["--preset", "small", "--disable-graph"], "disable_graph is True, but changes nothing"),
        ("smoke", ["--preset", "tiny", "--enable-memory"], "enable_memory is True, but changes nothing"),
        ("audit", ["--max-moe-iters", "2"], "max_moe_iters is 2, but changes nothing of the preset tiny"),
        ("audit", ["--disable-moe", "--max-moe-iters", "3"], "max_moe_iters is 3, but must be 1 without"),
        ("generate", ["--temperature", "0", "--seed", "0"], "--seed was given, but does nothing with --temp"),
        (
            "generate",
            ["--temperature", "0", "--top-k", "3"],
            "--top-k was given, but does nothing with --temp",
        ),
        (
            "generate",
            ["--bytes", "0", "--top-p", "0.5"],
            "--top-p was given, but does nothing with --bytes 0",
        ),
        ("generate", ["--bytes", "0", "--seed", "1"], "--seed was given, but does nothing with --bytes 0"),
        (
            "generate",
            ["--bytes", "0", "--temperature", "1"],
            "--temperature was given, but does nothing with",
        ),
        ("generate", ["--bytes", "0", "--no-cuda-graph"], "--cuda-graph was given, but does nothing with"),
        ("generate", ["--context", "9"], "--context was given, but does nothing without --prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_nothing_reads_is_refused(
    here: Here, text: Path, tmp_path: Path, command: str, more: list[str], sentence: str
) -> None:
    arguments = {
        "train": train_line(text, tmp_path / "run", *more),
        "generate": generate_line(tmp_path, *more),
    }
    check_refused(here(*arguments.get(command, [command, *more])), 2, sentence)
    assert not (tmp_path / "run").exists()


def test_a_reader_that_goes_away_is_told_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = arb("--help", module=PLAIN, stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


def test_an_unforeseen_error_is_one_sentence_too() -> None:
    """A full standard output, which nothing in the program expects, ends in a sentence. ``--traceback`` tells more."""
    with open("/dev/full", "wb") as full:
        done = arb("--version", module=PLAIN, stdout=full.fileno())
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [["eval", "run", "--data", "text"], ["train"], ["smoke", "--preset", "tiny"]]
)
def test_a_python_without_torch_is_one_sentence(words: list[str]) -> None:
    """In a process of its own, since here torch is imported. The errors that are explained are torch's own, too."""
    program = f"import sys; sys.modules['torch'] = None; from {PLAIN} import main; main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY, env=environment()
    )
    check_refused(done, 1, "the package 'torch' is not installed: `make install`")


def test_a_warning_is_a_sentence(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an encoder of another project that cannot be kept as it should be."""

    def warns(**options: Any) -> None:
        warnings.warn("\x1b[31mit is kept\n in bfloat16", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli.commands["preset"], "callback", warns)
    result = here("preset", "tiny")
    assert result.returncode == 0
    said = result.stderr.decode()
    assert said.startswith("arb: ") and said.endswith("[31mit is kept in bfloat16.\n") and "\x1b" not in said
