"""Laws of the ternary conv1d: torch's own convolution in float64, on sums that are exact."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch.nn import functional

from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact, same_sums
from ..law import law
from ..mutant import mutants_of
from ..refusal import F16, meta, ones, refusals, refused, weight
from ..subject import Subject
from .test_linear import dense

mutant = mutants_of("conv")


# --- how calls are drawn ---------------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, dict[str, int]]:
    """Draw a length and a convolution that fits it: strides that leave a tail, strides beyond the kernel, padding."""
    taps = draw(st.sampled_from((1, 2, 3, 4, 7)), label="taps")
    stride = draw(st.sampled_from((1, 2, 3, 5)), label="stride")
    padding = draw(st.sampled_from((0, 1, 3)), label="padding")
    length = draw(st.integers(max(1, taps - 2 * padding), 40), label="length")
    return length, {"kernel_size": taps, "stride": stride, "padding": padding}


@calls("conv1d", "conv1d_input_grad", "conv1d_weight_grad")
def conv_calls(draw: st.DrawFn, op: str) -> Case:
    exact_sums, dtype = draw(st.booleans(), label="exact"), draw(ss.DTYPES)
    length, geometry = draw(geometries())
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 5, 13)))
    num_rows = draw(st.sampled_from((1, 3, 16, 33)))
    positions = (length + 2 * geometry["padding"] - geometry["kernel_size"]) // geometry["stride"] + 1
    kinds = ("normal", "tiny", "constant")
    x = draw(ss.activations((batch, channels, length), dtype, exact=exact_sums, kinds=kinds))
    grad = draw(ss.activations((batch, num_rows, positions), dtype, exact=exact_sums, kinds=kinds))
    if op == "conv1d_weight_grad":
        return Case((grad, x), geometry, sums_exact=exact_sums)
    shape = (num_rows, channels * geometry["kernel_size"])
    weight = draw(ss.weights(shape, levels=ss.NARROW if exact_sums else None))
    if op == "conv1d":
        return Case((x, weight), geometry, sums_exact=exact_sums)
    return Case((grad, weight), {"length": length, **geometry}, sums_exact=exact_sums)


# --- laws, and the mutants that they reject --------------------------------------------------------------------------


CHANNELS, ROWS, BATCH = 5, 17, 2


@law(
    geometry=geometries(),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "conv_stride_tail",
            "windows_BCPJ = padded.unfold(2, kernel_size, stride)",
            "windows_BCPJ = padded.unfold(2, kernel_size, stride).clone()\n    windows_BCPJ[:, :, -1] = 0",
            compared="conv1d",
        ),
        mutant(
            "conv_flipped_taps",
            "windows_BCPJ = padded.unfold(2, kernel_size, stride)",
            "windows_BCPJ = padded.unfold(2, kernel_size, stride).flip(3)",
            compared="conv1d",
        ),
        mutant(
            "conv_taps_before_channels",
            "windows_BCPJ.permute(0, 2, 1, 3)",
            "windows_BCPJ.permute(0, 2, 3, 1)",
            compared="conv1d",
        ),
        mutant(
            "conv_padding_kept",
            "padded[:, :, padding : padding + length]",
            "padded[:, :, :length]",
            compared="conv1d_input_grad",
        ),
        mutant(
            "conv_weight_grad_of_flipped_taps",
            "return linear_weight_grad(grad_BNP.transpose(1, 2), columns_BPK)",
            "flipped_BPK = columns_BPK.unflatten(2, (-1, kernel_size)).flip(3).flatten(2)\n"
            "    return linear_weight_grad(grad_BNP.transpose(1, 2), flipped_BPK)",
            compared="conv1d_weight_grad",
        ),
    ],
)
def test_conv1d_by_torch(
    ops: Subject, geometry: tuple[int, dict[str, int]], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Forward and both gradients equal autograd through torch.nn.functional.conv1d: strides, padding, unread tails."""
    length, shape = geometry
    taps = shape["kernel_size"]
    weight = data.draw(ss.weights((ROWS, CHANNELS * taps), levels=ss.NARROW, mantissa=False))
    x = data.draw(ss.activations((BATCH, CHANNELS, length), dtype, exact=True))
    x_wide = x.to(torch.float64).requires_grad_()
    w_wide = dense(weight).reshape(ROWS, CHANNELS, taps).requires_grad_()
    y_wide = functional.conv1d(x_wide, w_wide, stride=shape["stride"], padding=shape["padding"])
    dy = data.draw(ss.activations(tuple(y_wide.shape), dtype, exact=True))
    dx_wide, dw_wide = torch.autograd.grad(y_wide, (x_wide, w_wide), dy.to(torch.float64))
    results = (
        ("y", ops.conv1d(x, weight, **shape), y_wide.detach().to(dtype)),
        ("dx", ops.conv1d_input_grad(dy, weight, length=length, **shape), dx_wide.to(dtype)),
        ("dw", ops.conv1d_weight_grad(dy, x, **shape), dw_wide.reshape(ROWS, -1).to(torch.float32)),
    )
    for name, got, want in results:
        same_sums(got, want, name)


@law(
    length=st.integers(1, 33),
    dtype=ss.DTYPES,
    data=st.data(),
    rejects=[
        mutant(
            "conv_batch_reversed",
            "windows_BCPJ.permute(0, 2, 1, 3)",
            "windows_BCPJ.flip(2).permute(0, 2, 1, 3)",
            compared="conv1d",
        ),
    ],
)
def test_conv1d_of_one_tap_is_linear(
    ops: Subject, length: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight = data.draw(ss.weights((ROWS, CHANNELS), levels=ss.NARROW, mantissa=False))
    x = data.draw(ss.activations((BATCH, CHANNELS, length), dtype, exact=True))
    want = ops.linear(x.transpose(1, 2), weight).transpose(1, 2)
    got = ops.conv1d(x, weight, kernel_size=1)
    same_sums(got, want)


@law(
    taps=st.sampled_from((1, 3)),
    rejects=[
        mutant("conv_batch_guessed", "windows_BCPJ.shape[2], num_columns)", "windows_BCPJ.shape[2], -1)"),
    ],
)
def test_conv1d_of_an_empty_batch(ops: Subject, taps: int) -> None:
    weight = ops.constant_weight((ROWS, CHANNELS * taps), trit=1, exponent=0)
    x, dy = torch.zeros(0, CHANNELS, 9), torch.zeros(0, ROWS, 9 - taps + 1)
    exact(ops.conv1d(x, weight, kernel_size=taps), dy)
    exact(ops.conv1d_input_grad(dy, weight, length=9, kernel_size=taps), x)
    exact(ops.conv1d_weight_grad(dy, x, kernel_size=taps), torch.zeros(ROWS, CHANNELS * taps))


# --- what is refused -------------------------------------------------------------------------------------------------


# fmt: off
test_refusals_of_conv = refusals(
    "conv",
    refused("conv1d", "channels that do not fit", ValueError, "x_BCL", ones(1, 3, 9), weight, kernel_size=7),
    refused("conv1d", "two dimensions", ValueError, "x_BCL", ones(2, 9), weight, kernel_size=7),
    refused("conv1d", "kernel 0", ValueError, "kernel_size", ones(1, 2, 9), weight, kernel_size=0),
    refused("conv1d", "stride 0", ValueError, "stride", ones(1, 2, 9), weight, kernel_size=7, stride=0),
    refused("conv1d", "padding -1", ValueError, "padding", ones(1, 2, 9), weight, kernel_size=7, padding=-1),
    refused("conv1d", "a window that does not fit", ValueError, "kernel_size", ones(1, 2, 6), weight, kernel_size=7),
    refused("conv1d", "float16", TypeError, "x_BCL", ones(1, 2, 9, dtype=F16), weight, kernel_size=7),
    refused("conv1d_input_grad", "other positions", ValueError, "grad_BNP", ones(1, 3, 4), weight, length=9, kernel_size=7),
    refused("conv1d_input_grad", "float16", TypeError, "grad_BNP", ones(1, 3, 3, dtype=F16), weight, length=9, kernel_size=7),
    refused("conv1d_input_grad", "columns of no kernel", ValueError,
            "weight", ones(1, 3, 5), weight, length=9, kernel_size=5),
    refused("conv1d_weight_grad", "other positions", ValueError, "grad_BNP", ones(1, 3, 4), ones(1, 2, 9), kernel_size=7),
    refused("conv1d_weight_grad", "another batch", ValueError, "x_BCL", ones(2, 3, 3), ones(1, 2, 9), kernel_size=7),
    refused("conv1d_weight_grad", "no kernel", TypeError, "kernel_size", ones(1, 3, 3), ones(1, 2, 9), kernel_size=None),
    refused("conv1d_weight_grad", "no rows", ValueError, "grad_BNP", ones(1, 0, 3), ones(1, 2, 9), kernel_size=7),
    refused("conv1d_weight_grad", "no channels", ValueError, "x_BCL", ones(1, 3, 3), ones(1, 0, 9), kernel_size=7),
    refused("conv1d_weight_grad", "two dtypes", TypeError,
            "x_BCL", ones(1, 3, 3), ones(1, 2, 9, dtype=torch.bfloat16), kernel_size=7),
    refused("conv1d_weight_grad", "two devices", ValueError, "x_BCL", ones(1, 3, 3), meta(1, 2, 9), kernel_size=7),
    rejects=[
        mutant("conv_padding_unchecked", "checks.conv_input(x_BCL, num_columns, kernel_size)", "pass"),
    ],
)
# fmt: on
