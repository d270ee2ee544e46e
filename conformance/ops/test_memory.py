"""Laws of memory. Rows come from their own n-gram alone, by integers, and spread well. Strengths change one row at a time.

Legend: B batch, P positions, N rows of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import STRENGTH_MAX

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import I8, ids, meta, ones, refusals, refused, scalar
from ..subject import Subject

mutant = mutants_of("memory")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


LAST_CODE = 2**32 - 1


@st.composite
def code_tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Draw codes: many or few, the largest words, some positions without one."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    codes = torch.randint(draw(st.sampled_from((2, 58_684, 2**32)), label="codes"), shape, generator=rng)
    if draw(st.booleans(), label="extremes"):
        some = torch.tensor([-1, 0, 2**31, LAST_CODE])[torch.randint(4, shape, generator=rng)]
        codes = torch.where(torch.rand(shape, generator=rng) < 0.2, some, codes)
    return codes


@st.composite
def tables_of_rows(draw: st.DrawFn) -> dict[str, int]:
    """Draw what an n-gram is hashed to: order, rows and salt."""
    return {
        "order": draw(st.sampled_from((1, 2, 3, 5, 16)), label="order"),
        "num_rows": draw(st.sampled_from((1, 2, 97, 4096, 10_000_000, 2**31 - 1)), label="N"),
        "salt": draw(st.sampled_from((0, 1, 3, 2**31, 2**32 - 1)), label="salt"),
    }


@calls("ngram_rows")
def ngram_rows_calls(draw: st.DrawFn) -> Case:
    kwargs: dict[str, Any] = draw(tables_of_rows())
    batch, positions = draw(st.sampled_from(((1, 1), (0, 3), (2, 0), (3, 7), (2, 17), (1, 300))))
    codes = draw(code_tensors((batch, positions)))
    if draw(st.booleans(), label="transposed"):
        codes = codes.T.contiguous().T
    if draw(st.booleans(), label="previous"):
        kwargs["previous"] = draw(code_tensors((batch, kwargs["order"] - 1)))
    return Case((codes,), kwargs)


@st.composite
def strength_tables(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw strengths: many of them 0, some full, small ones among them."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    values = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 64, STRENGTH_MAX - 1, STRENGTH_MAX], dtype=torch.int8)
    return values[torch.randint(len(values), (num_rows,), generator=rng)]


@st.composite
def touches(draw: st.DrawFn, num_rows: int) -> dict[str, Any]:
    """Draw a window (at the first row, across the end, all rows, none) and the rule of rise and decay."""
    first = draw(
        st.one_of(st.sampled_from((0, num_rows - 1, 10**15)), st.integers(0, 3 * num_rows)), label="first"
    )
    as_tensor = draw(st.booleans(), label="first as a tensor")
    return {
        "gain": draw(st.sampled_from((0, 1, 8, STRENGTH_MAX)), label="gain"),
        "first": torch.tensor(first) if as_tensor else first,
        "window": draw(
            st.one_of(st.sampled_from((0, 1, num_rows)), st.integers(0, num_rows)), label="window"
        ),
        "shift": draw(st.integers(0, 7), label="shift"),
    }


@st.composite
def named_rows(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw rows with duplicates and unused slots, in one or two dimensions, none at all among them."""
    shape = draw(st.sampled_from(((), (0,), (1,), (17,), (3, 11), (300,))), label="rows")
    rows = torch.randint(-1, num_rows, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    return rows // draw(st.sampled_from((1, 3)), label="duplicates")


@calls("touch_strengths")
def touch_strengths_calls(draw: st.DrawFn) -> Case:
    strengths = draw(strength_tables(draw(st.sampled_from((1, 5, 300)), label="N")))
    kwargs = draw(touches(strengths.numel()))
    kind = draw(st.sampled_from(("new", "other", "itself", "strided")), label="out")
    if kind == "itself":
        kwargs["out"] = strengths
    elif kind != "new":
        step = 2 if kind == "strided" else 1
        kwargs["out"] = torch.full((step * strengths.numel(),), 7, dtype=torch.int8)[::step]
    return Case((strengths, draw(named_rows(strengths.numel()))), kwargs)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


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


NGRAMS_LOOK_AHEAD = mutant(
    "ngrams_look_ahead",
    "all_codes = torch.cat([before, codes_BP], dim=1)",
    "all_codes = torch.cat([before, codes_BP], dim=1)\n    all_codes = all_codes.roll(-1, dims=1) if order > 1 else all_codes",
    compared="ngram_rows",
)
PREVIOUS_IGNORED = mutant(
    "previous_ignored", "if previous is None else previous", "if True else previous", compared="ngram_rows"
)
PREVIOUS_COUNTS_FROM_ITS_START = mutant(
    "previous_counts_from_its_start",
    "    batch, positions = codes_BP.shape\n",
    "    batch, positions = codes_BP.shape\n    previous = None if previous is None else previous.flip(1)\n",
    compared="ngram_rows",
)
SALT_IGNORED = mutant(
    "salt_ignored", "torch.full_like(codes_BP, salt)", "torch.full_like(codes_BP, 0)", compared="ngram_rows"
)


@law(
    shape=SHAPES,
    table=tables_of_rows(),
    given=st.booleans(),
    data=st.data(),
    rejects=[
        mutant(
            "newest_code_first",
            "c = all_codes[:, place : place + positions]",
            "c = all_codes[:, order - 1 - place : order - 1 - place + positions]",
            compared="ngram_rows",
        ),
        NGRAMS_LOOK_AHEAD,
        PREVIOUS_IGNORED,
        PREVIOUS_COUNTS_FROM_ITS_START,
        mutant("missing_codes_have_a_row", "known &= c >= 0", "known &= True", compared="ngram_rows"),
        mutant(
            "no_ngram_is_row_0",
            "torch.where(known, h % num_rows, -1)",
            "torch.where(known, h % num_rows, 0)",
            compared="ngram_rows",
        ),
        mutant("products_wrap_late", "* factor) & _WORD", "* factor)", compared="ngram_rows"),
        SALT_IGNORED,
    ],
)
def test_ngram_rows_by_integers(
    ops: Subject, shape: tuple[int, int], table: dict[str, int], given: bool, data: st.DataObject
) -> None:
    """Each position equals the rule in Python's integers. Codes that are missing, or lie before the first, give -1."""
    codes, before = data.draw(code_tensors(shape)), table["order"] - 1
    previous = data.draw(code_tensors((shape[0], before)))
    lines = [(previous[b].tolist() if given else [-1] * before) + codes[b].tolist() for b in range(shape[0])]
    want = [
        [row_of(line[p : p + before + 1], table["num_rows"], table["salt"]) for p in range(shape[1])]
        for line in lines
    ]
    rows = ops.ngram_rows(codes, **table, **({"previous": previous} if given else {}))
    exact(rows, torch.tensor(want, dtype=torch.int64))


@law(
    table=tables_of_rows(),
    cut=st.integers(0, 17),
    data=st.data(),
    rejects=[NGRAMS_LOOK_AHEAD, PREVIOUS_IGNORED, PREVIOUS_COUNTS_FROM_ITS_START],
)
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
    rejects=[
        SALT_IGNORED,
        mutant(
            "codes_added_up",
            "h = mix(((h + CODE_STEP) & _WORD) ^ (c & _WORD))",
            "h = (h + (order - place) * c) & _WORD",
            compared="ngram_rows",
        ),
    ],
)
def test_ngram_rows_are_spread(ops: Subject, num_rows: int, order: int, salt: int, distinct: int) -> None:
    """Neighbouring n-grams fall on rows as evenly as by chance. Two salts agree as seldom as by chance.

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


SMALL_STRENGTHS_STAY = mutant(
    "small_strengths_stay",
    "(touched[decaying] + 2**shift - 1) >> shift",
    "touched[decaying] >> shift",
    compared="touch_strengths",
)
STRENGTHS_HALVE_UPWARDS = mutant(
    "strengths_halve_upwards",
    "(touched[decaying] + 2**shift - 1) >> shift",
    "(touched[decaying] >> shift) + 1",
    compared="touch_strengths",
)


@law(
    num_rows=st.sampled_from((1, 5, 300)),
    data=st.data(),
    rejects=[
        SMALL_STRENGTHS_STAY,
        STRENGTHS_HALVE_UPWARDS,
        mutant(
            "hits_count_once", "+ gain * counts)", "+ gain * counts.clamp(max=1))", compared="touch_strengths"
        ),
        mutant(
            "strengths_wrap",
            "(touched[named] + gain * counts).clamp(max=STRENGTH_MAX)",
            "(touched[named] + gain * counts)",
            compared="touch_strengths",
        ),
        mutant("unused_slots_gain", "rows[rows >= 0].unique(", "rows.unique(", compared="touch_strengths"),
        mutant(
            "all_strengths_decay",
            "torch.arange(window, device=strengths.device)",
            "torch.arange(strengths.numel(), device=strengths.device)",
            compared="touch_strengths",
        ),
        mutant(
            "decay_stops_at_the_end",
            "decaying = (first + torch.arange(window, device=strengths.device)) % strengths.numel()",
            "decaying = (first % strengths.numel() + torch.arange(window)).clamp(max=strengths.numel() - 1).unique()",
            compared="touch_strengths",
        ),
        mutant(
            "named_rows_do_not_decay",
            "    touched[decaying] -= ",
            "    decaying = decaying[~torch.isin(decaying, rows)]\n    touched[decaying] -= ",
            compared="touch_strengths",
        ),
    ],
)
def test_touch_strengths_one_by_one(ops: Subject, num_rows: int, data: st.DataObject) -> None:
    """First each row of the window falls, then each naming raises a row. Every other row keeps its byte."""
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


@law(
    num_rows=st.sampled_from((5, 300)),
    data=st.data(),
    rejects=[
        mutant(
            "later_rows_gain_more",
            "rows[rows >= 0].unique(return_counts=True)",
            "rows[rows >= 0].unique_consecutive(return_counts=True)",
            compared="touch_strengths",
        ),
    ],
)
def test_touch_strengths_ignore_the_order(ops: Subject, num_rows: int, data: st.DataObject) -> None:
    strengths, rows = data.draw(strength_tables(num_rows)), data.draw(named_rows(num_rows)).flatten()
    rule = data.draw(touches(num_rows))
    order = torch.randperm(rows.numel(), generator=ss.generator(data.draw(ss.GENERATOR_SEEDS)))
    exact(ops.touch_strengths(strengths, rows, **rule), ops.touch_strengths(strengths, rows[order], **rule))


@law(
    shift=st.integers(0, 7),
    start=st.sampled_from((1, 2, 64, STRENGTH_MAX)),
    rejects=[SMALL_STRENGTHS_STAY, STRENGTHS_HALVE_UPWARDS],
)
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


@law(
    num_rows=st.sampled_from((5, 300)),
    data=st.data(),
    rejects=[
        mutant(
            "out_keeps_the_rest",
            "result if out is None else out.copy_(result)",
            "result if out is None else out.copy_(torch.where(result == strengths, out, result))",
            compared="touch_strengths",
        ),
    ],
)
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


# --- what is refused -------------------------------------------------------------------------------------------------


I64 = torch.int64
_NGRAM = {"order": 2, "num_rows": 5, "salt": 0}
_TOUCH = {"gain": 8, "first": 0, "window": 2, "shift": 2}
_CODES = ones(2, 3, dtype=I64)
_TABLE = ones(4, dtype=I8)


# fmt: off
test_refusals_of_memory = refusals(
    "memory",
    refused("ngram_rows", "int32 codes", TypeError, "codes_BP", ones(2, 3, dtype=torch.int32), **_NGRAM),
    refused("ngram_rows", "one dimension", ValueError, "codes_BP", ids(1, 2), **_NGRAM),
    refused("ngram_rows", "code -2", ValueError, "codes_BP", lambda: torch.full((2, 3), -2), **_NGRAM),
    refused("ngram_rows", "code 2**32", ValueError, "codes_BP", lambda: torch.full((2, 3), 2**32), **_NGRAM),
    refused("ngram_rows", "order 0", ValueError, "order", _CODES, **{**_NGRAM, "order": 0}),
    refused("ngram_rows", "order 17", ValueError, "order", _CODES, **{**_NGRAM, "order": 17}),
    refused("ngram_rows", "order 2.0", TypeError, "order", _CODES, **{**_NGRAM, "order": 2.0}),
    refused("ngram_rows", "no rows", ValueError, "num_rows", _CODES, **{**_NGRAM, "num_rows": 0}),
    refused("ngram_rows", "2**31 rows", ValueError, "num_rows", _CODES, **{**_NGRAM, "num_rows": 2**31}),
    refused("ngram_rows", "salt -1", ValueError, "salt", _CODES, **{**_NGRAM, "salt": -1}),
    refused("ngram_rows", "salt 2**32", ValueError, "salt", _CODES, **{**_NGRAM, "salt": 2**32}),
    refused("ngram_rows", "two previous for order 2", ValueError, "previous", _CODES, **_NGRAM, previous=ones(2, 2, dtype=I64)),
    refused("ngram_rows", "previous of another batch", ValueError, "previous", _CODES, **_NGRAM, previous=ones(1, 1, dtype=I64)),
    refused("ngram_rows", "int32 previous", TypeError, "previous", _CODES, **_NGRAM, previous=ones(2, 1, dtype=torch.int32)),
    refused("ngram_rows", "previous elsewhere", ValueError, "previous", _CODES, **_NGRAM, previous=meta(2, 1, dtype=I64)),
    refused("ngram_rows", "previous code -2", ValueError, "previous", _CODES, **_NGRAM, previous=lambda: torch.full((2, 1), -2)),
    refused("touch_strengths", "int16 strengths", TypeError, "strengths", ones(4, dtype=torch.int16), ids(0), **_TOUCH),
    refused("touch_strengths", "two dimensions", ValueError, "strengths", ones(2, 2, dtype=I8), ids(0), **_TOUCH),
    refused("touch_strengths", "no strengths", ValueError, "strengths", ones(0, dtype=I8), ids(), **{**_TOUCH, "window": 0}),
    refused("touch_strengths", "int32 rows", TypeError, "rows", _TABLE, ones(2, dtype=torch.int32), **_TOUCH),
    refused("touch_strengths", "row N", ValueError, "rows", _TABLE, ids(4), **_TOUCH),
    refused("touch_strengths", "row -2", ValueError, "rows", _TABLE, ids(-2), **_TOUCH),
    refused("touch_strengths", "rows elsewhere", ValueError, "rows", _TABLE, meta(2, dtype=I64), **_TOUCH),
    refused("touch_strengths", "gain -1", ValueError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": -1}),
    refused("touch_strengths", "gain 128", ValueError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": 128}),
    refused("touch_strengths", "gain 1.0", TypeError, "gain", _TABLE, ids(0), **{**_TOUCH, "gain": 1.0}),
    refused("touch_strengths", "shift 8", ValueError, "shift", _TABLE, ids(0), **{**_TOUCH, "shift": 8}),
    refused("touch_strengths", "window 5 of 4", ValueError, "window", _TABLE, ids(0), **{**_TOUCH, "window": 5}),
    refused("touch_strengths", "first -1", ValueError, "first", _TABLE, ids(0), **{**_TOUCH, "first": -1}),
    refused("touch_strengths", "first tensor -1", ValueError, "first", _TABLE, ids(0), **{**_TOUCH, "first": scalar(-1)}),
    refused("touch_strengths", "another out", ValueError, "out", _TABLE, ids(0), **_TOUCH, out=ones(3, dtype=I8)),
    refused("touch_strengths", "int16 out", TypeError, "out", _TABLE, ids(0), **_TOUCH, out=ones(4, dtype=torch.int16)),
    refused("touch_strengths", "out elsewhere", ValueError, "out", _TABLE, ids(0), **_TOUCH, out=meta(4, dtype=I8)),
    rejects=[
        mutant("ngram_order_unchecked", "checks.ngrams(codes_BP, order, num_rows, salt, previous)", "pass"),
        mutant(
            "touched_rows_unchecked",
            'checks.values_between("rows", rows, -1, strengths.numel() - 1)',
            "pass"
        ),
    ],
)
# fmt: on
