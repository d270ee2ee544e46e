"""Which machine a result belongs to: the device, what drives it, and the commit. No host names, no paths."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
"""Root of the repository."""

RESULTS = ROOT / "bench" / "results"
"""Where results are kept, in one folder per device."""

UNKNOWN = "unknown"
"""The id of a commit that nobody knows."""

WITHOUT_A_COMMIT = "git cannot tell of which commit the files here are"
"""What is said of such a commit."""

IDENTITY = ("device", "multiprocessors")
"""Facts that must be equal for two runs to be comparable at all."""

_SMI_FACTS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_max_mhz": "clocks.max.mem",
}
_SMI_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def without_place(word: str) -> str:
    """Return the name of a file that is given by its place, which is of one machine. Other words stay as they are."""
    return Path(word).name if word.startswith("/") else word


def on_gpu() -> bool:
    """Whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def slug_of(device: str) -> str:
    """Return the folder name of a device: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def device_name() -> str:
    """Return the GPU's name, or the model of the CPU."""
    if on_gpu():
        return torch.cuda.get_device_name()
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    return f"CPU {model or platform.machine()}"


def compiler_of(device: str) -> str:
    """Return the backend of torch.compile for a type of device. A CPU has its front end trace a model, and makes no kernels."""
    return "inductor" if device == "cuda" else "eager"


def slug() -> str:
    """Return the folder name of this device."""
    return slug_of(device_name())


@cache
def machine_info() -> dict[str, Any]:
    """Return what a result depends on and does not change while it is taken."""
    info: dict[str, Any] = {
        "device": device_name(),
        "slug": slug(),
        "memory_gib": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if on_gpu() else None,
        "system": platform.system(),
        "machine": platform.machine(),
    }
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        info["memory_gib"] = round(properties.total_memory / 2**30, 1)
        info["multiprocessors"] = properties.multi_processor_count
        info["l2_mib"] = round(properties.L2_cache_size / 2**20)
        info |= _nvidia_smi(_SMI_FACTS)
    else:
        info["threads"] = torch.get_num_threads()
    return info


def state() -> dict[str, Any]:
    """Return what does change: clocks, temperature, power; empty on a CPU."""
    return _nvidia_smi(_SMI_STATE) if on_gpu() else {}


def commit_info(commit: str | None) -> dict[str, Any]:
    """Return the commit that is measured: the one named, else git's; `dirty` is None where nobody knows.

    A copy without a history may lie in the folder of another repository, whose commit says nothing of the copy.

    `bench/results` does not count as a change: saving one result must not make the next one dirty.
    """
    if commit:
        return {"id": commit, "dirty": None, "time": None}
    is_tracked = _git("ls-files", "--error-unmatch", "--", "bench/machine.py") is not None
    found = _git("rev-parse", "HEAD") if is_tracked else None
    if found is None:
        return {"id": UNKNOWN, "dirty": None, "time": None}
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"id": found, "dirty": bool(changes), "time": _git("show", "-s", "--format=%cI")}


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Add the option of a script that names the commit, see `commit_name`."""
    parser.add_argument("--commit", metavar="ID", help="the commit that is measured, where git cannot say")


def commit_name(commit: str | None) -> str:
    """Return the id of `commit_info`, and whether its tree was changed. Say on stderr that results are of no known commit."""
    info = commit_info(commit)
    if info["id"] == UNKNOWN:
        print(f"{WITHOUT_A_COMMIT}: results name none, unless --commit does", file=sys.stderr)
    return f"{info['id']}{', changed' if info['dirty'] else ''}"


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(facts: dict[str, str]) -> dict[str, Any]:
    """Return facts that nvidia-smi tells about device 0; None for each where it can't."""
    command = [
        "nvidia-smi",
        "--id=0",
        f"--query-gpu={','.join(facts.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        values = []
    if len(values) != len(facts):
        return dict.fromkeys(facts)
    return {name: _number(value) for name, value in zip(facts, values, strict=True)}


def _number(text: str) -> float | str | None:
    # "[N/A]", "[Not Supported]"
    if text.startswith("["):
        return None
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text
