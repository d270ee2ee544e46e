"""The needs of every launch: that Triton can run here, and arguments that do not make it compile again.

Triton compiles a kernel anew for each integer type and, unless told otherwise, for values of 1 and multiples of 16. Sizes
that change from batch to batch are therefore passed through `do_not_specialize`, and 32-bit counters as signed words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import jit

from arbitor.optimized import settings
from arbitor.optimized.layouts import MAX_COLUMNS
from arbitor.reference import checks
from arbitor.reference.constants import RESERVED_STEP

MAX_PROGRAMS = 2**31 - 1
"""Programs that one launch can have along its first axis."""

_WORD = 1 << 32


def hash_callees_first(module: Any) -> None:
    """Let Triton hash a function that a kernel calls, before it takes over what that hash has found.

    Later releases of Triton do so. With 3.6 the name of a kernel in the cache depends on what the process has launched before, so
    that another process does not find it. A release whose private names are others is left as it is.
    """
    finder = getattr(module, "DependenciesFinder", None)
    take_over = getattr(finder, "_update_hash", None)
    if finder is None or take_over is None:
        return

    def after_its_hash(self: Any, func: Any, *more: Any, **named: Any) -> Any:
        # The hash is made when it is asked for.
        getattr(func, "cache_key", None)
        return take_over(self, func, *more, **named)

    finder._update_hash = after_its_hash


hash_callees_first(jit)


def runs_here(tensor: Tensor) -> None:
    """Refuse a tensor that Triton cannot reach, and say what would help."""
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and triton.knobs.runtime.interpret):
        return
    raise RuntimeError(
        f"a tensor is on {tensor.device}, but Triton kernels run on CUDA; move it there, use arbitor.reference.ops, "
        "or set TRITON_INTERPRET=1 before importing arbitor.optimized to run kernels in Triton's interpreter"
    )


def may_look_at_values(value: object) -> bool:
    """Return whether a value check may run: of a number always, of a tensor where nothing keeps the host from waiting for it.

    A check waits for the device, which no graph capture survives.
    """
    if not isinstance(value, Tensor):
        return True
    if not settings.value_checks():
        return False
    return not is_recorded(value.device)


def is_recorded(device: torch.device) -> bool:
    """Return whether launches on a device are being recorded as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def values_between(name: str, value: Tensor, low: int, high: int) -> None:
    """Refuse a tensor with an element outside [low, high], where value checks may run."""
    if may_look_at_values(value):
        checks.values_between(name, value, low, high)


def different(name: str, value: Tensor) -> None:
    """Refuse a tensor with rows in which a value stands twice, where value checks may run."""
    if may_look_at_values(value):
        checks.different(name, value)


def announce_written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote tensors in place. Autograd then refuses a gradient through their earlier values.

    Torch notices the writes of its own functions, but not those of a kernel.
    """
    torch.autograd.graph.increment_version(tensors)


def row_ids(rows: Tensor | None, num_rows: int, device: torch.device) -> None:
    """Refuse row ids that are not unique int64 [R]; -1 marks an unused slot. Values are checked only where value checks may run."""
    checks.row_ids(rows, device)
    if rows is not None and may_look_at_values(rows):
        checks.row_values(rows, num_rows)


def vote_rate(rate: float | Tensor, device: torch.device) -> None:
    """Refuse a rate that is not allowed, or a tensor elsewhere. Its value is checked only where value checks may run."""
    checks.vote_rate(rate, values=may_look_at_values(rate))
    same_device("rate", rate, device)


def same_device(name: str, value: object, device: torch.device) -> None:
    """Refuse a tensor on another device than the kernel's."""
    if isinstance(value, Tensor) and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but must be on {device}")


def row_grid(num_rows: int, row_blocks: int) -> tuple[int]:
    """Return the grid of a kernel that gives each row `row_blocks` programs; refuse more than a launch can have."""
    if num_rows * row_blocks > MAX_PROGRAMS:
        raise ValueError(
            f"{num_rows} rows need {num_rows * row_blocks} programs, but a launch has at most {MAX_PROGRAMS}"
        )
    return (num_rows * row_blocks,)


def gradient_columns(num_columns: int) -> None:
    """Refuse a gradient whose columns a kernel cannot count in 32 bits."""
    if num_columns > MAX_COLUMNS:
        raise ValueError(f"grad_NK has {num_columns} columns, but may have at most {MAX_COLUMNS}")


def signed_word(value: int) -> int:
    """Return a uint32 as the int32 with the same bits, so that every value has one kernel argument type."""
    return value - _WORD if value >= _WORD // 2 else value


def row_tile(size: int, most: int) -> tuple[int, int]:
    """Return the elements of a tile along a row of `size`, a power of two of at most `most`, and the tiles of a row."""
    block = min(most, triton.next_power_of_2(size))
    return block, triton.cdiv(size, block)


def column_step(num_columns: int) -> int:
    """Return what `known_columns` takes for rows of so many columns: 8 for an odd multiple of 8, else 1.

    Triton knows multiples of 16 by itself. Of other arguments it knows nothing, and reads rows one element at a time.
    """
    return 8 if num_columns % 16 == 8 else 1


def warps_of(lanes: int) -> int:
    """Return the warps of a program of so many lanes: eight lanes a thread, but at most four warps."""
    return max(1, min(4, lanes // 256))


@dataclass(frozen=True)
class Clock:
    """Dither coordinates as kernel arguments. A step on the device lets a captured graph replay with fresh dither."""

    seed_low: int
    seed_high: int
    step: int | Tensor
    tensor_id: int
    step_on_device: bool

    @classmethod
    def of(
        cls,
        seed: int,
        step: int | Tensor,
        tensor_id: int,
        device: torch.device,
        *,
        last_step: int = RESERVED_STEP - 1,
    ) -> Clock:
        """Return the checked coordinates. The value of a step on the device is checked only where value checks may run."""
        checks.vote_clock(seed, step, tensor_id, last_step=last_step, values=may_look_at_values(step))
        same_device("step", step, device)
        on_device = isinstance(step, Tensor)
        return cls(
            seed_low=signed_word(seed % _WORD),
            seed_high=signed_word(seed // _WORD),
            step=step if isinstance(step, Tensor) else signed_word(step),
            tensor_id=signed_word(tensor_id),
            step_on_device=on_device,
        )

    def of_tensor(self, tensor_id: int) -> Clock:
        """Return the coordinates of another tensor at the same step, whose value is not looked at again."""
        checks.integer("tensor_id", tensor_id, 0, _WORD - 1)
        return replace(self, tensor_id=signed_word(tensor_id))
