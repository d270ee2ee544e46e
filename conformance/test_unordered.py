"""Writes whose order is no matter are left to torch, whatever a program asks of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arbitor.reference.graph.grouped import numbered
from arbitor.reference.graph.ledger import GrowingRows
from arbitor.reference.unordered import in_any_order
from conformance.compare import exact

WRITES = ("index_put_", "scatter_")


class Ordered(TorchDispatchMode):
    """Notes of each write to places of a tensor whether torch had to sort them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WRITES:
            self.found.append((name, torch.are_deterministic_algorithms_enabled()))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["default", "warn", "error"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Ask torch for deterministic algorithms, or not. Yields the mode's number."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(request.param)
    yield torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(before)


def test_the_mode_comes_back(mode: int) -> None:
    with in_any_order():
        assert torch.get_deterministic_debug_mode() == 0
    assert torch.get_deterministic_debug_mode() == mode
    with pytest.raises(KeyError), in_any_order():
        raise KeyError
    assert torch.get_deterministic_debug_mode() == mode


def test_a_ledger_writes_its_rows_in_any_order(mode: int) -> None:
    """On CUDA the writes of a step of `small` were a third of its time, when each sorted the one place that it writes to."""
    store = GrowingRows(2, (3,), dtype=torch.float32, device=torch.device("cpu"))
    places_BQ = torch.tensor([[4, 0], [1, 2]])
    values = torch.arange(12.0).view(2, 2, 3)
    with Ordered() as seen:
        store.write(places_BQ, values, 5)
        store.write(torch.tensor([[3]]), values[:1, :1], 5, sequences=torch.tensor([1]))
    assert seen.found == [("index_put_", False)] * 2
    exact(store.read(places_BQ), values)
    exact(store.rows[1, 3], values[0, 0])


def test_experts_are_numbered_in_any_order(mode: int) -> None:
    with Ordered() as seen:
        groups_M, used = numbered(torch.tensor([5, -1, 2, 5, 7, -1]))
    assert seen.found == [("scatter_", False)] * 2
    exact(used[groups_M.clamp(min=0)], torch.tensor([5, 2, 2, 5, 7, 2]))
    exact(groups_M < 0, torch.tensor([False, True, False, False, False, True]))
