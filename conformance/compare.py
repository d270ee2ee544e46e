"""The comparers: `exact` and `no_worse` for ops and models, `alike` for pieces of the graph. No other tolerance exists.

Nothing is rounded before comparing. `exact` compares bits. `no_worse` counts errors in roundings: with `wide` the op in
float64 on the same inputs,

    one rounding of an element = half an ulp of its result in the output dtype   u(out) * |wide|
                               + one ulp of the sum it came from, in float32     eps(float32) * magnitude
                               + the smallest subnormal of the output dtype      (results may underflow)

where `magnitude` is the sum of the absolute terms, so that cancellation neither hides an error nor invents one.
The worst element of an implementation may be off by k times the roundings that the worst element of the reference op is
off by, plus one. The reference op is plain PyTorch on the same inputs: it works in float32 or wider, and rounds once
to the dtype that comes out. `alike` bounds the norm of a difference. docs/numerics.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.types import TernaryWeight

ALIKE = 2.0**-16
"""The largest difference of results that many ops have made: 128 roundings of float32, relative to the norm of the output."""

TWIN_ALIKE = {torch.float32: ALIKE, torch.bfloat16: 2.0**-4}
"""The error that a whole model's twin stays below if it computes what float64 does. In bfloat16 twins are off by 0.04 at most."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def exact(got: Any, want: Any, what: str = "output") -> None:
    """Fail unless `got` equals `want` in kind, dtype, shape and every bit. Weights must be equal in all that they hold."""
    if isinstance(want, Tensor):
        _same_kind(got, want, what)
        differs = bits_of(got) != bits_of(want)
        assert not differs.any(), _where(differs, got, want, what)
    elif isinstance(want, TernaryWeight):
        assert isinstance(got, TernaryWeight), f"{what}: is a {type(got).__name__}, want a TernaryWeight"
        for name in ("shape", "group_size", "mantissa_bits"):
            exact(getattr(got, name), getattr(want, name), f"{what}.{name}")
        for name, tensor in want.tensors().items():
            exact(getattr(got, name), tensor, f"{what}.{name}")
    elif isinstance(want, tuple):
        assert isinstance(got, tuple) and len(got) == len(want), f"{what}: got {got!r}, want {want!r}"
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            exact(one, other, f"{what}[{index}]")
    else:
        assert type(got) is type(want) and got == want, f"{what}: got {got!r}, want {want!r}"


def same_sums(got: Any, want: Any, what: str = "output") -> None:
    """Fail unless sums that are exact in any order are equal in every bit but the sign of a zero."""
    exact(unsigned_zeros(got), unsigned_zeros(want), what)


def no_worse(
    got: Tensor, *, twin: Tensor, wide: Tensor, magnitude: Tensor, k: float, what: str = "output"
) -> None:
    """Fail unless the floats `got` err at most k times as much as `twin`, plus one rounding.

    twin:      the reference op, plain PyTorch, on the inputs of the implementation
    wide:      the reference op in float64 on the same values
    magnitude: float64, the sum of the absolute terms of each element
    """
    _same_kind(got, twin, what)
    assert not (magnitude < 0).any(), f"{what}: a sum of absolute terms is negative"
    expected = wide.to(got.dtype)
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(expected)
        assert not differs.any(), f"{name} positions differ: {_where(differs, got, expected, what)}"
    allowed = roundings(twin, wide, magnitude).amax().item() if twin.numel() else 0.0
    allowed = k * allowed + 1.0
    count = roundings(got, wide, magnitude)
    differs = count > allowed
    worst = f"worst {count.max().item() if count.numel() else 0.0:.3g} roundings, allowed {allowed:.3g}: "
    assert not differs.any(), worst + _where(differs, got, wide, what)


def alike(got: Tensor, want: Tensor, what: str = "output", *, times: float = 1.0) -> None:
    """Fail unless the norm of the difference is at most `times` ALIKE of the norm of `want`.

    For outputs that many ops together have made, each of which is held to its own class elsewhere.
    """
    error, allowed = relative_error(got, want, what), times * ALIKE
    assert error <= allowed, f"{what}: off by {error:.3g} of its norm, allowed {allowed:.3g}"


def model_no_worse(
    got: Mapping[str, Tensor],
    *,
    twin: Mapping[str, Tensor],
    wide: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    kind_of: Callable[[str], str] | None = None,
    k: float = 2.0,
) -> None:
    """Fail unless the outputs `got` of a model err at most k times as much as those of its twin in `dtype`, plus one rounding.

    Integers must be equal. Else as `no_worse`, with the norm of an output in place of its elements, and the twin's worst output as
    the yardstick of all: a loss is one number, which the twin may have right by luck. Where there are many outputs of each kind,
    `kind_of` names them and an output's yardstick is its own twin's error, or the median of its kind where that is more. The twin
    itself must be alike, as TWIN_ALIKE says, or it has chosen other codes or experts and measures nothing. In bfloat16 nothing is
    added: one rounding would be half of what a twin is off by.
    """
    assert got.keys() == twin.keys() == wide.keys(), f"outputs are {list(got)}, want {list(wide)}"
    for what in [what for what in wide if not wide[what].is_floating_point()]:
        exact(twin[what], wide[what], f"the twin's {what}")
        exact(got[what], wide[what], what)
    wide = {what: want for what, want in wide.items() if want.is_floating_point()}
    twin_errors = {what: relative_error(twin[what], want, what) for what, want in wide.items()}
    worst = max(twin_errors.values())
    assert worst <= TWIN_ALIKE[dtype], (
        f"the twin is off by {worst:.3g} of the norm of an output, allowed {TWIN_ALIKE[dtype]:.3g}"
    )
    yardsticks = dict.fromkeys(wide, worst) if kind_of is None else _by_kind(twin_errors, kind_of)
    rounding = torch.finfo(dtype).eps if dtype is torch.float32 else 0.0
    for what, want in wide.items():
        error, allowed = relative_error(got[what], want, what), k * yardsticks[what] + rounding
        assert error <= allowed, f"{what}: off by {error:.3g} of its norm, allowed {allowed:.3g}"


def _by_kind(errors: Mapping[str, float], kind_of: Callable[[str], str]) -> dict[str, float]:
    """Return each error, or the median of its kind where that is more."""
    kinds: dict[str, list[float]] = {}
    for what, error in errors.items():
        kinds.setdefault(kind_of(what), []).append(error)
    return {what: max(error, median(kinds[kind_of(what)])) for what, error in errors.items()}


def relative_error(got: Tensor, want: Tensor, what: str) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got, want = got.detach().to(torch.float64), want.detach().to(torch.float64)
    assert want.isfinite().all() and got.isfinite().all(), f"{what} is not finite"
    error, size = (got - want).norm().item(), want.norm().item()
    return error / size if size else math.inf if error else 0.0


def roundings(value: Tensor, wide: Tensor, magnitude: Tensor) -> Tensor:
    """Return the error of each element in its own roundings, and 0 where the result is not finite."""
    one = one_rounding(value.dtype, wide, magnitude)
    finite = wide.to(value.dtype).isfinite() & value.isfinite()
    error = (value.to(torch.float64) - wide).abs() / one
    return torch.where(finite, error, 0.0)


def one_rounding(dtype: torch.dtype, wide: Tensor, magnitude: Tensor) -> Tensor:
    """Return what one rounding may cost each element, float64."""
    out = torch.finfo(dtype)
    return (
        wide.abs() * (out.eps / 2)
        + magnitude * torch.finfo(torch.float32).eps
        + out.smallest_normal * out.eps
    )


def unsigned_zeros(value: Any) -> Any:
    """Return floats with every zero made +0. The sign of a sum that vanishes depends on the order of its terms."""
    if isinstance(value, tuple):
        return tuple(map(unsigned_zeros, value))
    return value + 0.0 if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return every tensor in a value, by path. The value may be a tuple, a weight or a device layout."""
    if isinstance(value, Tensor):
        return {path or "value": value}
    found: dict[str, Tensor] = {}
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            found |= tensors_of(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            found |= tensors_of(item, f"{path}.{name}" if path else str(name))
    elif is_dataclass(value):
        for field in fields(value):
            found |= tensors_of(getattr(value, field.name), f"{path}.{field.name}")
    return found


def _same_kind(got: Any, want: Tensor, what: str) -> None:
    assert isinstance(got, Tensor), f"{what}: is a {type(got).__name__}, want a tensor"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"


def bits_of(value: Tensor) -> Tensor:
    """Return the bits of a tensor, so that -0 differs from +0 and a NaN equals itself."""
    return value.contiguous().view(_BITS[value.element_size()])


def _where(differs: Tensor, got: Tensor, want: Tensor, what: str) -> str:
    """Return the first difference in words."""
    place = tuple(differs.nonzero()[0].tolist())
    number = int(differs.sum())
    return f"{what}{list(place)} is {got[place].item()!r}, want {want[place].item()!r} ({number} elements differ)"
