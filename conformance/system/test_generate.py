"""`arb generate` from the command line: what it reads, prints and refuses."""

from __future__ import annotations

import io
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest

from arbitor.optimized.training import generate as generation
from arbitor.optimized.training import readers
from arbitor.reference.graph import ArbModel
from conformance.system.command import (
    PLAIN,
    Here,
    arb,
    check_refused,
    generate_line,
    last_counts,
    resume_line,
    train_line,
)
from conformance.training.forge import first_element, forged


def test_generate_is_deterministic(here: Here, finished: Path) -> None:
    arguments = ["--prompt", "7 squared", "--bytes", "20", "--temperature", "1", "--seed", "5"]
    first = arb(*generate_line(finished, *arguments))
    assert first.returncode == 0, first.stderr.decode()
    assert first.stdout.startswith(b"7 squared") and len(first.stdout) == 9 + 20
    assert here(*generate_line(finished, *arguments)).stdout == first.stdout
    assert here(*generate_line(finished, *arguments[:-1], "6")).stdout != first.stdout


def test_generate_passes_bytes_through_a_pipe_and_cleans_them_for_a_terminal(
    here: Here, finished: Path
) -> None:
    # A byte that is no UTF-8, and the start of an escape sequence.
    raw = "\udcff\x1b["
    assert here(*generate_line(finished, "--prompt", raw, "--bytes", "0")).stdout == b"\xff\x1b["
    leader, follower = pty.openpty()
    done = arb(*generate_line(finished, "--prompt", raw, "--bytes", "0"), module=PLAIN, stdout=follower)
    os.close(follower)
    assert done.returncode == 0
    assert os.read(leader, 1000).decode() == "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[\r\n"
    os.close(leader)


def test_generate_reads_as_much_of_a_prompt_as_asked_for(
    here: Here, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is the trained window, or any number of bytes. The prompt may be a file, of any bytes."""
    read: list[bytes] = []
    real = generation.read_prompt

    def watched(model: ArbModel, ids: list[int], **named: Any) -> Any:
        read.append(bytes(ids))
        return real(model, ids, **named)

    monkeypatch.setattr(generation, "read_prompt", watched)
    prompt = bytes(range(256)) * 20
    (tmp_path / "prompt").write_bytes(prompt)
    file = generate_line(finished, "--bytes", "2", "--prompt-file", str(tmp_path / "prompt"))
    for more, length in (([], 16), (["--context", "40"], 40), (["--context", "6000"], 5120)):
        result = here(*file, *more)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout[:-2] == prompt
        assert read.pop() == prompt[-length:]
    text = ["--prompt", "7 squared is 49.", "--context", "9", "--bytes", "5"]
    (tmp_path / "prompt").write_bytes(b"7 squared is 49.")
    assert here(*generate_line(finished, *text)).stdout == here(*last_counts(*file, *text[2:])).stdout
    assert read == [b"ed is 49."] * 2


def test_generate_reads_standard_input_and_says_how_fast_it_is(
    here: Here, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7 squared\xff")))
    done = here(*generate_line(finished, "--prompt-file", "-", "--bytes", "5"))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"7 squared\xff") and len(done.stdout) == 15
    assert done.stderr.startswith(b"arb: 5 bytes in ") and b" a second." in done.stderr


def test_generate_hands_on_each_byte_when_it_is_drawn(
    here: Here, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third byte is never drawn, and the two before it are there."""
    taken = []

    def step(reader: readers.Reader, choose: readers.Choose) -> None:
        taken.append(1)
        if len(taken) == 2:
            raise ValueError("no more")
        reader.model(None, ledger=reader.ledger, choose=choose)

    monkeypatch.setattr(readers.Reader, "step", step)
    result = here(*generate_line(finished, "--prompt", "ab", "--bytes", "9"))
    assert result.returncode == 2 and len(result.stdout) == 4 and result.stdout[:2] == b"ab"


def test_generate_refuses_to_record_on_a_cpu(here: Here, finished: Path) -> None:
    check_refused(
        here(*generate_line(finished, "--cuda-graph")),
        2,
        "cuda_graph is True",
        "only the triton backend on cuda can",
    )


def test_generate_refuses_a_prompt_that_it_cannot_read(here: Here, finished: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = here(*generate_line(finished, "--prompt-file", missing))
    check_refused(result, 1, f"cannot read the prompt {missing!r}: No such file")


def test_generate_refuses_a_folder_without_a_checkpoint(here: Here, tmp_path: Path) -> None:
    check_refused(here(*generate_line(tmp_path)), 1, "holds no checkpoint")


def test_generate_says_so_where_the_best_checkpoint_is_damaged(
    here: Here, finished: Path, tmp_path: Path
) -> None:
    content = (finished / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(content[:-1])
    (tmp_path / "latest.safetensors").write_bytes(content)
    result = here(*generate_line(tmp_path, "--bytes", "3"))
    assert result.returncode == 0 and len(result.stdout) == 3
    assert b"best.safetensors' is damaged" in result.stderr
    (tmp_path / "latest.safetensors").unlink()
    result = here(*generate_line(tmp_path, "--bytes", "3"))
    assert result.returncode == 1 and b"Traceback" not in result.stderr


def test_a_checkpoint_with_a_table_out_of_range_is_used_by_nobody(
    here: Here, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every digest fits. Neither the trainer nor ``arb generate`` loads it, and the run folder stays as it is."""
    run = tmp_path / "run"
    assert here(*train_line(text, run, "--preset", "whole", "--steps", "1")).returncode == 0
    sound = {name: (run / name).read_bytes() for name in ("latest.safetensors", "best.safetensors")}

    def load_state(*arguments: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(ArbModel, "load_state", load_state)
    for name, value, low, high in (
        ("graph.edges.neighbours", 10**9, -1, 69),
        ("composite.edges.neighbours", 30, -1, 29),
        ("shared_vq.bridge.tables.text.usage", -5, 0, 32767),
        ("memory.structure.strengths", -1, 0, 127),
    ):
        for file, content in sound.items():
            (run / file).write_bytes(content)
            forged(run / file, first_element(name, value))
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        says = f"the checkpoint's {name} holds {value}, but its elements must lie from {low} to {high}"
        check_refused(here(*generate_line(run)), 1, says)
        check_refused(here(*resume_line(run)), 1, says)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_what_is_at_its_default_is_never_refused(here: Here, finished: Path) -> None:
    for more in (["--temperature", "0", "--bytes", "1"], ["--bytes", "0"], ["--prompt", "", "--bytes", "1"]):
        result = here(*generate_line(finished, *more))
        assert result.returncode == 0, result.stderr.decode()
