"""A state dict says by which rules its parts learned, and is refused by name where these are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.changed_rules import CHANGED_RULES, Ruled, names_within, rules_of
from conformance.graph import models

ENTRY = "video_head._extra_state"

State = dict[str, Tensor]


def text(words: str) -> Tensor:
    return torch.tensor(list(words.encode()), dtype=torch.uint8)


def held(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def old() -> State:
    """The state dict of a model from before its video head read normed rows, as any program would hand it on."""
    state = held(ArbModel(models.WHOLE, seed=4))
    del state[ENTRY]
    return state


def into_model(state: State, **how: Any) -> Any:
    return ArbModel(models.WHOLE, seed=9).load_state_dict(state, **how)


def into_head(state: State, **how: Any) -> Any:
    head = ArbModel(models.WHOLE, seed=9).video_head
    assert head is not None
    own = {name.removeprefix("video_head."): each for name, each in state.items() if "video_head." in name}
    return head.load_state_dict(own, **how)


def into_holder(state: State, **how: Any) -> Any:
    holder = nn.Sequential(ArbModel(models.WHOLE, seed=9))
    return holder.load_state_dict({f"0.{name}": each for name, each in state.items()}, **how)


EVERYWHERE = pytest.mark.parametrize("load", [into_model, into_head, into_holder])


def test_a_part_with_a_changed_rule_says_so() -> None:
    """Who adds a rule to the table has to give the class of the part `Ruled`, and no other part has it."""
    parts = {name: part for name, part in ArbModel(models.WHOLE).named_modules() if isinstance(part, Ruled)}
    assert {name: part.rules for name, part in parts.items()} == CHANGED_RULES


def test_names_of_a_part_are_its_own() -> None:
    names = ["video_head.query", "video_heads.query", "a.video_head.query", "video_head"]
    assert names_within("video_head", names) == ["video_head.query", "video_head"]
    assert rules_of(names[1:3]) == {} and rules_of(names) == {"video_head": ["it reads normed rows"]}


@EVERYWHERE
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_from_before_a_rule_is_refused_by_name(load: Any, strict: bool, assign: bool) -> None:
    with pytest.raises(
        ValueError,
        match=r"state_dict has a .*[vV]ideo_?[hH]ead that learned before the rule 'it reads normed rows'",
    ):
        load(old(), strict=strict, assign=assign)


@EVERYWHERE
def test_a_state_dict_by_another_rule_is_refused_by_name(load: Any) -> None:
    for entry, error, says in (
        (text("it reads normed rows\nit sings"), ValueError, "'it sings', which this program does not have"),
        (text("it sings"), ValueError, "before the rule 'it reads normed rows'"),
        (torch.tensor([255, 254], dtype=torch.uint8), ValueError, "before the rule"),
        (torch.zeros(2), TypeError, r"_extra_state has dtype float32"),
        ("it reads normed rows", TypeError, "_extra_state is a str"),
    ):
        with pytest.raises(error, match=says):
            load({**old(), ENTRY: entry})


def test_a_refused_state_dict_changes_nothing() -> None:
    model = ArbModel(models.WHOLE, seed=9)
    before = held(model)
    with pytest.raises(ValueError, match="before the rule"):
        model.load_state_dict(old())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_state_dict_says_its_rules_through_any_file(tmp_path: Path) -> None:
    """Also through safetensors, which keeps tensors and nothing else."""
    model, wanted = ArbModel(models.WHOLE, seed=4), held(ArbModel(models.WHOLE, seed=4))
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (
        load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt", weights_only=True),
    ):
        other = ArbModel(models.WHOLE, seed=9)
        other.load_state_dict(state)
        assert all(torch.equal(each, wanted[name]) for name, each in other.state_dict().items())


@EVERYWHERE
def test_a_state_dict_of_shapes_alone_is_not_asked(load: Any) -> None:
    """On the meta device there are no weights that learned, and no text to read."""
    load({name: each.to("meta") for name, each in ArbModel(models.WHOLE).state_dict().items()}, assign=True)


def test_rules_are_said_under_any_default_device() -> None:
    model = ArbModel(models.WHOLE, seed=4)
    with torch.device("meta"):
        assert bytes(model.state_dict()[ENTRY].tolist()) == b"it reads normed rows"
        into_model(model.state_dict(), assign=True)


def test_a_model_without_such_a_part_says_nothing() -> None:
    """Its state dicts are those that they were, and old ones load."""
    model = models.nano(seed=4)
    assert not [name for name in model.state_dict() if name.endswith("_extra_state")]
    models.nano(seed=9).load_state_dict(held(model))


def test_a_state_dict_of_other_parts_alone_is_not_asked() -> None:
    state = {name: each for name, each in old().items() if not name.startswith("video_head.")}
    # Adapters are read so by peft.
    state |= {"video_head.query.adapter.lora_A": torch.zeros(2, 24)}
    found = into_model(state, strict=False)
    assert ENTRY in found.missing_keys and found.unexpected_keys == ["video_head.query.adapter.lora_A"]
