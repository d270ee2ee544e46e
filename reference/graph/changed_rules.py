"""Rules of the graph that have changed, and what a saved model says of them.

Weights that learned by one rule compute something else by another, and no weight shows by which rule it learned. So a saved model
names the rules below by which its parts learned. A checkpoint does so in its header, a state dict in an entry of the part. A part
that learned by other rules than those here is refused by name. A model without such parts names no rule, and loads as before.

Whoever changes what a part computes with given weights adds the new rule here, and an entry under *Rules* in CHANGELOG.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.graph.module import RULES_ENTRY, ArbModule

CHANGED_RULES: Mapping[str, tuple[str, ...]] = {"video_head": ("it reads normed rows",)}
"""The rules of a part that changed, by the name of the part in `ArbModel`, the oldest first. A part has a class with `Ruled`."""


class Ruled(ArbModule):
    """A part whose rules have changed. Its state dict names them.

    Attributes:
        rules: names of the rules.
    """

    rules: tuple[str, ...]

    def get_extra_state(self) -> Tensor:
        """Return the names of the rules as text in a tensor, because files of tensors hold nothing else.

        The text can be read whatever device is torch's default one.
        """
        return torch.tensor(list("\n".join(self.rules).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Keep the rules: `check_tensors` has compared them."""

    def check_tensors(self, state_dict: Mapping[str, Any], prefix: str, *, assign: bool) -> None:
        """Refuse the entries of a state dict for this part, under a prefix, if they learned by other rules."""
        super().check_tensors(state_dict, prefix, assign=assign)
        name = f"{prefix}{RULES_ENTRY}"
        if name in state_dict:
            checks.dtype_in(name, state_dict[name], (torch.uint8,))
            if state_dict[name].is_meta:
                # Only shapes are handed on, and no weights that learned.
                return
            stated = bytes(state_dict[name].flatten().tolist()).decode(errors="replace").split("\n")
        elif any(prefix + key in state_dict for key, _ in self.named_buffers()):
            stated = []
        else:
            # Of the adapters of the part alone, say.
            return
        refuse_other_rules(
            f"state_dict has a {prefix.rstrip('.') or type(self).__name__} that", self.rules, stated
        )


def rules_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return what a saved model says of its rules, by part.

    Args:
        names: of its weights and tables.
    """
    return {part: list(rules) for part, rules in CHANGED_RULES.items() if names_within(part, names)}


def names_within(part: str, names: Iterable[str]) -> list[str]:
    """Return those names of weights and tables that belong to a part."""
    return [name for name in names if f"{name}.".startswith(f"{part}.")]


def refuse_other_rules(what: str, rules: Iterable[str], stated: Iterable[str]) -> None:
    """Refuse a part that learned by other rules than those here.

    Args:
        what:   the part, in words that "learned" can follow.
        rules:  of the part, here.
        stated: rules by which it learned.

    Raises:
        ValueError: a rule of one is none of the other.
    """
    rules, stated = list(rules), list(stated)
    if missing := [rule for rule in rules if rule not in stated]:
        raise ValueError(
            f"{what} learned before the rule {missing[0]!r} (CHANGELOG.md), by which its weights compute something else, so it "
            "must be trained anew"
        )
    if unknown := [rule for rule in stated if rule not in rules]:
        raise ValueError(
            f"{what} learned by the rule {unknown[0]!r}, which this program does not have; another version of it wrote this"
        )
