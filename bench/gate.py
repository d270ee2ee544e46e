"""Green before fast: no number for an op that does not agree with the reference, nor for a peer that is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from bench.cases import Case
from bench.inputs import INPUTS, Maker, Sizes
from bench.peers import Peer

KEPT = ("G", "J", "stride", "padding", "float_bytes")
"""Sizes that choose a code path rather than an amount of work."""

MAX_TOKENS = 512
"""Activation rows of a check, at most; up to there M is the case's own, because kernels are chosen by it."""

PEER_ERROR = 1e-2
"""Norm of a peer's error over the norm of the result: bfloat16 operands stay below it, another function does not."""


class Red(Exception):
    """An implementation does not compute what it should; its message says where."""


def small(case: Case) -> Sizes:
    """Return the sizes at which a case is checked: the tiny shape's, with what chooses a code path from the case."""
    tiny = case.row.shapes.get("tiny", case.sizes)
    return {name: _small(name, size, tiny.get(name, size)) for name, size in case.sizes.items()}


def _small(name: str, size: int, tiny: int) -> int:
    if name in KEPT:
        return size
    return min(size, MAX_TOKENS if name == "M" else tiny)


class Gate:
    """Checks each op once for each size that it is checked at, and remembers the verdict."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.verdicts: dict[tuple[str, tuple[tuple[str, int], ...]], str | None] = {}

    def ours(self, op: str, sizes: Sizes) -> None:
        """Raise Red unless our op agrees with the reference, in the way that its row of the table says."""
        key = (op, tuple(sorted(sizes.items())))
        if key not in self.verdicts:
            self.verdicts[key] = self._compare(op, sizes)
        if self.verdicts[key] is not None:
            raise Red(f"{op} differs from the reference at {dict(sizes)}: {self.verdicts[key]}")

    def _compare(self, op: str, sizes: Sizes) -> str | None:
        from arbitor.optimized import ops as optimized_ops
        from conformance.cases import Case as Arguments
        from conformance.cases import compare
        from conformance.subject import Subject

        args, kwargs = INPUTS[op](Maker("cpu", f"gate {op}"), sizes)
        kwargs.pop("device", None)  # the subject says where
        try:
            compare(
                Subject(optimized_ops, "arbitor.optimized.ops", str(self.device)), op, Arguments(args, kwargs)
            )
        except Exception as error:  # any failure at all means that there is nothing to time
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def peer(self, op: str, peer: Peer, sizes: Sizes) -> None:
        """Raise Red unless a peer computes the op, within the rounding of its own dtype."""
        if not peer.checked:
            return
        arguments = INPUTS[op](Maker(self.device, f"gate {op}"), sizes)
        output = peer.build(arguments, sizes)()
        args, kwargs = arguments
        wide = [_widened(value) for value in args]
        expected = getattr(reference_ops, op)(
            *wide, **{name: _widened(value) for name, value in kwargs.items()}
        )
        output, expected = peer.matched(output, expected)
        for got, want in zip(_tensors(output), _tensors(expected), strict=True):
            error = relative_error(got, want)
            if not error <= PEER_ERROR:
                raise Red(f"peer {peer.name} of {op} is off by {error:.2g} of the result at {dict(sizes)}")


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of `want`; infinite for another shape."""
    if got.shape != want.shape:
        return float("inf")
    difference = got.to(torch.float64) - want.to(torch.float64)
    return float(difference.norm() / want.to(torch.float64).norm())


def _widened(value: Any) -> Any:
    """Return a float tensor in float64, a dtype as float64, and anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
