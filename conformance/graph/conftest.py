"""What spares the tests of the graph time: one thread, and products in few programs."""

from __future__ import annotations

import os
import sys
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


@pytest.fixture(autouse=True, scope="package")
def wide_programs() -> Iterator[None]:
    """Let Triton's interpreter compute 64 outputs at once where float rows are multiplied. A program takes it two milliseconds.

    On a GPU a program computes one output of so small a weight. `ops/test_linear.py` compares such programs in the interpreter too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
            from arbitor.optimized.kernels import float_rows

            patch.setattr(float_rows, "PROGRAMS", 1)
            patch.setattr(float_rows, "MOST_OUTPUTS", 64)
        yield
