"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.cli import cli
from arbitor.optimized.training import generate as generation
from arbitor.optimized.training import loop
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.options import CHANGES
from arbitor.reference.audit import audit
from arbitor.reference.config import MEMORY_ROWS, SIGN_VOTES, with_fields
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from conformance.system.command import REPOSITORY, Here, arb, check_refused, environment, last_counts
from conformance.training.forge import first_element, forged
from conformance.training.nano import NANO, TEXT, WHOLE

NO_GRAPH = {"num_hops": 0, "composite_codes": 0}
"""What is left out of a configuration without the graph."""

PLAIN = "arbitor.optimized.cli"
"""The command without the preset nano and without torch, until a command needs it."""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], *([name, "--help"] for name in cli.commands)])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    """Help is quick because nothing heavy is imported for it: counted, not timed."""
    code = (
        "import sys\nfrom arbitor.optimized.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'rich', 'matplotlib', 'tensorboard', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, capture_output=True)
    assert out.returncode == 0, out.stderr.decode()
    assert out.stdout.decode().splitlines()[-1] == "[]"
    assert b"Usage: " in out.stdout


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


def test_version() -> None:
    result = arb("--version", module=PLAIN)
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
def test_usage_errors(arguments: list[str], parts: list[str]) -> None:
    check_refused(arb(*arguments, module=PLAIN), 2, *parts)


def train(text: Path, run: Path, *more: str) -> list[str]:
    works = ("train", "--preset", "nano", "--data", str(text), "--device", "cpu", "--run", str(run))
    return last_counts(*works, *more)


@pytest.mark.parametrize(
    ("content", "more", "code", "parts"),
    [
        (None, [], 1, ["cannot read the data", "No such file"]),
        (b"", [], 1, ["is empty"]),
        (TEXT[:100], ["--context", "64"], 1, ["has 100 bytes", "context of 64", "128 bytes"]),
        (TEXT, ["--preset", "huge"], 2, ["'huge'", "'tiny'", "or a file that ends in .json"]),
        (TEXT, ["--preset", "tinny"], 2, ["did you mean 'tiny'?\n"]),
        (TEXT, ["--backend", "triton"], 1, ["TRITON_INTERPRET"]),
        (
            TEXT,
            ["--cuda-graph"],
            2,
            ["cuda_graph is True", "device cpu", "only the triton backend on cuda with stochastic votes"],
        ),
    ],
    ids=["missing", "empty", "short", "preset", "misspelt", "backend", "graph"],
)
def test_train_refuses(
    here: Here, tmp_path: Path, content: bytes | None, more: list[str], code: int, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    check_refused(here(*train(tmp_path / "data", tmp_path / "run", *more)), code, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "there"),
    [
        (lambda path: path.write_bytes(b"mine"), "a file"),
        (lambda path: path.symlink_to("nowhere"), "a link to no folder"),
        (lambda path: path.symlink_to(path.name), "a link to no folder"),
        (lambda path: os.mkfifo(path), "a pipe"),
    ],
    ids=["file", "dangling", "loop", "pipe"],
)
def test_a_run_folder_that_is_none_is_refused_before_anything_is_read(
    here: Here, tmp_path: Path, make: Callable[[Path], object], there: str
) -> None:
    make(tmp_path / "run")
    result = here(*train(tmp_path / "missing", tmp_path / "run"))
    check_refused(result, 1, f"the run folder '{tmp_path / 'run'}' is {there}, but must be a folder")


def test_train_says_what_needs_less_memory(
    here: Here, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(loop, "train", full)
    check_refused(here(*train(text, tmp_path / "run")), 1, "the GPU has not enough memory", "--no-cuda-graph")


def test_train_refuses_a_folder_without_text(here: Here, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    check_refused(here(*train(tmp_path, tmp_path / "run")), 1, "holds no text")


def test_train_takes_bytes_that_are_no_text(here: Here, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(255, -1, -1)) * 8)
    result = here(*train(tmp_path / "data", tmp_path / "run", "--steps", "1", "--no-save"))
    assert result.returncode == 0, result.stderr.decode()
    sample = (tmp_path / "run" / "sample.txt").read_bytes()
    with pytest.raises(UnicodeDecodeError):
        sample.decode()
    # While what is printed can be read.
    result.stdout.decode()


def test_train_prints_a_table_and_a_sample(finished: Path) -> None:
    out = (finished / "stdout").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    for name, bpb in (*summary["baselines"].items(), ("arb nano", summary["val_bpb"])):
        assert any(name in line and f"{bpb:.3f}" in line for line in out.splitlines()), name
    assert "step 15/15" in out and "\x1b" not in out
    assert "sample" in out and str(finished) in out


def test_train_refuses_to_start_twice(here: Here, finished: Path, text: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    check_refused(here(*train(text, finished)), 1, "already holds a run", "--resume")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


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
        "train": train(text, tmp_path / "run", *more),
        "generate": generate(tmp_path, *more),
    }
    check_refused(here(*arguments.get(command, [command, *more])), 2, sentence)
    assert not (tmp_path / "run").exists()


def test_what_is_at_its_default_is_never_refused(here: Here, finished: Path) -> None:
    for more in (["--temperature", "0", "--bytes", "1"], ["--bytes", "0"], ["--prompt", "", "--bytes", "1"]):
        result = here(*generate(finished, *more))
        assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize(
    ("option", "value", "was"), [("--steps", "14", "15"), ("--batch", "3", "2"), ("--preset", "tiny", "nano")]
)
def test_resume_refuses_another_run(here: Here, finished: Path, option: str, value: str, was: str) -> None:
    result = here("train", "--run", str(finished), "--resume", option, value)
    check_refused(result, 1, f"started with {option[2:]} {was}", f"with {option[2:]} {value}")


@pytest.mark.parametrize(
    ("flags", "fields", "settings"),
    [
        (
            ["--disable-vq"],
            {"num_codes": 0, "image_codes": 0, "audio_codes": 0, "memory_rows": 0, **NO_GRAPH},
            {"disable_vq": True},
        ),
        (["--disable-graph"], NO_GRAPH, {"disable_graph": True}),
        (["--disable-moe"], {"use_moe": False}, {"disable_moe": True}),
        (["--enable-memory"], {"memory_rows": MEMORY_ROWS}, {"enable_memory": True}),
        (["--enable-image"], {"image_features": 384, "image_codes": 8192}, {"enable_image": True}),
        (["--max-moe-iters", "3"], {"max_moe_iters": 3}, {"max_moe_iters": 3}),
        (["--sign-votes"], dict(SIGN_VOTES), {"sign_votes": True}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_trains_the_model_that_its_options_name(
    here: Here,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    fields: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    off = {"--enable-memory": {"memory_rows": 0}, "--enable-image": {"image_features": 0}}
    preset = with_fields(WHOLE, **off.get(flags[0], {}))
    monkeypatch.setitem(PRESETS, "whole", preset)
    run, expected = tmp_path / "run", with_fields(preset, **fields)
    result = here(*train(text, run, "--preset", "whole", "--steps", "1", *flags))
    assert result.returncode == 0, result.stderr.decode()
    summary, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    assert summary["weights"] == audit(expected).weights
    assert config["model"] == json.loads(expected.to_json()) != json.loads(preset.to_json())
    unset = {**dict.fromkeys(CHANGES, False), "max_moe_iters": None}
    assert {name: config["run"][name] for name in CHANGES} == {**unset, **settings}
    trained = load_checkpoint(run / "final.safetensors")
    assert trained.state.keys() == ArbModel(expected, device="meta").state().keys()

    same = resume_with(run, *flags)
    assert here(*same).returncode == 0
    other = "moe" if "--disable-graph" in flags else "graph"
    says = f"started with disable_{other} False and cannot go on with disable_{other} True"
    check_refused(here(*same, f"--disable-{other}"), 1, says)
    says = f"started with max_moe_iters {settings.get('max_moe_iters')} and cannot go on with max_moe_iters 2"
    check_refused(here(*last_counts(*same, "--max-moe-iters", "2")), 1, says)


def resume_with(run: Path, *more: str) -> list[str]:
    return ["train", "--run", str(run), "--resume", *more]


def test_a_checkpoint_with_a_table_out_of_range_is_used_by_nobody(
    here: Here, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every digest fits. Neither the trainer nor ``arb generate`` loads it, and the run folder stays as it is."""
    run = tmp_path / "run"
    assert here(*train(text, run, "--preset", "whole", "--steps", "1")).returncode == 0
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
        check_refused(here(*generate(run)), 1, says)
        check_refused(here(*resume_with(run)), 1, says)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def generate(run: Path, *more: str) -> list[str]:
    return last_counts("generate", "--run", str(run), "--device", "cpu", *more)


def test_generate_is_deterministic(here: Here, finished: Path) -> None:
    arguments = ["--prompt", "7 squared", "--bytes", "20", "--temperature", "1", "--seed", "5"]
    first = arb(*generate(finished, *arguments))
    assert first.returncode == 0, first.stderr.decode()
    assert first.stdout.startswith(b"7 squared") and len(first.stdout) == 9 + 20
    assert here(*generate(finished, *arguments)).stdout == first.stdout
    assert here(*generate(finished, *arguments[:-1], "6")).stdout != first.stdout


def test_generate_passes_bytes_through_a_pipe_and_cleans_them_for_a_terminal(
    here: Here, finished: Path
) -> None:
    # A byte that is no UTF-8, and the start of an escape sequence.
    raw = "\udcff\x1b["
    assert here(*generate(finished, "--prompt", raw, "--bytes", "0")).stdout == b"\xff\x1b["
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", PLAIN, "generate", "--run", str(finished), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--prompt", raw, "--bytes", "0"], env=environment(), cwd=REPOSITORY, stdout=follower
    )
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
    file = generate(finished, "--bytes", "2", "--prompt-file", str(tmp_path / "prompt"))
    for more, length in (([], 16), (["--context", "40"], 40), (["--context", "6000"], 5120)):
        result = here(*file, *more)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout[:-2] == prompt
        assert read.pop() == prompt[-length:]
    text = ["--prompt", "7 squared is 49.", "--context", "9", "--bytes", "5"]
    (tmp_path / "prompt").write_bytes(b"7 squared is 49.")
    assert here(*generate(finished, *text)).stdout == here(*last_counts(*file, *text[2:])).stdout
    assert read == [b"ed is 49."] * 2


def test_generate_refuses_to_record_on_a_cpu(here: Here, finished: Path) -> None:
    check_refused(
        here(*generate(finished, "--cuda-graph")),
        2,
        "cuda_graph is True",
        "only the triton backend on cuda can",
    )


def test_generate_refuses_a_prompt_that_it_cannot_read(here: Here, finished: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = here(*generate(finished, "--prompt-file", missing))
    check_refused(result, 1, f"cannot read the prompt {missing!r}: No such file")


def test_generate_refuses_a_folder_without_a_checkpoint(here: Here, tmp_path: Path) -> None:
    check_refused(here(*generate(tmp_path)), 1, "holds no checkpoint")


def test_generate_says_so_where_the_best_checkpoint_is_damaged(
    here: Here, finished: Path, tmp_path: Path
) -> None:
    content = (finished / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(content[:-1])
    (tmp_path / "latest.safetensors").write_bytes(content)
    result = here(*generate(tmp_path, "--bytes", "3"))
    assert result.returncode == 0 and len(result.stdout) == 3
    assert b"best.safetensors' is damaged" in result.stderr
    (tmp_path / "latest.safetensors").unlink()
    result = here(*generate(tmp_path, "--bytes", "3"))
    assert result.returncode == 1 and b"Traceback" not in result.stderr


def test_audit_counts_weights_and_no_floats(here: Here) -> None:
    result = here("audit", "--preset", "tiny", "--json")
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["weights"] == sum(area["weights"] for area in report["areas"]) > 100_000
    assert report["trainable_float_params"] == report["float_buffers"] == 0
    for area in report["areas"]:
        assert 1.3 < area["canonical_bytes"] / area["weights"] < 1.5
        assert area["canonical_bytes"] < area["resident_bytes"] < 1.2 * area["canonical_bytes"]
    table = here("audit", "--preset", "tiny").stdout.decode()
    assert f"{report['weights']:,}" in table
    check_refused(here("audit", "--preset", "huge"), 2, "'huge'")


def test_audit_shows_the_seeds_figures(here: Here) -> None:
    whole = here("audit", "--preset", "r14").stdout.decode()
    for text in ("MoEGraph", "3,011,944,672", "edge signs", "int32", "REFACTOR14", "+24,736", "sidecars"):
        assert text in whole
    off = ("--disable-vq", "--disable-graph", "--disable-moe")
    core = here("audit", "--preset", "r12", *off).stdout.decode()
    for text in ("124,145,088", "123,996,160", "+148,928", "(!)"):
        assert text in core
    assert "(!)" not in whole and "MoEGraph" not in core


def test_smoke_reports_what_refactor_12_reports(here: Here) -> None:
    result = here("smoke", "--preset", "nano", "--device", "cpu", "--ctx", "5", "--batch", "2", "--backward")
    assert result.returncode == 0, result.stderr.decode()
    lines = dict(line.split(": ", 1) for line in result.stdout.decode().splitlines()[1:])
    passes = [f"{part}, {when}" for when in ("cold", "warm") for part in ("forward", "backward/update")]
    assert list(lines) == ["logical ternary weights", "training state", "loss", "build", *passes]
    assert lines["logical ternary weights"] == f"{audit(NANO).weights:,}"
    assert lines["training state"].endswith(" MiB") and lines["forward, cold"].endswith(" s")
    assert "backward" not in here("smoke", "--preset", "nano", "--device", "cpu").stdout.decode()


def test_smoke_of_a_loss_that_is_not_finite() -> None:
    check_refused(arb("nan=0", "smoke", "--preset", "nano", "--device", "cpu", "--backward"), 1, "not finite")


def test_a_reader_that_goes_away_is_told_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", PLAIN, "--help"]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


def test_an_unforeseen_error_is_one_sentence_too() -> None:
    """A full standard output, which nothing in the program expects, ends in a sentence. ``--traceback`` tells more."""
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", PLAIN, "--version"]
        done = subprocess.run(command, env=environment(), cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr and b"Traceback" not in done.stderr


def test_a_warning_is_a_sentence(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an encoder of another project that cannot be kept as it should be."""

    def warns(**options: Any) -> None:
        warnings.warn("\x1b[31mit is kept\n in bfloat16", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli.commands["preset"], "callback", warns)
    result = here("preset", "tiny")
    assert result.returncode == 0
    said = result.stderr.decode()
    assert said.startswith("arb: ") and said.endswith("[31mit is kept in bfloat16.\n") and "\x1b" not in said
