"""Compile every CUDA C++ kernel, on a machine with or without a GPU. NVRTC needs none.

    python -m conformance.compile_cuda           # prints a line for each source, and exits with 1 if something is wrong
    python -m conformance.compile_cuda step      # some sources

Ops are called on the inputs of `cuda_calls` while a GPU is pretended, and the launches of CUDA C++ kernels are noted instead of
made. Afterwards each kernel that they asked for is compiled for Hopper, and one of each source for the oldest architecture, unless
the source is for Hopper alone. A kernel is wrong too if the assembler makes its `wgmma` wait for one another, because registers
or fences of the source do not fit.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import triton

from arbitor.optimized import ops
from arbitor.optimized.cuda import compiler
from arbitor.optimized.cuda import launch as launches
from arbitor.optimized.cuda.compiler import Kernel
from conformance import cuda_calls
from conformance.pretend_cuda import DEVICE, pretended
from conformance.subject import Subject

CAPABILITIES = (compiler.LEAST_CAPABILITY, compiler.HOPPER)
"""Compute capabilities that are compiled for."""


@contextmanager
def noted(kernels: dict[Kernel, str], cause: list[str]) -> Iterator[None]:
    """Note the CUDA C++ kernels that ops ask for within the block, with their cause, and launch nothing."""

    def note(kernel: Kernel) -> None:
        kernels.setdefault(kernel, cause[0])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ARB_PATH": "cuda"}))
        stack.enter_context(mock.patch.object(compiler, "why_missing", lambda: None))
        stack.enter_context(cuda_calls.of_any_size())
        stack.enter_context(launches.noted(note))
        yield


def asked_for() -> dict[Kernel, str]:
    """Return the CUDA C++ kernels that calls of ops ask for, each with the op that asked first."""
    subject, kernels, cause = Subject(ops, ops.__name__, str(DEVICE)), dict[Kernel, str](), [""]
    with triton.knobs.runtime.scope(), pretended(), noted(kernels, cause):
        # Triton's kernels beside them are stopped before they are compiled.
        triton.knobs.runtime.jit_cache_hook = lambda **_: True
        for cause[0], case in cuda_calls.calls():
            subject.call(cause[0], *case.args, **case.kwargs)
    return kernels


def given_up(told: str) -> list[str]:
    """Return what an assembler says that it does not do as the source asks, in its words."""
    return re.findall(r"Potential Performance Loss: (.*)", told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print. Return the exit status."""
    known = sorted(path.stem for path in compiler.FOLDER.glob("*.cu"))
    parser = argparse.ArgumentParser(
        prog="python -m conformance.compile_cuda", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help=f"of {', '.join(known)}; all if none is named"
    )
    sources: list[str] = parser.parse_args(arguments).sources
    if unknown := sorted(set(sources) - set(known)):
        sys.exit(f"no source is called {', '.join(unknown)}: there are {', '.join(known)}")
    if triton.knobs.runtime.interpret:
        sys.exit("with TRITON_INTERPRET=1 there is nothing to compile: unset it")
    if (reason := compiler.why_missing()) is not None:
        sys.exit(reason)
    torch.set_num_threads(1)
    kernels, complaints = asked_for(), []
    for source in sources or known:
        tried = [kernel for kernel in kernels if kernel.source == source]
        registers, spilled = 0, 0
        print(source, end=": ", flush=True)
        for kernel in tried:
            both = kernel is tried[0] and source not in compiler.HOPPER_SOURCES
            for capability in CAPABILITIES if both else (compiler.HOPPER,):
                try:
                    told = compiler.what_the_assembler_says(kernel, kernel.architecture(capability))
                except RuntimeError as error:
                    complaints.append(f"{error}\nas {kernels[kernel]} launches it")
                    continue
                complaints += [f"{kernel}: {sentence}" for sentence in given_up(told)]
                registers = max([registers, *map(int, re.findall(r"Used (\d+) registers", told))])
                spilled = max([spilled, *map(int, re.findall(r"(\d+) bytes spill", told))])
        print(f"{len(tried)} kernels, of at most {registers} registers and {spilled} spilled bytes")
        if not tried:
            complaints.append(f"{source}.cu was not compiled: no call of cuda_calls launches a kernel of it")
    print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
