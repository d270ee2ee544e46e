"""Laws of the codebook: the nearest code by fractions, candidates by hand, counters and revival one row at a time.

Legend: N codes, C code width, Q vectors, M candidates of a vector, R vectors of a batch, s sign bits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from arbitor.reference.constants import GROUP_SIZES, MAX_CODE_DIM, groups_per_row
from arbitor.reference.ops import codebook as reference_codebook
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight

from .. import oracle
from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, ids, meta, ones, refusals, refused, weight
from ..subject import Subject

mutant = mutants_of("codebook")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


LEVELS = (-9, 6)
"""Exponents of drawn codes, beyond both ends of what the search sees."""


WIDTHS = (1, 5, 12, 13, 16, 33, 64, 65, MAX_CODE_DIM)
"""Code widths: short groups, words that are not full, the widest."""


@st.composite
def codebooks(draw: st.DrawFn, *, limit: int = 130) -> TernaryWeight:
    """Draw codes, sometimes with the same row many times, with rows of zeros, or with rows that are nearly equal."""
    width = draw(st.sampled_from(WIDTHS), label="C")
    most = max(1, min(limit, ss.LIMITS.elements // width))
    count = draw(st.sampled_from([n for n in (1, 2, 5, 17, 64, 130, 513) if n <= most]), label="N")
    weight = draw(ss.weights((count, width), levels=LEVELS, mantissa=False))
    kind = draw(st.sampled_from(("free", "repeated", "one trit apart")), label="rows")
    if kind == "free":
        return weight
    if kind == "repeated":
        rows = torch.arange(count) % draw(st.sampled_from((1, 3)), label="different rows")
        trits, exponents = trits_of(weight)[rows], weight.exponents[rows]
        if draw(st.booleans(), label="a row of zeros"):
            trits[rows == 0] = 0
    else:
        # These scores differ in their last bits alone. A search in few bits takes them for ties.
        trits, exponents = trits_of(weight)[:1].repeat(count, 1), weight.exponents[:1].repeat(count, 1)
        places = (torch.arange(count), torch.arange(count) % width)
        trits[places] = (trits[places] + 2) % 3 - 1
    counts = {name: weight.tensors()[name] for name in ("trit_accum", "exponent_accum")}
    return weight_of_trits(trits, exponents, weight.group_size).with_tensors(**counts)


@st.composite
def vectors(
    draw: st.DrawFn, width: int, *, shape: tuple[int, ...] | None = None, code: Tensor | None = None
) -> Tensor:
    """Draw vectors to search for: real ones, halves of sixteenths, or the code itself. NaN and infinities are among them."""
    if shape is None:
        shape = draw(st.sampled_from(((), (0,), (1,), (2, 3), (17,), (65,))), label="vectors")
    seed = draw(ss.GENERATOR_SEEDS)
    kind = draw(
        st.sampled_from(("normal", "wild", "halves", *(("codes",) if code is not None else ()))), label="kind"
    )
    # Multiples of 7.5 sixteenths make ties of rint, of columns and of codes.
    if kind == "halves":
        z = ss.float_values((*shape, width), "small integers", seed) * 15 / 32
    elif kind == "codes" and code is not None:
        rows = torch.randint(code.shape[0], shape, generator=ss.generator(seed))
        z = code[rows]
    else:
        z = 2 * ss.float_values((*shape, width), kind, seed)
    if z.numel() and draw(st.booleans(), label="not finite"):
        flat = z.reshape(-1)
        for place, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            flat[(place * 7) % flat.numel()] = value
    return ss.lay_out(z.to(draw(ss.DTYPES)), draw(st.sampled_from(ss.LAYOUTS), label="layout"))


@st.composite
def sign_bit_counts(draw: st.DrawFn, num_codes: int, width: int) -> int:
    """Draw a number of sign bits that a table has the columns and the codes for."""
    return draw(st.integers(0, min(width, num_codes.bit_length() - 1, 6)), label="sign bits")


@calls("initial_codebook")
def initial_codebook_calls(draw: st.DrawFn) -> Case:
    width = draw(st.sampled_from(WIDTHS))
    num_codes = draw(st.sampled_from((1, 2, 5, 65) if width <= 16 else (1, 3, 17)))
    clock = {"seed": draw(ss.SEEDS), "tensor_id": draw(ss.TENSOR_IDS), "group_size": draw(ss.GROUPS)}
    return Case(((num_codes, width),), {"sign_bits": draw(sign_bit_counts(num_codes, width)), **clock})


@calls("nearest_codes")
def nearest_codes_calls(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    return Case((draw(vectors(weight.shape[1], code=dequantize(weight))), weight))


@calls("candidate_codes")
def candidate_codes_calls(draw: st.DrawFn) -> Case:
    width, num_codes = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from((1, 2, 5, 64, 130, 10_000_019)))
    sign_bits = draw(sign_bit_counts(num_codes, width)) if num_codes < 1000 else min(width, 16)
    if num_codes // 2**sign_bits > 1000:
        num_codes = 2**sign_bits * 3 + 1
    probes = draw(st.integers(1, min(2**sign_bits, 9)), label="probes")
    shape = draw(st.sampled_from(((), (0,), (2, 3), (9,))))
    z = draw(vectors(width, shape=shape))
    return Case((z,), {"num_codes": num_codes, "sign_bits": sign_bits, "num_probes": probes})


@st.composite
def candidate_lists(draw: st.DrawFn, shape: tuple[int, ...], num_codes: int) -> Tensor:
    """Draw candidates of each vector: some twice, unused slots, none at all."""
    width = draw(st.sampled_from((0, 1, 9, 70)), label="M")
    low = draw(st.sampled_from((-1, -1, 0, -(num_codes + 1))), label="unused slots")
    ids = torch.randint(low, num_codes, (*shape, width), generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    if shape and shape[0] and draw(st.booleans(), label="a vector without candidates"):
        ids[0] = -1
    return ids.clamp(min=-1)


@calls("nearest_candidates")
def nearest_candidates_calls(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    shape = draw(st.sampled_from(((), (0,), (1,), (2, 3), (17,))))
    z = draw(vectors(weight.shape[1], shape=shape, code=dequantize(weight)))
    return Case((z, weight, draw(candidate_lists(shape, weight.shape[0]))))


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


def sixteenths(row: list[float]) -> list[int]:
    """Return a vector in whole sixteenths, one element at a time."""
    whole = []
    for value in row:
        if math.isnan(value):
            whole.append(0)
        else:
            # Python rounds half to even.
            whole.append(round(min(max(16 * value, -127.0), 127.0)))
    return whole


def score(z_q: list[int], weight: TernaryWeight, trits: list[list[int]], code: int) -> Fraction:
    """Return half of |c'|**2 minus z . c'."""
    total = Fraction(0)
    for column, trit in enumerate(trits[code]):
        level = int(weight.exponents[code, column // weight.group_size])
        value = trit * Fraction(2) ** min(max(level, -5), 2)
        total += value * value / 2 - Fraction(z_q[column], 16) * value
    return total


def rows_of_trits(weight: TernaryWeight) -> list[list[int]]:
    count, width = weight.shape
    flat = oracle.unpack(weight.packed.tolist(), count * width)
    return [flat[n * width : (n + 1) * width] for n in range(count)]


SEARCH_WITHOUT_THE_SQUARE = mutant(
    "search_without_the_square",
    "score_Qn = codes_nC.square().sum(dim=1) / 2 - ",
    "score_Qn = 0 - ",
    compared="nearest_codes",
)
SEARCH_TAKES_THE_LAST = mutant(
    "search_takes_the_last",
    "places, _NO_ID).amin(dim=1)",
    "places, -1).amax(dim=1)",
    compared="nearest_codes",
)
SEARCH_CLAMPS_NO_EXPONENTS = mutant(
    "search_clamps_no_exponents",
    "weight.exponents.clamp(CODE_EXPONENT_MIN, CODE_EXPONENT_MAX)",
    "weight.exponents.clamp(-32, 15)",
    compared=("nearest_codes", "nearest_candidates"),
)
A_SHORT_LAST_CHUNK_IS_LOST = mutant(
    "a_short_last_chunk_is_lost",
    "last = min(first + rows_at_a_time, weight.shape[0])",
    "last = max(first + 1, weight.shape[0] // 128 * 128)",
    compared="nearest_codes",
)


@law(
    weight=codebooks(limit=17),
    data=st.data(),
    rejects=[
        SEARCH_WITHOUT_THE_SQUARE,
        mutant(
            "search_by_the_whole_square",
            "score_Qn = codes_nC.square().sum(dim=1) / 2 - ",
            "score_Qn = codes_nC.square().sum(dim=1) - ",
            compared="nearest_codes",
        ),
        SEARCH_TAKES_THE_LAST,
        SEARCH_CLAMPS_NO_EXPONENTS,
        mutant(
            "search_clamps_no_vectors",
            ".clamp(-QUERY_MAX, QUERY_MAX).round()",
            ".clamp(-32768, 32767).round()",
            compared=("nearest_codes", "nearest_candidates"),
        ),
        A_SHORT_LAST_CHUNK_IS_LOST,
    ],
)
def test_nearest_codes_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """The op finds the code of the least score, and the first of equal codes, as fractions find it, one code at a time."""
    z = data.draw(vectors(weight.shape[1], shape=(3,), code=dequantize(weight)))
    trits, want = rows_of_trits(weight), []
    for row in z.to(torch.float64).tolist():
        scores = [score(sixteenths(row), weight, trits, code) for code in range(weight.shape[0])]
        want.append(scores.index(min(scores)))
    exact(ops.nearest_codes(z, weight), torch.tensor(want))


@law(
    share=0.5,
    last=st.integers(-1, 1),
    query=st.sampled_from((-1, 1)),
    rest=st.sampled_from((-1, 1)),
    place=st.sampled_from((0, 1, 200, 299)),
    rejects=[
        mutant(
            "search_in_bfloat16",
            "least = score_Qn.amin(dim=1)",
            "score_Qn = score_Qn.to(torch.bfloat16).to(torch.float32)\n        least = score_Qn.amin(dim=1)",
            compared="nearest_codes",
        ),
    ],
)
def test_nearest_codes_keep_the_last_bit(ops: Subject, last: int, query: int, rest: int, place: int) -> None:
    """The smallest unit tells the largest sums apart: one trit of the least scale against one sixteenth."""
    trits = torch.full((300, MAX_CODE_DIM), rest, dtype=torch.int8)
    trits[:, 120:] = 0
    trits[:, -1] = -query
    trits[place, -1] = last
    levels = torch.full((300, 11), 2, dtype=torch.int8)
    levels[:, -1] = -5
    z = torch.full((1, MAX_CODE_DIM), 127 / 16)
    z[:, -1] = query / 16
    # The product with the last column is worth more than its square.
    want = 0 if last == -query else place
    exact(ops.nearest_codes(z, weight_of_trits(trits, levels)), torch.tensor([want]))


@law(
    num_codes=st.sampled_from((7, 130, 1100)),
    period=st.integers(1, 6),
    data=st.data(),
    rejects=[
        SEARCH_TAKES_THE_LAST,
        mutant(
            "a_later_tile_wins_ties",
            "places, _NO_ID).amin(dim=1)",
            "places - places // 64 * 128, _NO_ID).amin(dim=1)\n        lowest = lowest % 64 * 2 - lowest",
            compared="nearest_codes",
        ),
    ],
)
def test_nearest_codes_lowest_on_ties(ops: Subject, num_codes: int, period: int, data: st.DataObject) -> None:
    """Every code occurs again and again. The first of the equal codes is found, however far apart they are."""
    few = data.draw(ss.weights((period, 5), levels=(-3, 1), mantissa=False))
    rows = torch.arange(num_codes) % period
    many = weight_of_trits(trits_of(few)[rows], few.exponents[rows], few.group_size)
    z = data.draw(vectors(5, shape=(4,)))
    exact(ops.nearest_codes(z, many), ops.nearest_codes(z, few))


@law(
    weight=codebooks(),
    data=st.data(),
    rejects=[SEARCH_WITHOUT_THE_SQUARE, A_SHORT_LAST_CHUNK_IS_LOST],
)
def test_nearest_codes_shift_with_zero_rows(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Codes of zeros put before a table move its ids, unless zero is as near. Parts and tiles leave no trace."""
    count, width = data.draw(st.sampled_from((1, 127, 200)), label="zero rows"), weight.shape[1]
    z = data.draw(vectors(width, shape=(3,), code=dequantize(weight)))
    padded = weight_of_trits(
        torch.cat([torch.zeros(count, width, dtype=torch.int8), trits_of(weight)]),
        torch.cat([torch.zeros(count, weight.exponents.shape[1], dtype=torch.int8), weight.exponents]),
        weight.group_size,
    )
    alone, found = ops.nearest_codes(z, weight).tolist(), ops.nearest_codes(z, padded).tolist()
    trits = rows_of_trits(weight)
    scores = [score(sixteenths(z[q].tolist()), weight, trits, alone[q]) for q in range(3)]
    assert found == [count + alone[q] if scores[q] < 0 else 0 for q in range(3)]


CANDIDATES_IN_THEIR_ORDER = mutant(
    "candidates_in_their_order",
    "lowest = torch.where(is_least, named_qM, _NO_ID).amin(dim=1)",
    "lowest = named_qM.gather(1, is_least.to(torch.int8).argmax(dim=1, keepdim=True)).squeeze(1)\n"
    "        lowest = torch.where(is_least.any(dim=1), lowest, _NO_ID)",
    compared="nearest_candidates",
)


@law(weight=codebooks(), data=st.data(), rejects=[CANDIDATES_IN_THEIR_ORDER])
def test_nearest_candidates_of_all_codes(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """With every code among the candidates the search is exact, whatever their order, repetition and unused slots."""
    z = data.draw(vectors(weight.shape[1], shape=(3,), code=dequantize(weight)))
    rng = ss.generator(data.draw(ss.GENERATOR_SEEDS))
    extra = torch.randint(-1, weight.shape[0], (5,), generator=rng)
    every = torch.cat([torch.arange(weight.shape[0]), extra])
    candidates = torch.stack([every[torch.randperm(every.numel(), generator=rng)] for _ in range(3)])
    exact(ops.nearest_candidates(z, weight, candidates), ops.nearest_codes(z, weight))


@law(
    weight=codebooks(limit=17),
    data=st.data(),
    rejects=[
        SEARCH_CLAMPS_NO_EXPONENTS,
        mutant(
            "unused_slots_are_code_0",
            "named_qM = named_QM[some]",
            "named_qM = named_QM[some].clamp(min=0)",
            compared="nearest_candidates",
        ),
        CANDIDATES_IN_THEIR_ORDER,
        mutant(
            "no_candidate_is_code_0",
            "torch.where(lowest == _NO_ID, -1, lowest)",
            "torch.where(lowest == _NO_ID, 0, lowest)",
            compared="nearest_candidates",
        ),
    ],
)
def test_nearest_candidates_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """The op finds the named code of least score, the lowest on ties, and -1 where none is named."""
    z = data.draw(vectors(weight.shape[1], shape=(3,), code=dequantize(weight)))
    candidates = data.draw(candidate_lists((3,), weight.shape[0]))
    trits, want = rows_of_trits(weight), []
    for row, named in zip(z.to(torch.float64).tolist(), candidates.tolist(), strict=True):
        codes = sorted({code for code in named if code >= 0})
        scores = [score(sixteenths(row), weight, trits, code) for code in codes]
        want.append(codes[scores.index(min(scores))] if codes else -1)
    exact(ops.nearest_candidates(z, weight, candidates), torch.tensor(want))


def test_the_reference_searches_in_chunks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of many equal rows, searched a few rows and a few vectors at a time, gives the same ids."""
    weight = reference_codebook.initial_codebook((90, 7), sign_bits=2, seed=1, tensor_id=0)
    z = torch.randn(11, 7, generator=ss.generator(1))
    candidates = torch.randint(-1, 90, (11, 20), generator=ss.generator(2))
    search = lambda: (  # noqa: E731
        reference_codebook.nearest_codes(z, weight),
        reference_codebook.nearest_candidates(z, weight, candidates),
    )
    whole = search()
    monkeypatch.setattr(reference_codebook, "_CHUNK", 300)
    exact(search(), whole)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_nearest_codes_count_the_square_of_every_group(subject: Subject, group_size: int) -> None:
    """Near half of a code the square of the code decides against a code of zeros, whichever group the code is in."""
    count = groups_per_row(100, group_size)
    group_of_column = torch.arange(100) // group_size
    trits = (group_of_column == torch.arange(count + 1)[:, None]).to(torch.int8)
    exponents = (torch.arange(count) % 3).to(torch.int8).expand(count + 1, count).contiguous()
    weight = weight_of_trits(trits, exponents, group_size)
    halves = dequantize(weight)[:count] / 2
    for more, wanted in ((1.0, torch.arange(count)), (-1.0, torch.full((count,), count))):
        exact(subject.nearest_codes(halves + more / 16 * trits[:count], weight), wanted)


# --- what is refused -------------------------------------------------------------------------------------------------


_START = {"sign_bits": 1, "seed": 0, "tensor_id": 0}
_SEARCH = {"num_codes": 8, "sign_bits": 2, "num_probes": 2}


def wide() -> TernaryWeight:
    """Return codes of 129 columns."""
    return weight(2, 129)


def with_mantissa() -> TernaryWeight:
    """Return codes with a mantissa bit."""
    return replace(weight(), mantissa_bits=1)


# fmt: off
test_refusals_of_codebook = refusals(
    "codebook",
    refused("initial_codebook", "129 columns", ValueError, "shape", (4, 129), **_START),
    refused("initial_codebook", "more sign bits than columns", ValueError, "sign_bits", (4, 1), **{**_START, "sign_bits": 2}),
    refused("initial_codebook", "more buckets than codes", ValueError, "sign_bits", (3, 9), **{**_START, "sign_bits": 2}),
    refused("initial_codebook", "group 7", ValueError, "group_size", (4, 9), **_START, group_size=7),
    refused("initial_codebook", "no device", ValueError, "device", (4, 9), **_START, device="here"),
    refused("initial_codebook", "no codes", ValueError, "shape", (0, 9), **_START),
    refused("initial_codebook", "2**33 groups", ValueError, "shape", (2**31, 48), **_START),
    refused("initial_codebook", "seed -1", ValueError, "seed", (4, 9), **{**_START, "seed": -1}),
    refused("nearest_codes", "129 columns", ValueError, "weight", ones(2, 129), wide),
    refused("nearest_codes", "mantissa bits", ValueError, "weight or mantissa_bits", ones(2, 14), with_mantissa),
    refused("nearest_codes", "13 columns", ValueError, "z", ones(2, 13), weight),
    refused("nearest_codes", "a scalar", ValueError, "z", ones(), weight),
    refused("nearest_codes", "float16", TypeError, "z", ones(2, 14, dtype=F16), weight),
    refused("nearest_codes", "another device", ValueError, "z", meta(2, 14), weight),
    refused("candidate_codes", "int64", TypeError, "z", ones(2, 9, dtype=torch.int64), **_SEARCH),
    refused("candidate_codes", "no columns", ValueError, "z", ones(2, 0), **_SEARCH),
    refused("candidate_codes", "no codes", ValueError, "num_codes", ones(2, 9), **{**_SEARCH, "num_codes": 0}),
    refused("candidate_codes", "more buckets than codes", ValueError, "sign_bits", ones(2, 9), **{**_SEARCH, "num_codes": 3}),
    refused("candidate_codes", "sign bits -1", ValueError, "sign_bits", ones(2, 9), **{**_SEARCH, "sign_bits": -1}),
    refused("candidate_codes", "no probes", ValueError, "num_probes", ones(2, 9), **{**_SEARCH, "num_probes": 0}),
    refused("candidate_codes", "5 probes of 4", ValueError, "num_probes", ones(2, 9), **{**_SEARCH, "num_probes": 5}),
    refused("nearest_candidates", "129 columns", ValueError, "weight", ones(1, 129), wide, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "mantissa bits", ValueError,
            "weight or mantissa_bits", ones(1, 14), with_mantissa, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "float16", TypeError, "z", ones(1, 14, dtype=F16), weight, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "int32", TypeError, "candidates", ones(1, 14), weight, ones(1, 2, dtype=torch.int32)),
    refused("nearest_candidates", "other vectors", ValueError,
            "candidates", ones(2, 14), weight, ones(1, 2, dtype=torch.int64)),
    refused("nearest_candidates", "one dimension", ValueError, "candidates", ones(2, 14), weight, ids(0, 1)),
    refused("nearest_candidates", "code N", ValueError, "candidates", ones(14), weight, ids(0, 3)),
    refused("nearest_candidates", "code -2", ValueError, "candidates", ones(14), weight, ids(0, -2)),
    refused("nearest_candidates", "another device", ValueError,
            "candidates", ones(1, 14), weight, meta(1, 2, dtype=torch.int64)),
    rejects=[
        mutant(
            "wide_codes_searched",
            "    checks.codebook(weight)\n    checks.last_dim(\"z\"",
            "    checks.last_dim(\"z\"",
            times=2
        ),
    ],
)
# fmt: on
