"""Calls to compare of the core's ops: packing to layout.

Legend: N rows, K columns, M activation rows, B batch, C channels, L length, J taps, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from arbitor.reference.constants import EXPONENT_MAX, EXPONENT_MIN, packed_bytes
from arbitor.reference.ops.scale import dequantize as dense
from arbitor.reference.types import TernaryWeight
from conformance import strategies as ss
from conformance.cases.case import Case


def magnitude_of_norm_input_grad(op: Callable[..., Any], case: Case) -> Tensor:
    """Return (|dy w| + |x^| mean |x^ dy w|) / rms, the terms of dx."""
    grad, x, weight = case.args
    grad, x = grad.to(torch.float64), x.to(torch.float64)
    rms = (x.square().mean(dim=-1, keepdim=True) + case.kwargs.get("eps", 1e-6)).sqrt()
    scaled, unit = (grad * dense(weight, dtype=torch.float64)[0]).abs(), (x / rms).abs()
    return (scaled + unit * (unit * scaled).mean(dim=-1, keepdim=True)) / rms


def magnitude_of_denoise(op: Callable[..., Any], case: Case) -> Tensor:
    """Return (|latent| + (1 - alpha) |pred|) / sqrt(alpha)."""
    latent, pred = (value.to(torch.float64).abs() for value in case.args)
    return op(latent, -pred, **case.kwargs)


MAGNITUDES: dict[str, Callable[..., Any]] = {
    "rms_norm_input_grad": magnitude_of_norm_input_grad,
    "denoise_step": magnitude_of_denoise,
}
"""Sums of absolute terms of the ops that subtract."""

NARROW = (-6, 1)
"""Levels of exact cases: 4 bits of activation, 8 of range and 10 of count stay within float32's 24. With a mantissa, the levels
span fewer octaves by as many bits as it adds."""


@st.composite
def pack_trits(draw: st.DrawFn) -> Case:
    shape = draw(
        st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 40)), st.just((3, 0)), st.just((2, 3, 4)))
    )
    trits = draw(ss.trit_tensors(shape))
    return Case((ss.lay_out(trits.float(), draw(st.sampled_from(ss.LAYOUTS[:4]))).to(torch.int8),))


@st.composite
def unpack_trits(draw: st.DrawFn) -> Case:
    shape = draw(st.one_of(ss.matrix_shapes(), st.tuples(st.integers(0, 40)), st.just((2, 3, 4))))
    count = math.prod(shape)
    raw = draw(st.binary(min_size=min(packed_bytes(count), 800), max_size=min(packed_bytes(count), 800)))
    packed = torch.tensor([byte % 243 for byte in raw], dtype=torch.uint8)
    packed = packed.repeat(-(-packed_bytes(count) // max(len(raw), 1)))[: packed_bytes(count)]
    return Case((packed, shape))


@st.composite
def dither_bytes(draw: st.DrawFn) -> Case:
    ids = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from((0, 2**31, 2**32 - 1)))
    shape = draw(st.sampled_from(((), (0,), (7,), (3, 5), (65,))))
    count = math.prod(shape)
    values = torch.tensor(draw(st.lists(ids, min_size=count, max_size=count)), dtype=torch.int64).reshape(
        shape
    )
    return Case((values,), {"group_size": draw(ss.GROUPS), **draw(ss.clocks())})


@st.composite
def group_scales(draw: st.DrawFn) -> Case:
    bits = draw(st.sampled_from((0, 1, 2)))
    levels = draw(st.lists(st.integers(-32 << bits, (16 << bits) - 1), max_size=70))
    return Case((torch.tensor(levels, dtype=torch.int8),), {"mantissa_bits": bits})


@st.composite
def dequantize(draw: st.DrawFn) -> Case:
    return Case((draw(ss.weights()),), {"dtype": draw(ss.DTYPES)})


@st.composite
def initial_weight(draw: st.DrawFn) -> Case:
    std = draw(st.one_of(st.sampled_from((1e-12, 0.02, 1.0, 1e6)), st.floats(1e-9, 1e4)))
    clock = {"seed": draw(ss.SEEDS), "tensor_id": draw(ss.TENSOR_IDS)}
    return Case((draw(ss.matrix_shapes()),), {"std": std, "group_size": draw(ss.GROUPS), **clock})


@st.composite
def constant_weight(draw: st.DrawFn) -> Case:
    exponent = draw(st.one_of(st.sampled_from((EXPONENT_MIN, 0, EXPONENT_MAX)), st.integers(-32, 15)))
    kwargs = {"trit": draw(st.integers(-1, 1)), "exponent": exponent, "group_size": draw(ss.GROUPS)}
    return Case((draw(ss.matrix_shapes()),), kwargs)


def gradient_shapes() -> SearchStrategy[tuple[int, int]]:
    """Draw the shape of a gradient, sometimes of no rows: what a batch leaves to a table that it did not read."""
    return st.one_of(ss.matrix_shapes(), st.tuples(st.just(0), st.deferred(ss.sizes)))


@st.composite
def gradient_only(draw: st.DrawFn) -> Case:
    return Case((draw(ss.gradients(draw(gradient_shapes()))),))


@st.composite
def stochastic_votes(draw: st.DrawFn) -> Case:
    shape = draw(gradient_shapes())
    kwargs = {"group_size": draw(ss.GROUPS), **draw(ss.clocks())}
    if draw(st.booleans(), label="rows"):
        rows = torch.randperm(3 * shape[0], generator=ss.generator(draw(ss.GENERATOR_SEEDS)))[: shape[0]]
        kwargs["rows"] = torch.where(rows == 0, -1, rows)
    return Case((draw(ss.gradients(shape)), draw(ss.rates())), kwargs)


@st.composite
def sign_votes(draw: st.DrawFn) -> Case:
    step_size = draw(st.one_of(st.sampled_from((1, 127)), st.integers(1, 127)))
    return Case((draw(ss.gradients(draw(gradient_shapes()))), step_size))


@st.composite
def step_from_loss(draw: st.DrawFn) -> Case:
    loss = draw(st.one_of(st.sampled_from((0.0, 1e-9, 5.6937, 1e9)), st.floats(0.0, 12.0)))
    return Case(
        (loss, draw(st.sampled_from((5.545177444479562, 5.693732138802635, 1.0))), draw(st.integers(1, 127)))
    )


def with_out(draw: st.DrawFn, weight: TernaryWeight, kwargs: dict[str, Any]) -> None:
    """Draw whether the result goes to a new weight, into another one, or into the weight itself."""
    kind = draw(st.sampled_from(("new", "other", "itself")), label="out")
    if kind == "other":
        kwargs["out"] = weight.clone()
        for tensor in kwargs["out"].tensors().values():
            tensor.fill_(1)
    elif kind == "itself":
        kwargs["out"] = weight


@st.composite
def accumulate(draw: st.DrawFn) -> Case:
    weight = draw(ss.weights())
    kwargs = {"exponent_rule": draw(st.sampled_from(("score", "sign", "frozen"))), **draw(ss.clocks())}
    shape = weight.shape
    if draw(st.booleans(), label="some rows"):
        kwargs["rows"] = draw(ss.row_choices(shape[0]))
        shape = (kwargs["rows"].numel(), shape[1])
    votes = draw(ss.vote_tensors(shape)) if shape[0] else torch.zeros(shape, dtype=torch.int8)
    with_out(draw, weight, kwargs)
    return Case((weight, votes), kwargs)


@st.composite
def apply_step(draw: st.DrawFn) -> Case:
    theta = draw(st.one_of(st.sampled_from((1, 16, 127)), st.integers(1, 127)), label="theta")
    theta_e = draw(st.one_of(st.sampled_from((1, 4, 127)), st.integers(1, 127)), label="theta_e")
    weight = draw(ss.weights(theta=theta))
    kwargs = {"theta": theta, "theta_e": theta_e, "on_flip": draw(st.sampled_from(("reset", "carry")))}
    if draw(st.booleans(), label="some rows"):
        kwargs["rows"] = draw(ss.row_choices(weight.shape[0]))
    with_out(draw, weight, kwargs)
    return Case((weight,), kwargs)


@st.composite
def accumulate_gradient(draw: st.DrawFn) -> Case:
    weight = draw(ss.weights())
    kwargs = {"exponent_rule": draw(st.sampled_from(("score", "sign", "frozen"))), **draw(ss.clocks())}
    shape = weight.shape
    if draw(st.booleans(), label="some rows"):
        kwargs["rows"] = draw(ss.row_choices(shape[0]))
        shape = (kwargs["rows"].numel(), shape[1])
    if draw(st.booleans(), label="faults"):
        kwargs["faults"] = torch.tensor(draw(st.sampled_from((0, 2**40))))
    with_out(draw, weight, kwargs)
    return Case((weight, draw(ss.gradients(shape)), draw(ss.rates())), kwargs)


@st.composite
def count_changed_trits(draw: st.DrawFn) -> Case:
    shape = draw(ss.matrix_shapes())
    return Case((draw(ss.weights(shape)), draw(ss.weights(shape))))


@st.composite
def leading(draw: st.DrawFn, *, empty: bool = True) -> tuple[int, ...]:
    """Draw leading dimensions of activations: M rows at tile edges, none, several, or an empty batch."""
    several = st.sampled_from(((), (2, 3), (3, 1, 2), *(((0,), (2, 0)) if empty else ())))
    return draw(st.one_of(st.tuples(st.deferred(lambda: ss.sizes(70))), several), label="leading")


@st.composite
def linear_case(draw: st.DrawFn, *, backward: bool) -> Case:
    exact_sums = draw(st.booleans(), label="exact")
    weight = draw(ss.weights(levels=NARROW if exact_sums else None))
    width = weight.shape[0 if backward else 1]
    x = draw(ss.activations((*draw(leading()), width), draw(ss.DTYPES), exact=exact_sums))
    return Case((x, weight), sums_exact=exact_sums)


@st.composite
def linear_weight_grad(draw: st.DrawFn) -> Case:
    exact_sums, dtype, rows = draw(st.booleans(), label="exact"), draw(ss.DTYPES), draw(leading())
    num_rows, num_columns = draw(ss.matrix_shapes())
    modest = ("normal", "tiny", "constant")  # a huge one times another large one overflows
    kinds = draw(st.sampled_from(((modest, (*modest, "huge")), ((*modest, "wild"), (*modest, "wild")))))
    grad = draw(ss.activations((*rows, num_rows), dtype, exact=exact_sums, kinds=kinds[0]))
    x = draw(ss.activations((*rows, num_columns), dtype, exact=exact_sums, kinds=kinds[1]))
    return Case((grad, x), sums_exact=exact_sums)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, dict[str, int]]:
    """Draw a length and a convolution that fits it: strides that leave a tail, strides beyond the kernel, padding."""
    taps = draw(st.sampled_from((1, 2, 3, 4, 7)), label="taps")
    stride = draw(st.sampled_from((1, 2, 3, 5)), label="stride")
    padding = draw(st.sampled_from((0, 1, 3)), label="padding")
    length = draw(st.integers(max(1, taps - 2 * padding), 40), label="length")
    return length, {"kernel_size": taps, "stride": stride, "padding": padding}


@st.composite
def conv_case(draw: st.DrawFn, *, which: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    length, geometry = draw(geometries())
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 5, 13)))
    num_rows = draw(st.sampled_from((1, 3, 16, 33)))
    positions = (length + 2 * geometry["padding"] - geometry["kernel_size"]) // geometry["stride"] + 1
    kinds = ("normal", "tiny", "constant")
    x = draw(ss.activations((batch, channels, length), dtype, exact=exact_sums, kinds=kinds))
    grad = draw(ss.activations((batch, num_rows, positions), dtype, exact=exact_sums, kinds=kinds))
    if which == "conv1d_weight_grad":
        return Case((grad, x), geometry, sums_exact=exact_sums)
    shape = (num_rows, channels * geometry["kernel_size"])
    weight = draw(ss.weights(shape, levels=NARROW if exact_sums else None))
    if which == "conv1d":
        return Case((x, weight), geometry, sums_exact=exact_sums)
    return Case((grad, weight), {"length": length, **geometry}, sums_exact=exact_sums)


@st.composite
def norm_case(draw: st.DrawFn, *, which: str) -> Case:
    dtype, eps = draw(ss.DTYPES), draw(st.sampled_from((1e-6, 1e-12, 1.0)))
    weight = draw(ss.weights((1, draw(st.deferred(ss.sizes)))))
    shape = (*draw(leading()), weight.shape[1])
    # The square of a huge one overflows; a product with a tiny one loses bits, more or fewer by the order of factors.
    kinds = ("normal", "wild", "faint", "constant")
    x = draw(ss.activations(shape, dtype, exact=False, kinds=kinds))
    grad = draw(ss.activations(shape, dtype, exact=False, kinds=("normal", "constant")))
    args = {
        "rms_norm": (x, weight),
        "rms_norm_input_grad": (grad, x, weight),
        "rms_norm_weight_grad": (grad, x),
    }
    return Case(args[which], {"eps": eps})


@st.composite
def id_tensors(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Draw ids with duplicates, in one or two dimensions, none at all among them."""
    shape = draw(st.sampled_from(((), (0,), (1,), (17,), (3, 11), (64,))))
    choice = torch.randint(num_rows, shape, generator=ss.generator(draw(ss.GENERATOR_SEEDS)))
    return choice // draw(st.sampled_from((1, 3, 1000)), label="duplicates")


@st.composite
def embedding(draw: st.DrawFn) -> Case:
    weight = draw(ss.weights())
    return Case((draw(id_tensors(weight.shape[0])), weight), {"dtype": draw(ss.DTYPES)})


@st.composite
def embedding_row_grads(draw: st.DrawFn) -> Case:
    exact_sums = draw(st.booleans(), label="exact")
    ids = draw(id_tensors(draw(st.sampled_from((1, 5, 300, 2**40)))))
    shape = (*ids.shape, draw(st.deferred(ss.sizes)))
    return Case((ids, draw(ss.activations(shape, draw(ss.DTYPES), exact=exact_sums))), sums_exact=exact_sums)


@st.composite
def denoise_case(draw: st.DrawFn, *, backward: bool) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    # an alpha of 4**-n has an exact root; 1 - alpha then costs 2n bits more, which bfloat16 does not have
    alpha = draw(st.sampled_from((1.0, 0.25) if exact_sums else (1.0, 0.999, 0.5, 0.1, 1e-4)), label="alpha")
    shape = draw(st.one_of(ss.matrix_shapes(), st.sampled_from(((0,), (), (2, 3, 5, 7)))))
    tensors = [
        draw(ss.activations(shape, dtype, exact=False, kinds=("normal", "wild", "tiny"))) for _ in range(2)
    ]
    if exact_sums:
        tensors = [ss.lay_out(tensor.sign() * 4, "contiguous") for tensor in tensors]
    return Case(tuple(tensors[: 1 if backward else 2]), {"alpha": alpha}, sums_exact=exact_sums)


@st.composite
def one_weight(draw: st.DrawFn) -> Case:
    return Case((draw(ss.weights()),))


CASES: dict[str, SearchStrategy[Case]] = {
    "pack_trits": pack_trits(),
    "unpack_trits": unpack_trits(),
    "dither_bytes": dither_bytes(),
    "group_scales": group_scales(),
    "dequantize": dequantize(),
    "initial_weight": initial_weight(),
    "constant_weight": constant_weight(),
    "row_exponents": gradient_only(),
    "stochastic_votes": stochastic_votes(),
    "sign_votes": sign_votes(),
    "step_from_loss": step_from_loss(),
    "accumulate": accumulate(),
    "apply_step": apply_step(),
    "accumulate_gradient": accumulate_gradient(),
    "count_nonfinite_rows": gradient_only(),
    "count_changed_trits": count_changed_trits(),
    "linear": linear_case(backward=False),
    "linear_input_grad": linear_case(backward=True),
    "linear_weight_grad": linear_weight_grad(),
    "conv1d": conv_case(which="conv1d"),
    "conv1d_input_grad": conv_case(which="conv1d_input_grad"),
    "conv1d_weight_grad": conv_case(which="conv1d_weight_grad"),
    "rms_norm": norm_case(which="rms_norm"),
    "rms_norm_input_grad": norm_case(which="rms_norm_input_grad"),
    "rms_norm_weight_grad": norm_case(which="rms_norm_weight_grad"),
    "embedding": embedding(),
    "embedding_row_grads": embedding_row_grads(),
    "denoise_step": denoise_case(backward=False),
    "denoise_step_backward": denoise_case(backward=True),
    "from_spec": one_weight(),
    "to_spec": one_weight(),
}
"""Calls to compare, by op."""
