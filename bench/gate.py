"""Green before fast: no number for an op that does not agree with the reference, nor for a peer that is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arbitor.optimized import settings
from arbitor.reference import ops as reference_ops
from bench import cases
from bench.cases import BenchRow, Case
from bench.inputs import INPUTS, MOST, Maker, Sizes
from bench.peers import Peer

KEPT = ("G", "J", "E", "R", "order", "stride", "padding", "probes", "sign_bits", "halting", "float_bytes")
"""Sizes that choose a code path rather than an amount of work."""

MAX_TOKENS = 512
"""Activation rows of a check, at most, unless the family's MOST says otherwise; up to there M is the case's own."""

PEER_ERROR = 1e-2
"""Norm of a peer's error over the norm of the result: bfloat16 operands stay below it, another function does not."""


class Red(Exception):
    """An implementation does not compute what it should; its message says where."""


def small(row: BenchRow, sizes: Sizes) -> Sizes:
    """Return the sizes at which an op is checked: the tiny shape's, with what chooses a code path from those that are timed.

    The MOST of the family, in `bench/inputs/<family>.py`, says how far a size is the case's own. Beyond it no other path is
    left: tiles have their full width, the last is ragged, sums are split, a program takes more than one tile.
    """
    tiny = row.shapes.get("tiny", sizes)
    most: dict[str, int | tuple[int, ...]] = {**tiny, **MOST.get(row.family, {})}
    tokens = most.get("M")
    if isinstance(tokens, int):
        most["M"] = max(MAX_TOKENS, tokens)
    return {name: size if name in KEPT else _checked(size, most[name]) for name, size in sizes.items()}


def _checked(size: int, most: int | tuple[int, ...]) -> int:
    """Return the size of a check for the size that is timed."""
    if isinstance(most, int):
        return min(size, most)
    return max((reached for reached in most if reached <= size), default=size)


def called_with(case: Case, op: str) -> Sizes:
    """Return the sizes that a case calls an op with.

    A compound calls it with its own if the op has the same ones, a dtype aside. Else it is the op's shape of that name, or its tiny
    one.
    """
    shapes = cases.rows()[op].shapes
    if op == case.row.name or set(shapes["tiny"]) | {"float_bytes"} == set(case.sizes) | {"float_bytes"}:
        return case.sizes
    return shapes.get(case.shape, shapes["tiny"])


class Gate:
    """Checks each op once for each path and for each size that it is checked at, and remembers the verdict."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.verdicts: dict[tuple[str, str | None, tuple[tuple[str, int], ...]], str | None] = {}

    def ours(self, op: str, sizes: Sizes) -> None:
        """Raise Red unless our op agrees with the reference, in the way that its row of the table says.

        Args:
            sizes: those that are timed; what is checked is `small` of them.
        """
        row = cases.rows()[op]
        checked = small(row, sizes)
        key = (op, settings.path(), tuple(sorted(checked.items())))
        if key not in self.verdicts:
            self.verdicts[key] = self._compare(op, checked)
        if self.verdicts[key] is not None:
            raise Red(f"{op} differs from the reference at {dict(checked)}: {self.verdicts[key]}")

    def _compare(self, op: str, sizes: Sizes) -> str | None:
        from arbitor.optimized import ops as optimized_ops
        from conformance.case import Case as Arguments
        from conformance.families import compare
        from conformance.subject import Subject

        args, kwargs = INPUTS[op](Maker("cpu", f"gate {op}"), sizes)
        # The subject says where.
        kwargs.pop("device", None)
        try:
            compare(
                Subject(optimized_ops, "arbitor.optimized.ops", str(self.device)), op, Arguments(args, kwargs)
            )
        except Exception as error:
            # Any failure at all means that there is nothing to time.
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def peer(self, op: str, peer: Peer, sizes: Sizes) -> None:
        """Raise Red unless a peer computes the op, within the rounding of its own dtype; `sizes` as for `ours`."""
        if not peer.checked:
            return
        sizes = small(cases.rows()[op], sizes)
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
