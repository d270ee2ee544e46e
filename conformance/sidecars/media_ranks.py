"""What two ranks make of a mix, for test_media_ranks.py: a whole run, one that is killed and resumed, and adapters.

torchrun --nproc-per-node 2 -m conformance.sidecars.media_ranks MEDIA FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed.world import joined
from arbitor.optimized.training import media_speech
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph.audio import AUDIO_CODES
from conformance.sidecars.media_runs import CONFIG, KINDS, options, register
from conformance.training.nano import without_pictures
from conformance.training.runs import train_until_killed

KILLED_AT = 5


def asked(media: Path, folder: Path, name: str, **changes: Any) -> TrainOptions:
    """Return the options of a run on every kind, which says what it hears."""
    preset = folder / "preset.json"
    # Ranks read it at one time.
    if not preset.exists():
        preset.write_text(replace(CONFIG, talker_tokens=AUDIO_CODES).to_json())
    more = {"preset": str(preset), "data_speech": str(media / "audio"), "steps": 8, **changes}
    cache = str(folder / "features")
    return options(media, folder / name, *KINDS, batch=4, seed=3, feature_cache=cache, **more)


def tuned(media: Path, folder: Path, name: str) -> TrainOptions:
    """Return the options of adapters that learn every kind but speech over what two ranks trained."""
    more = {"lora_rank": 2, "steps": 4, "eval_interval": 4}
    base = str(folder / "whole")
    given = asked(media, folder, name, **more)
    return replace(given, preset=None, data_speech=None, finetune=True, init_from=base)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let runs train a codec in two short steps."""
    patch.setattr(media_speech, "CODEC_STEPS", 2)
    patch.setattr(media_speech, "CODEC_BATCH", 2)


def main(media: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, joined():
        without_pictures(patch)
        register(patch)
        shorten(patch)
        train(asked(media, folder, "whole"))
        killed = asked(media, folder, "killed")
        train_until_killed(KILLED_AT, killed)
        train(replace(killed, resume=True))
        train(tuned(media, folder, "tuned"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
