"""`arb finetune`, and what the other commands make of its run: it is measured, described, continued, drawn and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest
import torch

from arbitor import ArbModel
from arbitor.adapters import adapters_of, float_model, load_adapter
from arbitor.optimized.cli import cli
from arbitor.optimized.commands.export import print_losses
from arbitor.optimized.training import report
from arbitor.optimized.training.checkpoint import load_checkpoint
from arbitor.optimized.training.facts import read_facts
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.reference.graph.adapters import Merge
from conformance.compare import alike
from conformance.system.command import Here, check_refused
from conformance.training import nano
from conformance.training.test_finetune import OTHER


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_bytes(OTHER)
    return path


@pytest.fixture(scope="module")
def tuned(finished: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of adapters."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    options = {"init_from": str(finished), "data": str(other), "device": "cpu", "run": folder, "steps": 30}
    more = {
        "batch": 2,
        "context": 16,
        "lora_rank": 2,
        "learning_rate": 0.02,
        "eval_interval": 10,
        "log_interval": 5,
    }
    with pytest.MonkeyPatch.context() as patch:
        nano.register(patch)
        nano.without_pictures(patch)
        train(TrainOptions(finetune=True, **options, **more))
    return folder


def bpb(here: Here, run: Path, data: Path) -> float:
    said = here(
        "eval", "--run", str(run), "--data", str(data), "--device", "cpu", "--context", "16", "--json"
    )
    assert said.returncode == 0, said.stderr.decode()
    return float(json.loads(said.stdout)["total"]["bpb"])


def test_adapters_are_measured_described_and_drawn(
    here: Here, finished: Path, tuned: Path, other: Path
) -> None:
    assert bpb(here, tuned, other) < bpb(here, finished, other) - 0.3
    said = json.loads(
        here("eval", "--run", str(tuned), "--data", str(other), "--device", "cpu", "--json").stdout
    )
    assert said["adapters"] > 10
    info = json.loads(here("info", str(tuned), "--json").stdout)
    summary = json.loads((tuned / "summary.json").read_text())
    assert (info["base"], info["lora_rank"], info["learning_rate"]) == (str(finished), 2, 0.02)
    assert (
        info["adapter_sha256"] == summary["adapter_sha256"]
        and info["state_sha256"] == summary["state_sha256"]
    )
    assert "adapter/adapter_model.safetensors" in info["files"]
    alone = json.loads(here("info", str(tuned / "best.safetensors"), "--json").stdout)
    assert alone["adapters"] == said["adapters"] and alone["lora_alpha"] == 16.0
    assert "adapters" not in json.loads(here("info", str(finished / "best.safetensors"), "--json").stdout)
    assert here("report", str(tuned)).returncode == 0
    assert (tuned / "report.png").stat().st_size > 10_000
    same = ["--prompt", "The root of ", "--bytes", "12", "--device", "cpu", "--temperature", "0"]
    texts = [here("generate", "--run", str(run), *same).stdout for run in (finished, tuned)]
    model = ArbModel.from_pretrained(tuned, device="cpu")
    assert adapters_of(model) and texts[0] != texts[1]
    wanted = model.generate(b"The root of ", max_new_bytes=12, temperature=0)
    assert texts[1] == b"The root of " + wanted


def test_the_run_has_its_adapters_in_the_format_of_peft(finished: Path, tuned: Path) -> None:
    """The folder over the base gives the model of the run."""
    run = ArbModel.from_pretrained(tuned, device="cpu")
    base = ArbModel.from_pretrained(finished, device="cpu")
    load_adapter(base, tuned / "adapter")
    ids_BT = torch.arange(20).unsqueeze(0)
    assert torch.equal(run(ids_BT), base(ids_BT))


def test_adapters_are_exported_alone_and_merged(here: Here, tuned: Path, other: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert here("export", str(tuned), str(alone)).returncode == 0
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        assert (alone / name).read_bytes() == (tuned / "adapter" / name).read_bytes()

    floats = tmp_path / "floats"
    assert here("export", str(tuned), str(floats), "--merge", "float").returncode == 0
    ids_BT = torch.arange(20).unsqueeze(0)
    wanted = ArbModel.from_pretrained(tuned, device="cpu")(ids_BT)
    alike(float_model(floats)(ids_BT), wanted)

    ternary = tmp_path / "ternary"
    result = here("export", str(tuned), str(ternary), "--merge", "ternary")
    assert result.returncode == 0
    head, *rows, last, done = result.stdout.decode().splitlines()
    assert head.split() == ["error", "change", "kept", "weight"] and last.split()[-1] == "all"
    checkpoint = load_checkpoint(tuned / "best.safetensors")
    assert checkpoint.adapter is not None
    assert sorted(row.split()[-1] for row in rows) == sorted(checkpoint.adapter.matrices)
    error, change, kept, _ = last.split()
    assert 0 < float(error) < float(change) < 1 and 0 < float(kept.removesuffix("%")) < 100
    assert str(ternary) in done
    merged = ArbModel.from_pretrained(ternary, device="cpu")
    assert not adapters_of(merged)
    changed = {
        name
        for name, weight in merged.weights().items()
        if not torch.equal(weight.packed, checkpoint.state[name].packed)  # type: ignore[union-attr]
        or not torch.equal(weight.exponents, checkpoint.state[name].exponents)  # type: ignore[union-attr]
    }
    assert changed and changed <= set(checkpoint.adapter.matrices)
    # It is a model like any other: training goes on from it.
    assert bpb(here, ternary, other) < 9


def test_what_makes_no_sense_is_refused(here: Here, finished: Path, tuned: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    check_refused(here("finetune", "--run", run), 2, "--base is needed")
    check_refused(here("finetune", "--resume"), 2, "--resume needs --run")
    check_refused(here("finetune", "--base", run, "--run", run), 1, "no such folder or file")
    check_refused(here("train", "--lora-rank", "2"), 2, "No such option")
    check_refused(here("finetune", "--base", str(finished), "--preset", "tiny"), 2, "No such option")
    check_refused(
        here(
            "finetune",
            "--base",
            str(finished),
            "--lora-targets",
            "moe.router",
            "--run",
            run,
            "--device",
            "cpu",
        ),
        2,
        "chooses experts by exact integers",
    )
    check_refused(here("export", str(finished), run, "--merge", "float"), 2, "has no adapters")
    check_refused(here("export", str(tuned), str(finished), "--merge", "float"), 2, "must be new or empty")
    assert not Path(run).exists()


def test_the_command_says_what_learns(here: Here, finished: Path, other: Path, tmp_path: Path) -> None:
    where = ["--base", str(finished), "--data", str(other), "--device", "cpu", "--run", str(tmp_path / "run")]
    result = here(
        "finetune", *where, "--steps", "1", "--batch", "2", "--ctx", "16", "--lora-targets", "byte_head.down"
    )
    assert result.returncode == 0, result.stderr.decode()
    out = result.stdout.decode()
    assert (
        "which stay as they are" in out and "adapters: 1 of rank 8, " in out and "the base is frozen" in out
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"adapters {summary['adapter_sha256'][:16]}" in out


def test_the_run_is_finished_by_either_command(here: Here, tuned: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    shutil.rmtree(copy / "adapter")
    assert here("finetune", "--resume", "--run", str(copy)).returncode == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (copy / "adapter" / name).read_bytes() == (tuned / "adapter" / name).read_bytes()
    result = here("finetune", "--resume", "--run", str(copy), "--lora-rank", "3")
    check_refused(result, 1, "started with lora_rank 2 and cannot go on with lora_rank 3")


def test_folders_that_hold_no_ternary_model_say_what_reads_them(
    here: Here, tuned: Path, tmp_path: Path, other: Path
) -> None:
    """They were called damaged, or of another program."""
    alone, floats = str(tmp_path / "alone"), str(tmp_path / "floats")
    assert here("export", str(tuned), alone).stdout.startswith(
        b"wrote the adapters of nano after 30 steps to "
    )
    assert here("export", str(tuned), floats, "--merge", "float").returncode == 0
    for folder, says in (
        (alone, "holds adapters alone: load their base, and then arbitor.adapters.load_adapter(model, "),
        (
            floats,
            "holds the float weights of arb export --merge float, which arbitor.adapters.float_model reads",
        ),
    ):
        for words in (
            ("eval", folder, "--data", str(other)),
            ("info", folder),
            ("generate", folder),
            ("export", folder, str(tmp_path / "new")),
            ("finetune", "--base", folder, "--data", str(other), "--no-save"),
            ("train", "--init-from", folder, "--data", str(other), "--no-save"),
        ):
            check_refused(here(*words), 1, f"{folder!r} {says}")


def test_a_ternary_merge_says_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that keep nothing are counted, and not listed as 0.0% and -0.0%. So are those without a change.

    Where little is kept, the merge says what else to do.
    """
    kept, lost, worse = Merge(10.0, 1.0, 0.5), Merge(10.0, 1.0, 1.0), Merge(10.0, 9.0, 9.001)
    print_losses({"a": kept, "b": lost, "c": worse, "d": Merge(10.0, 0.0, 0.0)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["weight", "a", "all"]
    assert lines[1].split()[2] == "75.0%" and "-0.0%" not in "".join(lines)
    assert lines[3] == "2 of 4 weights keep nothing of their change, and are not listed."
    assert lines[4] == "1 of 4 weights have no change, and are not listed."
    assert lines[5].startswith(
        "0.9% of the change is kept: most of it is smaller than a step of a ternary weight. "
    )
    assert "arb train --init-from" in lines[5]
    print_losses({"a": kept})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_run_is_called_after_what_it_is_from(
    here: Here, finished: Path, tuned: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called by the whole path of a configuration."""
    shutil.copytree(finished, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    more = ("--data", str(other), "--device", "cpu", "--steps", "1", "--batch", "2", "--context", "16")
    for words in (("train", "--init-from", "mine"), ("finetune", "--base", "mine")):
        said = here(*words, *more, "--run", words[0])
        assert said.returncode == 0 and said.stderr == b""
        lines = said.stdout.decode().splitlines()
        assert lines[0].startswith("model: nano (from mine), ")
        assert any("arb nano (from mine)" in line for line in lines)
        assert "preset:               nano (from mine)\n" in here("info", words[0]).stdout.decode()
        config = json.loads(here("info", words[0], "--json").stdout)["preset"]
        assert config == str(tmp_path / "mine" / "config.json")


def test_the_page_of_adapters_shows_theirs(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The learning rate was called that of the votes, and the norms had no panel."""
    drawn: list[str] = []
    real = report._label
    monkeypatch.setattr(
        report, "_label", lambda axes, title, **more: (drawn.append(title), real(axes, title, **more))
    )
    facts, _ = read_facts(RunFolder(tuned))
    report.draw_page(tmp_path / "page.png", facts)
    assert drawn == ["loss", "learning rate of AdamW", "gradient of the adapters", "change by the adapters"]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--base", "none"], 1, "base is 'none', but there is no such folder or file"),
        (["--lora-targets", "x"], 2, "lora_targets has 'x', but must end the name of a linear, such as "),
        (["--batch", "auto"], 2, "'auto' is not a valid whole number"),
    ],
)
def test_sentences_name_what_was_typed(
    here: Here, finished: Path, other: Path, more: list[str], code: int, says: str
) -> None:
    base = () if "--base" in more else ("--base", str(finished))
    result = here("finetune", *base, "--data", str(other), "--device", "cpu", "--no-save", *more)
    check_refused(result, code, says)
    assert "such as 0, 1" not in result.stderr.decode()


def test_help_offers_what_works() -> None:
    for name, has in (("train", True), ("finetune", False)):
        [batch] = [each for each in cli.commands[name].params if each.name == "batch"]
        assert isinstance(batch, click.Option) and ("auto: what memory holds" in str(batch.help)) == has
