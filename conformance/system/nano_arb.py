"""The ``arb`` command as a user runs it, with the preset ``nano`` added and, if asked, something made to go wrong.

    python -m conformance.system.nano_arb [no-pictures] [slow-disk] [full-disk=BYTES] [nan=FROM] ARGUMENTS OF ARB...

``no-pictures`` writes stand-ins for pictures, since drawing them takes as long as the rest of a run of nano.
``slow-disk`` makes every flush and rename take a while, so that a kill at a random moment often falls into the writing
of a checkpoint. ``full-disk=BYTES`` lets no file grow beyond so many bytes (RLIMIT_FSIZE: the kernel itself refuses).
``nan=FROM`` makes the loss of every training micro-batch from that one on not finite.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from typing import Any

import pytest

from conformance.training import nano

SLOW_DISK_SECONDS = 0.02
"""What a flush or a rename takes on the slow disk."""


def make_disk_slow() -> None:
    def slow(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            time.sleep(SLOW_DISK_SECONDS)
            result = real(*arguments)
            time.sleep(SLOW_DISK_SECONDS)
            return result

        return call

    os.fsync = slow(os.fsync)
    os.replace = slow(os.replace)


def make_loss_nan(first: int) -> None:
    import torch

    from arbitor.reference.graph import ArbModel

    real, count = ArbModel.losses, itertools.count()

    def losses(model: ArbModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        result = real(model, ids)
        if torch.is_grad_enabled() and next(count) >= first:
            result["bytes"] = result["bytes"] * float("nan")
        return result

    ArbModel.losses = losses  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    while arguments:
        fault, _, value = arguments[0].partition("=")
        if fault == "no-pictures":
            nano.without_pictures(pytest.MonkeyPatch())
        elif fault == "slow-disk":
            make_disk_slow()
        elif fault == "full-disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
        elif fault == "nan":
            make_loss_nan(int(value))
        else:
            break
        arguments = arguments[1:]
    nano.register(pytest.MonkeyPatch())
    from arbitor.optimized.cli import main as arb

    arb(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
