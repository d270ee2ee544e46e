"""Compile every kernel for a GPU, on a machine without one. Triton's interpreter runs kernels that no compiler would take.

    python -m conformance.compile_kernels               # prints a line for each kernel, and exits with 1 if something is wrong
    python -m conformance.compile_kernels attention     # what the ops of some families launch

Ops are called on drawn and on preset-like inputs while a GPU is pretended. Their launches are stopped where Triton would compile.
Afterwards all specialisations of preset-like inputs are compiled, and the few specialisations of drawn inputs that differ most.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from arbitor.optimized import kernels as kernel_package
from arbitor.optimized import ops
from arbitor.optimized.distributed.changes import BLOCK, num_blocks
from arbitor.optimized.kernels.changes import counted, taken, written
from arbitor.optimized.kernels.mxint8 import add_encoded, encode
from arbitor.optimized.kernels.parts import MANY, add_parts
from arbitor.optimized.kernels.slots import Plan, rows_by_expert
from arbitor.optimized.kernels.unpack import unpacked_together
from arbitor.optimized.ops.unpacked import OUTPUT_MULTIPLE
from arbitor.reference.op_table import OP_TABLE
from conformance import preset_calls, strategies
from conformance.case import Case
from conformance.families import CASES
from conformance.pretend_cuda import DEVICE, pretended
from conformance.subject import Subject

EXAMPLES = 10
"""Drawn calls of an op."""

MOST_DRAWN = 2
"""Specialisations of a kernel that are compiled for drawn calls alone."""

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a program may have on the target."""


MOST_NARROW = 2
"""Accesses of one or two bytes that a thread may make where the compiler is told that rows are multiples of some columns."""


@dataclass(frozen=True)
class Specialisation:
    """A kernel for some types and constants.

    cause:   the op that launched it
    drawn:   whether only drawn calls did
    data:    what Triton compiles it from
    traits:  its types, constants and options, one by one
    """

    kernel: JITFunction
    cause: str
    drawn: bool
    data: str
    traits: frozenset[str]


class Recorder:
    """Notes what Triton is asked to compile, and has it not compiled, so that nothing is launched."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], Specialisation] = {}
        self.cause, self.drawn = "", False

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Note a specialisation once. Triton calls this as a hook, and stops where the hook returns True."""
        kernel = fn.jit_function
        name_of = dict(enumerate(kernel.arg_names))
        traits = {f"{name}: {kind}" for name, kind in compile["signature"].items() if kind != "constexpr"}
        traits |= {f"{name_of[place]}={value}" for (place, *_), value in compile["constants"].items()}
        for attributes in compile["configs"]:
            for (place, *_), of in attributes.items():
                traits |= {f"{name_of[place]}: {kind}={number}" for kind, number in of}
        traits |= {f"{option}={compile[option]}" for option in ("num_warps", "num_stages")}
        data = compile["specialization_data"]
        one = Specialisation(kernel, self.cause, self.drawn, data, frozenset(traits))
        self.found.setdefault((fn.module, fn.name, compile["key"]), one)
        return True


def kernels() -> list[JITFunction]:
    """Return every kernel of the package."""
    found = []
    for module_info in pkgutil.iter_modules(kernel_package.__path__):
        module = importlib.import_module(f"{kernel_package.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            is_kernel = isinstance(value, JITFunction) and re.fullmatch(r"_\w+_kernel", name)
            if is_kernel and value.__module__ == module.__name__:
                found.append(value)
    return found


def recorded(families: list[str]) -> list[Specialisation]:
    """Return what Triton would compile for all ops, or for the ops of some families. Preset-like calls come first."""
    names = [name for name, row in OP_TABLE.items() if not families or row.family in families]
    subject, recorder = Subject(ops, ops.__name__, str(DEVICE)), Recorder()
    preset_like = [(name, case) for name, case in preset_calls.calls() if name in names]
    drawn = [(name, case) for name in names for case in drawn_calls(name)]
    # CUDA C++ kernels would take the place of some: `conformance.compile_cuda` compiles them.
    path = mock.patch.dict(os.environ, {"ARB_PATH": "triton"})
    with triton.knobs.runtime.scope(), pretended(), path:
        triton.knobs.runtime.jit_cache_hook = recorder
        for recorder.drawn, calls in ((False, preset_like), (True, drawn)):
            for recorder.cause, case in calls:
                subject.call(recorder.cause, *case.args, **case.kwargs)
        if not families:
            recorder.cause, recorder.drawn = "an exchange of ranks", False
            for grad, out in gradients_of_ranks():
                add_parts(torch.stack([grad, grad]), out)
                content = encode(grad)
                add_encoded(torch.stack([content, content]), out)
            recorder.cause = "what the step of a rank has changed"
            piece = torch.zeros(1000, dtype=torch.uint8, device=DEVICE)
            counts = counted(piece, piece, num_blocks(1000), BLOCK)
            ends = counts.to(torch.int64)
            taken(piece, written(piece, piece, ends, BLOCK)[: num_blocks(1000)], ends, BLOCK)
            recorder.cause = "the library's gradient of experts"
            experts = torch.zeros(64, dtype=torch.int64, device=DEVICE)
            for num_groups, width, row_slots in itertools.product((5, 32), (1192, 3536), (1, 2)):
                # Contiguous rows, and some columns of wider ones.
                for stride in (width, 21_216):
                    rows = torch.zeros(64, stride, dtype=torch.bfloat16, device=DEVICE)[:, :width]
                    rows_by_expert(rows, Plan.of(experts, num_groups), num_groups, row_slots)
            recorder.cause = "the first product of a training pass"
            for shapes, dtype in matrices_of_passes():
                weights = [ops.from_spec(preset_calls.weight(*shape)) for shape in shapes]
                unpacked_together(weights, [1] * len(weights), dtype, row_multiple=OUTPUT_MULTIPLE)
    return list(recorder.found.values())


def gradients_of_ranks() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield gradients of a rank, and where the sum over ranks goes: no op adds parts in bfloat16, and none encodes a gradient.

    Some are of few columns and of many, of columns that are no multiple of 16, and of rows that lie apart.
    """
    for dtype, summed_in in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        for num_rows, num_columns in ((3, 1), (3, 100), (64, 16), (MANY // 1024, 1024)):
            grad = torch.zeros(num_columns, num_rows, dtype=dtype, device=DEVICE).t()
            out = torch.zeros(num_rows, num_columns, dtype=summed_in, device=DEVICE)
            yield grad, out
            yield grad.contiguous(), out


def matrices_of_passes() -> Iterator[tuple[list[tuple[int, int]], torch.dtype]]:
    """Yield shapes of matrices that a training pass unpacks in one launch, and the dtype of its activations."""
    for dtype in (torch.bfloat16, torch.float32):
        yield [(512, 1024)], dtype
        yield [(1024, 512)] * 76 + [(768, 24)], dtype
        yield [(16, 24), (8, 35)], dtype


def drawn_calls(name: str) -> list[Case]:
    """Return drawn calls of an op, the same on every run."""
    drawn: list[Case] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=CASES[name])
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return drawn


def chosen(found: list[Specialisation]) -> Iterator[Specialisation]:
    """Yield the preset-like specialisations of one kernel, then drawn ones, each with the most traits not seen before."""
    seen: set[str] = set()
    for one in found:
        if not one.drawn:
            seen |= one.traits
            yield one
    drawn = [one for one in found if one.drawn]
    for _ in range(min(MOST_DRAWN, len(drawn))):
        best = max(drawn, key=lambda one: len(one.traits - seen))
        drawn.remove(best)
        seen |= best.traits
        yield best


def complaint(one: Specialisation) -> tuple[str, str] | None:
    """Compile a specialisation. Return what is wrong with it and how it came about, or None if nothing is wrong."""
    try:
        compiled = one.kernel.preload(one.data)
    # A compiler may fail with any exception.
    except Exception as error:
        what = f"{place(one.kernel, error)} does not compile"
        reason = reason_of(error)
    else:
        shared, counted_twice = compiled.metadata.shared, repeated_operand(compiled.asm["ttgir"])
        if shared > SHARED_MEMORY:
            what = f"{place(one.kernel)} wants too much shared memory"
            reason = f"{shared} bytes of {SHARED_MEMORY}"
        elif counted_twice:
            what = f"{place(one.kernel)} has a product that counts some of its terms twice"
            reason = counted_twice
        elif not one.drawn and is_told_columns(one) and narrow_accesses(compiled.asm["ptx"]) > MOST_NARROW:
            what = f"{place(one.kernel)} reads or writes rows one element at a time"
            reason = f"{narrow_accesses(compiled.asm['ptx'])} accesses of one or two bytes"
        else:
            return None
    return what, f"{reason}\nas {one.cause} launches it, with {', '.join(sorted(one.traits))}"


def repeated_operand(ttgir: str) -> str | None:
    """Return an operand of a product on tensor cores that is too narrow for its layout, None if there is none.

    Four threads share the summed axis of `mma.sync`, and have `kWidth` neighbours of it each. Where there are fewer than four
    times as many, Triton 3.6 lays them out again for the threads left over, and the product counts them again.
    """
    pattern = r"tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = (\d), parent = #(\w+), kWidth = (\d+)\}>>"
    for rows, columns, operand, parent, width in re.findall(pattern, ttgir):
        summed = int(columns if operand == "0" else rows)
        if summed < 4 * int(width) and re.search(rf"#{parent} = #ttg\.nvidia_mma<\{{versionMajor = 2", ttgir):
            return f"operand {operand} is {rows} x {columns}, with {width} neighbours a thread"
    return None


def is_told_columns(one: Specialisation) -> bool:
    """Return whether a kernel is told that its rows are multiples of several columns, as `known_columns` tells it."""
    return any(re.fullmatch(r"COLUMN_STEP=(?!1$)\d+", trait) for trait in one.traits)


def narrow_accesses(ptx: str) -> int:
    """Return how many loads and stores of device memory take one or two bytes."""
    return len(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*\.[bsu](?:8|16)\s", re.sub(r"\.v\d\.\w+", "", ptx)))


def place(kernel: JITFunction, error: Exception | None = None) -> str:
    """Return file and line of a kernel, of the statement in it where an error says so, and its name."""
    lines, line = inspect.getsourcelines(kernel.fn)
    line += next(index for index, text in enumerate(lines) if text.startswith("def "))
    # The node counts lines from the `def`, which is line 1.
    if isinstance(error, CompilationError):
        line += getattr(error.node, "lineno", 1) - 1
    return f"{inspect.getsourcefile(kernel.fn)}:{line}: {kernel.__name__}"


def reason_of(error: BaseException) -> str:
    """Return what an error says. For an error in a function that the kernel calls, return the lines before it too."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    if first is error and isinstance(error, CompilationError) and error.error_message:
        return error.error_message
    return f"{type(first).__name__}: {first}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.compile_kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of ops; all if none is named")
    families: list[str] = parser.parse_args(arguments).families
    known = sorted({row.family for row in OP_TABLE.values()})
    if unknown := sorted(set(families) - set(known)):
        sys.exit(f"no family is called {', '.join(unknown)}: there are {', '.join(known)}")
    if triton.knobs.runtime.interpret:
        sys.exit("with TRITON_INTERPRET=1 there is nothing to compile: unset it")
    torch.set_num_threads(1)
    strategies.LIMITS.set_for("interpreter")
    found = recorded(families)
    complaints: dict[str, str] = {}
    for kernel in kernels():
        tried = list(chosen([one for one in found if one.kernel is kernel]))
        if families and not tried and kernel.__module__.rpartition(".")[2] not in families:
            continue
        # Printed before compiling, so that a compiler that aborts leaves the name.
        print(kernel.__name__, end=": ", flush=True)
        outcomes = [complaint(one) for one in tried]
        print(f"{outcomes.count(None)} of {len(tried)} specialisations are fine")
        for what, why in filter(None, outcomes):
            # A complaint is printed once, not for each specialisation.
            complaints.setdefault(what, why)
        if not tried:
            complaints[f"{place(kernel)} was not compiled"] = "no call of an op launches it"
    for what, why in complaints.items():
        print(f"\n{what}\n{why}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
