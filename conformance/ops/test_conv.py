"""Laws of the ternary conv1d: torch's own convolution in float64, on sums that are exact."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch.nn import functional

from conformance import strategies as ss
from conformance.cases.core import NARROW, geometries
from conformance.compare import exact, unsigned_zeros
from conformance.law import law
from conformance.ops.test_linear import dense
from conformance.subject import Subject

CHANNELS, ROWS, BATCH = 5, 17, 2


@law(geometry=geometries(), dtype=ss.DTYPES, data=st.data())
def test_conv1d_by_torch(
    ops: Subject, geometry: tuple[int, dict[str, int]], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Forward and both gradients equal autograd through torch.nn.functional.conv1d: strides, padding, unread tails."""
    length, shape = geometry
    taps = shape["kernel_size"]
    weight = data.draw(ss.weights((ROWS, CHANNELS * taps), levels=NARROW, mantissa=False))
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
        exact(unsigned_zeros(got), unsigned_zeros(want), name)


@law(length=st.integers(1, 33), dtype=ss.DTYPES, data=st.data())
def test_conv1d_of_one_tap_is_linear(
    ops: Subject, length: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight = data.draw(ss.weights((ROWS, CHANNELS), levels=NARROW, mantissa=False))
    x = data.draw(ss.activations((BATCH, CHANNELS, length), dtype, exact=True))
    want = ops.linear(x.transpose(1, 2), weight).transpose(1, 2)
    got = ops.conv1d(x, weight, kernel_size=1)
    exact(unsigned_zeros(got), unsigned_zeros(want))


@law(taps=st.sampled_from((1, 3)))
def test_conv1d_of_an_empty_batch(ops: Subject, taps: int) -> None:
    weight = ops.constant_weight((ROWS, CHANNELS * taps), trit=1, exponent=0)
    x, dy = torch.zeros(0, CHANNELS, 9), torch.zeros(0, ROWS, 9 - taps + 1)
    exact(ops.conv1d(x, weight, kernel_size=taps), dy)
    exact(ops.conv1d_input_grad(dy, weight, length=9, kernel_size=taps), x)
    exact(ops.conv1d_weight_grad(dy, x, kernel_size=taps), torch.zeros(ROWS, CHANNELS * taps))
