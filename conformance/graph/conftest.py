"""What spares the tests of the graph time: one thread, and products in few programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def few_programs(wide_programs: None) -> None:
    """Multiply float rows in few programs of the interpreter: a step of a model has dozens of products."""
