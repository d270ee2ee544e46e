"""From a `.cu` file of this folder to a kernel: NVRTC compiles it at first use, through cuda-core, and the result is kept on disk.

A user needs no toolkit and no compiler of the host. cuda-core and cuda-bindings are small wheels (`pip install arbitor[cuda]`), and
NVRTC comes with torch's wheels for CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbitor.optimized import settings
from arbitor.optimized.training.whole_file import write_among_others

FOLDER = Path(__file__).parent
"""Folder of the sources."""

LEAST_CAPABILITY = (8, 0)
"""Least compute capability of a GPU that runs the kernels: the first with `mma.sync` for bfloat16."""


HOPPER = (9, 0)
"""Compute capability of Hopper. A source that needs `wgmma` is for it alone."""

HOPPER_SOURCES = frozenset({"many_rows"})
"""Sources that are for Hopper alone."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a source, for some constants.

    source:    name of the file, without `.cu`
    entry:     name of the kernel in it
    constants: what the head of the source says that the host defines, by name
    """

    source: str
    entry: str
    constants: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, source: str, entry: str, **constants: int) -> Kernel:
        """Return the kernel for constants by name."""
        return cls(source, entry, tuple(constants.items()))

    def architecture(self, capability: tuple[int, int]) -> str:
        """Return what the compiler calls GPUs of a compute capability; the suffix `a` lets a source use what later ones lack."""
        return f"sm_{capability[0]}{capability[1]}{'a' if self.source in HOPPER_SOURCES else ''}"

    def __str__(self) -> str:
        """Return the kernel as a reader would name it."""
        return f"{self.source}.cu with {', '.join(f'{name}={value}' for name, value in self.constants)}"


@functools.cache
def why_missing() -> str | None:
    """Return why nothing can be compiled here, as one sentence; None where it can be. Looks once in a process."""
    try:
        importlib.import_module("cuda.core")
        _compiler_version()
    # A wheel that does not fit the driver or another wheel fails in ways of its own.
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"CUDA C++ kernels need cuda-core and NVRTC (pip install arbitor[cuda]), but {type(error).__name__}: {first}"
    return None


@functools.cache
def why_unknown(capability: tuple[int, int]) -> str | None:
    """Return why NVRTC, which is here, compiles nothing for a compute capability, as one sentence; None where it does."""
    status, known = importlib.import_module("cuda.bindings.nvrtc").nvrtcGetSupportedArchs()
    major, minor = capability
    # A release that does not say what it knows may know it.
    if int(status) != 0 or 10 * major + minor in known:
        return None
    release = ".".join(map(str, _compiler_version()))
    return f"NVRTC {release} does not know the compute capability {major}.{minor}; a newer torch brings a newer NVRTC"


_wait: Callable[[Callable[[], object]], object] = lambda look: None  # noqa: E731
"""Waits until a look at the disk finds what another process compiles now."""


@contextmanager
def waiting(wait: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Let `wait` wait for each kernel that is loaded in the block."""
    global _wait
    before, _wait = _wait, wait
    try:
        yield
    finally:
        _wait = before


def machine_code(kernel: Kernel, architecture: str) -> bytes:
    """Return the machine code of a kernel for an architecture such as `sm_90`, from the disk if it was compiled before.

    Raises:
        RuntimeError: the compiler refuses the source, with what it says.
    """
    path = kept_at(kernel, architecture)
    # `Path.exists` raises where a folder may not be searched or a name is too long.
    _wait(functools.partial(os.path.exists, path))
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        _not_kept(path.parent, error)
    code = _compile(source_text(kernel.source), kernel, architecture)
    try:
        write_among_others(path, code)
    except OSError as error:
        _not_kept(path.parent, error)
    return code


def kept_at(kernel: Kernel, architecture: str) -> Path:
    """Return where the machine code of a kernel for an architecture is kept on disk, once it was compiled."""
    known = (source_text(kernel.source), kernel.constants, architecture, _compiler_version())
    digest = hashlib.sha256(repr(known).encode()).hexdigest()
    return settings.cache_folder() / f"{kernel.source}-{architecture}-{digest}.cubin"


def source_text(source: str) -> str:
    """Return the text of a source, with the files of this folder that it includes in their places."""
    text = (FOLDER / f"{source}.cu").read_text()
    return re.sub(r'^#include "(.*)"$', lambda line: (FOLDER / line[1]).read_text(), text, flags=re.MULTILINE)


@functools.cache
def loaded(kernel: Kernel, architecture: str) -> Any:
    """Return a kernel that can be launched on every device of an architecture. It is compiled and loaded once in a process."""
    core = importlib.import_module("cuda.core")
    return core.ObjectCode.from_cubin(machine_code(kernel, architecture)).get_kernel(kernel.entry)


def what_the_assembler_says(kernel: Kernel, architecture: str) -> str:
    """Compile a kernel anew, and return what the assembler says of it: registers, spilled bytes, what it gave up.

    Raises:
        RuntimeError: as `machine_code`.
    """
    told = io.StringIO()
    _compile(source_text(kernel.source), kernel, architecture, told)
    # The compiler ends its log with a byte of 0.
    return told.getvalue().replace("\0", "")


def _compile(text: str, kernel: Kernel, architecture: str, told: io.StringIO | None = None) -> bytes:
    core = importlib.import_module("cuda.core")
    macros = [(name, str(value)) for name, value in kernel.constants]
    more = {} if told is None else {"ptxas_options": "-v"}
    options = core.ProgramOptions(
        std="c++17", arch=architecture, define_macro=macros, name=f"{kernel.source}.cu", **more
    )
    try:
        code = core.Program(text, "c++", options).compile("cubin", logs=told).code
    # The class of the error differs between releases of cuda-core.
    except Exception as error:
        raise RuntimeError(f"{kernel} does not compile for {architecture}: {error}") from error
    return bytes(code)


@functools.cache
def _compiler_version() -> tuple[int, int]:
    """Return the version of NVRTC, which loads it."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"NVRTC does not say its version: {status}")
    return major, minor


@functools.cache
def _warn_not_kept(folder: Path, reason: str) -> None:
    warnings.warn(
        f"compiled kernels are not kept in {folder}, and are compiled anew in each process: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _not_kept(folder: Path, error: OSError) -> None:
    """Say once for a folder and reason that kernels are not kept."""
    _warn_not_kept(folder, error.strerror or str(error))
