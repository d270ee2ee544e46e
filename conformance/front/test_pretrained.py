"""Models as folders: what is saved comes back in every bit, from a folder, a run or a hub, and nothing hostile does."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor import ArbConfig, ArbModel, adapters, pretrained
from arbitor.optimized.training import model_folder
from arbitor.optimized.training.adapter_files import write_adapter, write_floats
from arbitor.optimized.training.adapter_state import AdapterState
from arbitor.optimized.training.checkpoint import CheckpointError, state_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from conformance.graph.models import drawn_by_the_reference
from conformance.subject import Subject
from conformance.training import nano
from conformance.training.forge import Change, first_element, forged
from conformance.training.nano import IDS
from conformance.training.runs import options


def trained(steps: int = 2, config: ArbConfig = nano.WHOLE, **asked: Any) -> ArbModel:
    """Return a model after some steps, so that accumulators and tables are not what they begin with."""
    model = ArbModel(config, device="cpu", seed=3, **asked)
    for step in range(steps):
        step_on(model, step)
    return model


def step_on(model: ArbModel, step: int) -> None:
    assert model.backward(model.losses(IDS), rate=6.0, step=step)
    model.step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a model, for all tests of this file. It must not be changed."""
    path = tmp_path_factory.mktemp("saved") / "model"
    trained().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder that holds a model."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_holds_the_model_and_how_it_goes_on(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "deep" / "model")
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    copy = ArbModel.from_pretrained(tmp_path / "deep" / "model", device="cpu")
    assert (copy.config, copy.seed, copy.steps_taken) == (model.config, 3, 2)
    for other in (model, copy):
        step_on(other, 2)
    assert state_sha256(copy.state()) == state_sha256(model.state())
    assert state_sha256(trained().state()) != state_sha256(model.state()), "the step changed nothing"


def test_a_folder_serves_every_op_set(subject: Subject, tmp_path: Path) -> None:
    """One layer has every module. A second one would only take the interpreter longer."""
    folder, one_layer = tmp_path / "model", trained(config=replace(nano.WHOLE, num_layers=1))
    one_layer.save_pretrained(folder)
    ops = drawn_by_the_reference(subject.ops)
    model = ArbModel.from_pretrained(folder, device=subject.device, ops=ops)
    assert model.ops is ops and state_sha256(model.state()) == state_sha256(one_layer.state())
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert len(model.generate(b"to be", max_new_bytes=2)) == 2


def test_config_names_the_model(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    assert document["model_type"] == "arbitor" and document["architectures"] == ["ArbModel"]
    assert ArbConfig.from_json(json.dumps(document["model"])) == nano.WHOLE


def test_a_folder_is_overwritten_by_another_model(folder: Path) -> None:
    trained(0, nano.NANO).save_pretrained(folder)
    assert ArbModel.from_pretrained(str(folder), device="cpu").config == nano.NANO


def test_a_run_gives_its_best_model(text: Path, tmp_path: Path) -> None:
    train(options(text, tmp_path / "run", dtype="float32"))
    best = ArbModel.from_pretrained(tmp_path / "run", device="cpu")
    same = ArbModel.from_pretrained(tmp_path / "run" / "best.safetensors", device="cpu")
    assert state_sha256(best.state()) == state_sha256(same.state())
    assert best.trained_context == nano.NANO_DEFAULTS["context"]
    latest = ArbModel.from_pretrained(tmp_path / "run" / "latest.safetensors", device="cpu")
    assert latest.steps_taken == nano.NANO_DEFAULTS["steps"]
    (tmp_path / "run" / "best.safetensors").write_bytes(b"damaged")
    (tmp_path / "run" / "final.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"best\.safetensors.* trying another one"):
        found = ArbModel.from_pretrained(tmp_path / "run", device="cpu")
    assert state_sha256(found.state()) == state_sha256(latest.state())
    best.save_pretrained(tmp_path / "model")
    assert ArbModel.from_pretrained(tmp_path / "model", device="cpu").trained_context == best.trained_context


def test_a_run_is_not_written_over(text: Path, tmp_path: Path) -> None:
    train(options(text, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for name in (None, "latest", "previous", "best", "final", "metrics"):
        with pytest.raises(ValueError, match="must be one of its own"):
            trained(0).save_pretrained(tmp_path / "run")
        if name is None:
            assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        else:
            [path] = (tmp_path / "run").glob(f"{name}.*")
            path.unlink()
    # Its config.json alone is left.
    with pytest.raises(ValueError, match="must be one of its own"):
        trained(0).save_pretrained(tmp_path / "run")


def test_votes_that_wait_for_a_step_are_not_saved(tmp_path: Path) -> None:
    model = trained(0)
    model.backward(model.losses(IDS), rate=6.0, step=0)
    with pytest.raises(RuntimeError, match=r"must follow model\.step\(\)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_full_disk_leaves_the_model_that_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        trained(1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("files", [0, 1])
@pytest.mark.parametrize("write", ["model", "floats", "adapter"])
def test_a_full_disk_leaves_no_part_of_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, files: int
) -> None:
    """Neither an empty folder nor one of the two files, so that the next attempt finds its folder new or empty."""
    model = trained(1)
    adapters.attach(model, rank=2, targets="value_up")
    state = AdapterState.of(model)
    assert state is not None
    adapters.detach(model)
    writers: dict[str, Callable[[Path], None]] = {
        "model": model.save_pretrained,
        "floats": lambda path: write_floats(path, model.config, {"w": torch.zeros(2)}, model.tables()),
        "adapter": lambda path: write_adapter(path, state, base="x"),
    }
    real, renamed = os.replace, list[str]()

    def replace(source: Path, target: Path) -> None:
        if len(renamed) >= files:
            raise OSError(28, "No space left on device")
        renamed.append(target.name)
        real(source, target)

    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_bytes(b"mine")
    for folder in (tmp_path / "above" / "new", tmp_path / "empty", tmp_path / "used"):
        if folder.name == "used" and write == "floats":
            continue
        renamed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(TrainingError, match="No space left on device"):
                writers[write](folder)
        assert len(renamed) == files
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        assert left == ["empty", "used", "used/mine.txt"]
    writers[write](tmp_path / "above" / "new")


def another_size(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    header["config"]["width"] += 12


def many_layers(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    header["config"]["num_layers"] = 2**31 - 1


def many_hops(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    header["config"]["num_hops"] = 2**31 - 1


def unknown_field(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    header["config"]["colour"] = "red"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_size, "is of another model"),
        (many_layers, "num_layers is 2147483647"),
        (many_hops, "num_hops is 2147483647"),
        (unknown_field, "unknown field 'colour'"),
        (first_element("byte_head.down.packed", 250), "byte_head.down.packed"),
        (first_element("graph.edges.neighbours", 4000), "graph.edges.neighbours"),
    ],
)
def test_forgeries_are_refused(folder: Path, change: Change, reason: str) -> None:
    forged(folder / "model.safetensors", change)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=reason):
        ArbModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"model": {}}',
        b" " * (model_folder.MAX_CONFIG_BYTES + 1),
    ],
)
def test_a_config_of_something_else_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ArbModel.from_pretrained(folder, device="cpu")


def test_what_is_no_file_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is a pipe, but must be a regular file"):
        ArbModel.from_pretrained(tmp_path / "pipe")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="it is a pipe, but must be a regular file"):
            ArbModel.from_pretrained(folder)


@pytest.mark.parametrize("source", ["absent", "../absent/x", "a/b/c", "/absent"])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        ArbModel.from_pretrained(source)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds no checkpoint: it is no run, and has no model\.safetensors"
    ):
        ArbModel.from_pretrained(tmp_path)


class Hub:
    """Stands for huggingface_hub: a folder is the hub."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[Any]()
        self.HfApi = lambda: self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        self.asked.append((name, private, exist_ok))
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        self.asked.append(commit_message)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, sorted(allow_patterns)))
        if not (self.root / name).exists():
            raise OSError("404 Client Error.\nmore of it")
        return str(self.root / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(pretrained, "library", lambda name: {"huggingface_hub": stand_in}[name])
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_a_hub_gives_what_was_sent_to_it(hub: Hub) -> None:
    model = trained()
    assert model.push_to_hub("ann/nano-2", private=True) == "https://hub/ann/nano-2/commit/1"
    assert hub.asked == [("ann/nano-2", True, True), "Upload an ARB model"]
    copy = ArbModel.from_pretrained("ann/nano-2", device="cpu", revision="v1")
    assert hub.asked[2:] == [("ann/nano-2", "v1", ["config.json", "model.safetensors"])]
    assert state_sha256(copy.state()) == state_sha256(model.state())


def test_a_hub_is_asked_only_for_what_is_not_here(hub: Hub, folder: Path) -> None:
    folder.rename(folder.parent / "ann")
    (folder.parent / "owner").mkdir()
    (folder.parent / "ann").rename(folder.parent / "owner" / "name")
    ArbModel.from_pretrained("owner/name", device="cpu")
    assert not hub.asked
    with pytest.raises(ValueError, match="revision is 'v1', but must be None"):
        ArbModel.from_pretrained("owner/name", revision="v1")


def test_a_hub_that_has_no_such_model_is_named(hub: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'ann/absent' here.*from the hub: 404 Client Error\.$"
    ):
        ArbModel.from_pretrained("ann/absent")
    with pytest.raises(ValueError, match="name is 'nano', but must be OWNER/NAME"):
        trained(0).push_to_hub("nano")
    with pytest.raises(TypeError, match="name is a int, but must be OWNER/NAME"):
        trained(0).push_to_hub(5)  # type: ignore[arg-type]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    asks: list[Callable[[], Any]] = [
        lambda: ArbModel.from_pretrained("ann/nano"),
        lambda: trained(0).push_to_hub("ann/nano"),
    ]
    for ask in asks:
        with pytest.raises(ImportError, match=r"pip install 'arbitor\[hub\]'"):
            ask()


def test_the_real_library_has_what_is_called() -> None:
    """By name of every argument, so that a release without one is noticed."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    for call, names in (
        (hub.HfApi.create_repo, {"private", "exist_ok"}),
        (hub.HfApi.upload_folder, {"repo_id", "folder_path", "commit_message"}),
        (hub.snapshot_download, {"revision", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(call).parameters)
