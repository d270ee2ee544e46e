"""How codes are used: counters one at a time, codes that nobody chose revived, counters that age.

Legend: N codes, C code width, R vectors of a batch, s sign bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import USAGE_MAX
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.case import Case, calls
from conformance.compare import exact
from conformance.law import law
from conformance.mutant import mutants_of
from conformance.ops.test_codebook import (
    BUCKET_SIGNS_REVERSED,
    codebooks,
    rows_of_trits,
    sign_bit_counts,
    sixteenths,
    vectors,
)
from conformance.refusal import CLOCK, F16, ids, meta, ones, refusals, refused, scalar, weight
from conformance.subject import Subject

mutant = mutants_of("codebook")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def usages(draw: st.DrawFn, num_codes: int) -> Tensor:
    """Draw counters, many of them 0, some full."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    counts = torch.tensor([0, 0, 0, 1, 2, 3, 100, USAGE_MAX - 1, USAGE_MAX], dtype=torch.int16)
    return counts[torch.randint(len(counts), (num_codes,), generator=rng)]


@st.composite
def windows(draw: st.DrawFn, num_codes: int) -> dict[str, Any]:
    """Draw a window: from the first code on, across the end, the whole table, nothing; the start as a tensor too."""
    if num_codes > 1 and draw(st.booleans(), label="across the end"):
        first = draw(st.integers(1, num_codes - 1), label="first")
        window = draw(st.integers(num_codes - first + 1, num_codes), label="window")
    else:
        starts = st.one_of(st.sampled_from((0, num_codes - 1, 10**15)), st.integers(0, 3 * num_codes))
        first = draw(starts, label="first")
        window = draw(
            st.one_of(st.sampled_from((0, 1, num_codes)), st.integers(0, num_codes)), label="window"
        )
    as_tensor = draw(st.booleans(), label="first as a tensor")
    return {"first": torch.tensor(first) if as_tensor else first, "window": window}


def with_usage_out(draw: st.DrawFn, usage: Tensor, kwargs: dict[str, Any]) -> None:
    """Draw whether the result goes to new counters, into others, or into the counters themselves."""
    kind = draw(st.sampled_from(("new", "other", "itself")), label="out")
    if kind != "new":
        kwargs["out"] = usage if kind == "itself" else torch.full_like(usage, 7)


@calls("count_codes")
def count_codes_calls(draw: st.DrawFn) -> Case:
    num_codes = draw(st.sampled_from((1, 5, 300)))
    usage, kwargs = draw(usages(num_codes)), {}
    shape = draw(st.sampled_from(((), (0,), (1,), (3, 11), (300,))))
    ids = torch.randint(-1, num_codes, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    with_usage_out(draw, usage, kwargs)
    return Case((usage, ids // draw(st.sampled_from((1, 3)), label="duplicates")), kwargs)


@calls("revive_codes")
def revive_codes_calls(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    count = draw(st.sampled_from((0, 1, 2, 40)))
    z = draw(vectors(weight.shape[1], shape=(count,)))
    kwargs = {
        **draw(windows(weight.shape[0])),
        **draw(ss.clocks()),
        "sign_bits": draw(sign_bit_counts(*weight.shape)),
    }
    ss.with_out(draw, weight, kwargs)
    return Case((weight, draw(usages(weight.shape[0])), z), kwargs)


@calls("age_codes")
def age_codes_calls(draw: st.DrawFn) -> Case:
    usage = draw(usages(draw(st.sampled_from((1, 5, 300)))))
    kwargs = draw(windows(usage.numel()))
    with_usage_out(draw, usage, kwargs)
    return Case((usage,), kwargs)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


@law(
    num_codes=st.sampled_from((1, 5, 40)),
    count=st.sampled_from((0, 1, 33, 300)),
    data=st.data(),
    rejects=[
        mutant(
            "duplicates_count_once",
            "counted[used] + counts)",
            "counted[used] + counts.clamp(max=1))",
            compared="count_codes",
        ),
        mutant(
            "counters_wrap",
            ".clamp(max=USAGE_MAX).to(torch.int16)",
            ".to(torch.int16)",
            compared="count_codes",
        ),
        mutant("unused_slots_count", "ids[ids >= 0].unique(", "ids.unique(", compared="count_codes"),
    ],
)
def test_count_codes_one_by_one(ops: Subject, num_codes: int, count: int, data: st.DataObject) -> None:
    """Each id adds 1 until the counter is full; -1 counts nowhere, and no other counter moves."""
    usage = data.draw(usages(num_codes))
    rng = ss.generator(data.draw(ss.GENERATOR_SEEDS))
    ids = torch.randint(-1, num_codes, (count,), generator=rng)
    want = usage.tolist()
    for code in ids.tolist():
        if code >= 0:
            want[code] = min(want[code] + 1, USAGE_MAX)
    exact(ops.count_codes(usage, ids), torch.tensor(want, dtype=torch.int16))


@law(
    weight=codebooks(limit=64),
    data=st.data(),
    rejects=[
        mutant(
            "search_rounds_up",
            ".clamp(-QUERY_MAX, QUERY_MAX).round()",
            ".clamp(-QUERY_MAX, QUERY_MAX).add(0.5).floor()",
            compared=("candidate_codes", "revive_codes"),
        ),
        BUCKET_SIGNS_REVERSED,
        mutant(
            "window_stops_at_the_end",
            "rows = (first + torch.arange(window, device=usage.device)) % num_codes",
            "rows = (first % num_codes + torch.arange(window, device=usage.device)).clamp(max=num_codes - 1).unique()",
            compared="revive_codes",
        ),
        mutant(
            "codes_in_use_revived",
            "rows[(usage[rows] == 0)",
            "rows[(usage[rows] <= 1)",
            compared="revive_codes",
        ),
        mutant(
            "draws_of_the_dither",
            "torch.full_like(dead, REVIVAL_BLOCK)",
            "torch.zeros_like(dead)",
            compared="revive_codes",
        ),
        mutant(
            "draws_by_remainder",
            "(word * num_vectors) >> 32]",
            "word % num_vectors]",
            compared="revive_codes",
        ),
        mutant(
            "draws_from_the_first_half",
            "(word * num_vectors) >> 32]",
            "(word * num_vectors) >> 33]",
            compared="revive_codes",
        ),
        mutant(
            "a_half_is_too_little",
            "z_q.abs() >= ALIVE_QUERY",
            "z_q.abs() > ALIVE_QUERY",
            compared="revive_codes",
        ),
        mutant(
            "counts_survive_revival",
            "    for tensor in tensors.values():\n        tensor[dead] = 0\n",
            '    tensors["exponents"][dead] = 0\n',
            compared="revive_codes",
        ),
        mutant(
            "buckets_forgotten_at_revival",
            "new[:, :sign_bits] = bucket_signs(dead, num_codes, sign_bits)",
            "pass",
            compared="revive_codes",
        ),
    ],
)
def test_revive_codes_by_scalar_philox(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """One code of the window at a time: those in use stay, the others become the vector that Philox draws."""
    num_codes, width = weight.shape
    usage, count = data.draw(usages(num_codes)), data.draw(st.sampled_from((1, 2, 40)))
    z = data.draw(vectors(width, shape=(count,)))
    window, clock = data.draw(windows(num_codes)), data.draw(ss.clocks())
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    trits = torch.tensor(rows_of_trits(weight), dtype=torch.int8)
    want = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    key = (clock["seed"] & oracle.WORD, clock["seed"] >> 32)
    for place in range(window["window"]):
        code = (int(window["first"]) + place) % num_codes
        if usage[code]:
            continue
        draw = oracle.philox((code, 255, int(clock["step"]), clock["tensor_id"]), key)[0]
        z_q = sixteenths(z[draw * count // 2**32].to(torch.float64).tolist())
        bucket = code * 2**sign_bits // num_codes
        signs = [1 if bucket >> column & 1 else -1 for column in range(sign_bits)]
        row = signs + [(value > 7) - (value < -7) for value in z_q][sign_bits:]
        trits[code] = torch.tensor(row, dtype=torch.int8)
        for name in ("exponents", "trit_accum", "exponent_accum"):
            want[name][code] = 0
    want["packed"] = torch.tensor(oracle.pack(trits.flatten().tolist()), dtype=torch.uint8)
    got = ops.revive_codes(weight, usage, z, **window, **clock, sign_bits=sign_bits)
    exact(got, weight.with_tensors(**want))


@law(
    weight=codebooks(limit=64),
    clock=ss.clocks(),
    rejects=[
        mutant(
            "revived_from_nothing",
            "dead = rows[(usage[rows] == 0) & (num_vectors > 0)]",
            "dead = rows[usage[rows] == 0]\n    z_RC = z_RC if num_vectors else z_RC.new_zeros(1, z_RC.shape[1])",
            compared="revive_codes",
        ),
    ],
)
def test_revive_codes_from_no_vectors(ops: Subject, weight: TernaryWeight, clock: dict[str, Any]) -> None:
    usage = torch.zeros(weight.shape[0], dtype=torch.int16)
    none = torch.zeros(0, weight.shape[1])
    exact(ops.revive_codes(weight, usage, none, first=0, window=weight.shape[0], **clock), weight)


@law(
    num_codes=st.sampled_from((1, 5, 40)),
    data=st.data(),
    rejects=[
        mutant(
            "revived_codes_stay_at_0",
            "torch.where(usage[rows] == 0, 1, usage[rows] >> 1)",
            "usage[rows] >> 1",
            compared="age_codes",
        ),
        mutant(
            "use_is_not_forgotten",
            "torch.where(usage[rows] == 0, 1, usage[rows] >> 1)",
            "torch.where(usage[rows] == 0, 1, usage[rows])",
            compared="age_codes",
        ),
        mutant("all_counters_age", "aged = usage.clone()", "aged = usage >> 1", compared="age_codes"),
    ],
)
def test_age_codes_one_by_one(ops: Subject, num_codes: int, data: st.DataObject) -> None:
    """Counters of the window: 0, of a code just revived, becomes 1; the others halve."""
    usage, window = data.draw(usages(num_codes)), data.draw(windows(num_codes))
    want = usage.tolist()
    for place in range(window["window"]):
        code = (int(window["first"]) + place) % num_codes
        want[code] = want[code] // 2 if want[code] else 1
    exact(ops.age_codes(usage, **window), torch.tensor(want, dtype=torch.int16))


# --- what is refused -------------------------------------------------------------------------------------------------


_WINDOW = {"first": 0, "window": 2}
_REVIVE = {**_WINDOW, **CLOCK}


def wide() -> TernaryWeight:
    """Return codes of 129 columns."""
    return weight(2, 129)


def with_mantissa() -> TernaryWeight:
    """Return codes with a mantissa bit."""
    return replace(weight(), mantissa_bits=1)


def counts(num_codes: int = 3, dtype: torch.dtype = torch.int16) -> Callable[[], torch.Tensor]:
    """Return a maker of counters of use."""
    return ones(num_codes, dtype=dtype)


# fmt: off
test_refusals_of_codebook_use = refusals(
    "codebook_use",
    refused("count_codes", "int32 counters", TypeError, "usage", counts(3, torch.int32), ids(0)),
    refused("count_codes", "no counters", ValueError, "usage", counts(0), ids()),
    refused("count_codes", "two dimensions", ValueError, "usage", ones(3, 1, dtype=torch.int16), ids(0)),
    refused("count_codes", "int32 ids", TypeError, "ids", counts(), ones(2, dtype=torch.int32)),
    refused("count_codes", "id N", ValueError, "ids", counts(), ids(3)),
    refused("count_codes", "id -2", ValueError, "ids", counts(), ids(-2)),
    refused("count_codes", "another device", ValueError, "ids", counts(), meta(2, dtype=torch.int64)),
    refused("count_codes", "out of 4", ValueError, "out", counts(), ids(0), out=counts(4)),
    refused("count_codes", "out int32", TypeError, "out", counts(), ids(0), out=counts(3, torch.int32)),
    refused("revive_codes", "129 columns", ValueError, "weight", wide, counts(2), ones(2, 129), **_REVIVE),
    refused("revive_codes", "mantissa bits", ValueError, "mantissa_bits", with_mantissa, counts(), ones(2, 14), **_REVIVE),
    refused("revive_codes", "counters of 4", ValueError, "usage", weight, counts(4), ones(2, 14), **_REVIVE),
    refused("revive_codes", "int8 counters", TypeError, "usage", weight, counts(3, torch.int8), ones(2, 14), **_REVIVE),
    refused("revive_codes", "13 columns", ValueError, "z_RC", weight, counts(), ones(2, 13), **_REVIVE),
    refused("revive_codes", "three dimensions", ValueError, "z_RC", weight, counts(), ones(1, 2, 14), **_REVIVE),
    refused("revive_codes", "float16", TypeError, "z_RC", weight, counts(), ones(2, 14, dtype=F16), **_REVIVE),
    refused("revive_codes", "another device", ValueError, "z_RC", weight, counts(), meta(2, 14), **_REVIVE),
    refused("revive_codes", "a window of 4", ValueError,
            "window", weight, counts(), ones(2, 14), **{**_REVIVE, "window": 4}),
    refused("revive_codes", "first -1", ValueError, "first", weight, counts(), ones(2, 14), **{**_REVIVE, "first": -1}),
    refused("revive_codes", "first tensor -1", ValueError,
            "first", weight, counts(), ones(2, 14), **{**_REVIVE, "first": scalar(-1)}),
    refused("revive_codes", "step 2**32 - 1", ValueError,
            "step", weight, counts(), ones(2, 14), **{**_REVIVE, "step": 2**32 - 1}),
    refused("revive_codes", "more buckets than codes", ValueError,
            "sign_bits", weight, counts(), ones(2, 14), **_REVIVE, sign_bits=2),
    refused("revive_codes", "out of another shape", ValueError,
            "out", weight, counts(), ones(2, 14), **_REVIVE, out=lambda: weight(4)),
    refused("age_codes", "int32 counters", TypeError, "usage", counts(3, torch.int32), **_WINDOW),
    refused("age_codes", "a window of -1", ValueError, "window", counts(), first=0, window=-1),
    refused("age_codes", "a window of 4", ValueError, "window", counts(), first=0, window=4),
    refused("age_codes", "first 0.5", TypeError, "first", counts(), first=0.5, window=1),
    refused("age_codes", "first of two", ValueError, "first", counts(), first=ids(0, 1), window=1),
    refused("age_codes", "out of 4", ValueError, "out", counts(), **_WINDOW, out=counts(4)),
    rejects=[
        mutant("count_ids_unchecked", 'checks.values_between("ids", ids, -1, usage.numel() - 1)', "pass"),
        mutant("window_unchecked", "checks.code_window(usage.numel(), first, window)", "pass"),
    ],
)
# fmt: on
