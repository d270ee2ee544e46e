"""One setting of the trainer: what is said of it, and which values it can have. `options.py` has the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

AUTO = "auto"
"""The word that stands for a number which the machine decides, where `Option.auto` allows it."""

ALWAYS_RECORDED = object()
"""Says of a setting that every checkpoint has it: `Option.before`."""

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
"""How a message names the type of a setting."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a setting beside its name and its type.

    Attributes:
        help: what the command line says of it, a short sentence.
        default: its value where nobody names one.
        default_help: what help says instead of the default.
        low, high: the range of a number; None where it has no such end.
        choices: the strings allowed; empty for any.
        bound: whether it decides what a run computes, so that a resumed run must agree with it.
        before: of a bound setting that was added when there were checkpoints: the value that computes what the program computed
            until then. A run whose checkpoint lacks the setting has this value, whatever the default is or becomes.
        changes_model: whether it changes the model of the preset, so that every command that builds one has it. Such a
            setting is bound.
        also: other spellings of it on the command line.
        has_opposite: whether a switch can be asked for and asked against, with ``--no-`` before its name.
        auto: whether `AUTO` may be asked for in the place of a number. The run has a number then.
        path: whether it is a path, so that a run keeps the whole path and can be resumed from another folder.
        on_hub: whether it may also be a name on a hub, of a path.
        asked: whether it can be asked for. Others are what the preset says, and recorded.
        commands: the commands that train and have it.
    """

    help: str
    default: Any
    default_help: str | None = None
    low: int | None = None
    high: int | None = None
    choices: tuple[str, ...] = ()
    bound: bool = False
    before: Any = ALWAYS_RECORDED
    changes_model: bool = False
    also: tuple[str, ...] = ()
    has_opposite: bool = False
    auto: bool = False
    path: bool = False
    on_hub: bool = False
    asked: bool = True
    commands: tuple[str, ...] = ("train", "finetune")


@dataclass(frozen=True)
class Row:
    """A setting by its name and its type, both from its field of `Settings`.

    Attributes:
        name: of the field.
        kind: type of its values: int, float, bool or str.
        optional: whether None is a value too.
        option: the rest.
    """

    name: str
    kind: type
    optional: bool
    option: Option

    def check(self, value: Any, *, asked: bool = False) -> None:
        """Refuse a value that the setting can't have.

        Args:
            value: of the setting.
            asked: whether a user asks for it, who may say `AUTO` for some settings. A run always has a number.

        Raises:
            TypeError, ValueError: it is of another type, or outside of its range; one sentence names it.
        """
        may_be_auto = asked and self.option.auto
        if (value is None and self.optional) or (may_be_auto and value == AUTO):
            return
        # True is no whole number here, although Python has it so.
        if value == "":
            raise ValueError(f"{self.name} is '', but must not be empty")
        is_of_kind = type(value) is self.kind or (self.kind is float and type(value) is int)
        if not is_of_kind:
            or_auto = f" or {AUTO!r}" if may_be_auto else ""
            raise TypeError(f"{self.name} is {value!r}, but must be {_KINDS[self.kind]}{or_auto}")
        if self.option.choices and value not in self.option.choices:
            raise ValueError(f"{self.name} is {value!r}, but must be one of {', '.join(self.option.choices)}")
        low, high = self.option.low, self.option.high
        # What is not a number is in no range.
        if not (low is None or value >= low) or not (high is None or value <= high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{self.name} is {value}, but must be {allowed}")


def row_of(name: str, hint: Any) -> Row:
    """Return the row of a field from its annotation, ``Annotated[TYPE, Option(...)]``."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"the field {name} of Settings has no Option")
    annotated, option = get_args(hint)
    kinds = get_args(annotated) or (annotated,)
    [kind] = (each for each in kinds if each is not type(None))
    return Row(name=name, kind=kind, optional=type(None) in kinds, option=option)
