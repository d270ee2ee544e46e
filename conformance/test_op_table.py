"""The op table is complete, and its classes are the strictest that the outputs allow."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from torch import Tensor

from arbitor.reference import op_table, ops
from arbitor.reference.op_table import EXACT, FAMILIES, OP_TABLE, OpRow, table_of
from conformance.case import Case
from conformance.compare import tensors_of
from conformance.families import CASES

EXACT_FLOATS = ("group_scales", "dequantize", "embedding", "visible_slots")
"""Ops whose floats are trits times scales of three significant bits, such scales, or constants: no rounding can differ."""


@pytest.mark.parametrize("row", OP_TABLE.values(), ids=OP_TABLE)
def test_class_is_the_strictest(row: OpRow) -> None:
    """EXACT is the class of integers and of floats that are exact by construction, NO_WORSE of all other floats."""
    floats = []

    @settings(max_examples=5)
    @given(case=CASES[row.name])
    def run(case: Case) -> None:
        result = getattr(ops, row.name)(*case.args, **case.kwargs)
        tensors = tensors_of(result).values()
        floats.append(any(isinstance(t, Tensor) and t.is_floating_point() for t in tensors))

    run()
    assert (row.output is EXACT) == (row.name in EXACT_FLOATS or not any(floats))


@pytest.mark.parametrize("row", OP_TABLE.values(), ids=OP_TABLE)
def test_work_models_grow_with_the_shape(row: OpRow) -> None:
    """Work is a whole number, and no larger shape moves fewer bytes than the tiny one."""
    assert row.shapes
    work = {name: (row.bytes_min(shape), row.ops_min(shape)) for name, shape in row.shapes.items()}
    assert all(type(amount) is int and amount >= 0 for pair in work.values() for amount in pair)
    if "tiny" in work:
        assert all(work["tiny"] <= pair for pair in work.values())


def test_work_model_counts_canonical_bytes() -> None:
    """The state of a weight is 1/5 + 1 + 2/G bytes an element: apply_step reads and writes all of it."""
    shape = {"N": 5, "K": 24, "G": 12}
    assert OP_TABLE["apply_step"].bytes_min(shape) == 2 * (24 + 10 + 120 + 10)
    weight = ops.constant_weight((5, 24), trit=1, exponent=0)
    assert weight.state_bytes == 164 == sum(t.numel() * t.element_size() for t in weight.tensors().values())
    assert (
        OP_TABLE["linear"].bytes_min({"M": 2, "N": 5, "K": 24, "G": 12, "float_bytes": 2})
        == 24 + 10 + 2 * 2 * 29
    )


def test_every_file_with_rows_is_a_family() -> None:
    """Files are read here as text: a family is in the table without being named in any list."""
    folder = Path(inspect.getfile(op_table)).parent
    files = [path.stem for path in sorted(folder.glob("*.py")) if "\nOPS = " in path.read_text()]
    assert list(FAMILIES) == files
    assert list(OP_TABLE) == [row.name for family in FAMILIES for row in rows_of(family)]


def rows_of(family: str) -> list[OpRow]:
    return [row for row in OP_TABLE.values() if row.family == family]


def test_a_row_in_the_wrong_file_is_refused() -> None:
    row = OP_TABLE["pack_trits"]
    assert dict(table_of({"packing": [row]})) == {"pack_trits": row}
    with pytest.raises(
        ValueError, match=r"family of pack_trits is 'packing', but must be its file's, 'scale'"
    ):
        table_of({"scale": [row]})


def test_a_second_row_of_an_op_is_refused() -> None:
    row, again = OP_TABLE["pack_trits"], replace(OP_TABLE["pack_trits"], family="scale")
    with pytest.raises(ValueError, match=r"name is 'pack_trits' in scale\.py, but packing\.py has a row"):
        table_of({"packing": [row], "scale": [again]})
