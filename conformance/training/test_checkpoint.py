"""Checkpoints: what is written can be read by anyone, and nothing else is accepted."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from arbitor.optimized.training import checkpoint as checkpoints
from arbitor.optimized.training.checkpoint import CheckpointError, load_checkpoint
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.model_folder import write_folder
from arbitor.reference.constants import MANTISSA_BITS, level_range
from arbitor.reference.types import TernaryWeight
from conformance.graph.models import NANO, nano, ops_with, random_ids
from conformance.training.forge import Change, first_element, forged

CONFIG = json.loads(NANO.to_json())
METADATA: dict[str, Any] = {
    "config": CONFIG,
    "seed": 3,
    "best_bpb": 2.5,
    "run": {"preset": "nano", "steps": 9},
    "progress": {"seconds": 1.5},
}


@functools.cache
def trained_weights() -> dict[str, TernaryWeight]:
    """Weights after two steps, so that no part of them is all zeros. Not to be written to."""
    model = nano()
    for step in range(2):
        assert model.backward(model.loss(random_ids(2, 12, seed=step)), rate=1.25, step=step)
        model.step()
    return model.weights()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    checkpoints.save_checkpoint(path, trained_weights(), step=2, **METADATA)
    return path


def tensors_of(weights: dict[str, TernaryWeight]) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": t for name, weight in weights.items() for part, t in weight.tensors().items()}


def test_checkpoint_round_trip(saved: Path) -> None:
    weights = trained_weights()
    loaded = load_checkpoint(saved)
    assert {"step": loaded.step, "seed": loaded.seed, "best_bpb": loaded.best_bpb} == {
        "step": 2,
        "seed": 3,
        "best_bpb": 2.5,
    }
    assert (loaded.config, loaded.run, loaded.progress) == (CONFIG, METADATA["run"], METADATA["progress"])
    expected, found = tensors_of(weights), tensors_of(loaded.state)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    other = nano(seed=99)
    other.load_weights(loaded.state)
    assert checkpoints.state_sha256(other.weights()) == loaded.state_sha256


def test_checkpoint_is_a_plain_safetensors_file(saved: Path) -> None:
    """The library reads it, byte for byte as the library would have it."""
    tensors = safetensors.torch.load_file(saved)
    assert tensors.keys() == tensors_of(nano().weights()).keys()
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["arbitor"]
    length = int.from_bytes(saved.read_bytes()[:8], "little")
    assert length % 8 == 0
    assert saved.stat().st_size == 8 + length + sum(tensor.numel() for tensor in tensors.values())


def test_checkpoint_files_of_equal_runs_are_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoints.save_checkpoint(tmp_path / name, trained_weights(), step=2, **METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def bytes_of_one_shape(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Tensors of 24 weights that differ in nothing but their shape."""
    groups = torch.zeros(shape[0], shape[1] // 12, dtype=torch.int8)
    return {
        "packed": torch.full((5,), 121, dtype=torch.uint8),
        "exponents": groups,
        "trit_accum": torch.zeros(shape, dtype=torch.int8),
        "exponent_accum": groups,
    }


def test_state_sha256_sees_every_part_of_every_weight() -> None:
    weights = trained_weights()
    digests = {checkpoints.state_sha256(weights)}
    count = 1
    for name, weight in weights.items():
        for part, tensor in weight.tensors().items():
            changed = tensor.clone()
            changed.view(-1)[-1] += 1 if int(changed.view(-1)[-1]) < 100 else -1
            digests.add(checkpoints.state_sha256({**weights, name: weight.with_tensors(**{part: changed})}))
            count += 1
    renamed = dict(weights)
    renamed["other"] = renamed.pop(next(iter(renamed)))
    digests.add(checkpoints.state_sha256(renamed))
    row = {"w": TernaryWeight(**bytes_of_one_shape((1, 24)), shape=(1, 24))}
    column = {"w": TernaryWeight(**bytes_of_one_shape((2, 12)), shape=(2, 12))}
    digests |= {checkpoints.state_sha256(row), checkpoints.state_sha256(column)}
    assert len(digests) == count + 3
    assert checkpoints.state_sha256(dict(reversed(weights.items()))) == checkpoints.state_sha256(weights)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 5000, -1])
def test_checkpoint_truncated_anywhere_is_refused(saved: Path, keep: int) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(saved)


def test_checkpoint_with_any_byte_flipped_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    places = [*range(0, 16), *range(16, len(content), max(1, len(content) // 150)), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x01
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)
            pytest.fail(f"byte {place} was changed and nobody noticed")


def _reshape(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    tensors["embedding.table.trit_accum"] = tensors["embedding.table.trit_accum"].t().contiguous()


def _lose(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    del tensors["embedding.table.exponents"]


def _add(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    tensors["extra.packed"] = torch.zeros(1, dtype=torch.uint8)


def _widen(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    tensors["embedding.table.trit_accum"] = tensors["embedding.table.trit_accum"].to(torch.int16)


def _field(name: str, value: Any) -> Change:
    def change(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        header[name] = value

    return change


def _drop_field(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    del header["seed"]


EMBEDDING, LOAD = "embedding.table", "layers.0.moe_graph.moe.load"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            first_element("embedding.table.packed", 243),
            "embedding.table.packed holds 243, but its elements must lie from 0 to 242",
        ),
        (
            first_element("embedding.table.exponents", 64),
            "embedding.table.exponents holds 64, but its elements must lie from -128 to 63",
        ),
        (
            first_element("embedding.table.trit_accum", -128),
            "embedding.table.trit_accum holds -128, but its elements must lie from -127 to 127",
        ),
        (
            first_element("embedding.table.exponent_accum", -128),
            "embedding.table.exponent_accum holds -128, but its elements must lie from -127 to 127",
        ),
        (_reshape, "'embedding.table' does not have the shape its header states"),
        (_widen, "'embedding.table' does not have the shape its header states"),
        (_lose, "embedding.table.exponents is missing"),
        (_add, "tensors that belong to no weight"),
        (
            _field("format", 2),
            "format version is 2 and this program reads 3; another version of this program wrote it",
        ),
        (_field("weights", []), r"has \[\] for weights"),
        (_field("step", "2"), "has '2' for step"),
        (_field("best_bpb", True), "has True for best_bpb"),
        (_field("weights", {"embedding.table": {}}), "malformed"),
        (_drop_field, "its header has no seed"),
        (_field("step", -5), "has -5 for step, but it is at least 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoint_forged_is_refused(saved: Path, change: Change, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(forged(saved, change))
    assert "one.safetensors" in str(caught.value)


def test_forged_with_nothing_changed_is_accepted(saved: Path) -> None:
    """The forger above forges well: what is refused is refused for what was changed."""
    before = load_checkpoint(saved).state_sha256
    assert load_checkpoint(forged(saved, lambda tensors, header: None)).state_sha256 == before


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "its header is no object"),
        ({"w": {"dtype": "I8", "shape": [-3], "data_offsets": [0, 0]}}, "'w' has numbers that are no sizes"),
        (
            {"w": {"dtype": "I8", "shape": [True], "data_offsets": [0, 1]}},
            "'w' has numbers that are no sizes",
        ),
        ({"w": {"dtype": "I8", "shape": [1], "data_offsets": [3, 4]}}, "'w' is not where it should be"),
    ],
)
def test_a_header_that_describes_no_tensors_is_refused(tmp_path: Path, header: Any, says: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "forged.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(path)


def test_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="a safetensors file, but no checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: x"
        ),
    ],
    ids=["Python", "torch"],
)
def test_a_checkpoint_that_memory_does_not_hold_is_not_called_damaged(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints, "read_tensor", full)
    with pytest.raises(CheckpointError, match=r"^the checkpoint '.*' needs more memory than there is$"):
        load_checkpoint(saved)


def refuse_to_copy(weight: TernaryWeight) -> TernaryWeight:
    raise AssertionError("a weight was brought to its canonical form")


@pytest.fixture
def saved_state(tmp_path: Path) -> Path:
    """A checkpoint with tables, as a run writes it."""
    path = tmp_path / "one.safetensors"
    checkpoints.save_checkpoint(path, nano(seed=4).state(), step=2, **METADATA)
    return path


def test_check_fits_names_the_difference(saved_state: Path) -> None:
    loaded = load_checkpoint(saved_state)
    checkpoints.check_fits(loaded, nano(ops=ops_with(to_spec=refuse_to_copy)))
    for fields, sentence in (
        ({"num_layers": 1}, r"'layers\.1\.attention\.key_up' is there but not here"),
        ({"num_layers": 3}, r"'layers\.2\.attention\.key_up' is here but not there"),
        ({"max_moe_iters": 2}, r"'layers\.1\.moe_graph\.halt' is here but not there"),
        ({"embed_dim": 12}, r"'embedding\.table' is .*297, 10\].* there and .*297, 12\].* here"),
        (
            {"group_size": 24},
            r"'embedding\.table' is .*'group_size': 12.* there and .*'group_size': 24.* here",
        ),
        ({"num_experts": 5}, r"'layers\.0\.moe_graph\.moe\.router' is .* there and .* here"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            checkpoints.check_fits(loaded, nano(**fields))


@pytest.mark.parametrize("kind", ["weight", "dtype", "shape"])
def test_check_fits_compares_tables_too(saved_state: Path, kind: str) -> None:
    loaded = load_checkpoint(saved_state)
    load, table = loaded.state[LOAD], loaded.state[EMBEDDING]
    assert isinstance(load, torch.Tensor)
    other = {"weight": table, "dtype": load.to(torch.int32), "shape": load[:-1]}[kind]
    with pytest.raises(CheckpointError, match=rf"'{re.escape(LOAD)}' is .* there and .*'int64'.* here"):
        checkpoints.check_fits(replace(loaded, state={**loaded.state, LOAD: other}), nano())


def test_check_fits_refuses_a_table_out_of_range(saved_state: Path) -> None:
    """Forged with digests that fit: the file is sound in itself, and no model can have written it."""
    loaded = load_checkpoint(forged(saved_state, first_element(LOAD, -5)))
    with pytest.raises(
        CheckpointError,
        match=rf"^the checkpoint's {re.escape(LOAD)} holds -5, but its elements must lie from 0 to {2**63 - 1}$",
    ):
        checkpoints.check_fits(loaded, nano())


def test_save_checkpoint_on_a_broken_disk_leaves_everything_as_it_was(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"cannot write .*No space left on device.*intact$"):
        checkpoints.save_checkpoint(saved, nano(seed=5).weights(), step=3, **METADATA)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("bits", MANTISSA_BITS)
def test_checkpoint_keeps_scale_mantissas(tmp_path: Path, bits: int) -> None:
    """With b mantissa bits the stored levels reach from -32 * 2**b to 16 * 2**b - 1, and no further."""
    weight, (low, high) = next(iter(nano().weights().values())), level_range(bits)
    path = tmp_path / "m.safetensors"

    def save(lowest: int, highest: int) -> Tensor:
        exponents = torch.full_like(weight.exponents, highest)
        exponents[0] = lowest
        weights = {"w": replace(weight, mantissa_bits=bits, exponents=exponents)}
        checkpoints.save_checkpoint(path, weights, step=0, **METADATA)
        return exponents

    exponents = save(low, high)
    assert torch.equal(load_checkpoint(path).state["w"].exponents, exponents)
    for lowest, highest, outside in ((low, high + 1, high + 1), (low - 1, high, low - 1)):
        if outside >= -128:
            save(lowest, highest)
            with pytest.raises(
                CheckpointError, match=f"holds {outside}, but its elements must lie from {low} to {high}"
            ):
                load_checkpoint(path)


FLOATS = {
    "a.lora_A": torch.ones(2, 5),
    "a.lora_B": torch.ones(3, 2),
    "a.lora_A.exp_avg": torch.full((2, 5), -1.0),
    "a.lora_A.exp_avg_sq": torch.ones(2, 5),
    "a.lora_A.step": torch.tensor(3.0),
}
STATED = {"alpha": 4.0, "ranks": {"a": 2}, "moments": ["a.lora_A"], "sha256": ""}
"""An adapter as a checkpoint holds it, and what the header says of it."""


@pytest.mark.parametrize(
    ("says", "header", "floats"),
    [
        ("alpha is 0", {"alpha": 0.0}, {}),
        ("alpha is inf", {"alpha": math.inf}, {}),
        ("a.lora_A has shape", {"ranks": {"a": 3}}, {}),
        ("b.lora_A is missing", {"ranks": {"b": 2}}, {}),
        ("a.lora_B.exp_avg is missing", {"moments": ["a.lora_B"]}, {}),
        ("a.lora_A has dtype", {}, {"a.lora_A": torch.ones(2, 5, dtype=torch.bfloat16)}),
        ("a.lora_A has shape", {}, {"a.lora_A": torch.ones(10)}),
        ("a.lora_B has shape", {}, {"a.lora_B": torch.ones(3, 4)}),
        ("a.lora_B holds", {}, {"a.lora_B": torch.full((3, 2), math.nan)}),
        ("a.lora_A.exp_avg has shape", {}, {"a.lora_A.exp_avg": torch.ones(5, 2)}),
        ("a.lora_A.exp_avg holds", {}, {"a.lora_A.exp_avg": torch.full((2, 5), math.inf)}),
        ("a.lora_A.exp_avg_sq holds", {}, {"a.lora_A.exp_avg_sq": torch.full((2, 5), -1.0)}),
        ("a.lora_A.step has shape", {}, {"a.lora_A.step": torch.ones(1)}),
        ("a.lora_A.step holds", {}, {"a.lora_A.step": torch.tensor(-1.0)}),
    ],
)
def test_floats_that_no_run_writes_are_refused(
    says: str, header: dict[str, Any], floats: dict[str, Tensor]
) -> None:
    """A file whose digests fit may still say what is not so."""
    whole = checkpoints._adapter({"adapter": STATED}, FLOATS)
    assert whole is not None and whole.tensors().keys() == FLOATS.keys()
    with pytest.raises(CheckpointError, match=f"^{re.escape(says)}"):
        checkpoints._adapter({"adapter": {**STATED, **header}}, {**FLOATS, **floats})


def test_a_folder_of_a_model_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"^cannot write the folder '.*file/model': Not a directory$"):
        write_folder(tmp_path / "file" / "model", NANO, trained_weights(), step=2, seed=3, run={})
