"""Laws of dither: bytes are a function of where and when, and of nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import GROUP_SIZES

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import CLOCK, ids, ones, refusals, refused, scalar
from ..subject import Subject

mutant = mutants_of("dither")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("dither_bytes")
def dither_bytes_calls(draw: st.DrawFn) -> Case:
    ids = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from((0, 2**31, 2**32 - 1)))
    shape = draw(st.sampled_from(((), (0,), (7,), (3, 5), (65,))))
    count = math.prod(shape)
    values = torch.tensor(draw(st.lists(ids, min_size=count, max_size=count)), dtype=torch.int64).reshape(
        shape
    )
    return Case((values,), {"group_size": draw(ss.GROUPS), **draw(ss.clocks())})


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


IDS = st.lists(st.one_of(st.integers(0, 2**32 - 1), st.just(2**32 - 1)), min_size=1, max_size=9).map(
    torch.tensor
)


EXPONENT_BYTE_FIRST = mutant(
    "exponent_byte_first",
    "torch.stack(blocks[: group_size + 1], dim=-1)",
    "torch.stack(blocks[1 : group_size + 1] + blocks[:1], dim=-1)",
    compared="dither_bytes",
)


@law(
    ids=IDS,
    group_size=ss.GROUPS,
    clock=ss.clocks(),
    rejects=[
        mutant("nine_rounds", "PHILOX_ROUNDS = 10", "PHILOX_ROUNDS = 9", compared="dither_bytes"),
        mutant(
            "key_words_swapped",
            "key = (seed & _WORD, seed >> 32)",
            "key = (seed >> 32, seed & _WORD)",
            compared="dither_bytes",
        ),
        mutant(
            "big_endian_words",
            "(0, 8, 16, 24)",
            "(24, 16, 8, 0)",
            compared=("dither_bytes", "stochastic_votes"),
        ),
        mutant(
            "step_and_tensor_swapped",
            "step_word, tensor_word)",
            "tensor_word, step_word)",
            compared="dither_bytes",
        ),
        mutant(
            "one_block_repeated",
            "torch.full_like(group_ids, block)",
            "torch.zeros_like(group_ids)",
            compared="dither_bytes",
        ),
        EXPONENT_BYTE_FIRST,
    ],
)
def test_dither_bytes_by_scalar_philox(
    ops: Subject, ids: Tensor, group_size: int, clock: dict[str, Any]
) -> None:
    numbers = {name: int(value) for name, value in clock.items()}
    want = [oracle.dither(group, group_size, **numbers) for group in ids.tolist()]
    exact(ops.dither_bytes(ids, group_size=group_size, **clock), torch.tensor(want, dtype=torch.uint8))


@law(
    ids=IDS,
    group_size=ss.GROUPS,
    clock=ss.clocks(),
    rejects=[
        mutant(
            "ids_by_position",
            "words = philox((group_ids,",
            "words = philox((torch.arange(group_ids.numel()).reshape(group_ids.shape),",
            compared="dither_bytes",
        ),
    ],
)
def test_dither_bytes_group_locality(
    ops: Subject, ids: Tensor, group_size: int, clock: dict[str, Any]
) -> None:
    """A group's bytes do not depend on the tensor that they are asked for in."""
    together = ops.dither_bytes(ids, group_size=group_size, **clock)
    alone = ops.dither_bytes(ids[-1], group_size=group_size, **clock)
    exact(alone, together[-1])
    exact(ops.dither_bytes(ids.flip(0)[:, None], group_size=group_size, **clock), together.flip(0)[:, None])


@law(ids=IDS, clock=ss.clocks(), rejects=[EXPONENT_BYTE_FIRST])
def test_dither_bytes_of_a_larger_group_continue(ops: Subject, ids: Tensor, clock: dict[str, Any]) -> None:
    """Byte i is the same for every group size that has one."""
    longest = ops.dither_bytes(ids, group_size=96, **clock)
    for group_size in GROUP_SIZES:
        exact(ops.dither_bytes(ids, group_size=group_size, **clock), longest[:, : group_size + 1])


@law(
    ids=IDS,
    clock=ss.clocks(),
    bit=st.integers(0, 31),
    rejects=[
        mutant(
            "tensor_id_ignored",
            "torch.full_like(group_ids, tensor_id)",
            "torch.zeros_like(group_ids)",
            compared="dither_bytes",
        ),
        mutant("high_seed_ignored", "seed >> 32)", "0)", compared="dither_bytes"),
    ],
)
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


STEP_TENSOR_IGNORED = mutant(
    "step_tensor_ignored",
    "torch.as_tensor(step, device=group_ids.device)",
    "torch.as_tensor(0 if isinstance(step, torch.Tensor) else step, device=group_ids.device)",
    compared="dither_bytes",
)


@law(ids=IDS, clock=ss.clocks(), rejects=[STEP_TENSOR_IGNORED])
def test_dither_bytes_step_as_a_tensor(ops: Subject, ids: Tensor, clock: dict[str, Any]) -> None:
    """A step that lives on the device counts like a number: a captured graph replays with fresh dither."""
    step = int(clock["step"])
    number = ops.dither_bytes(ids, group_size=12, **{**clock, "step": step})
    exact(ops.dither_bytes(ids, group_size=12, **{**clock, "step": torch.tensor(step)}), number)


# --- what is refused -------------------------------------------------------------------------------------------------


_VOTES = {"group_size": 12, **CLOCK}


# fmt: off
test_refusals_of_dither = refusals(
    "dither",
    refused("dither_bytes", "group size 13", ValueError, "group_size", ids(0), group_size=13, **CLOCK),
    refused("dither_bytes", "group size 12.0", ValueError, "group_size", ids(0), group_size=12.0, **CLOCK),
    refused("dither_bytes", "group size 0", ValueError, "group_size", ids(0), group_size=0, **CLOCK),
    refused("dither_bytes", "id -1", ValueError, "group_ids", ids(-1), **_VOTES),
    refused("dither_bytes", "id 2**32", ValueError, "group_ids", ids(2**32), **_VOTES),
    refused("dither_bytes", "int32 ids", TypeError, "group_ids", ones(1, dtype=torch.int32), **_VOTES),
    refused("dither_bytes", "seed -1", ValueError, "seed", ids(0), **{**_VOTES, "seed": -1}),
    refused("dither_bytes", "seed 2**64", ValueError, "seed", ids(0), **{**_VOTES, "seed": 2**64}),
    refused("dither_bytes", "step 2**32", ValueError, "step", ids(0), **{**_VOTES, "step": 2**32}),
    refused("dither_bytes", "step 1.0", TypeError, "step", ids(0), **{**_VOTES, "step": 1.0}),
    refused("dither_bytes", "float step", TypeError, "step", ids(0), **{**_VOTES, "step": torch.tensor(1.0)}),
    refused("dither_bytes", "step tensor 2**32 + 5", ValueError, "step", ids(0), **{**_VOTES, "step": scalar(2**32 + 5)}),
    refused("dither_bytes", "step tensor -1", ValueError, "step", ids(0), **{**_VOTES, "step": scalar(-1)}),
    refused("dither_bytes", "tensor id -1", ValueError, "tensor_id", ids(0), **{**_VOTES, "tensor_id": -1}),
    rejects=[
        mutant("seed_unchecked", "checks.vote_clock(seed, step, tensor_id, last_step=RESERVED_STEP)", "pass"),
    ],
)
# fmt: on
