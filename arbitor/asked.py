"""What other libraries ask of any model of torch, answered by the models that users make, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from arbitor.reference.graph.stateful import Stateful

NO_PARAMETERS = (
    "the model has no parameter, because its weights are integers: its attributes device and dtype say where and what it is, "
    "ArbOptimizer steps it, and arbitor.adapters puts float adapters over it in the place of peft"
)
"""What `next(model.parameters())` says."""


def or_why_none(found: Iterator[nn.Parameter]) -> Generator[nn.Parameter, None, str | None]:
    """Yield parameters. Where there are none, the reason is the value of the StopIteration that `next` raises."""
    reason: str | None = NO_PARAMETERS
    for parameter in found:
        reason = None
        yield parameter
    return reason


class Asked(Stateful):
    """A model with answers for other libraries. `instead` says what their trainers and pipelines must be given."""

    instead: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.context.device)

    def parameters(self, recurse: bool = True) -> Generator[nn.Parameter, None, str | None]:
        """Yield the float parameters: of adapters, and of float layers. A ternary weight is none."""
        return (yield from or_why_none(super().parameters(recurse)))

    def __getattr__(self, name: str) -> Any:
        """Find a part by its name, as torch does; refuse what a Trainer of transformers asks first, by a TypeError.

        A Trainer needs a model of its own library. A property would be read by whatever reads all that `dir` lists.
        """
        if name == "accepts_loss_kwargs":
            self._refuse("Trainer")
        return super().__getattr__(name)

    def can_generate(self) -> bool:
        """Refuse a pipeline of transformers, which asks this, by a TypeError, as it needs a model of its own library."""
        self._refuse("pipeline")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"a {what} of transformers was given a model of type {type(self).__name__}, but must be given {self.instead} "
            "(docs/python.md)"
        )
