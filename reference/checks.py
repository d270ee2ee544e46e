"""What is refused, and in which words: one sentence that names the argument, the value and what is allowed.

Shared by `reference` and `optimized`, so that both refuse the same inputs with the same exception. No arithmetic here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.reference.types import (
    ACCUM_MAX,
    GROUP_SIZES,
    MANTISSA_BITS,
    MAX_CODE_DIM,
    MAX_NEIGHBOURS,
    MAX_ORDER,
    MAX_SIGN_BITS,
    RESERVED_STEP,
    STRENGTH_MAX,
    groups_per_row,
)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Activation dtypes. float16 is out: 2**-32 and 2**15 times an activation do not fit it."""

GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of a weight gradient that votes; bfloat16 is upcast."""

MAX_RATE = 127.0
"""Largest vote rate: at one row RMS of gradient, the vote then fills its int8."""


class Weight(Protocol):
    """What a check reads of a weight, in canonical form or in any device layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    @property
    def exponents(self) -> Tensor:
        """The exponents, on the weight's device."""
        ...


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Return dtypes as a readable list."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(name: str, value: object) -> Tensor:
    """Refuse anything but a torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a torch.Tensor")
    return value


def dtype_in(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a tensor of a dtype that is not listed."""
    is_tensor(name, value)
    if value.dtype not in allowed:
        raise TypeError(f"{name} has dtype {names((value.dtype,))}, but must be {names(allowed)}")


def tensor(name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Refuse a tensor of another dtype or shape."""
    dtype_in(name, value, (dtype,))
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {tuple(shape)}")


def matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse anything but a 2-D tensor of an allowed dtype with at least one row and column."""
    dtype_in(name, value, allowed)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [rows, columns] with at least one of each"
        )


def gradient_matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype] = GRADIENT_DTYPES) -> None:
    """Refuse anything but a 2-D gradient with at least one column; a batch that used no row of a table has no rows."""
    dtype_in(name, value, allowed)
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [rows, columns] with at least one column"
        )


def last_dim(name: str, value: Tensor, size: int, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse a tensor whose dtype is not allowed or whose last dimension is not `size`."""
    dtype_in(name, value, allowed)
    if value.ndim == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but its last dimension must be {size}")


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different shapes."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must match {other_name}, {tuple(other.shape)}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different dtypes."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {names((value.dtype,))}, but must match {other_name}, {names((other.dtype,))}"
        )


def same_device(**tensors: Tensor) -> None:
    """Refuse tensors on different devices."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device}, but must be on {first.device}, where {first_name} is"
            )


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return `shape` as (N, K); refuse anything but two positive integers."""
    values = tuple(shape)
    if len(values) != 2 or not all(isinstance(size, int) and size > 0 for size in values):
        raise ValueError(f"{name} is {values}, but must be two positive integers (rows, columns)")
    return values[0], values[1]


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not listed."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def group_size(value: int) -> None:
    """Refuse a group size that is not allowed."""
    one_of("group_size", value, GROUP_SIZES)


def mantissa_bits(value: int) -> None:
    """Refuse a number of mantissa bits that is not allowed."""
    one_of("mantissa_bits", value, MANTISSA_BITS)


def integer(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be an integer from {low} to {high}")


def number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse anything but a finite number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite or not low <= value <= high or (open_low and value == low):
        relation = "above" if open_low else "from"
        raise ValueError(f"{name} is {value}, but must be finite, {relation} {low} to {high}")


def threshold(name: str, value: int) -> None:
    """Refuse a theta that an accumulator cannot reach."""
    integer(name, value, 1, ACCUM_MAX)


def vote_clock(
    seed: int, step: int | Tensor, tensor_id: int, *, last_step: int = RESERVED_STEP - 1, values: bool = True
) -> None:
    """Refuse dither coordinates that do not fit Philox, a 64-bit seed and two 32-bit counters, or a step past the last.

    The value of a step that is a tensor is looked at unless `values` is False.
    """
    integer("seed", seed, 0, 2**64 - 1)
    integer("tensor_id", tensor_id, 0, 2**32 - 1)
    if isinstance(step, Tensor):
        tensor("step", step, torch.int64, ())
        if values:
            values_between("step", step, 0, last_step)
    else:
        integer("step", step, 0, last_step)


def vote_rate(rate: float | Tensor, *, values: bool = True) -> None:
    """Refuse a rate that is neither a number in [0, 127] nor a 0-dim float32 tensor.

    The value of a rate that is a tensor is looked at unless `values` is False.
    """
    if isinstance(rate, Tensor):
        tensor("rate", rate, torch.float32, ())
        if not values or rate.device.type == "meta":
            return
        rate = float(rate)
    number("rate", rate, 0.0, MAX_RATE)


def group_ids_fit(num_rows: int, num_columns: int, size: int) -> None:
    """Refuse a weight with more groups than the 32-bit dither counter can tell apart."""
    groups = num_rows * groups_per_row(num_columns, size)
    if groups > 2**32:
        raise ValueError(
            f"shape {(num_rows, num_columns)} has {groups} groups, but at most {2**32} can be dithered"
        )


def values_between(name: str, value: Tensor, low: int, high: int) -> None:
    """Refuse a tensor with an element outside [low, high]; a meta tensor has no elements to look at."""
    if value.numel() == 0 or value.device.type == "meta":
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        raise ValueError(f"{name} holds {worst}, but its elements must lie from {low} to {high}")


def gradient_of(
    weight: Weight, name: str, value: Tensor, rows: Tensor | None, allowed: Sequence[torch.dtype]
) -> None:
    """Refuse a gradient or votes that do not fit `weight`, or the `rows` of it that are updated."""
    dtype_in(name, value, allowed)
    num_rows = weight.shape[0] if rows is None else rows.shape[0]
    if tuple(value.shape) != (num_rows, weight.shape[1]):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {(num_rows, weight.shape[1])}")
    same_device(weight=weight.exponents, **{name: value})


def row_ids(rows: Tensor | None, device: torch.device) -> None:
    """Refuse row ids that are not int64 [R] on the device of the weight or gradient."""
    if rows is None:
        return
    dtype_in("rows", rows, (torch.int64,))
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}, but must be one-dimensional")
    if rows.device != device:
        raise ValueError(f"rows is on {rows.device}, but must be on {device}")


def row_values(rows: Tensor | None, num_rows: int) -> None:
    """Refuse row ids outside -1 .. num_rows - 1, or one named twice: its gradients must be summed before it votes."""
    if rows is None or rows.device.type == "meta":
        return
    values_between("rows", rows, -1, num_rows - 1)
    used = rows[rows >= 0]
    if used.unique().numel() != used.numel():
        raise ValueError("rows names a row more than once, but each must be unique; sum its gradients first")


def conv_positions(length: int, kernel_size: int, stride: int, padding: int) -> int:
    """Return the number of positions of a convolution; refuse a geometry in which no window fits."""
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    integer("stride", stride, 1, 2**31 - 1)
    integer("padding", padding, 0, 2**31 - 1)
    integer("length", length, 1, 2**63 - 1)
    if length + 2 * padding < kernel_size:
        raise ValueError(
            f"kernel_size is {kernel_size}, but the padded length is only {length + 2 * padding}"
        )
    return (length + 2 * padding - kernel_size) // stride + 1


def conv_columns(num_columns: int, kernel_size: int) -> None:
    """Refuse a weight whose columns are not a whole number of kernels."""
    if num_columns % kernel_size:
        raise ValueError(
            f"weight has {num_columns} columns, but they must be a multiple of kernel_size {kernel_size}"
        )


def conv_input(x_BCL: Tensor, num_columns: int, kernel_size: int) -> None:
    """Refuse an input that is not [B, C, L] with C * kernel_size columns of weight."""
    dtype_in("x_BCL", x_BCL, FLOAT_DTYPES)
    integer("kernel_size", kernel_size, 1, 2**31 - 1)
    if x_BCL.ndim != 3 or x_BCL.shape[1] * kernel_size != num_columns:
        raise ValueError(
            f"x_BCL has shape {tuple(x_BCL.shape)}, but must be [batch, channels, length] "
            f"with channels * {kernel_size} = {num_columns}"
        )


def conv_gradient(grad_BNP: Tensor, num_rows: int | None, positions: int) -> None:
    """Refuse a gradient that is not [B, N, P] for a convolution's output."""
    dtype_in("grad_BNP", grad_BNP, FLOAT_DTYPES)
    fits = grad_BNP.ndim == 3 and grad_BNP.shape[2] == positions and num_rows in (None, grad_BNP.shape[1])
    if not fits:
        expected = f"[batch, {'rows' if num_rows is None else num_rows}, {positions}]"
        raise ValueError(f"grad_BNP has shape {tuple(grad_BNP.shape)}, but must be {expected}")


def one_row(name: str, weight: Weight) -> None:
    """Refuse a weight of more than one row, where a vector of channels is meant."""
    if weight.shape[0] != 1:
        raise ValueError(f"{name} has shape {weight.shape}, but must have one row")


def rows_of(rows: Tensor | None, grad: Tensor) -> None:
    """Refuse row ids that are not one int64 a gradient row, on the gradient's device."""
    row_ids(rows, grad.device)
    if rows is not None and rows.shape[0] != grad.shape[0]:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, but must be {(grad.shape[0],)}, one id a gradient row"
        )


def out_weight(out: Any, weight: Any) -> None:
    """Refuse a weight to write into that differs from the one updated in shape, format or device."""
    if out is None:
        return
    for field in ("shape", "group_size", "mantissa_bits", "device"):
        if getattr(out, field) != getattr(weight, field):
            raise ValueError(
                f"out has {field} {getattr(out, field)}, but must match weight, {getattr(weight, field)}"
            )


def fault_counter(faults: Tensor | None, grad: Tensor) -> None:
    """Refuse a counter of faulty rows that is not int64 [] on the gradient's device."""
    if faults is not None:
        tensor("faults", faults, torch.int64, ())
        same_device(grad=grad, faults=faults)


def last_dim_not_empty(name: str, value: Tensor) -> None:
    """Refuse a tensor without a last dimension, or with an empty one."""
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but needs a last dimension of at least 1")


def code_columns(name: str, num_columns: int) -> None:
    """Refuse codes so wide that the sums of a search would round."""
    if num_columns > MAX_CODE_DIM:
        raise ValueError(f"{name} has {num_columns} columns, but a codebook may have at most {MAX_CODE_DIM}")


def codebook(weight: Any) -> None:
    """Refuse a weight whose rows cannot be searched exactly: too wide, or with mantissa bits."""
    code_columns("weight", weight.shape[1])
    if weight.mantissa_bits:
        raise ValueError(f"weight has mantissa_bits {weight.mantissa_bits}, but a codebook must have 0")


def buckets(num_codes: int, num_columns: int, sign_bits: int) -> None:
    """Refuse a number of sign bits for which there are too few columns, or too few codes to put one into each bucket."""
    integer("sign_bits", sign_bits, 0, min(num_columns, MAX_SIGN_BITS))
    if num_codes < 2**sign_bits:
        raise ValueError(
            f"sign_bits is {sign_bits}, but {2**sign_bits} buckets need as many codes, and there are {num_codes}"
        )


def usage_of(num_codes: int | None, usage: Tensor, out: Tensor | None) -> None:
    """Refuse counters of use that are not int16 [N], or an `out` that they do not fit."""
    dtype_in("usage", usage, (torch.int16,))
    if usage.ndim != 1 or usage.numel() == 0 or num_codes not in (None, usage.numel()):
        expected = f"({'codes' if num_codes is None else num_codes},)"
        raise ValueError(
            f"usage has shape {tuple(usage.shape)}, but must be {expected} with at least one code"
        )
    if out is not None:
        tensor("out", out, torch.int16, usage.shape)
        same_device(usage=usage, out=out)


def code_window(num_codes: int, first: int | Tensor, window: int, *, values: bool = True) -> None:
    """Refuse a window that is longer than the table, or one whose start is negative.

    The value of a start that is a tensor is looked at unless `values` is False.
    """
    integer("window", window, 0, num_codes)
    if isinstance(first, Tensor):
        tensor("first", first, torch.int64, ())
        if values:
            values_between("first", first, 0, 2**62)
    else:
        integer("first", first, 0, 2**62)


def expert_matrix(name: str, value: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse activations that are not [slots, columns] of an allowed dtype; there may be no slots."""
    dtype_in(name, value, allowed)
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be [slots, columns] with at least one column"
        )


def expert_pair(grad_MN: Tensor, x_MK: Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse the gradient of an output and the input that it came from, unless they are of one dtype and as many slots."""
    expert_matrix("grad_MN", grad_MN, allowed)
    expert_matrix("x_MK", x_MK, allowed)
    same_dtype("x_MK", x_MK, "grad_MN", grad_MN)
    if x_MK.shape[0] != grad_MN.shape[0]:
        raise ValueError(
            f"x_MK has shape {tuple(x_MK.shape)}, but must have as many slots as grad_MN, {tuple(grad_MN.shape)}"
        )


def expert_slots(experts_M: Tensor, num_slots: int, **beside: Tensor) -> None:
    """Refuse expert ids that are not int64 with one entry a slot of the activations, on their device."""
    dtype_in("experts_M", experts_M, (torch.int64,))
    if tuple(experts_M.shape) != (num_slots,):
        raise ValueError(
            f"experts_M has shape {tuple(experts_M.shape)}, but must be {(num_slots,)}, one expert a slot"
        )
    same_device(**beside, experts_M=experts_M)


def stacked_rows(name: str, num_rows: int, num_groups: int) -> int:
    """Return the rows of one matrix of a stack; refuse a stack whose rows are not a whole number for each."""
    integer("num_groups", num_groups, 1, 2**31 - 1)
    if num_rows % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, but must divide the rows of {name}, which has {num_rows}"
        )
    return num_rows // num_groups


def expert_rows(weight: Weight, num_groups: int) -> int:
    """Return the rows of one expert; refuse a stacked weight whose rows are not a whole number for each."""
    return stacked_rows("weight", weight.shape[0], num_groups)


def decode_slots(q_BHK: Tensor, keys_BSK: Tensor, bias_BS: Tensor, *, value_width: int, scale: float) -> None:
    """Refuse queries, slots and biases that do not fit each other, a value width beyond the slots, or a bad scale."""
    dtype_in("q_BHK", q_BHK, FLOAT_DTYPES)
    if q_BHK.ndim != 3 or q_BHK.shape[2] == 0:
        raise ValueError(
            f"q_BHK has shape {tuple(q_BHK.shape)}, but must be [batch, heads, columns] with at least one column"
        )
    is_tensor("keys_BSK", keys_BSK)
    same_dtype("keys_BSK", keys_BSK, "q_BHK", q_BHK)
    batch, _, columns = q_BHK.shape
    if keys_BSK.ndim != 3 or keys_BSK.shape[0] != batch or keys_BSK.shape[2] != columns:
        raise ValueError(
            f"keys_BSK has shape {tuple(keys_BSK.shape)}, but must be [{batch}, slots, {columns}], as q_BHK has it"
        )
    tensor("bias_BS", bias_BS, torch.promote_types(q_BHK.dtype, torch.float32), keys_BSK.shape[:2])
    same_device(q_BHK=q_BHK, keys_BSK=keys_BSK, bias_BS=bias_BS)
    integer("value_width", value_width, 1, columns)
    number("scale", scale, 0.0, 2.0**15, open_low=True)


def slot_bias(bias_BS: Tensor) -> None:
    """Refuse a bias that is NaN or +inf; -inf hides its slot."""
    if bias_BS.device.type != "meta" and not bool((bias_BS < math.inf).all()):
        raise ValueError("bias_BS holds NaN or +inf, but its elements must be finite or -inf")


def denoise_loop(
    latent_BL: Tensor,
    tokens_BPD: Tensor,
    weights: dict[str, Any],
    alphas: Sequence[float],
    halt_threshold: float | None,
    allowed: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Refuse latents, tokens, weights (by the names of the arguments), alphas or a threshold that do not fit each other."""
    if not isinstance(alphas, Sequence) or isinstance(alphas, str):
        raise TypeError(f"alphas is a {type(alphas).__name__}, but must be a sequence of numbers")
    if not alphas:
        raise ValueError("alphas has no numbers, but must have one a step, at least one")
    for alpha in alphas:
        number("alphas", alpha, 0.0, 1.0, open_low=True)
    if halt_threshold is not None:
        number("halt_threshold", halt_threshold, 0.0, 1.0, open_low=True)
    width, size = weights["latent_in"].shape
    shapes = {"query": (width, width), "latent_out": (size, width)}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, but must be {shape}")
    rows, columns = weights["step_rows"].shape
    if rows < len(alphas) or columns != width:
        raise ValueError(
            f"step_rows has shape {(rows, columns)}, but must have {width} columns and a row for each of {len(alphas)} steps"
        )
    dtype_in("latent_BL", latent_BL, allowed)
    if latent_BL.ndim != 2 or latent_BL.shape[1] != size:
        raise ValueError(f"latent_BL has shape {tuple(latent_BL.shape)}, but must be [samples, {size}]")
    same_dtype("tokens_BPD", tokens_BPD, "latent_BL", latent_BL)
    fits = tokens_BPD.ndim == 3 and tokens_BPD.shape[0] == latent_BL.shape[0] and tokens_BPD.shape[2] == width
    if not fits or tokens_BPD.shape[1] == 0:
        raise ValueError(
            f"tokens_BPD has shape {tuple(tokens_BPD.shape)}, but must be [{latent_BL.shape[0]}, tokens, {width}] "
            "with at least one token"
        )
    same_device(
        latent_BL=latent_BL,
        tokens_BPD=tokens_BPD,
        **{name: weight.exponents for name, weight in weights.items()},
    )


def flag(name: str, value: object) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but must be True or False")


def node_matrix(name: str, value: Tensor) -> None:
    """Refuse vectors of nodes that are not float [N, D] with at least one of each."""
    matrix(name, value, FLOAT_DTYPES)


def edge_slots(neighbours_RJ: Tensor, **beside: Tensor) -> None:
    """Refuse neighbours that are not int32 or int64 [R, J] with at least one slot, on the device of what is beside them."""
    dtype_in("neighbours_RJ", neighbours_RJ, (torch.int32, torch.int64))
    if neighbours_RJ.ndim != 2 or neighbours_RJ.shape[1] == 0:
        raise ValueError(
            f"neighbours_RJ has shape {tuple(neighbours_RJ.shape)}, but must be [rows, slots] with at least one slot"
        )
    same_device(**beside, neighbours_RJ=neighbours_RJ)


def edge_signs(signs_RJ: Tensor, neighbours_RJ: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse signs that are not one a slot, in the dtype and on the device of what they multiply."""
    is_tensor("signs_RJ", signs_RJ)
    same_dtype("signs_RJ", signs_RJ, other_name, other)
    same_shape("signs_RJ", signs_RJ, "neighbours_RJ", neighbours_RJ)
    same_device(**{other_name: other}, signs_RJ=signs_RJ)


def edge_gradient(name: str, grad_RD: Tensor, neighbours_RJ: Tensor) -> None:
    """Refuse a gradient of gathered rows that is not float [R, D], one row for each row of neighbours."""
    dtype_in(name, grad_RD, FLOAT_DTYPES)
    edge_slots(neighbours_RJ, **{name: grad_RD})
    if grad_RD.ndim != 2 or grad_RD.shape[1] == 0 or grad_RD.shape[0] != neighbours_RJ.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(grad_RD.shape)}, but must be [{neighbours_RJ.shape[0]}, width], "
            "one row for each row of neighbours_RJ"
        )


def neighbour_tables(
    neighbours_NJ: Tensor, scores_NJ: Tensor, signs: Any, out: tuple[Tensor, Tensor, Any] | None
) -> None:
    """Refuse tables of neighbours, scores and signs that do not fit each other, or an `out` that they do not fit."""
    matrix("neighbours_NJ", neighbours_NJ, (torch.int32,))
    num_slots = neighbours_NJ.shape[1]
    if num_slots > MAX_NEIGHBOURS:
        raise ValueError(f"neighbours_NJ has {num_slots} slots a row, but may have at most {MAX_NEIGHBOURS}")
    tensor("scores_NJ", scores_NJ, torch.int8, neighbours_NJ.shape)
    if tuple(signs.shape) != tuple(neighbours_NJ.shape):
        raise ValueError(
            f"signs has shape {tuple(signs.shape)}, but must match neighbours_NJ, {tuple(neighbours_NJ.shape)}"
        )
    same_device(neighbours_NJ=neighbours_NJ, scores_NJ=scores_NJ, signs=signs.exponents)
    if out is None:
        return
    if not isinstance(out, tuple) or len(out) != 3:
        raise TypeError(f"out is a {type(out).__name__}, but must be a tuple of neighbours, scores and signs")
    tensor("out[0]", out[0], torch.int32, neighbours_NJ.shape)
    tensor("out[1]", out[1], torch.int8, neighbours_NJ.shape)
    same_device(neighbours_NJ=neighbours_NJ, **{"out[0]": out[0], "out[1]": out[1]})
    out_weight(out[2], signs)


def edge_pairs(sources_M: Tensor, targets_M: Tensor, neighbours_NJ: Tensor) -> None:
    """Refuse pairs that are not two int64 vectors of one length, on the device of the table."""
    for name, value in (("sources_M", sources_M), ("targets_M", targets_M)):
        dtype_in(name, value, (torch.int64,))
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be one-dimensional")
    same_shape("targets_M", targets_M, "sources_M", sources_M)
    same_device(neighbours_NJ=neighbours_NJ, sources_M=sources_M, targets_M=targets_M)


def ngrams(codes_BP: Tensor, order: int, num_rows: int, salt: int, previous: Tensor | None) -> None:
    """Refuse codes that are not int64 [B, P], an order or a table that is out of range, or codes before them that do not fit."""
    dtype_in("codes_BP", codes_BP, (torch.int64,))
    if codes_BP.ndim != 2:
        raise ValueError(f"codes_BP has shape {tuple(codes_BP.shape)}, but must be [batch, positions]")
    integer("order", order, 1, MAX_ORDER)
    integer("num_rows", num_rows, 1, 2**31 - 1)
    integer("salt", salt, 0, 2**32 - 1)
    if previous is not None:
        tensor("previous", previous, torch.int64, (codes_BP.shape[0], order - 1))
        same_device(codes_BP=codes_BP, previous=previous)


def strengths_of(strengths: Tensor, out: Tensor | None) -> None:
    """Refuse strengths that are not int8 [N], or an `out` that they do not fit."""
    dtype_in("strengths", strengths, (torch.int8,))
    if strengths.ndim != 1 or strengths.numel() == 0:
        raise ValueError(
            f"strengths has shape {tuple(strengths.shape)}, but must be one-dimensional with at least one row"
        )
    if out is not None:
        tensor("out", out, torch.int8, strengths.shape)
        same_device(strengths=strengths, out=out)


def strength_rule(gain: int, shift: int) -> None:
    """Refuse a gain or a shift that is out of range."""
    integer("gain", gain, 0, STRENGTH_MAX)
    integer("shift", shift, 0, 7)
