"""Parts of a measurement: each is on disk as soon as it is done, and one that fails leaves the others, for GPU time is dear."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.training.whole_file import write_whole

OUT_OF_MEMORY = "out of memory"
"""Why a part failed that did not fit the device."""


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a part measured, or why it `failed`; what it held on the device is then free again."""
    try:
        return part()
    except torch.cuda.OutOfMemoryError:
        reason = OUT_OF_MEMORY
    except Exception as error:
        # Whatever it is, the parts before and after are worth keeping.
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    # Here the error is gone, with the frames that it held.
    free()
    return {"failed": reason}


def free() -> None:
    """Give back the memory of the device that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(path: Path | None, report: Any) -> None:
    """Write a report as JSON, if there is a path."""
    if path is not None:
        write_text(path, json.dumps(report, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; whoever is cut off in the middle leaves the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def exit_status(parts: Sequence[Mapping[str, Any]]) -> int:
    """Return 1, and say how many parts failed, if one did; else 0."""
    failed = sum("failed" in part for part in parts)
    if failed:
        print(f"{failed} of {len(parts)} parts failed", file=sys.stderr)
    return int(failed > 0)
