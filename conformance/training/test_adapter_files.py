"""Adapters as files: peft reads ours, we read peft's, and merged models are read again."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arbitor import ArbModel
from arbitor.adapters import (
    adapters_of,
    attach,
    float_model,
    load_adapter,
    merged_floats,
    save_adapter,
    stacks_of,
    use_float_linears,
)
from arbitor.optimized.training.adapter_files import read_adapter, write_floats
from arbitor.optimized.training.adapter_state import check_stated, state_from
from arbitor.optimized.training.errors import TrainingError
from arbitor.reference.graph import ArbModel as ReferenceModel
from conformance.compare import alike
from conformance.graph.models import NANO, WHOLE, random_ids
from conformance.graph.test_adapters import media, moved
from conformance.report import skip

FILES = {"adapter_config.json", "adapter_model.safetensors"}


def model_of(config: Any = NANO) -> ArbModel:
    return ArbModel(config, device="cpu", ops="reference", seed=3)


@pytest.fixture
def peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        skip("the exchange of adapters with peft", "peft is not installed")
    return pytest.importorskip("peft")


def adapted(config: Any = NANO, **options: Any) -> ArbModel:
    model = model_of(config)
    attach(model, **{"rank": 3, "alpha": 5.0, **options})
    moved(model)
    return model


def test_a_folder_holds_what_peft_names(tmp_path: Path) -> None:
    model = adapted(targets="attention.query_up,byte_head.down")
    save_adapter(model, tmp_path, base="runs/demo")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{kind}.weight" for name in adapters_of(model) for kind in "AB"
    }
    found = tensors["base_model.model.byte_head.down.lora_A.weight"]
    assert torch.equal(found, model.byte_head.down.adapter.a_RK)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, "runs/demo")
    again = model_of()
    assert list(load_adapter(again, tmp_path)) == list(adapters_of(model))
    ids_BT = random_ids(2, 12)
    assert torch.equal(again(ids_BT), model(ids_BT))
    with pytest.raises(RuntimeError, match="has no adapters"):
        save_adapter(model_of(), tmp_path)


def test_peft_reads_our_adapters(peft: Any, tmp_path: Path) -> None:
    """A model of every module with float linears, wrapped by peft, computes what ours does, also byte by byte."""
    model, ids_BT = adapted(WHOLE), random_ids(2, 14)
    save_adapter(model, tmp_path)
    twin = model_of(WHOLE)
    names = use_float_linears(twin)
    with torch.no_grad():
        base = twin(ids_BT, **media(2))
        wanted = model(ids_BT, **media(2))
        wrapped = peft.PeftModel.from_pretrained(twin, tmp_path)
        inner = wrapped.base_model.model
        found = inner(ids_BT, **media(2))
        ledger = inner.new_ledger(2)
        first = inner(ids_BT[:, :13], ledger=ledger)
        ledger.retract()
        last = inner(ids_BT[:, 13:], ledger=ledger)
        text = inner(ids_BT)
    alike(found, wanted)
    assert (base - wanted).norm() > wanted.norm() / 64
    alike(torch.cat([first, last], dim=1), text)
    kinds = (peft.tuners.lora.Linear, peft.tuners.lora.layer.ParamWrapper)
    layers = {name for name, part in inner.named_modules() if isinstance(part, kinds)}
    assert layers == set(names) == set(adapters_of(model)) and stacks_of(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_the_adapters_of_peft(peft: Any, tmp_path: Path, rslora: bool) -> None:
    """Two ranks, a few linears by suffix, and trained by peft's own forward pass."""
    ids_BT = random_ids(2, 14)
    twin = model_of()
    use_float_linears(twin)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query_up", "value_up", "down"],
        rank_pattern={} if rslora else {"value_up": 2},
        use_rslora=rslora,
        # peft has no dropout for parameters.
        target_parameters=None if rslora else ["moe.expert_up.weight"],
        lora_dropout=0.1 if rslora else 0.0,
    )
    wrapped = peft.get_peft_model(twin, config)
    inner = wrapped.base_model.model
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        inner.losses(ids_BT)["bytes"].backward()
        optimizer.step()
    wrapped.eval()
    wrapped.save_pretrained(tmp_path)
    model = model_of()
    with torch.no_grad():
        before, wanted = model(ids_BT), inner(ids_BT)
        found = load_adapter(model, tmp_path)
        after = model(ids_BT)
    alike(after, wanted)
    assert (before - wanted).norm() > wanted.norm() / 64
    assert {adapter.rank for adapter in found.values()} == ({4} if rslora else {2, 4})
    assert any("expert_up" in name for name in found) != rslora
    # And back, where several ranks are a pattern.
    save_adapter(model, tmp_path / "again")
    plain = model_of()
    use_float_linears(plain)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").base_model.model(ids_BT)
    alike(again, wanted)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("use_dora", True, "use_dora is True, but must be left out"),
        ("bias", "all", "bias is 'all', but must be left out"),
        ("modules_to_save", ["byte_head"], "modules_to_save is"),
        ("alpha_pattern", {"down": 3}, "alpha_pattern is"),
        ("fan_in_fan_out", True, "fan_in_fan_out is True"),
        ("something_new", 7, "something_new is 7, but must be left out"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("peft_type", "IA3", "peft_type must be LORA"),
        ("lora_alpha", -1, "lora_alpha is -1, but must be a number above 0"),
        ("lora_alpha", None, "lora_alpha is None"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(
    tmp_path: Path, field: str, value: Any, sentence: str
) -> None:
    save_adapter(adapted(targets="byte_head.down"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(TrainingError, match=sentence):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_model.model.byte_head.down.lora_A.weight": None}, "has no lora_A and lora_B that belong"),
        (
            {"base_model.model.byte_head.down.lora_A.weight": torch.ones(2, 36)},
            "has no lora_A and lora_B that",
        ),
        ({"base_model.model.table.lora_embedding_A": torch.ones(2, 2)}, "but must have matrices of linears"),
        ({"byte_head.down.lora_A.weight": torch.ones(2, 2)}, "but must have matrices of linears"),
        (
            {"base_model.model.byte_head.down.lora_A.weight": torch.full((3, 36), torch.nan)},
            "no matrix of finite",
        ),
        ({"base_model.model.byte_head.down.lora_A.weight": torch.ones(3, dtype=torch.int8)}, "no matrix of"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    save_adapter(adapted(targets="byte_head.down"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(TrainingError, match=sentence):
        read_adapter(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot read .*adapter_config"):
        read_adapter(tmp_path)
    save_adapter(adapted(targets="byte_head.down"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="damaged or not a safetensors file"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be used"):
        read_adapter(tmp_path)


STATED = {
    "alpha": 4.0,
    "ranks": {"byte_head.down": 2},
    "moments": ["byte_head.down.lora_A"],
    "sha256": "",
}
"""What a header says of adapters."""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"alpha": "4"}, "adapter is no object with alpha, ranks, moments and sha256"),
        ({"ranks": {}}, "adapter has no ranks"),
        ({"ranks": {"byte_head.norm": 2}}, "no linear of that name"),
        ({"ranks": {"layers.0.moe_graph.moe.router": 2}}, "no linear of that name"),
        ({"ranks": {"byte_head.down": True}}, "adapter has rank True"),
        ({"ranks": {"byte_head.down": 2**20}}, "outside 1 to 65536"),
        ({"moments": ["byte_head.up.lora_A"]}, "which is no matrix of it"),
        ({"moments": ["byte_head.down.lora_A"] * 2}, "twice"),
    ],
)
def test_a_header_of_adapters_that_no_model_has_is_refused(changes: dict[str, Any], sentence: str) -> None:
    model = ReferenceModel(NANO, device="meta")
    check_stated(STATED, model)
    with pytest.raises(ValueError, match=sentence):
        check_stated({**STATED, **changes}, model)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("byte_head.down.lora_A", torch.ones(3, 36), "its adapter has rank 2"),
        ("byte_head.down.lora_B", torch.full((24, 2), torch.inf), "all must be finite"),
        ("byte_head.down.lora_A.exp_avg", torch.ones(2, 35), "exp_avg has shape"),
        ("byte_head.down.lora_A.exp_avg_sq", -torch.ones(2, 36), "finite and at least 0"),
        ("byte_head.down.lora_A.step", torch.ones(1), "step has shape"),
    ],
)
def test_floats_that_no_run_leaves_are_refused(name: str, tensor: torch.Tensor, sentence: str) -> None:
    like = {"exp_avg": torch.ones(2, 36), "exp_avg_sq": torch.ones(2, 36), "step": torch.tensor(3.0)}
    tensors = {"byte_head.down.lora_A": torch.ones(2, 36), "byte_head.down.lora_B": torch.ones(24, 2)}
    tensors |= {f"byte_head.down.lora_A.{part}": value for part, value in like.items()}
    assert state_from(STATED, tensors).moments["byte_head.down.lora_A"]["step"].item() == 3
    with pytest.raises(ValueError, match=sentence):
        state_from(STATED, {**tensors, name: tensor})


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = adapted(targets="byte_head.down")
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path)
    [(a_RK, _)] = read_adapter(tmp_path).matrices.values()
    assert torch.equal(a_RK, model.byte_head.down.adapter.a_RK.to(torch.bfloat16).to(torch.float32))


def test_a_float_model_computes_what_the_adapted_one_does(tmp_path: Path) -> None:
    model, ids_BT = adapted(WHOLE), random_ids(2, 14)
    with torch.no_grad():
        wanted = model(ids_BT, **media(2))
        write_floats(tmp_path / "floats", model.config, merged_floats(model), model.tables())
        found = float_model(tmp_path / "floats")(ids_BT, **media(2))
    alike(found, wanted)
    tensors = load_file(tmp_path / "floats" / "model.safetensors")
    assert all(f"{name}.weight" in tensors for name in model.ternary_modules())
    with pytest.raises(ValueError, match="must be new or empty"):
        write_floats(tmp_path / "floats", model.config, {}, {})
    with pytest.raises(TrainingError, match="holds no float model"):
        model_of().save_pretrained(tmp_path / "ternary")
        float_model(tmp_path / "ternary")
    with pytest.raises(TrainingError, match="cannot read"):
        float_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("shared_vq.bridge.tables.text.usage", lambda tensor: tensor - 2, "usage holds -"),
        ("shared_vq.bridge.tables.text.usage", lambda tensor: tensor[:1], "usage has shape"),
        ("graph.edges.neighbours", lambda tensor: tensor + 10**6, "neighbours holds"),
        ("graph.edges.neighbours", lambda tensor: tensor.float(), "neighbours has dtype float32"),
        ("byte_head.down.weight", lambda tensor: tensor[:1], "byte_head.down.weight has shape"),
        ("byte_head.down.weight", lambda tensor: tensor.double(), "byte_head.down.weight has dtype float64"),
        ("embedding.table.weight", lambda tensor: tensor * math.nan, "finite"),
    ],
)
def test_a_float_model_that_no_merge_wrote_is_refused(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], sentence: str
) -> None:
    """A row would be copied to all others, and ops index with tables."""
    model = adapted(WHOLE)
    write_floats(tmp_path / "floats", model.config, merged_floats(model), model.tables())
    path = tmp_path / "floats" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)
    with pytest.raises(TrainingError, match=f"holds no float model: .*{sentence}"):
        float_model(tmp_path / "floats")


@pytest.mark.parametrize("content", [b"", b"no tensors", bytes(100)], ids=["empty", "text", "zeros"])
def test_a_float_model_whose_file_is_damaged_is_refused(tmp_path: Path, content: bytes) -> None:
    model = adapted(WHOLE)
    write_floats(tmp_path / "floats", model.config, merged_floats(model), model.tables())
    (tmp_path / "floats" / "model.safetensors").write_bytes(content)
    with pytest.raises(TrainingError, match="is damaged or not a safetensors file"):
        float_model(tmp_path / "floats")
