"""What two ranks make of a mix, for test_media_ranks.py: a whole run, one that is killed and resumed, and adapters;
and what becomes of ranks that read or measure in two ways.

torchrun --nproc-per-node 2 -m conformance.sidecars.media_ranks MEDIA FOLDER
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.optimized.distributed.world import World, joined
from arbitor.optimized.training import media_speech
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_reader import MediaReader
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.audio import AUDIO_CODES
from conformance.sidecars.media_runs import CONFIG, KINDS, options, register
from conformance.training.nano import without_pictures
from conformance.training.runs import train_until_killed

KILLED_AT = 5

HELD_OUT = (0, 1, 4, 5, 7)
"""Numbers of media of each kind that are held out, in batches of four."""


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


def refused(media: Path, folder: Path, world: World) -> str:
    """Return the sentence with which ranks end of which the last cannot decode a file."""
    real, is_last = MediaReader.is_readable, world.number == world.count - 1

    def is_readable(reader: MediaReader, kind: str, item: Item) -> bool:
        return real(reader, kind, item) and not (is_last and kind == "audio" and item.path.stem == "04")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as says:
        patch.setattr(MediaReader, "is_readable", is_readable)
        train(options(media, folder / "refused", "audio", mix="text=0,audio=1", batch=4, steps=30))
    return str(says.value)


def measured(media: Path, folder: Path, world: World) -> list[float | None]:
    """Return what a run measures whose ranks round in two ways: to rank 0 the model gets better, and to the last one worse."""
    by, calls = 1.0 if world.number == world.count - 1 else -1.0, itertools.count(1)
    loss, losses = ArbModel.loss, ArbModel.losses

    def rounded(value: Tensor) -> Tensor:
        return value if torch.is_grad_enabled() else value + 1000.0 + by * next(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArbModel, "loss", lambda *given, **named: rounded(loss(*given, **named)))
        patch.setattr(
            ArbModel,
            "losses",
            lambda *given, **named: {name: rounded(value) for name, value in losses(*given, **named).items()},
        )
        summary = train(asked(media, folder, "measured", steps=4, eval_interval=2, data_speech=None)).summary
    return [summary["val_bpb"], summary["best_bpb"]]


def held_out(media: Path, folder: Path, name: str) -> dict[str, list[Any]]:
    """Return what a model makes of several numbers of media held out, and how many of them were in passes of this process."""
    found = {}
    with (
        opened(asked(media, folder, name, eval_windows=8), None) as run,
        pytest.MonkeyPatch.context() as patch,
    ):
        mix, model, seen = run.mix, run.model, [0]
        assert mix is not None
        losses = model.losses

        def counted(ids_BT: Tensor, **named: Any) -> dict[str, Tensor]:
            seen[0] += len(ids_BT)
            return losses(ids_BT, **named)

        patch.setattr(model, "losses", counted)
        folders = dict(mix._folders)
        for number in HELD_OUT:
            seen[0] = 0
            for kind, whole in folders.items():
                mix._folders[kind] = replace(whole, validation=whole.train[:number])
            bpb = mix.validate(model, run.text.windows_WT)
            found[str(number)] = [bpb, mix.metrics(validated=True), seen[0]]
    return found


def main(media: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, joined() as world:
        without_pictures(patch)
        register(patch)
        shorten(patch)
        train(asked(media, folder, "whole"))
        killed = asked(media, folder, "killed")
        train_until_killed(KILLED_AT, killed)
        train(replace(killed, resume=True))
        train(tuned(media, folder, "tuned"))
        found = {
            "refused": refused(media, folder, world),
            "measured": measured(media, folder, world),
            "held out": held_out(media, folder, "held out"),
        }
    (folder / f"rank{world.number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
