"""Configurations are read from presets and JSON, and wrong ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from arbitor.reference.audit import audit
from arbitor.reference.config import SPECIAL_IDS, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.presets import PRESETS, preset
from conformance.graph.models import NANO, WHOLE


def test_the_vocabulary_is_256_bytes_32_specials_and_9_marks() -> None:
    assert VOCABULARY_SIZE == 297
    assert sorted(SPECIAL_IDS.values()) == list(range(256, 297))
    assert (SPECIAL_IDS["PAD"], SPECIAL_IDS["EOS"], SPECIAL_IDS["BOS"], SPECIAL_IDS["RESERVED"]) == (
        256,
        257,
        258,
        287,
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert ArbConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["width"] == config.width


def test_presets_have_the_size_they_promise() -> None:
    assert audit(preset("tiny")).weights < 1_000_000
    assert 10_000_000 <= audit(preset("small")).weights <= 30_000_000


def test_fields_with_a_default_may_be_left_out_of_json() -> None:
    values = json.loads(NANO.to_json())
    del values["theta"], values["group_size"]
    assert ArbConfig.from_json(json.dumps(values)) == NANO


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset is 'huge', but must be one of 'tiny', 'small'"):
        preset("huge")
    with pytest.raises(ValueError, match=r"; did you mean 'tiny'\?$"):
        preset("tinny")


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("name", "", ValueError, "name is ''"),
        ("width", 0, ValueError, "width is 0"),
        ("width", 24.0, TypeError, "width is a float"),
        ("num_layers", True, TypeError, "num_layers is a bool"),
        ("use_moe", 1, TypeError, "use_moe is 1, but must be true or false"),
        ("top_k", 5, ValueError, "top_k is 5, but must be an integer from 1 to 4"),
        ("rotary_dim", 3, ValueError, "rotary_dim is 3, but must be even and below head_dim, which is 12"),
        ("rotary_dim", 12, ValueError, "rotary_dim is 12, but must be even and below head_dim, which is 12"),
        ("max_moe_iters", 17, ValueError, "max_moe_iters is 17, but must be an integer from 1 to 16"),
        ("group_size", 13, ValueError, "group_size is 13"),
        ("theta", 0, ValueError, "theta is 0"),
        ("theta_e", 128, ValueError, "theta_e is 128"),
        ("mantissa_bits", 3, ValueError, "mantissa_bits is 3"),
        ("max_vote_step", 128, ValueError, "max_vote_step is 128"),
        ("on_flip", "keep", ValueError, "on_flip is 'keep', but must be one of 'reset', 'carry'"),
        ("exponent_rule", "none", ValueError, "exponent_rule is 'none'"),
        ("vote_rule", "adam", ValueError, "vote_rule is 'adam', but must be one of 'stochastic', 'sign'"),
    ],
)
def test_a_field_that_is_not_allowed_is_refused(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(NANO, **{field: value})


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_media_without_codes_of_their_own_are_refused(kind: str) -> None:
    """Every position has a code, or none has."""
    with pytest.raises(ValueError, match=f"{kind}_codes is 0, but must be at least 1 with {kind}_features"):
        replace(WHOLE, **{f"{kind}_codes": 0})
    replace(NANO, **{f"{kind}_features": 7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: {**values, "depth": 3}, "unknown field 'depth'"),
        (lambda values: {key: value for key, value in values.items() if key != "width"}, "no field 'width'"),
        (lambda values: list(values), "JSON list"),
    ],
)
def test_json_that_is_no_config_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArbConfig.from_json(json.dumps(change(json.loads(NANO.to_json()))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        (NANO.to_json().replace("{", '{"width": 1,', 1), "the key 'width' stands there twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["half of it", "a key twice", "too deep"],
)
def test_text_that_is_no_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArbConfig.from_json(text)
