"""`arbitor.ArbModel`: where it is built, what it says of itself, and the text that it makes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor import ArbModel, preset
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.reference import graph
from arbitor.reference import ops as reference_ops
from arbitor.reference.audit import audit
from arbitor.reference.presets import PRESETS
from conformance.system.command import Here
from conformance.training import nano
from conformance.training.runs import options


@pytest.fixture(scope="module")
def model() -> ArbModel:
    return ArbModel(nano.NANO, device="cpu", seed=1)


def test_defaults_are_those_of_the_machine(num_gpus: int) -> None:
    model, cuda = ArbModel("nano", seed=5), bool(num_gpus)
    assert model.context.device.type == ("cuda" if cuda else "cpu")
    assert model.dtype is (torch.bfloat16 if cuda else torch.float32)
    assert model.ops.__name__ == ("arbitor.optimized.ops" if cuda else "arbitor.reference.ops")
    assert (model.seed, model.config) == (5, preset("nano"))


def test_it_is_the_model_of_the_specification(model: ArbModel) -> None:
    plain = graph.ArbModel(nano.NANO, seed=1)
    assert isinstance(model, graph.ArbModel)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in model.state_dict().items())


def test_names_and_objects_mean_the_same() -> None:
    named = ArbModel(nano.NANO, device="cpu", dtype="float64", ops="reference")
    given = ArbModel(nano.NANO, device=torch.device("cpu"), dtype=torch.float64, ops=reference_ops)
    assert named.dtype is given.dtype is torch.float64
    assert named.ops is given.ops is reference_ops
    assert ArbModel(nano.NANO, device="meta").context.device.type == "meta"


@pytest.mark.parametrize(
    ("asked", "error", "sentence"),
    [
        ({"config": 5}, TypeError, "config is a int"),
        ({"config": "tny"}, ValueError, "preset is 'tny'"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'"),
        ({"device": "xpu"}, ValueError, "device is 'xpu'"),
        ({"dtype": "float8"}, ValueError, "dtype is 'float8'"),
        ({"dtype": torch.float16}, ValueError, "dtype is torch.float16"),
        ({"ops": "cuda"}, ValueError, "ops is 'cuda'"),
        ({"ops": 3}, TypeError, "ops is a int"),
        ({"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named(asked: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        ArbModel(**{"config": nano.NANO, "device": "cpu", **asked})


def test_encoders_are_encoders(model: ArbModel) -> None:
    with pytest.raises(TypeError, match="encoders is a str, but must be Encoders or None"):
        model.use_encoders("facebook/dinov2-small")  # type: ignore[arg-type]
    assert model.encoders is None and model.use_encoders(None) is model


def test_sizes(model: ArbModel) -> None:
    report = audit(nano.NANO, resident_bytes=lambda weight: weight.state_bytes)
    assert model.num_weights == report.weights
    assert model.state_bytes == report.canonical_bytes + report.table_bytes
    first, second = repr(model).splitlines()[:2]
    assert first == "ArbModel("
    assert second.strip() == (
        f"nano: {report.weights:,} ternary weights, {model.state_bytes:,} bytes of state, device=cpu, dtype=torch.float32"
    )
    # Other modules of the list say the shapes of their weights.
    num_rows, num_columns = model.weights()["byte_head.vocabulary"].shape
    assert num_rows != num_columns
    assert f"(vocabulary): TernaryLinear({num_rows} x {num_columns})\n" in repr(model.byte_head)


def test_a_model_has_as_many_weights_as_the_command_says() -> None:
    """In every preset. Signs of edges are ternary state, and no weights."""
    for name in PRESETS:
        assert ArbModel(name, device="meta").num_weights == audit(preset(name)).weights, name


def test_copies_are_models_too(model: ArbModel) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is ArbModel and other.steps_taken == 0
        assert other.generate("a", max_new_bytes=8) == model.generate("a", max_new_bytes=8)


def test_the_five_lines_of_a_loop_learn(text: Path) -> None:
    ids_BT = torch.tensor(list(text.read_bytes()[:256])).view(4, 64)
    model = ArbModel(nano.NANO, device="cpu")
    before = float(model.loss(ids_BT).detach())
    for step in range(30):
        model.backward(model.losses(ids_BT), rate=4.0, step=step)
        model.step()
    assert float(model.loss(ids_BT).detach()) < before - 1 and model.steps_taken == 30


def test_text_is_that_of_the_command(
    text: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arb, run = Here(capfdbinary), tmp_path / "run"
    train(options(text, run))
    for arguments in ({}, {"seed": 7, "temperature": 0.5}, {"temperature": 0}, {"top_k": 9, "top_p": 0.8}):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
        done = arb(
            "generate", "--run", str(run), "--prompt", "7 squared", "--bytes", "24", "--device", "cpu", *flags
        )
        assert done.returncode == 0, done.stderr
        model = ArbModel.from_pretrained(run, device="cpu")
        added = model.generate(b"7 squared", max_new_bytes=24, **arguments)
        assert b"7 squared" + added == done.stdout and len(added) == 24


def test_types_come_back_as_given(model: ArbModel) -> None:
    raw = model.generate(b"ab", max_new_bytes=20)
    assert isinstance(raw, bytes) and len(raw) == 20
    assert model.generate("ab", max_new_bytes=20) == raw.decode(errors="replace")
    assert model.generate([b"ab"], max_new_bytes=20) == [raw]
    assert model.generate((), max_new_bytes=20) == []
    assert model.generate("ab", max_new_bytes=0) == "" and model.generate([b""], max_new_bytes=0) == [b""]


def test_a_batch_is_what_each_is_alone(model: ArbModel) -> None:
    prompts = ["", "ab", b"a longer prompt", "b"]
    alone = [model.generate(prompt, max_new_bytes=12, seed=4 + place) for place, prompt in enumerate(prompts)]
    assert model.generate(prompts, max_new_bytes=12, seed=4) == alone
    assert model.generate(prompts, max_new_bytes=12, seed=[4, 5, 6, 7]) == alone
    assert model.generate(prompts, max_new_bytes=12, seed=5) != alone


def test_a_stream_is_the_text_in_pieces(model: ArbModel) -> None:
    stream = model.generate(b"ab", max_new_bytes=9, stream=True)
    assert isinstance(stream, Iterator)
    pieces = list(stream)
    assert [len(piece) for piece in pieces] == [1] * 9
    assert b"".join(pieces) == model.generate(b"ab", max_new_bytes=9)
    rows = list(model.generate(["a", b"b"], max_new_bytes=9, stream=True))
    whole = model.generate(["a", b"b"], max_new_bytes=9)
    assert ["".join(row[0] for row in rows), b"".join(row[1] for row in rows)] == whole


def test_a_stream_leaves_torch_as_it_is(model: ArbModel) -> None:
    """Between two pieces nothing that holds for a step holds for its reader."""
    from arbitor.optimized.settings import value_checks

    stream = model.generate(b"ab", max_new_bytes=3, stream=True)
    next(stream)
    assert torch.is_grad_enabled() and value_checks()
    next(stream)
    assert torch.is_grad_enabled() and value_checks()


def test_characters_are_whole(model: ArbModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a character of several bytes no half is handed out, and one that stays half is named as such."""
    drawn = [[bytes([byte])] for byte in "aé€".encode() + b"\xe2\x82"]
    monkeypatch.setattr("arbitor.generation.stream_batch", lambda *a, **k: iter(drawn))
    assert list(model.generate("", stream=True)) == ["a", "", "é", "", "", "€", "", "", "�"]


def test_generation_ends_before_a_stop(model: ArbModel) -> None:
    whole = model.generate(b"ab", max_new_bytes=40, seed=2)
    for length in (1, 2, 3):
        stop = whole[20 : 20 + length]
        wanted = whole[: whole.index(stop)]
        assert model.generate(b"ab", max_new_bytes=40, seed=2, stop=stop) == wanted
        pieces = list(
            model.generate(b"ab", max_new_bytes=40, seed=2, stop=[stop, b"no such bytes"], stream=True)
        )
        assert b"".join(pieces) == wanted and len(pieces) == len(wanted) + length
    assert model.generate(b"ab", max_new_bytes=40, seed=2, stop=whole[-1:] + b"?") == whole


def test_the_others_go_on_after_one_has_stopped(model: ArbModel) -> None:
    first, second = model.generate([b"ab", b"cd"], max_new_bytes=30)
    stop = first[5:8]
    assert stop not in second
    assert model.generate([b"ab", b"cd"], max_new_bytes=30, stop=stop) == [first[:5], second]


@pytest.mark.parametrize(
    ("asked", "error", "sentence"),
    [
        ({"max_new_bytes": -1}, ValueError, "max_new_bytes is -1"),
        ({"max_new_bytes": 2.5}, TypeError, "max_new_bytes is a float"),
        ({"max_new_bytes": None}, TypeError, "max_new_bytes is a NoneType"),
        ({"temperature": "hot"}, TypeError, "temperature is a str"),
        ({"temperature": -0.5}, ValueError, "temperature is -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        (
            {"max_new_tokens": 3},
            TypeError,
            "no argument 'max_new_tokens'; max_new_bytes is how many bytes to add",
        ),
        ({"beams": 3}, TypeError, "generate has no argument 'beams'$"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": 257}, ValueError, "top_k is 257"),
        ({"top_k": 1.5}, TypeError, "top_k is a float"),
        ({"top_k": True}, TypeError, "top_k is a bool"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": float("nan")}, ValueError, "top_p is nan"),
        ({"top_k": 3, "temperature": 0}, ValueError, "top_k is 3, but must be None"),
        ({"top_p": 0.5, "temperature": 0}, ValueError, "top_p is 0.5, but must be None"),
        ({"stop": ""}, ValueError, "stop holds an empty string"),
        ({"stop": [3]}, TypeError, "stop is a int"),
        ({"stop": 3}, TypeError, "stop is a int"),
        ({"seed": [1, 2]}, ValueError, "seeds has 2 entries"),
        ({"seed": [1.5]}, TypeError, r"seeds\[0\] is a float"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"seed": "x"}, TypeError, "seed is a str"),
        ({"seed": True}, TypeError, "seed is a bool"),
        ({"context": 2}, ValueError, "context is 2"),
        ({"context": 3.5}, TypeError, "context is a float"),
        ({"prompts": [3]}, TypeError, r"prompts\[0\] is a int"),
        ({"prompts": 3}, TypeError, "prompts is a int"),
        ({"prompts": {"ab": 1}}, TypeError, "prompts is a dict"),
        ({"prompts": "a\ud800"}, ValueError, r"prompts holds '\\ud800'"),
    ],
)
def test_wrong_options_of_generate_are_named(
    model: ArbModel, asked: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    """At once, also of a stream from which nobody takes a piece."""
    for stream in (False, True):
        with pytest.raises(error, match=sentence):
            model.generate(**{"prompts": "ab", "stream": stream, **asked})


def test_a_device_that_is_not_there_is_named(num_gpus: int) -> None:
    if num_gpus:
        assert ArbModel(nano.NANO, device="cuda").context.device.type == "cuda"
    else:
        with pytest.raises(TrainingError, match="torch finds no CUDA device"):
            ArbModel(nano.NANO, device="cuda")
