"""What implementations are fed: hypothesis strategies in three tiers.

dense   every element drawn, nothing filled in (`fill=nothing()`, or nearly all would be one value); small, shrinks well
bytes   raw bytes, read as packed words
seeded  drawn shape and seed, filled by a generator, then extremes planted at tile edges; any size

Legend: N rows, K columns, G columns a group, KG groups a row, M activation rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from arbitor.reference.constants import (
    ACCUM_MAX,
    GROUP_SIZES,
    MANTISSA_BITS,
    groups_per_row,
    level_range,
    packed_bytes,
)
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight

from . import oracle

DENSE_LIMIT = 4096
"""Most elements of a dense draw. Hypothesis gives up above 4,096."""

TILES = (16, 32, 64, 128)
"""Block sizes that kernels use: their edges are where kernels break."""

EDGES = sorted({1, 2, 3, 5, 11, 12, 13} | {size + d for size in TILES for d in (-1, 0, 1)})
"""Sizes worth trying, ascending: smaller ones shrink better."""


@dataclass
class Limits:
    """How large drawn tensors may be: a kernel in the interpreter takes a millisecond a tile."""

    size: int = 130
    elements: int = 6000

    def set_for(self, kind: str) -> None:
        """Choose the limits of a device: `interpreter`, `torch` or `cuda`."""
        chosen = {"interpreter": (130, 4000), "torch": (130, 6000), "cuda": (600, 200_000)}
        self.size, self.elements = chosen[kind]


LIMITS = Limits()
"""The limits of this run."""

SEEDS = st.one_of(st.sampled_from((0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)), st.integers(0, 2**64 - 1))
STEPS = st.one_of(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 2)), st.integers(0, 2**32 - 2))
TENSOR_IDS = st.one_of(st.sampled_from((0, 1, 2**31, 2**32 - 1)), st.integers(0, 2**32 - 1))
GROUPS = st.one_of(st.just(12), st.sampled_from(GROUP_SIZES))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
RATES = st.one_of(
    st.sampled_from((0.0, 2.0**-9, 0.1, 0.5, 1.0, 1.25, 3.0, 127.0)), st.floats(0.0, 127.0, width=32)
)
GENERATOR_SEEDS = st.integers(0, 2**31 - 1)


def sizes(limit: int | None = None) -> st.SearchStrategy[int]:
    """Draw a size: an edge of a tile, or beyond the interpreter anything below the limit."""
    most = LIMITS.size if limit is None else min(limit, LIMITS.size)
    edges = st.sampled_from([size for size in EDGES if size <= most])
    return st.one_of(edges, st.integers(1, most)) if most > EDGES[-1] + 1 else edges


@st.composite
def matrix_shapes(draw: st.DrawFn, limit: int | None = None) -> tuple[int, int]:
    """Draw (N, K) within the element limit. One row, and one column, are often drawn."""
    num_columns = draw(st.deferred(lambda: sizes(limit)), label="K")
    most = max(1, min(limit or LIMITS.size, LIMITS.elements // num_columns))
    return draw(st.deferred(lambda: sizes(most)), label="N"), num_columns


def gradient_shapes() -> st.SearchStrategy[tuple[int, int]]:
    """Draw the shape of a gradient, sometimes of no rows: what a batch leaves to a table that it did not read."""
    return st.one_of(matrix_shapes(), st.tuples(st.just(0), st.deferred(sizes)))


@st.composite
def leading(draw: st.DrawFn, *, empty: bool = True) -> tuple[int, ...]:
    """Draw leading dimensions of activations: M rows at tile edges, none, several, or an empty batch."""
    several = st.sampled_from(((), (2, 3), (3, 1, 2), *(((0,), (2, 0)) if empty else ())))
    return draw(st.one_of(st.tuples(st.deferred(lambda: sizes(70))), several), label="leading")


def generator(seed: int) -> torch.Generator:
    """Return torch's generator at a seed."""
    return torch.Generator().manual_seed(seed)


def plant(values: Tensor, extremes: list[float], rng: torch.Generator) -> Tensor:
    """Write extremes into the last column of each tile, the last row, and a few places of a matrix."""
    num_rows, num_columns = values.shape
    edges = {num_columns - 1, 0} | {edge for size in TILES for edge in (size - 1, size) if edge < num_columns}
    for index, column in enumerate(sorted(edges)):
        row = int(torch.randint(num_rows, (), generator=rng))
        values[row, column] = extremes[index % len(extremes)]
    values[-1, -1] = extremes[int(torch.randint(len(extremes), (), generator=rng))]
    return values


@st.composite
def skewed_ids(draw: st.DrawFn, first: int = 0) -> Tensor:
    """Draw ids from `first` on, shuffled, one in hundreds of places: once sorted, they start and end anywhere in a tile."""
    some = st.lists(st.sampled_from((0, 1, 2, 7, 63, 64, 65)), max_size=2)
    times = [*draw(some), draw(st.sampled_from((128, 191, 192, 300))), *draw(some)]
    ids = torch.arange(first, first + len(times)).repeat_interleave(torch.tensor(times))
    return ids[torch.randperm(len(ids), generator=generator(draw(GENERATOR_SEEDS)))]


@st.composite
def trit_tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Draw int8 trits of a shape, in one of the three tiers."""
    count = int(np.prod(shape, dtype=np.int64))
    tier = draw(
        st.sampled_from(("dense", "bytes", "seeded") if count <= DENSE_LIMIT // 4 else ("seeded",)),
        label="tier",
    )
    if tier == "dense":
        values = draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1), fill=st.nothing()))
        return torch.from_numpy(values)
    if tier == "bytes":
        raw = draw(st.binary(min_size=packed_bytes(count), max_size=packed_bytes(count)))
        return torch.tensor(oracle.unpack([byte % 243 for byte in raw], count), dtype=torch.int8).reshape(
            shape
        )
    rng = generator(draw(GENERATOR_SEEDS))
    density = draw(st.sampled_from((0.0, 0.1, 0.62, 1.0)), label="density")
    nonzero = torch.rand(shape, generator=rng) < density
    signs = torch.randint(0, 2, shape, generator=rng) * 2 - 1
    return (nonzero * signs).to(torch.int8)


NARROW = (-6, 1)
"""Levels of exact cases: 4 bits of activation, 8 of range and 10 of count stay within float32's 24. With a mantissa, the levels
span fewer octaves by as many bits as it adds."""


@st.composite
def weights(
    draw: st.DrawFn,
    shape: tuple[int, int] | None = None,
    *,
    limit: int | None = None,
    levels: tuple[int, int] | None = None,
    mantissa: bool = True,
    theta: int = 16,
) -> TernaryWeight:
    """Draw a weight with full accumulators. `levels` narrows the exponents, for sums that must be exact."""
    num_rows, num_columns = draw(matrix_shapes(limit)) if shape is None else shape
    group_size = draw(GROUPS, label="G")
    bits = draw(st.sampled_from(MANTISSA_BITS), label="mantissa bits") if mantissa else 0
    groups = groups_per_row(num_columns, group_size)
    rng = generator(draw(GENERATOR_SEEDS))
    low, high = levels or level_range(bits)
    exponents = torch.randint(low, high + 1, (num_rows, groups), generator=rng).to(torch.float32)
    exponent_accum = torch.randint(-ACCUM_MAX, ACCUM_MAX + 1, (num_rows, groups), generator=rng).to(
        torch.float32
    )
    trit_accum = torch.randint(-ACCUM_MAX, ACCUM_MAX + 1, (num_rows, num_columns), generator=rng).to(
        torch.float32
    )
    counts = [127, -127, theta, -theta, theta - 1, 1 - theta, 126, -126]
    weight = weight_of_trits(
        draw(trit_tensors((num_rows, num_columns))),
        plant(exponents, [low, high], rng).to(torch.int8),
        group_size,
        mantissa_bits=bits,
    )
    return weight.with_tensors(
        trit_accum=plant(trit_accum, counts, rng).to(torch.int8),
        exponent_accum=plant(exponent_accum, counts, rng).to(torch.int8),
    )


def with_out(draw: st.DrawFn, weight: TernaryWeight, kwargs: dict[str, Any]) -> None:
    """Draw whether the result goes to a new weight, into another one, or into the weight itself."""
    kind = draw(st.sampled_from(("new", "other", "itself")), label="out")
    if kind != "new":
        kwargs["out"] = weight if kind == "itself" else of_ones(weight)


def with_out_of_all(draw: st.DrawFn, weights: tuple[TernaryWeight, ...], kwargs: dict[str, Any]) -> None:
    """Draw whether the results go to new weights, into others, or into the weights themselves."""
    kind = draw(st.sampled_from(("new", "others", "themselves")), label="out")
    if kind != "new":
        kwargs["out"] = weights if kind == "themselves" else tuple(map(of_ones, weights))


def of_ones(weight: TernaryWeight) -> TernaryWeight:
    """Return a weight like another one, all of whose tensors are filled with 1."""
    made = weight.clone()
    for tensor in made.tensors().values():
        tensor.fill_(1)
    return made


LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
"""How a float input lies in memory: `offset` starts one element late, so that wide loads are misaligned."""


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout. `expanded` repeats the first row with stride 0."""
    if values.ndim < 2 or layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return values[:1].clone().expand(values.shape)
    step = 2 if layout == "strided" else 1
    room = torch.full((*values.shape[:-1], step * values.shape[-1] + 3), float("nan")).to(values.dtype)
    view = room[..., 1 : 1 + step * values.shape[-1] : step]
    view.copy_(values)
    return view


def float_values(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Return float32 values of a kind, from a seed."""
    rng = generator(seed)
    normal = torch.randn(shape, generator=rng)
    if kind == "normal":
        return normal
    if kind == "small integers":
        return torch.randint(-8, 9, shape, generator=rng).to(torch.float32)
    # These values reach down into the subnormals.
    if kind == "tiny":
        return normal * 1e-40
    # These values are as small as a product with another float may be.
    if kind == "faint":
        return normal * 1e-30
    if kind == "huge":
        return normal * 1e30
    # Every term of a sum has one sign.
    if kind == "constant":
        return torch.full(shape, float(normal.flatten()[0]) if normal.numel() else 1.0)
    # Every row has another magnitude, and zeros of both signs.
    assert kind == "wild", kind
    rows = (*shape[:-1], 1) if shape else ()
    magnitude = torch.randint(-50, 51, rows, generator=rng).to(torch.float32)
    sparse = torch.where(torch.rand(shape, generator=rng) < 0.1, normal.sign() * 0.0, normal)
    return torch.ldexp(sparse, magnitude)


@st.composite
def activations(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, exact: bool, kinds: tuple[str, ...] = ()
) -> Tensor:
    """Draw activations or their gradients. `exact` draws small integers times one power of two, whose sums are exact."""
    real = kinds or ("normal", "wild", "tiny", "huge", "constant")
    kind = "small integers" if exact else draw(st.sampled_from(real), label="kind")
    values = float_values(shape, kind, draw(GENERATOR_SEEDS))
    if exact:
        values = values * 2.0 ** draw(st.integers(-10, 10), label="power")
    layout = draw(st.sampled_from(LAYOUTS), label="layout")
    return lay_out(values.to(dtype), layout)


GRADIENT_KINDS = ("normal", "wild", "tiny", "huge", "ties", "spikes", "boundary", "constant")


@st.composite
def gradients(
    draw: st.DrawFn, shape: tuple[int, int], *, faults: bool = True, kinds: tuple[str, ...] = GRADIENT_KINDS
) -> Tensor:
    """Draw a weight gradient to vote with: rounding ties, saturating spikes, rows of zeros, infinities and NaNs."""
    kind = draw(st.sampled_from(kinds), label="kind")
    seed = draw(GENERATOR_SEEDS)
    rng = generator(seed + 1)
    num_rows, num_columns = shape
    # With small integers and a rate such as 2**-9, q falls halfway between integers.
    if kind == "ties":
        values = float_values(shape, "small integers", seed)
    elif kind == "spikes":
        # One element carries its row, so that it saturates.
        values = float_values(shape, "normal", seed) * 1e-3
        values[torch.arange(num_rows), torch.randint(num_columns, (num_rows,), generator=rng)] = 1000.0
    elif kind == "boundary":
        # Half ones and half zeros have a mean square of exactly 1/2, where V changes.
        values = (torch.arange(num_columns) % 2 == 0).to(torch.float32).expand(shape).clone()
        values *= torch.randint(0, 2, shape, generator=rng) * 2 - 1
    else:
        values = float_values(shape, kind, seed)
    if faults and num_rows:
        for value in (0.0, float("nan"), float("inf"), float("-inf")):
            if draw(st.booleans(), label=f"row of {value}"):
                target = int(torch.randint(num_rows, (), generator=rng))
                if value == 0.0:
                    values[target] = draw(st.sampled_from((0.0, -0.0)), label="zero")
                else:
                    values[target, int(torch.randint(num_columns, (), generator=rng))] = value
    dtype = draw(DTYPES, label="dtype")
    return lay_out(values.to(dtype), draw(st.sampled_from(LAYOUTS), label="layout"))


@st.composite
def vote_tensors(draw: st.DrawFn, shape: tuple[int, int]) -> Tensor:
    """Draw int8 votes: full range, all at one rail, or small, with extremes at tile edges."""
    rng = generator(draw(GENERATOR_SEEDS))
    kind = draw(st.sampled_from(("full", "small", "most", "least", "none")), label="votes")
    if kind in ("most", "least", "none"):
        value = {"most": ACCUM_MAX, "least": -ACCUM_MAX, "none": 0}[kind]
        return torch.full(shape, value, dtype=torch.int8)
    bound = ACCUM_MAX if kind == "full" else 3
    values = torch.randint(-bound, bound + 1, shape, generator=rng).to(torch.float32)
    return plant(values, [127, -127], rng).to(torch.int8)


@st.composite
def row_choices(draw: st.DrawFn, num_rows: int, *, slots: bool = True) -> Tensor:
    """Draw unique row ids in any order, some slots of -1 among them."""
    rows = draw(st.lists(st.integers(0, num_rows - 1), unique=True, max_size=min(num_rows, 20)), label="rows")
    unused = draw(st.integers(0, 2), label="unused slots") if slots else 0
    order = draw(st.permutations(rows + [-1] * unused))
    return torch.tensor(order, dtype=torch.int64)


@st.composite
def clocks(draw: st.DrawFn) -> dict[str, Any]:
    """Draw dither coordinates, with the step as an integer or as a 0-dim tensor."""
    step: int | Tensor = draw(STEPS, label="step")
    if draw(st.booleans(), label="step as a tensor"):
        step = torch.tensor(step)
    return {"seed": draw(SEEDS, label="seed"), "step": step, "tensor_id": draw(TENSOR_IDS, label="tensor id")}


@st.composite
def rates(draw: st.DrawFn) -> float | Tensor:
    """Draw a vote rate, as a number or as a 0-dim float32 tensor."""
    rate = draw(RATES, label="rate")
    return torch.tensor(rate, dtype=torch.float32) if draw(st.booleans(), label="rate as a tensor") else rate
