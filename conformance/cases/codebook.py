"""Calls to compare of the family codebook.

Legend: N codes, C code width, Q vectors, M candidates of a vector, s sign bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.constants import MAX_CODE_DIM, USAGE_MAX
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.ops.scale import dequantize
from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.case import Case
from conformance.cases.core import with_out

LEVELS = (-9, 6)
"""Exponents of drawn codes: beyond both ends of what the search sees."""

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
    else:  # scores that differ in their last bits alone: what a search in few bits takes for ties
        trits, exponents = trits_of(weight)[:1].repeat(count, 1), weight.exponents[:1].repeat(count, 1)
        places = (torch.arange(count), torch.arange(count) % width)
        trits[places] = (trits[places] + 2) % 3 - 1
    counts = {name: weight.tensors()[name] for name in ("trit_accum", "exponent_accum")}
    return weight_of_trits(trits, exponents, weight.group_size).with_tensors(**counts)


@st.composite
def vectors(
    draw: st.DrawFn, width: int, *, shape: tuple[int, ...] | None = None, code: Tensor | None = None
) -> Tensor:
    """Draw vectors to search for: real ones, halves of sixteenths, the code itself; with NaN and infinities."""
    if shape is None:
        shape = draw(st.sampled_from(((), (0,), (1,), (2, 3), (17,), (65,))), label="vectors")
    seed = draw(ss.GENERATOR_SEEDS)
    kind = draw(
        st.sampled_from(("normal", "wild", "halves", *(("codes",) if code is not None else ()))), label="kind"
    )
    if kind == "halves":  # 7.5 sixteenths and its multiples: ties of rint, of columns and of codes
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


@st.composite
def initial_codebook(draw: st.DrawFn) -> Case:
    width = draw(st.sampled_from(WIDTHS))
    num_codes = draw(st.sampled_from((1, 2, 5, 65) if width <= 16 else (1, 3, 17)))
    clock = {"seed": draw(ss.SEEDS), "tensor_id": draw(ss.TENSOR_IDS), "group_size": draw(ss.GROUPS)}
    return Case(((num_codes, width),), {"sign_bits": draw(sign_bit_counts(num_codes, width)), **clock})


@st.composite
def nearest_codes(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    return Case((draw(vectors(weight.shape[1], code=dequantize(weight))), weight))


@st.composite
def candidate_codes(draw: st.DrawFn) -> Case:
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


@st.composite
def nearest_candidates(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    shape = draw(st.sampled_from(((), (0,), (1,), (2, 3), (17,))))
    z = draw(vectors(weight.shape[1], shape=shape, code=dequantize(weight)))
    return Case((z, weight, draw(candidate_lists(shape, weight.shape[0]))))


@st.composite
def usages(draw: st.DrawFn, num_codes: int) -> Tensor:
    """Draw counters, many of them 0, some full."""
    rng = ss.generator(draw(ss.GENERATOR_SEEDS))
    counts = torch.tensor([0, 0, 0, 1, 2, 3, 100, USAGE_MAX - 1, USAGE_MAX], dtype=torch.int16)
    return counts[torch.randint(len(counts), (num_codes,), generator=rng)]


def with_usage_out(draw: st.DrawFn, usage: Tensor, kwargs: dict[str, Any]) -> None:
    """Draw whether the result goes to new counters, into others, or into the counters themselves."""
    kind = draw(st.sampled_from(("new", "other", "itself")), label="out")
    if kind != "new":
        kwargs["out"] = usage if kind == "itself" else torch.full_like(usage, 7)


@st.composite
def count_codes(draw: st.DrawFn) -> Case:
    num_codes = draw(st.sampled_from((1, 5, 300)))
    usage, kwargs = draw(usages(num_codes)), {}
    shape = draw(st.sampled_from(((), (0,), (1,), (3, 11), (300,))))
    ids = torch.randint(-1, num_codes, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    with_usage_out(draw, usage, kwargs)
    return Case((usage, ids // draw(st.sampled_from((1, 3)), label="duplicates")), kwargs)


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


@st.composite
def revive_codes(draw: st.DrawFn) -> Case:
    weight = draw(codebooks())
    count = draw(st.sampled_from((0, 1, 2, 40)))
    z = draw(vectors(weight.shape[1], shape=(count,)))
    kwargs = {
        **draw(windows(weight.shape[0])),
        **draw(ss.clocks()),
        "sign_bits": draw(sign_bit_counts(*weight.shape)),
    }
    with_out(draw, weight, kwargs)
    return Case((weight, draw(usages(weight.shape[0])), z), kwargs)


@st.composite
def age_codes(draw: st.DrawFn) -> Case:
    usage = draw(usages(draw(st.sampled_from((1, 5, 300)))))
    kwargs = draw(windows(usage.numel()))
    with_usage_out(draw, usage, kwargs)
    return Case((usage,), kwargs)


CASES: dict[str, SearchStrategy[Case]] = {
    "initial_codebook": initial_codebook(),
    "nearest_codes": nearest_codes(),
    "candidate_codes": candidate_codes(),
    "nearest_candidates": nearest_candidates(),
    "count_codes": count_codes(),
    "revive_codes": revive_codes(),
    "age_codes": age_codes(),
}
"""Calls to compare, by op."""

MAGNITUDES: dict[str, Callable[..., Any]] = {}
"""Sums of absolute terms of the ops that subtract."""
