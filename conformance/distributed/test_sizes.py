"""The tables of docs/scaling.md have the numbers of optimized/distributed/sizes.py.

test_distributed.py compares these with the bytes of real ranks.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from arbitor.optimized.distributed.sizes import kept_bytes, received_bytes
from arbitor.optimized.layouts import DeviceWeight

SIDE = 240
"""A multiple of 16 and of 12, so that neither words nor groups are ragged."""

WEIGHT = DeviceWeight(
    words=torch.empty(SIDE, SIDE // 16, dtype=torch.int32, device="meta"),
    exponents=torch.empty(SIDE, SIDE // 12, dtype=torch.int8, device="meta"),
    trit_accum=torch.empty(SIDE, SIDE, dtype=torch.int8, device="meta"),
    exponent_accum=torch.empty(SIDE, SIDE // 12, dtype=torch.int8, device="meta"),
    shape=(SIDE, SIDE),
    group_size=12,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def rows(columns: int) -> list[list[float]]:
    """Return the rows of numbers of the table that has so many columns."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip().replace(",", "").removesuffix(" B") for cell in line.strip("|").split("|")]
        if (
            line.startswith("|")
            and len(cells) == columns
            and all(re.fullmatch(r"[\d.]+", cell) for cell in cells)
        ):
            found.append([float(cell) for cell in cells])
    return found


def kept(count: int) -> float:
    """Return the bytes a weight that a rank keeps."""
    return kept_bytes(WEIGHT, count) / SIDE**2


def received(count: int) -> float:
    """Return the bytes a weight that a rank receives in a step, with gradients in bfloat16."""
    return received_bytes(WEIGHT, count, gradient_bytes=2) / count / SIDE**2


def test_bytes_a_weight() -> None:
    table = rows(3)
    assert [row[0] for row in table] == [1, 2, 4, 8, 64, 1024]
    for ranks, keeps, receives in table:
        assert [keeps, receives] == [round(kept(int(ranks)), 3), round(received(int(ranks)), 3)]


def test_large_models() -> None:
    table = rows(4)
    assert len(table) == 3
    for billions, ranks, keeps, receives in table:
        assert keeps == round(billions * kept(int(ranks)), 1)
        assert receives == round(billions * received(int(ranks)), 1)
