"""Files of float matrices become files of ternary weights and come back, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arbitor import convert
from arbitor.nn import swap_linears
from arbitor.optimized.cli import run_command
from arbitor.optimized.training.errors import TrainingError
from arbitor.reference.convert import loss_of, ternarize


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(7, 30, generator=generator),
        "half.weight": torch.randn(5, 24, generator=generator).to(torch.bfloat16),
        "conv.weight": torch.randn(4, 3, 5, generator=generator, dtype=torch.float64),
        "old.weight": torch.randn(3, 13, generator=generator).to(torch.float16),
        "layer.bias": torch.randn(7, generator=generator),
        "ids": torch.arange(6).view(2, 3),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(matrices(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(convert.command, [str(each) for each in arguments], name="python -m arbitor.convert")
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def test_a_file_is_converted_by_the_rule_and_comes_back(source: Path, tmp_path: Path) -> None:
    ternary, again, once_more = (tmp_path / f"{name}.safetensors" for name in ("ternary", "again", "more"))
    losses = convert.convert_file(source, ternary)
    names = [name for name, tensor in matrices().items() if name.endswith("weight")]
    assert set(losses) == set(names)
    stored = load_file(ternary)
    for name in names:
        w_NK = matrices()[name].flatten(1)
        w_NK = w_NK.float() if w_NK.dtype == torch.float16 else w_NK
        weight = ternarize(w_NK)
        assert torch.equal(stored[f"{name}.packed"], weight.packed)
        assert torch.equal(stored[f"{name}.exponents"], weight.exponents)
        assert losses[name] == loss_of(w_NK, weight)
        assert 0 < losses[name].error < 0.5
    assert set(convert.restore_file(ternary, again)) == set(names)
    restored = load_file(again)
    assert restored.keys() == matrices().keys()
    for name, tensor in matrices().items():
        assert (restored[name].shape, restored[name].dtype) == (tensor.shape, tensor.dtype)
        if name not in names:
            assert torch.equal(restored[name], tensor)
    convert.convert_file(again, once_more)
    assert {name: tensor.tolist() for name, tensor in load_file(once_more).items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }


def test_the_format_is_what_was_asked_for(source: Path, tmp_path: Path) -> None:
    ternary = tmp_path / "ternary.safetensors"
    coarse = convert.convert_file(source, ternary, group_size=24, mantissa_bits=0)
    fine = convert.convert_file(source, tmp_path / "fine.safetensors", group_size=6)
    assert all(coarse[name].error > fine[name].error for name in coarse)
    convert.restore_file(ternary, tmp_path / "again.safetensors")
    levels = {
        float(x) for x in load_file(tmp_path / "again.safetensors")["layer.weight"].abs().flatten() if x
    }
    assert levels and all(level.hex().startswith("0x1.0000000000000p") for level in levels)


def test_a_module_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6, bias=False)
    net = nn.Sequential(nn.Linear(30, 6), nn.ReLU(), shared, shared)
    weight = net[0].weight.detach().clone()
    lost = swap_linears(net)
    assert convert.swap_back(net) == list(lost)
    assert all(type(part) is nn.Linear for part in (net[0], net[2])) and net[2] is net[3]
    assert torch.equal(net[0].weight, convert.dequantize(ternarize(weight)))
    assert isinstance(net[0].bias, nn.Parameter) and net[2].bias is None
    with pytest.raises(ValueError, match=r"has no arbitor\.nn\.Linear below it"):
        convert.swap_back(net)


def test_the_command_says_what_each_matrix_lost(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ternary, again = tmp_path / "t.safetensors", tmp_path / "again.safetensors"
    code, out, err = run(capsys, source, ternary, "--skip", "conv|old", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert set(said) == {"layer.weight", "half.weight"}
    assert said["layer.weight"]["error"] == loss_of(*_pair("layer.weight")).error
    code, out, _ = run(capsys, source, ternary, "--select", "layer", "--group-size", "6")
    assert code == 0 and "7 x 30" in out and "layer.weight" in out and "half" not in out
    code, out, _ = run(capsys, "--back", ternary, again)
    assert code == 0 and "1 matrices in float" in out
    assert load_file(again).keys() == matrices().keys()


def _pair(name: str) -> tuple[torch.Tensor, Any]:
    w_NK = matrices()[name]
    return w_NK, ternarize(w_NK)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["SOURCE"], 2, "Missing argument 'TARGET'"),
        (["missing", "x"], 1, "cannot read 'missing': No such file"),
        (["SOURCE", "x", "--select", "nothing"], 2, "has no float matrix that is selected"),
        (["SOURCE", "x", "--select", "("], 2, "--select is '(', but must be a regular expression"),
        (["SOURCE", "x", "--group-size", "7"], 2, "'7' is not one of"),
        (["--back", "SOURCE", "x"], 1, "is no file that arbitor.convert wrote"),
        (["--back", "SOURCE", "x", "--skip", "a"], 2, "--skip was given, but does nothing with --back"),
        (["FOLDER", "x"], 1, "it is a folder, but must be a regular file"),
        (["TEXT", "x"], 1, "is damaged or not a safetensors file"),
        (["NAN", "x"], 2, "layer.weight: w_NK holds an element that is not finite"),
        (["SOURCE", "missing/x"], 1, "cannot write 'missing/x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"no tensors here")
    save_file({"layer.weight": torch.full((3, 4), torch.nan)}, tmp_path / "nan")
    names = {"SOURCE": source.name, "FOLDER": ".", "TEXT": "text", "NAN": "nan"}
    found, _, err = run(capsys, *(names.get(each, each) for each in arguments))
    assert found == code and says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda source: convert.convert_file(source, source, select="layer"), "select is a str"),
        (lambda source: convert.ternarize_all([torch.ones(2, 2)]), "matrices is a list"),
        (lambda source: convert.ternarize_all({"w": 3}), "w is a int, but must be a torch.Tensor"),
        (lambda source: convert.swap_back(None), "module is a NoneType"),
    ],
)
def test_wrong_arguments_are_named(source: Path, wrong: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        wrong(source)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**6, 10**6]},
        {"shape": []},
        {"shape": "x"},
        {"dtype": "int8"},
        {"group_size": 5},
        {"mantissa_bits": 9},
        None,
    ],
    ids=str,
)
def test_a_hostile_file_is_refused(source: Path, tmp_path: Path, change: Any) -> None:
    """What the metadata say is looked at before memory is taken for it."""
    ternary = tmp_path / "t.safetensors"
    convert.convert_file(source, ternary, select=lambda name: name == "layer.weight")
    stated = {"shape": [7, 30], "dtype": "float32", "group_size": 12, "mantissa_bits": 2}
    tensors = load_file(ternary)
    if change is None:
        tensors["layer.weight.packed"].fill_(255)
    text = json.dumps({"layer.weight": {**stated, **(change or {})}})
    save_file(tensors, ternary, metadata={"arbitor.ternary": text})
    with pytest.raises(TrainingError, match=r"'layer\.weight' is no ternary matrix"):
        convert.restore_file(ternary, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "a.packed": torch.ones(2, dtype=torch.int8)}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"the name 'a\.packed' is that of a tensor and of a part"):
        convert.convert_file(tmp_path / "s", tmp_path / "t")
