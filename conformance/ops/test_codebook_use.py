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

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ids, meta, ones, refusals, refused, scalar, weight
from ..subject import Subject
from .test_codebook import codebooks, rows_of_trits, sign_bit_counts, sixteenths, vectors
from .test_codebook_buckets import BUCKET_SIGNS_REVERSED

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


def drawn_ids(draw: st.DrawFn, low: int, high: int, count: int) -> Tensor:
    """Draw int64 [count] from `low` to `high`."""
    return torch.randint(low, high + 1, (count,), generator=ss.generator(draw(ss.GENERATOR_SEEDS)))


@calls("revival_vectors")
def revival_vectors_calls(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    num_codes, width = weight.shape
    count = draw(st.sampled_from((0, 1, 2, 40)))
    # A vector that comes twice has equal gains.
    z = draw(vectors(width, shape=(count,)))[: count // draw(st.sampled_from((1, 2)))].repeat(2, 1)[:count]
    # Few codes have many vectors each.
    ids = drawn_ids(draw, -1, draw(st.sampled_from((0, num_codes - 1))), z.shape[0])
    return Case((z, weight, ids, draw(usages(num_codes))), draw(windows(num_codes)))


@calls("revive_codes")
def revive_codes_calls(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    count, at = draw(st.sampled_from((0, 1, 2, 40))), draw(windows(weight.shape[0]))
    z = draw(vectors(weight.shape[1], shape=(count,)))
    chosen = drawn_ids(draw, -1, count - 1, at.pop("window"))
    kwargs = {**at, "sign_bits": draw(sign_bit_counts(*weight.shape))}
    ss.with_out(draw, weight, kwargs)
    return Case((weight, z, chosen), kwargs)


@calls("age_codes")
def age_codes_calls(draw: st.DrawFn) -> Case:
    usage = draw(usages(draw(st.sampled_from((1, 5, 300)))))
    kwargs = draw(windows(usage.numel()))
    chosen = drawn_ids(draw, -1, 2, kwargs.pop("window"))
    with_usage_out(draw, usage, kwargs)
    return Case((usage, chosen), kwargs)


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
            "distances_of_vectors_that_are_not_rounded",
            "z_q = whole_sixteenths(z_RC).to(torch.float64)",
            "z_q = z_RC.nan_to_num().clamp(-8, 8).to(torch.float64) * 16",
            compared="revival_vectors",
        ),
        mutant(
            "vectors_without_a_gain",
            "farthest & (gains_R[by_code] > 0)",
            "farthest & (gains_R[by_code] >= 0)",
            compared="revival_vectors",
        ),
        mutant(
            "vectors_without_a_code",
            "torch.where(ids_R >= 0, own_R - made_R, 0.0)",
            "own_R - made_R",
            compared="revival_vectors",
        ),
        mutant(
            "several_vectors_of_a_code",
            "chosen = by_code[farthest & (gains_R[by_code] > 0)]",
            "chosen = by_code[gains_R[by_code] > 0]",
            compared="revival_vectors",
        ),
        mutant(
            "the_nearest_vector_of_a_code",
            "by_gain = gains_R.sort(descending=True, stable=True)",
            "by_gain = gains_R.where(gains_R > 0, torch.inf).sort(stable=True)",
            compared="revival_vectors",
        ),
        mutant(
            "vectors_in_order_of_codes",
            "    chosen = chosen[gains_R[chosen].sort(descending=True, stable=True).indices]\n",
            "",
            compared="revival_vectors",
        ),
        mutant(
            "codes_in_use_revived",
            "dead = (usage[rows] == 0)",
            "dead = (usage[rows] <= 1)",
            compared="revival_vectors",
        ),
        mutant(
            "window_stops_at_the_end",
            "rows = (first + torch.arange(window, device=usage.device)) % usage.numel()",
            "rows = (first % usage.numel() + torch.arange(window, device=usage.device)).clamp(max=usage.numel() - 1)",
            compared="revival_vectors",
        ),
    ],
)
def test_revival_vectors_one_by_one(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """In whole numbers: unused codes take turns to choose the vector that would gain most by a code of its own."""
    case = data.draw(revival_vectors_case(weight))
    z, _, ids, usage = case.args
    table = code_rows(weight)
    gains: dict[int, tuple[int, int]] = {}
    for place, (row, code) in enumerate(zip(z.to(torch.float64).tolist(), ids.tolist(), strict=True)):
        z_q = sixteenths(row)
        made = [32 * ((value > 7) - (value < -7)) for value in z_q]
        gain = 0 if code < 0 else distance(z_q, table[code]) - distance(z_q, made)
        if gain > gains.get(code, (0, 0))[0]:
            gains[code] = gain, place
    order = sorted(gains, key=lambda code: (-gains[code][0], code))
    waiting, want = [gains[code][1] for code in order], []
    for place in range(case.kwargs["window"]):
        dead = usage[(int(case.kwargs["first"]) + place) % len(usage)] == 0
        want.append(waiting.pop(0) if dead and waiting else -1)
    exact(ops.revival_vectors(*case.args, **case.kwargs), torch.tensor(want, dtype=torch.int64))


@st.composite
def revival_vectors_case(draw: st.DrawFn, weight: TernaryWeight) -> Case:
    """Draw a call of `revival_vectors` on a table."""
    num_codes, width = weight.shape
    count = draw(st.sampled_from((0, 1, 9, 33)))
    z = draw(vectors(width, shape=(count,)))[: (count + 1) // 2].repeat(2, 1)[:count]
    ids = drawn_ids(draw, -1, num_codes - 1, count)
    return Case((z, weight, ids, draw(usages(num_codes))), draw(windows(num_codes)))


def code_rows(weight: TernaryWeight) -> list[list[int]]:
    """Return the codes as a search sees them, in units of 2**-5."""
    exponents = weight.exponents.clamp(-5, 2).to(torch.int64) + 5
    return [
        [trit << int(levels[column // weight.group_size]) for column, trit in enumerate(trits)]
        for trits, levels in zip(rows_of_trits(weight), exponents, strict=True)
    ]


def distance(z_q: list[int], code: list[int]) -> int:
    """Return |z - code|**2 in units of 2**-10, for z in sixteenths and a code in units of 2**-5."""
    return sum((2 * z - c) ** 2 for z, c in zip(z_q, code, strict=True))


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
            "revived_window_stops_at_the_end",
            "rows = (first + torch.arange(vectors.numel(), device=vectors.device)) % num_codes",
            "rows = (first % num_codes + torch.arange(vectors.numel(), device=vectors.device)).clamp(max=num_codes - 1)",
            compared="revive_codes",
        ),
        mutant(
            "the_first_vector_is_none",
            "revived = rows[vectors >= 0]",
            "vectors = vectors.where(vectors > 0, -1)\n    revived = rows[vectors >= 0]",
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
            "    for tensor in tensors.values():\n        tensor[revived] = 0\n",
            '    tensors["exponents"][revived] = 0\n',
            compared="revive_codes",
        ),
        mutant(
            "buckets_forgotten_at_revival",
            "new[:, :sign_bits] = bucket_signs(revived, num_codes, sign_bits)",
            "pass",
            compared="revive_codes",
        ),
    ],
)
def test_revive_codes_one_by_one(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """One code of the window at a time: those without a vector stay, the others become their vector."""
    num_codes, width = weight.shape
    count = data.draw(st.sampled_from((1, 2, 40)))
    z = data.draw(vectors(width, shape=(count,)))
    at = data.draw(windows(num_codes))
    rng = ss.generator(data.draw(ss.GENERATOR_SEEDS))
    chosen = torch.randint(-1, count, (at.pop("window"),), generator=rng)
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    trits = torch.tensor(rows_of_trits(weight), dtype=torch.int8)
    want = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    for place, vector in enumerate(chosen.tolist()):
        if vector < 0:
            continue
        code = (int(at["first"]) + place) % num_codes
        z_q = sixteenths(z[vector].to(torch.float64).tolist())
        bucket = code * 2**sign_bits // num_codes
        signs = [1 if bucket >> column & 1 else -1 for column in range(sign_bits)]
        row = signs + [(value > 7) - (value < -7) for value in z_q][sign_bits:]
        trits[code] = torch.tensor(row, dtype=torch.int8)
        for name in ("exponents", "trit_accum", "exponent_accum"):
            want[name][code] = 0
    want["packed"] = torch.tensor(oracle.pack(trits.flatten().tolist()), dtype=torch.uint8)
    exact(ops.revive_codes(weight, z, chosen, **at, sign_bits=sign_bits), weight.with_tensors(**want))


@law(
    num_codes=st.sampled_from((1, 5, 40)),
    data=st.data(),
    rejects=[
        mutant(
            "revived_codes_stay_at_0",
            "torch.where(vectors >= 0, 1, usage[rows] >> 1)",
            "usage[rows] >> 1",
            compared="age_codes",
        ),
        mutant(
            "codes_that_wait_are_forgotten",
            "torch.where(vectors >= 0, 1, usage[rows] >> 1)",
            "torch.where((vectors >= 0) | (usage[rows] == 0), 1, usage[rows] >> 1)",
            compared="age_codes",
        ),
        mutant(
            "use_is_not_forgotten",
            "torch.where(vectors >= 0, 1, usage[rows] >> 1)",
            "torch.where(vectors >= 0, 1, usage[rows])",
            compared="age_codes",
        ),
        mutant("all_counters_age", "aged = usage.clone()", "aged = usage >> 1", compared="age_codes"),
    ],
)
def test_age_codes_one_by_one(ops: Subject, num_codes: int, data: st.DataObject) -> None:
    """Counters of the window: of a code just revived it becomes 1; the others halve, and 0 stays 0."""
    usage, at = data.draw(usages(num_codes)), data.draw(windows(num_codes))
    rng = ss.generator(data.draw(ss.GENERATOR_SEEDS))
    chosen = torch.randint(-1, 2, (at.pop("window"),), generator=rng)
    want = usage.tolist()
    for place, vector in enumerate(chosen.tolist()):
        code = (int(at["first"]) + place) % num_codes
        want[code] = 1 if vector >= 0 else want[code] // 2
    exact(ops.age_codes(usage, chosen, **at), torch.tensor(want, dtype=torch.int16))


# --- what is refused -------------------------------------------------------------------------------------------------


_WINDOW = {"first": 0, "window": 2}
_AT = {"first": 0}


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
    refused("revival_vectors", "129 columns", ValueError, "weight", ones(2, 129), wide, ids(0, 0), counts(2), **_WINDOW),
    refused("revival_vectors", "mantissa bits", ValueError,
            "weight or mantissa_bits", ones(2, 14), with_mantissa, ids(0, 0), counts(), **_WINDOW),
    refused("revival_vectors", "counters of 4", ValueError, "usage", ones(2, 14), weight, ids(0, 0), counts(4), **_WINDOW),
    refused("revival_vectors", "int8 counters", TypeError,
            "usage", ones(2, 14), weight, ids(0, 0), counts(3, torch.int8), **_WINDOW),
    refused("revival_vectors", "13 columns", ValueError, "z_RC", ones(2, 13), weight, ids(0, 0), counts(), **_WINDOW),
    refused("revival_vectors", "three dimensions", ValueError, "z_RC", ones(1, 2, 14), weight, ids(0), counts(), **_WINDOW),
    refused("revival_vectors", "float16", TypeError, "z_RC", ones(2, 14, dtype=F16), weight, ids(0, 0), counts(), **_WINDOW),
    refused("revival_vectors", "three ids", ValueError, "ids_R", ones(2, 14), weight, ids(0, 0, 0), counts(), **_WINDOW),
    refused("revival_vectors", "int32 ids", TypeError,
            "ids_R", ones(2, 14), weight, ones(2, dtype=torch.int32), counts(), **_WINDOW),
    refused("revival_vectors", "id N", ValueError, "ids_R", ones(2, 14), weight, ids(0, 3), counts(), **_WINDOW),
    refused("revival_vectors", "another device", ValueError, "z_RC", meta(2, 14), weight, ids(0, 0), counts(), **_WINDOW),
    refused("revival_vectors", "a window of 4", ValueError,
            "window", ones(2, 14), weight, ids(0, 0), counts(), first=0, window=4),
    refused("revival_vectors", "first -1", ValueError,
            "first", ones(2, 14), weight, ids(0, 0), counts(), first=-1, window=2),
    refused("revival_vectors", "first tensor -1", ValueError,
            "first", ones(2, 14), weight, ids(0, 0), counts(), first=scalar(-1), window=2),
    refused("revive_codes", "129 columns", ValueError, "weight", wide, ones(2, 129), ids(0), **_AT),
    refused("revive_codes", "mantissa bits", ValueError, "weight or mantissa_bits", with_mantissa, ones(2, 14), ids(0), **_AT),
    refused("revive_codes", "13 columns", ValueError, "z_RC", weight, ones(2, 13), ids(0), **_AT),
    refused("revive_codes", "three dimensions", ValueError, "z_RC", weight, ones(1, 2, 14), ids(0), **_AT),
    refused("revive_codes", "float16", TypeError, "z_RC", weight, ones(2, 14, dtype=F16), ids(0), **_AT),
    refused("revive_codes", "another device", ValueError, "z_RC", weight, meta(2, 14), ids(0), **_AT),
    refused("revive_codes", "vectors of 4", ValueError, "vectors", weight, ones(2, 14), ids(0, 0, 0, 0), **_AT),
    refused("revive_codes", "int32 vectors", TypeError, "vectors", weight, ones(2, 14), ones(2, dtype=torch.int32), **_AT),
    refused("revive_codes", "vector R", ValueError, "vectors", weight, ones(2, 14), ids(2), **_AT),
    refused("revive_codes", "vector -2", ValueError, "vectors", weight, ones(2, 14), ids(-2), **_AT),
    refused("revive_codes", "first -1", ValueError, "first", weight, ones(2, 14), ids(0), first=-1),
    refused("revive_codes", "first tensor -1", ValueError, "first", weight, ones(2, 14), ids(0), first=scalar(-1)),
    refused("revive_codes", "more buckets than codes", ValueError,
            "sign_bits", weight, ones(2, 14), ids(0), **_AT, sign_bits=2),
    refused("revive_codes", "out of another shape", ValueError,
            "out", weight, ones(2, 14), ids(0), **_AT, out=lambda: weight(4)),
    refused("age_codes", "int32 counters", TypeError, "usage", counts(3, torch.int32), ids(0), **_AT),
    refused("age_codes", "vectors of 4", ValueError, "vectors", counts(), ids(0, 0, 0, 0), **_AT),
    refused("age_codes", "two dimensions", ValueError, "vectors", counts(), ones(1, 1, dtype=torch.int64), **_AT),
    refused("age_codes", "int32 vectors", TypeError, "vectors", counts(), ones(2, dtype=torch.int32), **_AT),
    refused("age_codes", "another device", ValueError, "vectors", counts(), meta(2, dtype=torch.int64), **_AT),
    refused("age_codes", "first 0.5", TypeError, "first", counts(), ids(0), first=0.5),
    refused("age_codes", "first of two", ValueError, "first", counts(), ids(0), first=ids(0, 1)),
    refused("age_codes", "out of 4", ValueError, "out", counts(), ids(0), **_AT, out=counts(4)),
    rejects=[
        mutant("count_ids_unchecked", 'checks.values_between("ids", ids, -1, usage.numel() - 1)', "pass"),
        mutant("window_unchecked", "checks.code_window(weight.shape[0], first, window)", "pass"),
        mutant("revivals_unchecked", "checks.revivals(usage.numel(), first, vectors)", "pass"),
        mutant("vectors_unchecked", 'checks.values_between("vectors", vectors, -1, z_RC.shape[0] - 1)', "pass"),
    ],
)
# fmt: on
