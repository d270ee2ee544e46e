"""Every bad call is refused, by the same exception everywhere, in one sentence that names the argument."""

from __future__ import annotations

import pytest
import torch

from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.ops.packing import weight_of_trits
from conformance.law import law
from conformance.ops import refusals
from conformance.ops.refusals import REFUSALS
from conformance.subject import Subject


@law()
def test_refusals_of_packing(ops: Subject) -> None:
    _all_of(ops, "packing")


@law()
def test_refusals_of_dither_and_scale(ops: Subject) -> None:
    _all_of(ops, "dither", "scale")


@law()
def test_refusals_of_votes(ops: Subject) -> None:
    _all_of(ops, "votes")


@law()
def test_refusals_of_update(ops: Subject) -> None:
    _all_of(ops, "update")


@law()
def test_refusals_of_linear_and_conv(ops: Subject) -> None:
    _all_of(ops, "linear", "conv")


@law()
def test_refusals_of_norm_embedding_denoise(ops: Subject) -> None:
    _all_of(ops, "norm", "embedding", "denoise")


@law()
def test_refusals_of_codebook_and_edges(ops: Subject) -> None:
    _all_of(ops, "codebook", "edges")


@law()
def test_refusals_of_experts_attention_memory(ops: Subject) -> None:
    _all_of(ops, "experts", "attention", "memory")


def _all_of(ops: Subject, *families: str) -> None:
    """Fail with every call of some families that is not refused as it must be."""
    failures = []
    for case in REFUSALS:
        if OP_TABLE[case.op].family in families:
            try:
                refusals.check(ops, case)
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


def test_every_op_that_takes_arguments_refuses_some() -> None:
    assert {case.op for case in REFUSALS} == set(OP_TABLE) - {"from_spec", "to_spec"}  # any weight converts


@pytest.mark.parametrize(
    ("error", "says", "tensors"),
    [
        (ValueError, "packed", {"packed": torch.zeros(8, dtype=torch.uint8)}),
        (TypeError, "packed", {"packed": torch.zeros(9, dtype=torch.int8)}),
        (ValueError, "exponents", {"exponents": torch.zeros(3, 1, dtype=torch.int8)}),
        (ValueError, "trit_accum", {"trit_accum": torch.zeros(14, 3, dtype=torch.int8)}),
        (TypeError, "exponent_accum", {"exponent_accum": torch.zeros(3, 2, dtype=torch.int16)}),
        (ValueError, "trit_accum", {"trit_accum": torch.zeros(3, 14, dtype=torch.int8, device="meta")}),
    ],
)
def test_weight_refuses_tensors_that_do_not_fit(
    error: type[Exception], says: str, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(error, match=says):
        refusals.bad_weight(**tensors)


@pytest.mark.parametrize(("level", "bits"), [(16, 0), (-33, 0), (32, 1), (-65, 1), (64, 2)])
def test_weight_refuses_levels_beyond_the_rails(level: int, bits: int) -> None:
    trits = torch.zeros(1, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="exponents"):
        weight_of_trits(trits, torch.full((1, 1), level, dtype=torch.int8), mantissa_bits=bits)
