"""Laws of the codebook: the nearest code by fractions, candidates by hand, counters and revival one row at a time.

Legend: N codes, C code width, Q vectors, M candidates of a vector, R vectors of a batch, s sign bits.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from arbitor.reference.constants import MAX_CODE_DIM, RESERVED_STEP, USAGE_MAX
from arbitor.reference.ops import codebook as reference_codebook
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight
from conformance import oracle
from conformance import strategies as ss
from conformance.cases.codebook import (
    candidate_lists,
    codebooks,
    sign_bit_counts,
    usages,
    vectors,
    windows,
)
from conformance.compare import exact
from conformance.law import law
from conformance.subject import Subject


def sixteenths(row: list[float]) -> list[int]:
    """Return a vector in whole sixteenths, one element at a time."""
    whole = []
    for value in row:
        if math.isnan(value):
            whole.append(0)
        else:
            whole.append(round(min(max(16 * value, -127.0), 127.0)))  # Python rounds half to even
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


@law(weight=codebooks(limit=17), data=st.data())
def test_nearest_codes_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """The code of the least score, and of equal ones the first: each score a fraction, one code at a time."""
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
)
def test_nearest_codes_keep_the_last_bit(ops: Subject, last: int, query: int, rest: int, place: int) -> None:
    """Sums as large as they come, told apart by the smallest unit: one trit of the least scale against one sixteenth."""
    trits = torch.full((300, MAX_CODE_DIM), rest, dtype=torch.int8)
    trits[:, 120:] = 0
    trits[:, -1] = -query
    trits[place, -1] = last
    levels = torch.full((300, 11), 2, dtype=torch.int8)
    levels[:, -1] = -5
    z = torch.full((1, MAX_CODE_DIM), 127 / 16)
    z[:, -1] = query / 16
    want = 0 if last == -query else place  # the product with the last column is worth more than its square
    exact(ops.nearest_codes(z, weight_of_trits(trits, levels)), torch.tensor([want]))


@law(num_codes=st.sampled_from((7, 130, 1100)), period=st.integers(1, 6), data=st.data())
def test_nearest_codes_lowest_on_ties(ops: Subject, num_codes: int, period: int, data: st.DataObject) -> None:
    """Every code again and again: the first of the equal ones is found, however far apart they are."""
    few = data.draw(ss.weights((period, 5), levels=(-3, 1), mantissa=False))
    rows = torch.arange(num_codes) % period
    many = weight_of_trits(trits_of(few)[rows], few.exponents[rows], few.group_size)
    z = data.draw(vectors(5, shape=(4,)))
    exact(ops.nearest_codes(z, many), ops.nearest_codes(z, few))


@law(weight=codebooks(), data=st.data())
def test_nearest_codes_shift_with_zero_rows(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Codes of zeros put before a table move its ids, unless zero is as near: splits and tiles leave no trace."""
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


@law(weight=codebooks(), data=st.data())
def test_nearest_candidates_of_all_codes(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """With every code among the candidates the search is exact, whatever their order, repetition and unused slots."""
    z = data.draw(vectors(weight.shape[1], shape=(3,), code=dequantize(weight)))
    rng = ss.generator(data.draw(ss.GENERATOR_SEEDS))
    extra = torch.randint(-1, weight.shape[0], (5,), generator=rng)
    every = torch.cat([torch.arange(weight.shape[0]), extra])
    candidates = torch.stack([every[torch.randperm(every.numel(), generator=rng)] for _ in range(3)])
    exact(ops.nearest_candidates(z, weight, candidates), ops.nearest_codes(z, weight))


@law(weight=codebooks(limit=17), data=st.data())
def test_nearest_candidates_by_fractions(ops: Subject, weight: TernaryWeight, data: st.DataObject) -> None:
    """Of the codes named, the one of least score, the lowest on ties; -1 where none is named."""
    z = data.draw(vectors(weight.shape[1], shape=(3,), code=dequantize(weight)))
    candidates = data.draw(candidate_lists((3,), weight.shape[0]))
    trits, want = rows_of_trits(weight), []
    for row, named in zip(z.to(torch.float64).tolist(), candidates.tolist(), strict=True):
        codes = sorted({code for code in named if code >= 0})
        scores = [score(sixteenths(row), weight, trits, code) for code in codes]
        want.append(codes[scores.index(min(scores))] if codes else -1)
    exact(ops.nearest_candidates(z, weight, candidates), torch.tensor(want))


@law(num_codes=st.integers(1, 200), width=st.integers(1, 20), data=st.data())
def test_candidate_codes_by_hand(ops: Subject, num_codes: int, width: int, data: st.DataObject) -> None:
    """Buckets one after the other: that of the signs, then those with the columns flipped that are nearest to 0."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    probes = data.draw(st.integers(1, min(2**sign_bits, 12)), label="probes")
    z = data.draw(vectors(width, shape=(2,)))
    found = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=probes)
    weigh = lambda ranks: sum(rank + 1 for rank in range(sign_bits) if ranks >> rank & 1)  # noqa: E731
    sets = sorted(range(2**sign_bits), key=lambda ranks: (weigh(ranks), ranks))[:probes]
    size, want = -(-num_codes // 2**sign_bits), []
    for row in z.to(torch.float64).tolist():
        z_q, slots = sixteenths(row), []
        order = sorted(range(sign_bits), key=lambda column: (abs(z_q[column]), column))
        for ranks in sets:
            flipped = {order[rank] for rank in range(sign_bits) if ranks >> rank & 1}
            number = sum(1 << c for c in range(sign_bits) if (z_q[c] > 0) != (c in flipped))
            codes = [code for code in range(num_codes) if code * 2**sign_bits // num_codes == number]
            slots += codes + [-1] * (size - len(codes))
        want.append(slots)
    exact(found, torch.tensor(want))


@law(num_codes=st.integers(1, 150), width=st.integers(1, 20), data=st.data())
def test_candidate_codes_of_every_bucket(
    ops: Subject, num_codes: int, width: int, data: st.DataObject
) -> None:
    sign_bits = min(data.draw(sign_bit_counts(num_codes, width)), 4)
    z = data.draw(vectors(width, shape=(2,)))
    found = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=2**sign_bits)
    for row in found.tolist():
        assert sorted(code for code in row if code >= 0) == list(range(num_codes))


@law(num_codes=st.integers(1, 20), width=st.integers(1, 30), size=ss.GROUPS, seed=ss.SEEDS, data=st.data())
def test_initial_codebook_by_scalar_philox(
    ops: Subject, num_codes: int, width: int, size: int, seed: int, data: st.DataObject
) -> None:
    """Signs of the bucket in the first columns, the trits of an initial weight in the others, exponents and counts 0."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    weight = ops.initial_codebook(
        (num_codes, width), sign_bits=sign_bits, seed=seed, tensor_id=3, group_size=size
    )
    groups, want = -(-width // size), []
    for code in range(num_codes):
        bucket, row = code * 2**sign_bits // num_codes, []
        for column in range(width):
            group = code * groups + column // size
            byte = oracle.dither(group, size, seed, RESERVED_STEP, 3)[column % size]
            random = -1 if byte < 79 else 1 if byte >= 177 else 0
            row.append((1 if bucket >> column & 1 else -1) if column < sign_bits else random)
        want.append(row)
    exact(trits_of(weight), torch.tensor(want, dtype=torch.int8))
    assert not any(tensor.any() for name, tensor in weight.tensors().items() if name != "packed")


@law(
    share=0.5, num_codes=st.integers(1, 20), width=st.sampled_from((7, 16, 33)), seed=ss.SEEDS, data=st.data()
)
def test_initial_codebook_is_found(
    ops: Subject, num_codes: int, width: int, seed: int, data: st.DataObject
) -> None:
    """A code is among the candidates that its own vector names with one probe, and an equal one is the nearest."""
    sign_bits = data.draw(sign_bit_counts(num_codes, width))
    weight = ops.initial_codebook((num_codes, width), sign_bits=sign_bits, seed=seed, tensor_id=0)
    code = data.draw(st.integers(0, num_codes - 1))
    z = dequantize(weight)[code : code + 1]
    candidates = ops.candidate_codes(z, num_codes=num_codes, sign_bits=sign_bits, num_probes=1)
    assert code in candidates.tolist()[0]
    found = int(ops.nearest_candidates(z, weight, candidates))
    assert found <= code and torch.equal(trits_of(weight)[found], trits_of(weight)[code])


@law(num_codes=st.sampled_from((1, 5, 40)), count=st.sampled_from((0, 1, 33, 300)), data=st.data())
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


@law(weight=codebooks(limit=64), data=st.data())
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


@law(weight=codebooks(limit=64), clock=ss.clocks())
def test_revive_codes_from_no_vectors(ops: Subject, weight: TernaryWeight, clock: dict[str, Any]) -> None:
    usage = torch.zeros(weight.shape[0], dtype=torch.int16)
    none = torch.zeros(0, weight.shape[1])
    exact(ops.revive_codes(weight, usage, none, first=0, window=weight.shape[0], **clock), weight)


@law(num_codes=st.sampled_from((1, 5, 40)), data=st.data())
def test_age_codes_one_by_one(ops: Subject, num_codes: int, data: st.DataObject) -> None:
    """Counters of the window: 0, of a code just revived, becomes 1; the others halve."""
    usage, window = data.draw(usages(num_codes)), data.draw(windows(num_codes))
    want = usage.tolist()
    for place in range(window["window"]):
        code = (int(window["first"]) + place) % num_codes
        want[code] = want[code] // 2 if want[code] else 1
    exact(ops.age_codes(usage, **window), torch.tensor(want, dtype=torch.int16))


def test_the_reference_searches_in_chunks_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of many equal rows, searched a few rows and a few vectors at a time: the same ids."""
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
