"""Damages the files of a run at random, and looks for what is not refused: seconds in the suite, hours by hand.

    python -m conformance.system.fuzz --mutations 10000 --seed 1 --jobs 2

A mutation changes bytes, cuts, repeats or swaps pieces of one file of a run folder; or changes a value somewhere in its JSON, as a
careful forger would, with digests that fit. Then the run is read as ``--resume``, ``--init-from`` and the commands for finished
runs read it. That must end in a checkpoint that holds a model, or in a sentence (TrainingError), within seconds.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arbitor.optimized.training import checkpoint as checkpoints
from arbitor.optimized.training.beginning import begin_with
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.facts import read_facts
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.model_folder import read_model
from arbitor.optimized.training.plan import preset_config
from arbitor.optimized.training.run_folder import RunFolder
from arbitor.optimized.training.sizes import config_of
from arbitor.reference.graph import ArbModel
from conformance.system.campaigns import main
from conformance.training import nano

SLOW_SECONDS = 20.0
"""Seconds of the processor after which a mutation is a fault too: reading a sound run takes a tenth of one."""

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**31 - 1,
    2**63,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "\udcff",
    [],
    {},
    [[]],
    "nano",
    "../../x",
)
"""What a forger puts in the place of a value."""

CHECKPOINTS = ("latest.safetensors", "previous.safetensors", "best.safetensors", "final.safetensors")
TEXTS = ("config.json", "metrics.jsonl")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file with a few bytes changed, or a piece of it cut, repeated or moved."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 2, 8, 64, 4096)))
        kind = draw.randrange(5)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:start] = data[start:end]
        elif kind == 3:
            data[start:start] = draw.randbytes(draw.randint(1, 16))
        else:
            del data[start:]
    return bytes(data)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside of a JSON value."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*way, key)
        yield from places(child, (*way, key))


def changed(document: Any, draw: random.Random) -> Any:
    """Return a JSON value with one value inside exchanged, removed, doubled or named anew."""
    document = copy.deepcopy(document)
    *way, last = draw.choice(list(places(document)))
    parent = document
    for key in way:
        parent = parent[key]
    kind = draw.randrange(4)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent[last], int):
        parent[last] = parent[last] * draw.choice((-1, 2, 10**6)) + draw.choice((-1, 0, 1))
    elif kind == 2 and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
    else:
        parent[last] = draw.choice(VALUES)
    return document


def forged(content: bytes, draw: random.Random) -> bytes:
    """Return a checkpoint with a value of its JSON changed, and every digest of the header made to fit."""
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    if draw.randrange(4):
        header = changed(json.loads(outer["__metadata__"]["arbitor"]), draw)
        if isinstance(header, dict):
            header["content_sha256"] = checkpoints._content_sha256(header)
        outer["__metadata__"]["arbitor"] = json.dumps(header)
    else:
        outer = changed(outer, draw)
    text = json.dumps(outer).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file of a folder, and return what was done to it."""
    name = draw.choice(CHECKPOINTS + TEXTS)
    path = folder / name
    content = path.read_bytes()
    kind: Callable[[bytes, random.Random], bytes]
    if draw.randrange(2):
        kind, new = damaged, damaged(content, draw)
    elif name in CHECKPOINTS:
        kind, new = forged, forged(content, draw)
    else:
        kind = changed
        lines = content.splitlines() if name == "metrics.jsonl" else [content]
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(changed(json.loads(lines[place]), draw)).encode()
        new = b"\n".join(lines)
    path.write_bytes(new)
    if draw.randrange(2):
        # Nothing else to go on from.
        for other in CHECKPOINTS:
            if other != name:
                (folder / other).unlink()
    return f"{kind.__name__} {name}"


def use(folder: Path) -> str:
    """Read a folder as the commands do. Return which of them found something to use."""
    run = RunFolder(folder)
    used = []
    for what, read in (
        ("resume", lambda: run.find().checkpoint),
        ("generate", lambda: run.load_best(lambda refusal: None)),
        ("preset", lambda: preset_config(str(run.config))),
        ("metrics", lambda: read_metrics(run.metrics)),
        ("info", lambda: read_facts(run)[0].words()),
        ("export", lambda: read_model(folder, lambda refusal: None)),
        ("init", lambda: begin_with(ArbModel(nano.NANO), str(folder))),
    ):
        try:
            found: Any = read()
        except (TrainingError, OSError) as error:
            assert "\n" not in str(error), f"{what}: more than a sentence: {error}"
            continue
        except ValueError as error:
            # What a preset's file says wrong is the user's error, not the system's.
            assert what == "preset" and "\n" not in str(error), f"{what}: {type(error).__name__}: {error}"
            continue
        if isinstance(found, checkpoints.Checkpoint):
            model = ArbModel(config_of(found.config))
            try:
                checkpoints.check_fits(found, model)
                model.load_state(found.state)
            except TrainingError:
                continue
        used.append(what)
    return "+".join(used) or "nothing"


def part(scratch: Path, seed: int, first: int, count: int) -> Counter[str]:
    """Mutate copies of the run, and count what was still usable."""
    return mutated(scratch / "whole", seed=seed, first=first, count=count)


def mutated(folder: Path, *, seed: int, first: int = 0, count: int) -> Counter[str]:
    """Mutate copies of a run folder, and count what was still usable.

    Args:
        folder: of a finished run.
        seed: of the draws.
        first: number of the first mutation.
        count: of mutations.

    Raises:
        AssertionError: a mutation raised what is no sentence, or took too long; the message says how to see it again.
    """
    ends: Counter[str] = Counter()
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory() as scratch:
            copied = Path(scratch) / "run"
            copied.mkdir()
            for name in CHECKPOINTS + TEXTS:
                shutil.copy(folder / name, copied)
            what = mutate(copied, draw)
            began = time.process_time()
            try:
                ends[f"still usable for {use(copied)}"] += 1
                seconds = time.process_time() - began
                assert seconds < SLOW_SECONDS, f"it took {seconds:.1f} s"
            except Exception as error:
                raise AssertionError(
                    f"mutation {number} of seed {seed} ({what}): {type(error).__name__}: {error}"
                ) from error
    return ends


if __name__ == "__main__":
    main(part, "mutations", default=1000)
