"""What must be refused, one line a case: the call, the exception, and the argument that its sentence names.

Every implementation raises the same exception for the same reason, and has written nothing when it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.types import RESERVED_STEP, TernaryWeight
from conformance.subject import Subject

CLOCK: dict[str, Any] = {"seed": 1, "step": 2, "tensor_id": 3}


@dataclass(frozen=True)
class Refusal:
    """A call that must raise: `says` is the argument that the message must name."""

    op: str
    why: str
    error: type[Exception]
    says: str
    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def refused(op: str, why: str, error: type[Exception], says: str, *args: Any, **kwargs: Any) -> Refusal:
    """Return a refusal of one call; callables among the arguments are called each time, so none shares memory."""
    build = lambda value: value() if callable(value) and not isinstance(value, type) else value  # noqa: E731
    return Refusal(
        op,
        why,
        error,
        says,
        lambda: (tuple(map(build, args)), {name: build(value) for name, value in kwargs.items()}),
    )


def weight(num_rows: int = 3, num_columns: int = 14) -> TernaryWeight:
    """Return a small weight of ones."""
    trits = torch.ones(num_rows, num_columns, dtype=torch.int8)
    return TernaryWeight.from_trits(trits, torch.zeros(num_rows, -(-num_columns // 12), dtype=torch.int8))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a maker of a tensor on another device."""
    return lambda: torch.zeros(shape, dtype=dtype, device="meta")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a maker of a tensor of ones."""
    return lambda: torch.ones(shape, dtype=dtype)


def ids(*values: int) -> Callable[[], Tensor]:
    """Return a maker of int64 ids."""
    return lambda: torch.tensor(values, dtype=torch.int64)


def with_byte(value: int) -> Callable[[], Tensor]:
    """Return a maker of two packed bytes, the second of them `value`."""
    return lambda: torch.tensor([121, value], dtype=torch.uint8)


def scalar(value: float, dtype: torch.dtype = torch.int64) -> Callable[[], Tensor]:
    """Return a maker of a 0-dim tensor."""
    return lambda: torch.tensor(value, dtype=dtype)


def faulty(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of a gradient of ones whose last element is a NaN, so that it would be counted."""
    return lambda: torch.ones(shape).index_fill_(-1, torch.tensor([shape[-1] - 1]), float("nan"))


I8, F16, F32 = torch.int8, torch.float16, torch.float32
_VOTES = {"group_size": 12, **CLOCK}

REFUSALS = (
    refused("pack_trits", "a trit of 2", ValueError, "trits", lambda: torch.tensor([0, 2], dtype=I8)),
    refused("pack_trits", "a trit of -2", ValueError, "trits", lambda: torch.tensor([-2], dtype=I8)),
    refused("pack_trits", "int16", TypeError, "trits", ones(5, dtype=torch.int16)),
    refused("pack_trits", "float", TypeError, "trits", ones(5)),
    refused("unpack_trits", "byte 243", ValueError, "packed", with_byte(243), (10,)),
    refused("unpack_trits", "byte 255", ValueError, "packed", with_byte(255), (6,)),
    refused("unpack_trits", "a byte too many", ValueError, "packed", with_byte(0), (5,)),
    refused("unpack_trits", "a byte too few", ValueError, "packed", with_byte(0), (11,)),
    refused("unpack_trits", "int8", TypeError, "packed", ones(2, dtype=I8), (10,)),
    refused("unpack_trits", "a negative size", ValueError, "shape", with_byte(0), (-2, -5)),
    refused("dither_bytes", "group size 13", ValueError, "group_size", ids(0), group_size=13, **CLOCK),
    refused("dither_bytes", "group size 0", ValueError, "group_size", ids(0), group_size=0, **CLOCK),
    refused("dither_bytes", "id -1", ValueError, "group_ids", ids(-1), **_VOTES),
    refused("dither_bytes", "id 2**32", ValueError, "group_ids", ids(2**32), **_VOTES),
    refused("dither_bytes", "int32 ids", TypeError, "group_ids", ones(1, dtype=torch.int32), **_VOTES),
    refused("dither_bytes", "seed -1", ValueError, "seed", ids(0), **{**_VOTES, "seed": -1}),
    refused("dither_bytes", "seed 2**64", ValueError, "seed", ids(0), **{**_VOTES, "seed": 2**64}),
    refused("dither_bytes", "step 2**32", ValueError, "step", ids(0), **{**_VOTES, "step": 2**32}),
    refused("dither_bytes", "step 1.0", TypeError, "step", ids(0), **{**_VOTES, "step": 1.0}),
    refused("dither_bytes", "float step", TypeError, "step", ids(0), **{**_VOTES, "step": torch.tensor(1.0)}),
    refused("dither_bytes", "step tensor 2**32 + 5", ValueError, "step", ids(0), **{**_VOTES, "step": scalar(2**32 + 5)}),
    refused("dither_bytes", "step tensor -1", ValueError, "step", ids(0), **{**_VOTES, "step": scalar(-1)}),
    refused("dither_bytes", "tensor id -1", ValueError, "tensor_id", ids(0), **{**_VOTES, "tensor_id": -1}),
    refused("group_scales", "int16", TypeError, "exponents", ones(2, dtype=torch.int16)),
    refused("group_scales", "level 16", ValueError, "exponents", scalar(16, I8)),
    refused("group_scales", "level -33", ValueError, "exponents", scalar(-33, I8)),
    refused("group_scales", "level 64 of 2 mantissa bits", ValueError, "exponents", scalar(64, I8), mantissa_bits=2),
    refused("group_scales", "3 mantissa bits", ValueError, "mantissa_bits", ones(2, dtype=I8), mantissa_bits=3),
    refused("dequantize", "float16", TypeError, "dtype", weight, dtype=lambda: F16),
    refused("dequantize", "two-dimensional rows", ValueError, "rows", weight, rows=lambda: torch.zeros(2, 1, dtype=torch.int64)),
    refused("dequantize", "a list of rows", TypeError, "rows", weight, rows=[0, 1]),
    refused("dequantize", "row N", ValueError, "rows", weight, rows=ids(3)),
    refused("dequantize", "row -1", ValueError, "rows", weight, rows=ids(-1)),
    refused("initial_weight", "std 0", ValueError, "std", (2, 3), std=0.0, seed=0, tensor_id=0),
    refused("initial_weight", "std NaN", ValueError, "std", (2, 3), std=float("nan"), seed=0, tensor_id=0),
    refused("initial_weight", "std 10**400", ValueError, "std", (2, 3), std=10**400, seed=0, tensor_id=0),
    refused("initial_weight", "no rows", ValueError, "shape", (0, 3), std=1.0, seed=0, tensor_id=0),
    refused("initial_weight", "2**33 groups", ValueError, "shape", (2**31, 48), std=1.0, seed=0, tensor_id=0),
    refused("constant_weight", "trit 2", ValueError, "trit", (2, 3), trit=2, exponent=0),
    refused("constant_weight", "exponent 16", ValueError, "exponent", (2, 3), trit=1, exponent=16),
    refused("constant_weight", "exponent -33", ValueError, "exponent", (2, 3), trit=1, exponent=-33),
    refused("constant_weight", "group 7", ValueError, "group_size", (2, 3), trit=1, exponent=0, group_size=7),
    refused("row_exponents", "float16", TypeError, "grad_NK", ones(2, 3, dtype=F16)),
    refused("row_exponents", "one dimension", ValueError, "grad_NK", ones(3)),
    refused("row_exponents", "no columns", ValueError, "grad_NK", ones(3, 0)),
    refused("stochastic_votes", "rate -1", ValueError, "rate", ones(2, 3), -1.0, **_VOTES),
    refused("stochastic_votes", "rate 128", ValueError, "rate", ones(2, 3), 128.0, **_VOTES),
    refused("stochastic_votes", "rate NaN", ValueError, "rate", ones(2, 3), float("nan"), **_VOTES),
    refused("stochastic_votes", "float64 rate", TypeError, "rate", ones(2, 3), ones(dtype=torch.float64), **_VOTES),
    refused("stochastic_votes", "rate of shape [1]", ValueError, "rate", ones(2, 3), ones(1), **_VOTES),
    refused("stochastic_votes", "rate tensor -1", ValueError, "rate", ones(2, 3), scalar(-1.0, F32), **_VOTES),
    refused("stochastic_votes", "rate tensor 128", ValueError, "rate", ones(2, 3), scalar(128.0, F32), **_VOTES),
    refused("stochastic_votes", "rate tensor NaN", ValueError, "rate", ones(2, 3), scalar(float("nan"), F32), **_VOTES),
    refused("stochastic_votes", "step tensor 2**32 + 5", ValueError,
            "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(2**32 + 5)}),
    refused("stochastic_votes", "step tensor -1", ValueError, "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(-1)}),
    refused("stochastic_votes", "the reserved step", ValueError, "step", ones(2, 3), 1.0, **{**_VOTES, "step": RESERVED_STEP}),
    refused("stochastic_votes", "a tensor of the reserved step", ValueError,
            "step", ones(2, 3), 1.0, **{**_VOTES, "step": scalar(RESERVED_STEP)}),
    refused("stochastic_votes", "a list of rows", TypeError, "rows", ones(2, 3), 1.0, rows=[0, 1], **_VOTES),
    refused("stochastic_votes", "rows elsewhere", ValueError,
            "rows", ones(2, 3), 1.0, rows=meta(2, dtype=torch.int64), **_VOTES),
    refused("stochastic_votes", "group size 10", ValueError, "group_size", ones(2, 3), 1.0, group_size=10, **CLOCK),
    refused("stochastic_votes", "float16", TypeError, "grad_NK", ones(2, 3, dtype=F16), 1.0, **_VOTES),
    refused("stochastic_votes", "int32 rows", TypeError, "rows", ones(2, 3), 1.0, rows=ones(2, dtype=torch.int32), **_VOTES),
    refused("stochastic_votes", "a row too few", ValueError, "rows", ones(2, 3), 1.0, rows=ids(1), **_VOTES),
    refused("sign_votes", "step 0", ValueError, "step_size", ones(2, 3), 0),
    refused("sign_votes", "step 128", ValueError, "step_size", ones(2, 3), 128),
    refused("sign_votes", "step 1.5", TypeError, "step_size", ones(2, 3), 1.5),
    refused("step_from_loss", "a negative loss", ValueError, "loss", -0.1, 5.5, 8),
    refused("step_from_loss", "a NaN loss", ValueError, "loss", float("nan"), 5.5, 8),
    refused("step_from_loss", "reference 0", ValueError, "loss_ref", 1.0, 0.0, 8),
    refused("step_from_loss", "step 0", ValueError, "max_step", 1.0, 5.5, 0),
    refused("accumulate", "float votes", TypeError, "votes_NK", weight, ones(3, 14), **CLOCK),
    refused("accumulate", "a column too few", ValueError, "votes_NK", weight, ones(3, 13, dtype=I8), **CLOCK),
    refused("accumulate", "a vote of -128", ValueError,
            "votes_NK", weight, lambda: torch.full((3, 14), -128, dtype=I8), **CLOCK),
    refused("accumulate", "another device", ValueError, "votes_NK", weight, meta(3, 14, dtype=I8), **CLOCK),
    refused("accumulate", "an unknown rule", ValueError,
            "exponent_rule", weight, ones(3, 14, dtype=I8), exponent_rule="ema", **CLOCK),
    refused("accumulate", "a row named twice", ValueError, "rows", weight, ones(2, 14, dtype=I8), rows=ids(1, 1), **CLOCK),
    refused("accumulate", "row N", ValueError, "rows", weight, ones(1, 14, dtype=I8), rows=ids(3), **CLOCK),
    refused("accumulate", "row -2", ValueError, "rows", weight, ones(1, 14, dtype=I8), rows=ids(-2), **CLOCK),
    refused("accumulate", "another out", ValueError, "out", weight, ones(3, 14, dtype=I8), out=lambda: weight(4), **CLOCK),
    refused("accumulate", "an out elsewhere", ValueError,
            "out", weight, ones(3, 14, dtype=I8), out=lambda: weight().to("meta"), **CLOCK),
    refused("accumulate", "the reserved step", ValueError,
            "step", weight, ones(3, 14, dtype=I8), **{**CLOCK, "step": RESERVED_STEP}),
    refused("accumulate", "step tensor -1", ValueError, "step", weight, ones(3, 14, dtype=I8), **{**CLOCK, "step": scalar(-1)}),
    refused("accumulate", "a list of rows", TypeError, "rows", weight, ones(2, 14, dtype=I8), rows=[0, 1], **CLOCK),
    refused("accumulate", "a row named twice, with an out", ValueError,
            "rows", weight, ones(2, 14, dtype=I8), rows=ids(1, 1), out=weight, **CLOCK),
    refused("apply_step", "theta 0", ValueError, "theta", weight, theta=0),
    refused("apply_step", "theta 128", ValueError, "theta", weight, theta=128),
    refused("apply_step", "theta 1.0", TypeError, "theta", weight, theta=1.0),
    refused("apply_step", "theta_e 0", ValueError, "theta_e", weight, theta_e=0),
    refused("apply_step", "theta_e 128", ValueError, "theta_e", weight, theta_e=128),
    refused("apply_step", "an unknown on_flip", ValueError, "on_flip", weight, on_flip="keep"),
    refused("apply_step", "row N", ValueError, "rows", weight, rows=ids(3)),
    refused("apply_step", "a row named twice", ValueError, "rows", weight, rows=ids(0, 2, 0)),
    refused("apply_step", "a list of rows", TypeError, "rows", weight, rows=[0, 1]),
    refused("apply_step", "an out elsewhere", ValueError, "out", weight, out=lambda: weight().to("meta")),
    refused("apply_step", "another out", ValueError, "out", weight, out=lambda: weight(4)),
    refused("accumulate_gradient", "float64", TypeError, "grad_NK", weight, ones(3, 14, dtype=torch.float64), 1.0, **CLOCK),
    refused("accumulate_gradient", "another shape", ValueError, "grad_NK", weight, ones(14, 3), 1.0, **CLOCK),
    refused("accumulate_gradient", "rate 200", ValueError, "rate", weight, ones(3, 14), 200.0, **CLOCK),
    refused("accumulate_gradient", "rate tensor -1", ValueError, "rate", weight, ones(3, 14), scalar(-1.0, F32), **CLOCK),
    refused("accumulate_gradient", "rate tensor NaN", ValueError,
            "rate", weight, ones(3, 14), scalar(float("nan"), F32), **CLOCK),
    refused("accumulate_gradient", "step tensor 2**32 + 5", ValueError,
            "step", weight, ones(3, 14), 1.0, **{**CLOCK, "step": scalar(2**32 + 5)}),
    refused("accumulate_gradient", "the reserved step", ValueError,
            "step", weight, ones(3, 14), 1.0, **{**CLOCK, "step": RESERVED_STEP}),
    refused("accumulate_gradient", "a list of rows", TypeError, "rows", weight, ones(2, 14), 1.0, rows=[0, 1], **CLOCK),
    refused("accumulate_gradient", "an out elsewhere", ValueError,
            "out", weight, faulty(3, 14), 1.0, faults=scalar(0), out=lambda: weight().to("meta"), **CLOCK),
    refused("accumulate_gradient", "faults elsewhere", ValueError,
            "faults", weight, faulty(3, 14), 1.0, faults=meta(dtype=torch.int64), out=weight, **CLOCK),
    refused("accumulate_gradient", "an unknown rule, with faults", ValueError,
            "exponent_rule", weight, faulty(3, 14), 1.0, exponent_rule="ema", faults=scalar(5), out=weight, **CLOCK),
    refused("accumulate_gradient", "seed -1, with faults", ValueError,
            "seed", weight, faulty(3, 14), 1.0, faults=scalar(5), out=weight, **{**CLOCK, "seed": -1}),
    refused("accumulate_gradient", "a row named twice, with faults", ValueError,
            "rows", weight, faulty(2, 14), 1.0, rows=ids(1, 1), faults=scalar(5), out=weight, **CLOCK),
    refused("accumulate_gradient", "a row named twice", ValueError,
            "rows", weight, ones(2, 14), 1.0, rows=ids(1, 1), **CLOCK),
    refused("accumulate_gradient", "int32 faults", TypeError,
            "faults", weight, ones(3, 14), 1.0, faults=ones(dtype=torch.int32), **CLOCK),
    refused("accumulate_gradient", "an unknown rule", ValueError,
            "exponent_rule", weight, ones(3, 14), 1.0, exponent_rule="", **CLOCK),
    refused("count_nonfinite_rows", "int8", TypeError, "grad_NK", ones(3, 14, dtype=I8)),
    refused("count_changed_trits", "another shape", ValueError, "after", weight, lambda: weight(3, 13)),
    refused("linear", "float16", TypeError, "x", ones(2, 14, dtype=F16), weight),
    refused("linear", "int8", TypeError, "x", ones(2, 14, dtype=I8), weight),
    refused("linear", "13 columns", ValueError, "x", ones(2, 13), weight),
    refused("linear", "a scalar", ValueError, "x", ones(), weight),
    refused("linear", "another device", ValueError, "x", meta(2, 14), weight),
    refused("linear_input_grad", "14 columns for 3 rows", ValueError, "grad", ones(2, 14), weight),
    refused("linear_input_grad", "float16", TypeError, "grad", ones(2, 3, dtype=F16), weight),
    refused("linear_input_grad", "another device", ValueError, "grad", meta(2, 3), weight),
    refused("linear_weight_grad", "other rows", ValueError, "x", ones(2, 3), ones(3, 14)),
    refused("linear_weight_grad", "two dtypes", TypeError, "x", ones(2, 3), ones(2, 14, dtype=torch.bfloat16)),
    refused("linear_weight_grad", "two devices", ValueError, "x", ones(2, 3), meta(2, 14)),
    refused("linear_weight_grad", "a scalar x", ValueError, "x", ones(3), ones()),
    refused("linear_weight_grad", "a scalar grad", ValueError, "grad", ones(), ones(14)),
    refused("conv1d", "channels that do not fit", ValueError, "x_BCL", ones(1, 3, 9), weight, kernel_size=7),
    refused("conv1d", "two dimensions", ValueError, "x_BCL", ones(2, 9), weight, kernel_size=7),
    refused("conv1d", "kernel 0", ValueError, "kernel_size", ones(1, 2, 9), weight, kernel_size=0),
    refused("conv1d", "stride 0", ValueError, "stride", ones(1, 2, 9), weight, kernel_size=7, stride=0),
    refused("conv1d", "padding -1", ValueError, "padding", ones(1, 2, 9), weight, kernel_size=7, padding=-1),
    refused("conv1d", "a window that does not fit", ValueError, "kernel_size", ones(1, 2, 6), weight, kernel_size=7),
    refused("conv1d", "float16", TypeError, "x_BCL", ones(1, 2, 9, dtype=F16), weight, kernel_size=7),
    refused("conv1d_input_grad", "other positions", ValueError, "grad_BNP", ones(1, 3, 4), weight, length=9, kernel_size=7),
    refused("conv1d_input_grad", "columns of no kernel", ValueError,
            "weight", ones(1, 3, 5), weight, length=9, kernel_size=5),
    refused("conv1d_weight_grad", "other positions", ValueError, "grad_BNP", ones(1, 3, 4), ones(1, 2, 9), kernel_size=7),
    refused("conv1d_weight_grad", "another batch", ValueError, "x", ones(2, 3, 3), ones(1, 2, 9), kernel_size=7),
    refused("rms_norm", "eps 0", ValueError, "eps", ones(2, 14), lambda: weight(1), eps=0.0),
    refused("rms_norm", "eps 2", ValueError, "eps", ones(2, 14), lambda: weight(1), eps=2.0),
    refused("rms_norm", "three rows", ValueError, "weight", ones(2, 14), weight),
    refused("rms_norm", "13 channels", ValueError, "x", ones(2, 13), lambda: weight(1)),
    refused("rms_norm", "no channels", ValueError, "x", ones(2, 0), lambda: weight(1)),
    refused("rms_norm", "float16", TypeError, "x", ones(2, 14, dtype=F16), lambda: weight(1)),
    refused("rms_norm", "another device", ValueError, "x", meta(2, 14), lambda: weight(1)),
    refused("rms_norm_input_grad", "two shapes", ValueError, "grad", ones(3, 14), ones(2, 14), lambda: weight(1)),
    refused("rms_norm_input_grad", "two dtypes", TypeError,
            "grad", ones(2, 14, dtype=torch.bfloat16), ones(2, 14), lambda: weight(1)),
    refused("rms_norm_weight_grad", "two shapes", ValueError, "grad", ones(3, 14), ones(2, 14)),
    refused("rms_norm_weight_grad", "a scalar", ValueError, "x", ones(), ones()),
    refused("rms_norm_weight_grad", "no channels", ValueError, "x", ones(2, 0), ones(2, 0)),
    refused("embedding", "id N", ValueError, "ids", ids(3), weight),
    refused("embedding", "id -1", ValueError, "ids", ids(-1), weight),
    refused("embedding", "int32 ids", TypeError, "ids", ones(2, dtype=torch.int32), weight),
    refused("embedding", "float16", TypeError, "dtype", ids(0), weight, dtype=lambda: F16),
    refused("embedding_row_grads", "id -1", ValueError, "ids", ids(-1), ones(1, 4)),
    refused("embedding_row_grads", "other positions", ValueError, "grad", ids(0, 1), ones(3, 4)),
    refused("embedding_row_grads", "int8", TypeError, "grad", ids(0, 1), ones(2, 4, dtype=I8)),
    refused("denoise_step", "alpha 0", ValueError, "alpha", ones(2), ones(2), alpha=0.0),
    refused("denoise_step", "alpha 1.1", ValueError, "alpha", ones(2), ones(2), alpha=1.1),
    refused("denoise_step", "alpha NaN", ValueError, "alpha", ones(2), ones(2), alpha=float("nan")),
    refused("denoise_step", "two shapes", ValueError, "pred", ones(2), ones(3), alpha=0.5),
    refused("denoise_step", "two dtypes", TypeError, "pred", ones(2), ones(2, dtype=torch.bfloat16), alpha=0.5),
    refused("denoise_step", "two devices", ValueError, "pred", ones(2), meta(2), alpha=0.5),
    refused("denoise_step_backward", "alpha -1", ValueError, "alpha", ones(2), alpha=-1.0),
    refused("denoise_step_backward", "float16", TypeError, "grad", ones(2, dtype=F16), alpha=0.5),
)  # fmt: skip
"""Every call that must be refused."""


def check(ops: Subject, case: Refusal) -> None:
    """Fail unless the call raises the exception with a sentence that names the argument."""
    args, kwargs = case.call()
    error = ops.refuses(case.op, args, kwargs)
    assert error is not None, f"{case.op} accepts {case.why}"
    assert type(error) is case.error, f"{case.op} on {case.why}: {error!r}, want a {case.error.__name__}"
    assert case.says in str(error), f"{case.op} on {case.why} does not name {case.says}: {error}"
    assert len(str(error).splitlines()) == 1, f"{case.op} on {case.why} takes more than a sentence: {error}"


def bad_weight(**tensors: Tensor) -> TernaryWeight:
    """Build a weight with some tensors exchanged, which its constructor must refuse."""
    return replace(weight(), **tensors)
