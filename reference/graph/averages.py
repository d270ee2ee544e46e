"""The running mean of a matrix's gradients, which leads a gradient before it is made orthogonal.

Legend: N rows and K columns of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arbitor.reference.constants import ACCUM_MAX, AVERAGE_EXPONENT_MAX, AVERAGE_EXPONENT_MIN
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.tables import TableModule
from arbitor.reference.types import without_memory
from arbitor.reference.unordered import in_any_order


class GradientAverage(TableModule):
    """A byte for each element of a weight, and an exponent for each row. Every gradient of the weight changes it at once.

    Math:    see `average_gradient`
    Shapes:  mean int8 [N, K], exponents int8 [N]
    Start:   zeros
    Ranks:   lies where the accumulators of the weight lie, with its owner or with the rank that keeps its experts
    Source:  docs/spec/orthogonal.md
    """

    of_votes = True

    def __init__(self, context: GraphContext, shape: tuple[int, int]) -> None:
        super().__init__(context)
        self.memory = context.config.average_memory
        mean_NK, exponents_N = (
            torch.zeros(size, dtype=torch.int8, device=context.device) for size in (shape, shape[:1])
        )
        self.add_table("mean", mean_NK, -ACCUM_MAX, ACCUM_MAX)
        self.add_table("exponents", exponents_N, AVERAGE_EXPONENT_MIN, AVERAGE_EXPONENT_MAX)

    def lead(self, grad_NK: Tensor, rows: Tensor | None, rate: float | Tensor) -> Tensor:
        """Return what votes for a gradient of the weight, or of its unique `rows`, and change the mean in place.

        A row of -1 is none. Such rows stand last.
        """
        mean_NK, exponents_N = self.get_buffer("mean"), self.get_buffer("exponents")
        if rows is None:
            led_NK: Tensor = torch.empty_like(grad_NK)
            self._moved(grad_NK, mean_NK, exponents_N, rate, out=(led_NK, mean_NK, exponents_N))
            return led_NK
        used_R = rows >= 0
        # An unused slot, which stands behind the others, stands for the first one, so that a row that is written twice gets the
        # same bytes. Where no slot is used, row 0 stays.
        source_R = torch.where(used_R, torch.arange(len(rows), device=rows.device), 0)
        at_R = rows[source_R].clamp(min=0)
        led_RK, mean_RK, exponents_R = self._moved(grad_NK, mean_NK[at_R], exponents_N[at_R], rate)
        with in_any_order():
            mean_NK[at_R] = torch.where(used_R[0], mean_RK[source_R], mean_NK[at_R])
            exponents_N[at_R] = torch.where(used_R[0], exponents_R[source_R], exponents_N[at_R])
        return led_RK

    def _moved(self, *given: Any, **out: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return `ops.average_gradient` with the memory of this mean."""
        return self.ops.average_gradient(*given, memory=self.memory, **out)

    def leave(self) -> None:
        """Let another rank keep the mean. Here it reads as zeros."""
        for name, table in self.tables().items():
            self.register_buffer(name, without_memory(table))


def average_of(module: TernaryModule, *, orthogonal: bool) -> GradientAverage | None:
    """Return the average of a module's weight, of the rows that this rank keeps of it.

    It is None where the configuration has none or the gradient votes as it is.
    """
    if not (orthogonal and module.config.average_gradients):
        return None
    average = GradientAverage(module.context, module.weight.shape)
    average.spread = module.spread
    if module.tensor_id in module.context.kept_rows:
        average.leave()
    return average
