"""Laws of dither: bytes are a function of where and when, and of nothing else."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import GROUP_SIZES
from conformance import oracle
from conformance import strategies as ss
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject

IDS = st.lists(st.one_of(st.integers(0, 2**32 - 1), st.just(2**32 - 1)), min_size=1, max_size=9).map(
    torch.tensor
)


@law(ids=IDS, group_size=ss.GROUPS, clock=ss.clocks())
def test_dither_bytes_by_scalar_philox(
    ops: Subject, ids: Tensor, group_size: int, clock: dict[str, Any]
) -> None:
    numbers = {name: int(value) for name, value in clock.items()}
    want = [oracle.dither(group, group_size, **numbers) for group in ids.tolist()]
    exact(ops.dither_bytes(ids, group_size=group_size, **clock), torch.tensor(want, dtype=torch.uint8))


@law(ids=IDS, group_size=ss.GROUPS, clock=ss.clocks())
def test_dither_bytes_group_locality(
    ops: Subject, ids: Tensor, group_size: int, clock: dict[str, Any]
) -> None:
    """A group's bytes do not depend on the tensor that they are asked for in."""
    together = ops.dither_bytes(ids, group_size=group_size, **clock)
    alone = ops.dither_bytes(ids[-1], group_size=group_size, **clock)
    exact(alone, together[-1])
    exact(ops.dither_bytes(ids.flip(0)[:, None], group_size=group_size, **clock), together.flip(0)[:, None])


@law(ids=IDS, clock=ss.clocks())
def test_dither_bytes_of_a_larger_group_continue(ops: Subject, ids: Tensor, clock: dict[str, Any]) -> None:
    """Byte i is the same for every group size that has one."""
    longest = ops.dither_bytes(ids, group_size=96, **clock)
    for group_size in GROUP_SIZES:
        exact(ops.dither_bytes(ids, group_size=group_size, **clock), longest[:, : group_size + 1])


@law(ids=IDS, clock=ss.clocks(), bit=st.integers(0, 31))
def test_dither_bytes_depend_on_every_coordinate(
    ops: Subject, ids: Tensor, clock: dict[str, Any], bit: int
) -> None:
    """One bit of seed, step, tensor id or group id changes the block: 25 equal bytes by chance are 2**-200."""
    call = lambda ids, clock: ops.dither_bytes(ids, group_size=24, **clock)  # noqa: E731
    first = call(ids[:1], clock)
    for name, flipped in (
        ("seed", 1 << bit),
        ("seed", 1 << (bit + 32)),
        ("step", 1 << bit),
        ("tensor_id", 1 << bit),
    ):
        other = {**clock, name: int(clock[name]) ^ flipped}
        if name != "step" or other["step"] < 2**32 - 1:
            assert not torch.equal(first, call(ids[:1], other)), f"{name} bit {flipped} changes nothing"
    assert not torch.equal(first, call(ids[:1] ^ (1 << bit), clock)), f"group id bit {bit} changes nothing"


@law(ids=IDS, clock=ss.clocks())
def test_dither_bytes_step_as_a_tensor(ops: Subject, ids: Tensor, clock: dict[str, Any]) -> None:
    """A step that lives on the device counts like a number: a captured graph replays with fresh dither."""
    step = int(clock["step"])
    number = ops.dither_bytes(ids, group_size=12, **{**clock, "step": step})
    exact(ops.dither_bytes(ids, group_size=12, **{**clock, "step": torch.tensor(step)}), number)
