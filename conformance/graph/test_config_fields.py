"""Every field of a configuration does something, or is refused. Two models that differ in one field compute differently."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.config import SWITCHES, ArbConfig, at_rest, with_fields, with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.presets import PRESETS
from conformance.compare import tensors_of
from conformance.graph import models

LIVELY = {"width": 36, "num_layers": 1, "theta": 2, "theta_e": 1, "window": 8, "block": 4, "num_summaries": 2}
"""So wide that some gradients are made orthogonal, quick to move, and soon out of the window."""

WHOLE = replace(models.WHOLE, **LIVELY)

NANO = replace(models.NANO, **LIVELY)

BASES: dict[str, ArbConfig] = {
    "nano": NANO,
    "signs": with_fields(NANO, vote_rule="sign", theta=9),
    "frozen": with_fields(NANO, exponent_rule="frozen"),
    "averaged": with_fields(NANO, average_gradients=True),
    "no experts": with_modules(NANO, moe=False),
    "candidates": replace(WHOLE, code_search="candidates", sign_bits=2, num_probes=1),
    "whole": WHOLE,
    "no codes": with_modules(WHOLE, vq=False),
    "no graph": with_modules(WHOLE, graph=False),
    "no memory": with_modules(WHOLE, memory=False),
    "no composites": with_fields(WHOLE, composite_codes=0),
    "no media": with_fields(WHOLE, image_features=0, audio_features=0),
    "no video": with_fields(WHOLE, video_latent=0),
    "bytes alone": with_fields(WHOLE, video_latent=0, talker_tokens=0),
}
"""Configurations with each switch on, and with each off."""

TRAINED = ("nano", "averaged", "signs", "frozen", "no experts", "candidates")
"""Configurations whose models are trained, to see fields at work that no weight shows at the start."""

OTHER: dict[str, Any] = {
    "name": "another",
    "width": 48,
    "head_dim": 14,
    "rotary_dim": 2,
    "top_k": 1,
    "code_search": "candidates",
    "window": 16,
    "block": 2,
    "group_size": 6,
    "mantissa_bits": 1,
    "theta": 3,
    "theta_e": 3,
    "on_flip": "carry",
    "exponent_rule": "sign",
    "vote_rule": "sign",
    "orthogonal_steps": 1,
    "max_vote_step": 3,
}
"""Another value of a field. A field without one here is negated, or grows by one."""

SAME_MODEL = ("name", "dense_dispatch_max_tokens")
"""Fields in which equal models may differ: the label, and the choice between two equal paths of experts."""


def other(config: ArbConfig, name: str) -> Any:
    """Return another value of a field than a configuration has."""
    value = getattr(config, name)
    if name in OTHER:
        return OTHER[name] if OTHER[name] != value else at_rest(name)
    return not value if isinstance(value, bool) else value + 1


def media_of(config: ArbConfig, batch: int) -> dict[str, Tensor]:
    """Return features of the media that a model reads."""
    rng = torch.Generator().manual_seed(4)
    widths = {"image_BNF": config.image_features, "audio_BNF": config.audio_features}
    return {name: torch.randn(batch, 5, width, generator=rng) for name, width in widths.items() if width}


def bits(values: Any) -> dict[str, tuple[Any, ...]]:
    """Return shape and bytes of all tensors by path."""
    return {
        path: (
            tuple(tensor.shape),
            tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"",
        )
        for path, tensor in tensors_of(values).items()
    }


def state_at_the_start(config: ArbConfig) -> Any:
    return bits(ArbModel(config, seed=3).state())


def behaviour(config: ArbConfig) -> Any:
    """Return what a model makes of bytes and media: its state after steps, logits of a long text, and a latent."""
    model = ArbModel(config, seed=3)
    for step in range(2):
        ids_BT = models.random_ids(2, 16, seed=step)
        assert model.backward(model.losses(ids_BT, **media_of(config, 2)), rate=models.RATE, step=step)
        model.step()
    made = [model.state()]
    with torch.no_grad():
        made.append({"logits": model(models.random_ids(1, 40))})
    return bits(made)


@pytest.mark.parametrize("base", TRAINED)
def test_a_field_makes_another_model_or_is_refused(base: str) -> None:
    config = BASES[base]
    start, acts, silent = state_at_the_start(config), None, []
    for name in (field.name for field in fields(config) if field.name not in SAME_MODEL):
        try:
            changed = replace(config, **{name: other(config, name)})
        except ValueError:
            continue
        if state_at_the_start(changed) != start:
            continue
        acts = acts or behaviour(config)
        if behaviour(changed) == acts:
            silent.append(name)
    assert not silent, f"{base}: nothing reads {silent}"


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.off)
def test_what_nothing_reads_is_refused_in_a_sentence(switch: Any) -> None:
    off = [config for config in BASES.values() if not switch.is_on(config)]
    assert off and any(switch.is_on(config) for config in BASES.values())
    for config in off:
        for name in switch.fields:
            assert getattr(config, name) == at_rest(name)
            value = other(config, name)
            with pytest.raises(ValueError, match=r"\w+ is .*, but must be ") as caught:
                replace(config, **{name: value})
            assert "\n" not in str(caught.value)
    # Of what several switches turn off, the first is named.
    config, name = off[-1], switch.fields[-1]
    with pytest.raises(ValueError, match=f"{name} is .* must be .* {switch.off}: nothing would read it"):
        replace(config, **{name: other(config, name)})


def test_a_field_may_be_read_in_all_configurations_or_has_a_switch() -> None:
    """The fields that are never refused, by name. A new field must be added here or be refused somewhere."""
    switched = {name for switch in SWITCHES for name in switch.fields}
    always = {field.name for field in fields(ArbConfig)} - switched
    assert always == {
        *("name", "embed_dim", "width", "num_layers", "num_heads", "head_dim", "rotary_dim", "query_latent"),
        *("kv_latent", "head_inner", "num_codes", "use_moe", "window", "block", "num_summaries"),
        *("image_features", "audio_features", "video_latent", "talker_tokens"),
        *("group_size", "mantissa_bits", "theta", "on_flip", "exponent_rule", "vote_rule"),
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "options",
    [
        {"vq": False},
        {"graph": False},
        {"moe": False},
        {"memory": False},
        {"vq": False, "moe": False},
        {"moe": False, "max_moe_iters": 1},
    ],
    ids=str,
)
def test_modules_that_are_switched_off_leave_a_valid_configuration(
    name: str, options: dict[str, Any]
) -> None:
    """What is left out takes its fields along, and survives JSON."""
    config = with_modules(PRESETS[name], **options)
    assert ArbConfig.from_json(config.to_json()) == config
    assert with_modules(config, **options) == config


def test_modules_that_cannot_be_switched_on_are_refused() -> None:
    with pytest.raises(ValueError, match="memory_rows is 16384, but must be 0 without num_codes"):
        with_modules(models.NANO, memory=True)
    with pytest.raises(ValueError, match="memory_rows is 50, but must be 0 without num_codes"):
        with_modules(WHOLE, vq=False, memory=True)
    with pytest.raises(ValueError, match="max_moe_iters is 3, but must be 1 without use_moe"):
        with_modules(WHOLE, moe=False, max_moe_iters=3)
    with pytest.raises(ValueError, match="num_experts is 1, but must be an integer from 2"):
        replace(models.NANO, num_experts=1, top_k=1)
    with pytest.raises(ValueError, match="num_probes is 5, but must be an integer from 1 to 4"):
        replace(WHOLE, code_search="candidates", sign_bits=2, num_probes=5)
