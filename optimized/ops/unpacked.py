"""Weights as floats for products of the library: unpacked for one product, or once for all products of a training pass.

A training pass multiplies by each matrix in its forward pass and again in its backward pass. Within `Copies.in_pass` every matrix
is unpacked once. What an earlier pass has multiplied by is unpacked in one launch, at the first product. Anything else is unpacked
at its own first product.

A copy is of use only while it is equal to its weight. So it never outlives its pass. It stands for one `DeviceWeight` object, which
the pass holds, so that no other weight can take its place. Codes and exponents must have the version and the address that they had
when they were unpacked. The copy holds their memory, so that no other memory can have this address.

Whatever writes to a tensor gives it another version: a function of torch by itself, a kernel by `announce_written`. Three writers
give none, and none of them may write to a weight while a pass is open: the replay of a graph, a function of torch that is given
`Tensor.data`, and another library that shares the memory. The trainer replays the graphs of steps between passes.

A copy is read on the stream that wrote it. One that was written in a recording is read in the recordings of its pass alone. They
share memory and are replayed in their order (`training.recording.recorded`). In every other case a product unpacks its weight for
itself, as it does outside of a pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from arbitor.optimized.kernels.launch import is_recorded
from arbitor.optimized.kernels.scale import dense_rows
from arbitor.optimized.kernels.unpack import unpacked_together
from arbitor.optimized.layouts import DeviceWeight

OUTPUT_MULTIPLE = 8
"""Number that divides the outputs of the library's product: rows at odd addresses of bfloat16 would take six times as long."""

MOST_WEIGHTS = 2**27
"""Most weights of a model whose copies a pass keeps: 256 MiB of bfloat16. A larger model would have them at the peak of its memory,
and its matrices are so large that a launch for each is no loss."""

_open: tuple[_Pass, ...] = ()
"""The passes that are open. They are no context variable, because autograd's threads must see them."""

_opening = threading.Lock()


def unpacked(
    weight: DeviceWeight, dtype: torch.dtype, *, num_groups: int = 1, row_multiple: int = 1
) -> Tensor:
    """Return all of a weight as `dense_rows` does. Nobody may write to the result, which others may read.

    Args:
        weight, dtype, num_groups: as for `dense_rows`.
        row_multiple: 1 or OUTPUT_MULTIPLE.
    """
    for each in _open:
        copy = each.copy_of(weight, dtype, num_groups)
        if copy is not None:
            return copy[: triton.cdiv(weight.shape[0] // num_groups, row_multiple) * row_multiple]
    return dense_rows(weight, dtype, num_groups=num_groups, row_multiple=row_multiple)


class Copies:
    """The copies that the passes of a model make of its weights, each for itself."""

    def __init__(self) -> None:
        """Begin before the first pass."""
        # How many matrices of a stack stand side by side, by the names of the weights that passes have multiplied by.
        self._asked: dict[str, int] = {}

    @contextmanager
    def in_pass(self, weights: Mapping[str, DeviceWeight], dtype: torch.dtype) -> Iterator[None]:
        """Unpack each weight once in the block, which is a pass.

        Args:
            weights: of the model by name, the very objects that it multiplies by.
            dtype: of the activations. Products in another one unpack for themselves.
        """
        global _open
        if sum(math.prod(weight.shape) for weight in weights.values()) > MOST_WEIGHTS:
            yield
            return
        # Torch counts no versions of tensors of inference mode.
        watched = {
            name: weight
            for name, weight in weights.items()
            if not (weight.words.is_inference() or weight.exponents.is_inference())
        }
        taken = _Pass(watched, dtype, self._asked)
        try:
            with _opening:
                _open = (*_open, taken)
            yield
        finally:
            with _opening:
                _open = tuple(each for each in _open if each is not taken)
            taken.end()


@dataclass(frozen=True)
class _Copy:
    """A weight as floats.

    Fields:
        matrix: the weight, as `dense_rows` returns it.
        state: what `_state` said of the weight before it was unpacked.
        memory: of its codes and its exponents, held so that none that comes later has the same address.
    """

    matrix: Tensor
    state: tuple[int, ...]
    memory: tuple[torch.UntypedStorage, ...]


class _Pass:
    """A pass that is open, with the copies that it has made."""

    def __init__(
        self, weights: Mapping[str, DeviceWeight], dtype: torch.dtype, asked: dict[str, int]
    ) -> None:
        self._weights = weights
        self._names = {id(weight): name for name, weight in weights.items()}
        self._dtype = dtype
        self._asked = asked
        self._copies: dict[str, _Copy] = {}
        # Where copies are made and read, by device, since the first product there.
        self._places: dict[torch.device, tuple[object, bool]] = {}

    def copy_of(self, weight: DeviceWeight, dtype: torch.dtype, num_groups: int) -> Tensor | None:
        """Return the copy of a weight, made now if there is none; None if the pass keeps none for such a product."""
        name = self._names.get(id(weight))
        if name is None or dtype is not self._dtype:
            return None
        place = _place(weight.device)
        if weight.device not in self._places:
            self._places[weight.device] = place
            self._make_all(weight.device)
        if place != self._places[weight.device]:
            return None
        # A weight that is multiplied in two forms has a copy of the first.
        if self._asked.setdefault(name, num_groups) != num_groups:
            return None
        copy, state = self._copies.get(name), _state(weight)
        if copy is None or copy.state != state:
            matrix = dense_rows(weight, dtype, num_groups=num_groups, row_multiple=OUTPUT_MULTIPLE)
            copy = self._copies[name] = _Copy(matrix, state, _memory(weight))
        return copy.matrix

    def end(self) -> None:
        """Drop the copies, and let go of the weights."""
        self._names, self._weights = {}, {}
        self._copies.clear()

    def _make_all(self, device: torch.device) -> None:
        """Make the copies of one device that earlier passes have asked for, in one launch."""
        names = [
            name for name, weight in self._weights.items() if name in self._asked and weight.device == device
        ]
        weights = [self._weights[name] for name in names]
        states = [_state(weight) for weight in weights]
        groups = [self._asked[name] for name in names]
        made = unpacked_together(weights, groups, self._dtype, row_multiple=OUTPUT_MULTIPLE)
        for place, matrix in made.items():
            self._copies[names[place]] = _Copy(matrix, states[place], _memory(weights[place]))


def _place(device: torch.device) -> tuple[object, bool]:
    """Return the stream of a device that work goes to now, and whether it is being recorded."""
    if device.type != "cuda":
        return None, False
    return torch.cuda.current_stream(device), is_recorded(device)


def _state(weight: DeviceWeight) -> tuple[int, ...]:
    """Return what changes with every change of a weight: versions and addresses of its codes and exponents."""
    codes, exponents = weight.words, weight.exponents
    return codes._version, codes.data_ptr(), exponents._version, exponents.data_ptr()


def _memory(weight: DeviceWeight) -> tuple[torch.UntypedStorage, ...]:
    """Return the memory in which the codes and the exponents of a weight lie."""
    return weight.words.untyped_storage(), weight.exponents.untyped_storage()
