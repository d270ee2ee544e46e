"""Writes whose order is no matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_any_order() -> Iterator[None]:
    """Let torch write within the block in the order that it likes, also where a program asked for deterministic algorithms.

    To be used where places differ, or get the same values where they are equal, so that every order gives the same bits. On CUDA a
    deterministic `index_put_` or `scatter_` sorts the places first and looks whether they exist, by some twenty launches.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
