"""Laws of packing: five trits to a byte, the first least significant."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance import oracle
from conformance import strategies as ss
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject

TRITS = st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 30)), st.just((2, 3, 4))).flatmap(
    ss.trit_tensors
)
BYTES = st.binary(max_size=200).map(lambda raw: torch.tensor([byte % 243 for byte in raw], dtype=torch.uint8))


@law(trits=TRITS)
def test_pack_trits_roundtrip(ops: Subject, trits: Tensor) -> None:
    exact(ops.unpack_trits(ops.pack_trits(trits), trits.shape), trits)


@law(packed=BYTES)
def test_unpack_trits_roundtrip(ops: Subject, packed: Tensor) -> None:
    exact(ops.pack_trits(ops.unpack_trits(packed, (5 * packed.numel(),))), packed)


@law(trits=TRITS)
def test_pack_trits_by_long_division(ops: Subject, trits: Tensor) -> None:
    exact(ops.pack_trits(trits), torch.tensor(oracle.pack(trits.flatten().tolist()), dtype=torch.uint8))


@law(packed=BYTES, drop=st.integers(0, 4))
def test_unpack_trits_by_long_division(ops: Subject, packed: Tensor, drop: int) -> None:
    """What fills a short last byte is ignored, whatever it is."""
    count = max(0, 5 * packed.numel() - drop)
    want = torch.tensor(oracle.unpack(packed.tolist(), count), dtype=torch.int8)
    exact(ops.unpack_trits(packed, (count,)), want)


@law(trits=TRITS)
def test_pack_trits_negation(ops: Subject, trits: Tensor) -> None:
    """Every digit d becomes 2 - d, the filler stays 1: negated trits pack to 242 - byte."""
    exact(ops.pack_trits(-trits), 242 - ops.pack_trits(trits))


@law(trits=ss.matrix_shapes().flatmap(ss.trit_tensors))
def test_pack_trits_ignores_memory_layout(ops: Subject, trits: Tensor) -> None:
    """Row-major means the order of indices, not of memory."""
    for layout in ss.LAYOUTS[:4]:
        exact(ops.pack_trits(ss.lay_out(trits.float(), layout).to(torch.int8)), ops.pack_trits(trits), layout)
    exact(ops.pack_trits(trits.T), ops.pack_trits(trits.T.contiguous()), "transposed")
