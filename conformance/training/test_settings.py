"""Environment variables, devices and op sets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized import settings
from arbitor.optimized.training import machine_memory, prepared, sizes
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions, preset_defaults
from arbitor.optimized.training.plan import decide, preset_config, settings_config
from arbitor.optimized.training.runtime import choose_runtime, deterministic
from arbitor.optimized.training.schedule import GAIN, gain_of, rate
from arbitor.reference.config import with_modules
from arbitor.reference.graph import ArbModel, TernaryEmbedding
from arbitor.reference.graph.grouped import TernaryGroupedLinear
from arbitor.reference.presets import PRESETS
from conformance.training.nano import NANO, NANO_DEFAULTS, WHOLE
from conformance.training.runs import options


@pytest.mark.parametrize(
    ("value", "expected"), [(None, True), ("", True), ("1", True), ("0", False), (" 0 ", False)]
)
def test_value_checks(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("ARB_VALUE_CHECKS", raising=False)
    if value is not None:
        monkeypatch.setenv("ARB_VALUE_CHECKS", value)
    assert settings.value_checks() is expected


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("1", True), ("0", False)])
def test_values_are_not_looked_at_where_they_are_vouched_for(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    monkeypatch.delenv("ARB_VALUE_CHECKS", raising=False)
    if value is not None:
        monkeypatch.setenv("ARB_VALUE_CHECKS", value)
    with pytest.raises(ZeroDivisionError), settings.values_vouched_for():
        with settings.values_vouched_for():
            pass
        assert settings.value_checks() is expected
        raise ZeroDivisionError
    assert settings.value_checks() is (value != "0")


def test_settings_refuse_what_they_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARB_VALUE_CHECKS", "yes")
    monkeypatch.setenv("ARB_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ARB_VALUE_CHECKS is 'yes'"):
        settings.value_checks()
    with pytest.raises(ValueError, match="ARB_BACKEND is 'cuda'"):
        choose_runtime("cpu")


def test_choose_runtime_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_runtime("cpu").backend == "reference"
    assert choose_runtime("cpu").dtype == torch.float32
    assert choose_runtime("cpu").ops().__name__ == "arbitor.reference.ops"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_runtime("cpu", "triton").backend == "triton"
    monkeypatch.setenv("ARB_BACKEND", "triton")
    assert choose_runtime("cpu").backend == "triton"
    assert choose_runtime("cpu", "reference").backend == "reference"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(TrainingError, match="TRITON_INTERPRET"):
        choose_runtime("cpu")


def test_choose_runtime_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (choose_runtime().device, choose_runtime().backend) == ("cuda", "triton")
    assert choose_runtime().dtype == torch.bfloat16
    assert choose_runtime("cuda", "reference").dtype == torch.float32
    assert choose_runtime(dtype="float32").dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_runtime().device == "cpu"
    with pytest.raises(TrainingError, match="no CUDA device"):
        choose_runtime("cuda")


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"backend": "numpy"}, {"dtype": "float16"}])
def test_choose_runtime_refuses_names(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is"):
        choose_runtime(**options)


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_deterministic_puts_everything_back(mode: str) -> None:
    """Also that torch only warned."""
    torch.set_deterministic_debug_mode(mode)
    before = (torch.get_deterministic_debug_mode(), torch.get_num_threads())
    try:
        with deterministic(threads=2):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.get_num_threads() == 2
        assert (torch.get_deterministic_debug_mode(), torch.get_num_threads()) == before
    finally:
        torch.set_deterministic_debug_mode("default")


def recorded() -> dict[str, object]:
    return {**decide(TrainOptions(preset="nano", steps=5, seed=4), None).as_json(), "device": "cpu"}


def test_decide_takes_what_was_asked_then_what_was_recorded_then_the_default() -> None:
    fresh = decide(TrainOptions(preset="nano", batch=7), None)
    assert (fresh.batch, fresh.context, fresh.seed, fresh.data) == (7, NANO_DEFAULTS["context"], 0, "stdlib")
    resumed = decide(TrainOptions(log_interval=9), recorded())
    assert (resumed.preset, resumed.steps, resumed.seed, resumed.log_interval) == ("nano", 5, 4, 9)


@pytest.mark.parametrize("name", ["preset", "steps", "batch", "context", "accum", "seed"])
def test_decide_refuses_another_run(name: str) -> None:
    was = recorded()[name]
    # More steps make a longer run of the same, fewer another one.
    other = "tiny" if name == "preset" else int(str(was)) + (-1 if name == "steps" else 1)
    same = {name: was}
    decide(TrainOptions(**same), recorded())  # type: ignore[arg-type]
    with pytest.raises(
        TrainingError, match=f"started with {name} {was} and cannot go on with {name} {other}"
    ):
        decide(TrainOptions(**{name: other}), recorded())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": -1}, "batch"),
        ({"log_interval": 0}, "log_interval"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"steps": 2**31, "accum": 2}, "steps times accum"),
    ],
)
def test_decide_refuses_numbers_out_of_range(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is"):
        decide(TrainOptions(preset="nano", **options), None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": "5"}, "steps is '5', but must be a whole number"),
        ({"batch": True}, "batch is True, but must be a whole number or 'auto'"),
        ({"seed": 1.0}, "seed is 1.0, but must be a whole number"),
        ({"disable_vq": 1}, "disable_vq is 1, but must be True or False"),
        ({"data": 7}, "data is 7, but must be a string"),
    ],
)
def test_decide_refuses_other_types(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(TypeError, match=f"^{sentence}$"):
        decide(TrainOptions(**{"preset": "nano", **options}), None)


def test_votes_of_micro_batches_are_refused_where_they_change_nothing() -> None:
    asked = TrainOptions(preset="nano", accum=3, accum_votes=True)
    assert decide(asked, None).summed == 1 and decide(replace(asked, accum_votes=None), None).summed == 3
    for changes, sentence in (
        (
            {"accum": 1},
            "accum_votes is True, but does nothing with accum 1, as a single micro-batch votes once",
        ),
        (
            {"accum": None},
            "accum_votes is True, but does nothing with accum 1, as a single micro-batch votes once",
        ),
        ({"sign_votes": True}, "accum_votes is True, but does nothing: sign votes are of each micro-batch"),
        (
            {"finetune": True, "init_from": "base"},
            "accum_votes is True, but does nothing in arb finetune: it is of arb train",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            decide(replace(asked, **changes), None)
    # Of older runs it says something where there were several micro-batches.
    for accum in (1, 3):
        old = {**recorded(), "accum": accum}
        del old["accum_votes"]
        assert decide(TrainOptions(), old).accum_votes is (accum > 1)


def test_the_rate_can_be_chosen() -> None:
    """It is the rate of the flat part, whatever theta is. Sign votes do not read it, and a resumed run keeps it."""
    settings = decide(TrainOptions(preset="nano", rate=3, steps=100), None)
    for theta in (64, 32):
        gain = gain_of(settings.rate, theta)
        assert rate(20, 100, theta=theta, gain=gain) == 3.0
    assert gain_of(None, 64) == GAIN
    was = {**settings.as_json(), "device": "cpu"}
    assert decide(TrainOptions(rate=3.0), was).rate == decide(TrainOptions(), was).rate == 3
    with pytest.raises(TrainingError, match=r"started with rate 3 and cannot go on with rate 4\.0"):
        decide(TrainOptions(rate=4.0), was)
    with pytest.raises(ValueError, match=r"rate is 3, but does nothing: the loss gives sign votes"):
        decide(TrainOptions(preset="nano", rate=3, sign_votes=True), None)
    for value in (-1, 128, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"rate is .* but must be from 0 to 127"):
            decide(TrainOptions(preset="nano", rate=value), None)
    with pytest.raises(TypeError, match="rate is '3', but must be a number"):
        decide(TrainOptions(preset="nano", rate="3"), None)


def test_decide_refuses_what_nothing_reads() -> None:
    """Settings that do nothing are refused where a run goes on too. A run that already has such a setting does go on."""
    for was in (None, recorded()):
        with pytest.raises(ValueError, match=r"^save_interval is 2, but does nothing"):
            decide(TrainOptions(save=False, save_interval=2), was)
    with pytest.raises(ValueError, match=r"^enable_memory is True, but changes nothing of the preset tiny"):
        decide(TrainOptions(enable_memory=True), None)
    old = {**decide(TrainOptions(preset="tiny"), None).as_json(), "enable_memory": True}
    settings = decide(TrainOptions(enable_memory=True), old)
    assert settings_config(settings) == preset_config("tiny")


def test_a_preset_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(replace(NANO, name="mine", width=NANO.width + 12).to_json())
    monkeypatch.chdir(tmp_path)
    settings = decide(TrainOptions(preset="mine.json", disable_moe=True), None)
    # So that a run can be resumed from another folder.
    assert settings.preset == str(tmp_path / "mine.json")
    assert settings_config(settings) == with_modules(
        replace(NANO, name="mine", width=NANO.width + 12), moe=False
    )
    assert settings.batch == preset_defaults("mine")["batch"]


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (None, TrainingError, "can't be read: No such file"),
        (b"\xff", ValueError, "is no text"),
        (b"[1", ValueError, "it is no JSON"),
        (b'{"name": "mine"}', ValueError, "config has no field"),
    ],
)
def test_a_preset_file_is_refused_in_a_sentence(
    tmp_path: Path, content: bytes | None, error: type[Exception], sentence: str
) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=sentence) as caught:
        decide(TrainOptions(preset=str(path)), None)
    assert str(caught.value).startswith(f"preset is the file {str(path)!r}") and "\n" not in str(caught.value)


def test_sums_of_gradients_are_counted_as_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pass leaves them, in each dtype, where experts are chosen and where not. What has no room for them is refused."""
    for config, (batch, length), dtype in (
        (replace(WHOLE, num_layers=4, width=36, head_inner=36), (2, 16), torch.bfloat16),
        (replace(WHOLE, num_layers=3), (2, 16), torch.float32),
        (replace(WHOLE, num_experts=64), (1, 8), torch.float32),
    ):
        model = ArbModel(config, dtype=dtype, seed=3)
        ids_BT = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))
        model.backward(model.losses(ids_BT), rate=1.0, step=0, accum=2)
        held = model.voting.sums
        assert held is not None
        size = sum(total.grad_NK.nbytes for _, total in held.totals.values())
        named = {tensor_id for tensor_id, _ in held.totals}
        # Weights of media and of their heads have no gradient in a pass of text.
        silent = sum(
            math.prod(m.weight.shape) * model.voting.dtype_of(int(getattr(m, "orthogonal", False))).itemsize
            for m in model.ternary_modules().values()
            if m.tensor_id not in named
            and not m.built_frozen
            and not isinstance(m, TernaryEmbedding | TernaryGroupedLinear)
        )
        counted = sizes.sum_bytes(config, dtype, positions=batch * (length - 2))
        assert 0 < silent < size and size + silent == counted
        assert size == sizes.sum_bytes(config, dtype, positions=batch * (length - 2), of_media=False)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": sizes.least_state_bytes(config) + counted}
    monkeypatch.setattr(machine_memory.os, "sysconf", pages.__getitem__)
    sizes.check_memory(config, "cpu", sums=counted)
    pages["SC_PHYS_PAGES"] -= 1
    state_and_sums = r"^the model 'whole' has a state of 0\.0 GiB and sums of gradients of 0\.0 GiB, but cpu has 0\.0 GiB of memory"
    with pytest.raises(
        TrainingError, match=f"{state_and_sums}: a new run with --accum-votes needs no memory for sums$"
    ):
        sizes.check_memory(config, "cpu", sums=counted)
    pages["SC_PHYS_PAGES"] = 100
    with pytest.raises(TrainingError, match=f"{state_and_sums}$"):
        sizes.check_memory(config, "cpu", sums=counted)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"accum": 2}, True),
        ({"accum": 1}, False),
        ({"accum": 2, "accum_votes": True}, False),
        ({"accum": 2, "sign_votes": True}, False),
    ],
)
def test_a_run_is_refused_for_its_sums_alone(
    text: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, counts: bool
) -> None:
    """Sums that no step would make are not counted, nor those of media in a run of text."""
    monkeypatch.setattr(prepared, "sum_bytes", lambda *_, of_media, **__: 0 if of_media else 2**60)
    asked = options(text, None, save=False, steps=1, **changes)
    if counts:
        with pytest.raises(TrainingError, match="sums of gradients of"):
            train(asked)
    else:
        train(asked)


def test_a_state_beyond_the_memory_of_the_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}
    monkeypatch.setattr(machine_memory.os, "sysconf", pages.__getitem__)
    with pytest.raises(
        TrainingError, match=r"the model 'tiny' has a state of 0\.0 GiB, but cpu has 0\.0 GiB"
    ):
        sizes.check_memory(PRESETS["tiny"], "cpu")
    # Its accumulators alone would not fit. Of many ranks each keeps a part of them.
    pages["SC_PHYS_PAGES"] = sizes.least_state_bytes(PRESETS["tiny"]) * 2 // 3 // 4096
    sizes.check_memory(PRESETS["tiny"], "cpu", num_ranks=3)
    with pytest.raises(TrainingError, match="has a state of"):
        sizes.check_memory(PRESETS["tiny"], "cpu")
    # Of many ranks each keeps a part of the means too.
    averaged = replace(PRESETS["r12"], average_gradients=True)
    kept = sizes.least_state_bytes(replace(averaged, average_gradients=False)) // 4
    pages["SC_PHYS_PAGES"] = kept // 4096
    sizes.check_memory(averaged, "cpu", num_ranks=64)
    pages["SC_PHYS_PAGES"] = 2**20
    sizes.check_memory(PRESETS["tiny"], "cpu")
    # A container has less than its machine.
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("4096")
    with pytest.raises(TrainingError, match=r"but cpu has 0\.0 GiB of memory"):
        sizes.check_memory(PRESETS["tiny"], "cpu")
