"""Laws of memory: rows by integers, from their own n-gram alone, well spread; strengths one row at a time.

Legend: B batch, P positions, N rows of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from arbitor.reference.constants import STRENGTH_MAX
from conformance import oracle
from conformance import strategies as ss
from conformance.cases.memory import code_tensors, named_rows, strength_tables, tables_of_rows, touches
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject


def mixed(x: int) -> int:
    """Return a word mixed, as the specification says it."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & oracle.WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & oracle.WORD
    return x ^ (x >> 15)


def row_of(ngram: list[int], num_rows: int, salt: int) -> int:
    """Return the row of an n-gram, -1 if a code of it is missing."""
    if min(ngram) < 0:
        return -1
    h = mixed(salt)
    for code in ngram:
        h = mixed(((h + 0x9E3779B9) & oracle.WORD) ^ code)
    return h % num_rows


SHAPES = st.sampled_from(((1, 1), (2, 5), (3, 17)))


@law(shape=SHAPES, table=tables_of_rows(), given=st.booleans(), data=st.data())
def test_ngram_rows_by_integers(
    ops: Subject, shape: tuple[int, int], table: dict[str, int], given: bool, data: st.DataObject
) -> None:
    """Each position on its own, in Python's integers; codes that are missing, or lie before the first, give -1."""
    codes, before = data.draw(code_tensors(shape)), table["order"] - 1
    previous = data.draw(code_tensors((shape[0], before)))
    lines = [(previous[b].tolist() if given else [-1] * before) + codes[b].tolist() for b in range(shape[0])]
    want = [
        [row_of(line[p : p + before + 1], table["num_rows"], table["salt"]) for p in range(shape[1])]
        for line in lines
    ]
    rows = ops.ngram_rows(codes, **table, **({"previous": previous} if given else {}))
    exact(rows, torch.tensor(want, dtype=torch.int64))


@law(table=tables_of_rows(), cut=st.integers(0, 17), data=st.data())
def test_ngram_rows_go_on(ops: Subject, table: dict[str, int], cut: int, data: st.DataObject) -> None:
    """Codes read in two parts, the end of the first carried to the second, have the rows of codes read at once."""
    codes, before = data.draw(code_tensors((2, 17))), table["order"] - 1
    carried = torch.cat([torch.full((2, before), -1), codes[:, :cut]], dim=1)[:, cut:]
    parts = (
        ops.ngram_rows(codes[:, :cut], **table),
        ops.ngram_rows(codes[:, cut:], **table, previous=carried),
    )
    exact(torch.cat(parts, dim=1), ops.ngram_rows(codes, **table))


@law(
    num_rows=st.sampled_from((64, 97, 256)),
    order=st.integers(1, 4),
    salt=st.integers(0, 20),
    distinct=st.sampled_from((2, 5, 8)),
)
def test_ngram_rows_are_spread(ops: Subject, num_rows: int, order: int, salt: int, distinct: int) -> None:
    """Neighbouring n-grams fall on rows as evenly as by chance; two salts agree as seldom as by chance.

    Chi square of N cells has mean N - 1 and variance 2 (N - 1): eight deviations above it is no chance.
    """
    ngrams = torch.cartesian_prod(*[torch.arange(distinct)] * order).reshape(-1, order)
    repeats = -(-1024 // ngrams.shape[0])
    shifted = torch.cat([ngrams + 1000 * place for place in range(repeats)])
    rows, others = (
        ops.ngram_rows(shifted, order=order, num_rows=num_rows, salt=one)[:, -1] for one in (salt, salt + 1)
    )
    count = shifted.shape[0]
    expected = count / num_rows
    chi_square = float((rows.bincount(minlength=num_rows) - expected).square().sum() / expected)
    assert chi_square < num_rows - 1 + 8 * (2 * (num_rows - 1)) ** 0.5, f"rows are uneven: {chi_square}"
    agree = int((rows == others).sum())
    assert agree < expected + 8 * expected**0.5, f"two salts agree on {agree} rows of {count}"


@law(num_rows=st.sampled_from((1, 5, 300)), data=st.data())
def test_touch_strengths_one_by_one(ops: Subject, num_rows: int, data: st.DataObject) -> None:
    """First each row of the window falls, then each naming raises a row; every other row keeps its byte."""
    strengths, rows = data.draw(strength_tables(num_rows)), data.draw(named_rows(num_rows))
    rule: dict[str, Any] = data.draw(touches(num_rows))
    want = strengths.tolist()
    for place in range(rule["window"]):
        row = (int(rule["first"]) + place) % num_rows
        want[row] -= -(-want[row] // 2 ** rule["shift"])
    for row in rows.flatten().tolist():
        if row >= 0:
            want[row] = min(want[row] + rule["gain"], STRENGTH_MAX)
    exact(ops.touch_strengths(strengths, rows, **rule), torch.tensor(want, dtype=torch.int8))


@law(num_rows=st.sampled_from((5, 300)), data=st.data())
def test_touch_strengths_ignore_the_order(ops: Subject, num_rows: int, data: st.DataObject) -> None:
    strengths, rows = data.draw(strength_tables(num_rows)), data.draw(named_rows(num_rows)).flatten()
    rule = data.draw(touches(num_rows))
    order = torch.randperm(rows.numel(), generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    exact(ops.touch_strengths(strengths, rows, **rule), ops.touch_strengths(strengths, rows[order], **rule))


@law(shift=st.integers(0, 7), start=st.sampled_from((1, 2, 64, STRENGTH_MAX)))
def test_touch_strengths_reach_zero(ops: Subject, shift: int, start: int) -> None:
    """A strength that only decays falls at each visit until it is 0, and stays there."""
    strengths, none = torch.full((3,), start, dtype=torch.int8), torch.zeros(0, dtype=torch.int64)
    for _ in range(start):
        after = ops.touch_strengths(strengths, none, gain=1, first=0, window=3, shift=shift)
        assert after.ge(0).all() and ((after < strengths) | (strengths == 0)).all()
        if after.eq(0).all():
            break
        strengths = after
    exact(after, torch.zeros(3, dtype=torch.int8))


@law(num_rows=st.sampled_from((5, 300)), data=st.data())
def test_touch_strengths_in_place(ops: Subject, num_rows: int, data: st.DataObject) -> None:
    """Written into another table or over the strengths themselves, the result is the same."""
    strengths, rows = data.draw(strength_tables(num_rows)), data.draw(named_rows(num_rows))
    rule = data.draw(touches(num_rows))
    want = ops.touch_strengths(strengths, rows, **rule)
    for out in (torch.full_like(strengths, 7), strengths.clone()):
        exact(ops.touch_strengths(strengths, rows, **rule, out=out), want)
        exact(out, want, "out")
    itself = strengths.clone()
    exact(ops.touch_strengths(itself, rows, **rule, out=itself), want)
