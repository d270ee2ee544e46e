"""Laws of packing: five trits to a byte, the first least significant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import packed_bytes

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import I8, ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("packing")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@calls("pack_trits")
def pack_trits_calls(draw: st.DrawFn) -> Case:
    shape = draw(
        st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 40)), st.just((3, 0)), st.just((2, 3, 4)))
    )
    trits = draw(ss.trit_tensors(shape))
    return Case((ss.lay_out(trits.float(), draw(st.sampled_from(ss.LAYOUTS[:4]))).to(torch.int8),))


@calls("unpack_trits")
def unpack_trits_calls(draw: st.DrawFn) -> Case:
    shape = draw(st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 40)), st.just((2, 3, 4))))
    count = math.prod(shape)
    raw = draw(st.binary(min_size=min(packed_bytes(count), 800), max_size=min(packed_bytes(count), 800)))
    packed = torch.tensor([byte % 243 for byte in raw], dtype=torch.uint8)
    packed = packed.repeat(-(-packed_bytes(count) // max(len(raw), 1)))[: packed_bytes(count)]
    return Case((packed, shape))


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


TRITS = st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 30)), st.just((2, 3, 4))).flatmap(
    ss.trit_tensors
)
BYTES = st.binary(max_size=200).map(lambda raw: torch.tensor([byte % 243 for byte in raw], dtype=torch.uint8))


PACK_MOST_SIGNIFICANT_FIRST = mutant(
    "pack_most_significant_first",
    "(digits.reshape(-1, TRITS_PER_BYTE) * places)",
    "(digits.reshape(-1, TRITS_PER_BYTE) * places.flip(0))",
    compared="pack_trits",
)
PACK_DROPS_THE_TAIL = mutant(
    "pack_drops_the_tail",
    "digits = torch.cat([digits, digits.new_ones(padding)])",
    "digits = torch.cat([digits[: 5 * (digits.numel() // 5)], digits.new_ones((padding > 0) * 5)])",
    compared="pack_trits",
)


@law(trits=TRITS, rejects=[PACK_MOST_SIGNIFICANT_FIRST, PACK_DROPS_THE_TAIL])
def test_pack_trits_roundtrip(ops: Subject, trits: Tensor) -> None:
    exact(ops.unpack_trits(ops.pack_trits(trits), trits.shape), trits)


UNPACK_MOST_SIGNIFICANT_FIRST = mutant(
    "unpack_most_significant_first",
    "- 1 for j in range(TRITS_PER_BYTE)]",
    "- 1 for j in reversed(range(TRITS_PER_BYTE))]",
    compared="unpack_trits",
)


@law(packed=BYTES, rejects=[UNPACK_MOST_SIGNIFICANT_FIRST])
def test_unpack_trits_roundtrip(ops: Subject, packed: Tensor) -> None:
    exact(ops.pack_trits(ops.unpack_trits(packed, (5 * packed.numel(),))), packed)


BOTH_MOST_SIGNIFICANT_FIRST = mutant(
    "both_most_significant_first",
    "for j in range(TRITS_PER_BYTE)]",
    "for j in reversed(range(TRITS_PER_BYTE))]",
    compared="pack_trits",
    times=2,
)
PAD_WITH_MINUS_ONE = mutant(
    "pad_with_minus_one", "digits.new_ones(padding)", "digits.new_zeros(padding)", compared="pack_trits"
)


@law(
    trits=TRITS,
    rejects=[
        PACK_MOST_SIGNIFICANT_FIRST,
        BOTH_MOST_SIGNIFICANT_FIRST,
        PAD_WITH_MINUS_ONE,
        PACK_DROPS_THE_TAIL,
    ],
)
def test_pack_trits_by_long_division(ops: Subject, trits: Tensor) -> None:
    exact(ops.pack_trits(trits), torch.tensor(oracle.pack(trits.flatten().tolist()), dtype=torch.uint8))


@law(
    packed=BYTES,
    drop=st.integers(0, 4),
    rejects=[UNPACK_MOST_SIGNIFICANT_FIRST, BOTH_MOST_SIGNIFICANT_FIRST],
)
def test_unpack_trits_by_long_division(ops: Subject, packed: Tensor, drop: int) -> None:
    """What fills a short last byte is ignored, whatever it is."""
    count = max(0, 5 * packed.numel() - drop)
    want = torch.tensor(oracle.unpack(packed.tolist(), count), dtype=torch.int8)
    exact(ops.unpack_trits(packed, (count,)), want)


@law(trits=TRITS, rejects=[PAD_WITH_MINUS_ONE])
def test_pack_trits_negation(ops: Subject, trits: Tensor) -> None:
    """Every digit d becomes 2 - d, the filler stays 1: negated trits pack to 242 - byte."""
    exact(ops.pack_trits(-trits), 242 - ops.pack_trits(trits))


@law(
    trits=ss.matrix_shapes().flatmap(ss.trit_tensors),
    rejects=[
        mutant(
            "pack_in_memory_order",
            "digits = trits.reshape(-1)",
            "digits = trits.as_strided((trits.numel(),), (1,), trits.storage_offset())",
        ),
    ],
)
def test_pack_trits_ignores_memory_layout(ops: Subject, trits: Tensor) -> None:
    """Row-major means the order of indices, not of memory."""
    for layout in ss.LAYOUTS[:4]:
        exact(ops.pack_trits(ss.lay_out(trits.float(), layout).to(torch.int8)), ops.pack_trits(trits), layout)
    exact(ops.pack_trits(trits.T), ops.pack_trits(trits.T.contiguous()), "transposed")


# --- what is refused -------------------------------------------------------------------------------------------------


def with_byte(value: int) -> Callable[[], Tensor]:
    """Return a maker of two packed bytes, the second of them `value`."""
    return lambda: torch.tensor([121, value], dtype=torch.uint8)


# fmt: off
test_refusals_of_packing = refusals(
    "packing",
    refused("pack_trits", "a trit of 2", ValueError, "trits", lambda: torch.tensor([0, 2], dtype=I8)),
    refused("pack_trits", "a trit of -2", ValueError, "trits", lambda: torch.tensor([-2], dtype=I8)),
    refused("pack_trits", "int16", TypeError, "trits", ones(5, dtype=torch.int16)),
    refused("pack_trits", "float", TypeError, "trits", ones(5)),
    refused("unpack_trits", "byte 243", ValueError, "packed", with_byte(243), (10,)),
    refused("unpack_trits", "byte 255", ValueError, "packed", with_byte(255), (6,)),
    refused("unpack_trits", "a byte too many", ValueError, "packed", with_byte(0), (5,)),
    refused("unpack_trits", "a byte too few", ValueError, "packed", with_byte(0), (11,)),
    refused("unpack_trits", "int8", TypeError, "packed", ones(2, dtype=I8), (10,)),
    refused("unpack_trits", "a number for a shape", TypeError, "shape", with_byte(0), 10),
    refused("unpack_trits", "a negative size", ValueError, "shape", with_byte(0), (-2, -5)),
    rejects=[
        mutant("pack_accepts_two", 'checks.values_between("trits", trits, -1, 1)', "pass"),
        mutant(
            "unpack_accepts_243",
            'checks.weight_values("packed", "packed", packed)',
            'checks.values_between("packed", packed, 0, 243)',
        ),
    ],
)
# fmt: on
