"""Train the tiny preset on rendered media with random frozen encoders, and measure it on what was held out.

    python -m bench.media --run runs/demo-media

The run is one of `arb train` on text, pictures, sounds, videos and speech. Its figures are printed and written to `media.json` of
the run folder, each beside what is reached without the medium: slots of texts that are right, bits per byte, the error of latents
after each step, vowels that are said right, and the choices of the router. `media.png` shows pictures with the texts that the model
wrote, and `media.wav` has a sound that it said. The process fails where a goal is missed.

Rates and objectives were chosen on files of seed 0, and the number of steps after runs on files of seeds 1 and 2. Runs on those of
seeds 3 and 4 decided how the video head reads a text, and one on those of seed 7 the mix. Files of seed 8, the default, are judged.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from arbitor.optimized.training.generate import generate_batch
from arbitor.optimized.training.loop import opened
from arbitor.optimized.training.media import CAPTION_END
from arbitor.optimized.training.media_files import Item
from arbitor.optimized.training.media_mix import ANSWERED_BY, Batch, Mix
from arbitor.optimized.training.options import TrainOptions
from arbitor.optimized.training.run import Run
from arbitor.optimized.training.shown import shown
from arbitor.optimized.training.whole_file import write_whole
from arbitor.reference.config import with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.audio import SAMPLES_PER_FRAME
from arbitor.reference.graph.codec import spectra
from arbitor.reference.graph.router import MODALITIES
from arbitor.reference.graph.targets import ended_streams
from arbitor.reference.graph.video import latent_shape
from arbitor.reference.presets import preset
from arbitor.sidecars import read_audio, read_image, write_audio
from bench.media.beside import features_beside
from bench.media.random_sidecars import write_sidecars
from bench.media.render import RATE, SLOTS, VOWELS, render, slot_bits, values_of

GOALS = {"slots": 0.9, "margin": 0.5, "vowels": 0.75, "router": 0.95}
"""Least share of slots that are right, least part of the bits of the slots that the medium saves, least share of vowels that are
said right, and least share of right choices."""

JUDGES = 200
"""Sounds that say what vowels sound like."""

STEPS = 900
MIX = "text=2,image=5,audio=6,video=4,speech=2"
"""Length of the run, and how often a micro-batch is of each kind."""

SHOWN = 12
"""Pictures on the sheet."""


@dataclass(frozen=True)
class Figure:
    """A number that was measured.

    Attributes:
        name: what it is.
        value: the number.
        baseline: what is reached without the medium.
        goal: what it must reach, or None.
        lower: whether lower is better.
    """

    name: str
    value: float
    baseline: float
    goal: float | None
    lower: bool = False

    def reached(self) -> bool:
        """Return whether the goal is reached; a number without a goal always is."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.lower else self.value >= self.goal


def main(arguments: Sequence[str] | None = None) -> int:
    """Render, train, measure, and print. Return the exit status."""
    asked = parsed(arguments)
    # Operations are so small here that threads wait for each other longer than they work.
    torch.set_num_threads(1)
    root = asked.run.with_name(asked.run.name + "-data")
    config = with_modules(preset("tiny"), vq=False)
    render(root, count=asked.count, seed=asked.seed)
    sidecars = write_sidecars(root / "sidecars", config, root / "video")
    options: dict[str, Any] = {f"data_{kind}": str(root / kind) for kind in SLOTS}
    options["data_speech"] = str(root / "audio")
    options["feature_cache"] = str(root / "features")
    began = time.monotonic()
    training = TrainOptions(
        run=asked.run,
        preset="tiny",
        disable_vq=True,
        max_moe_iters=1,
        mix=asked.mix,
        steps=asked.steps,
        batch=asked.batch,
        context=48,
        seed=asked.seed,
        eval_interval=asked.steps,
        save_interval=asked.steps,
        device="cpu",
        **options,
        **sidecars,
    )
    console = Console()
    side = latent_shape(config.video_latent)[-1]
    folders = {kind: str(root / kind) for kind in SLOTS}
    with (
        features_beside(folders, sidecars, cache=options["feature_cache"], side=side),
        opened(training, console) as run,
    ):
        run.take_steps()
        result = run.finish()
        written = {kind: continued(run, list(mix_of(run).held_out(kind))) for kind in ("image", "audio")}
        sounds = said(run)
        figures = measured(run, written, sounds)
        sheet(run, written["image"][:SHOWN], asked.run / "media.png")
        write_audio(asked.run / "media.wav", sounds[0])
    document = {
        "figures": [{**vars(figure), "reached": figure.reached()} for figure in figures],
        "steps": asked.steps,
        "files": asked.count,
        "seconds": round(time.monotonic() - began, 1),
        "state_sha256": result.summary["state_sha256"],
    }
    write_whole(asked.run / "media.json", (json.dumps(document, indent=2) + "\n").encode())
    print(table(figures))
    print(f"{document['seconds']:.0f} s; {asked.run}/media.json, media.png, media.wav")
    return 0 if all(figure.reached() for figure in figures) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.media", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo-media"), help="run folder, which is made")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--count", type=int, default=2000, help="files of each kind")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mix", default=MIX)
    parser.add_argument("--seed", type=int, default=8)
    return parser.parse_args(arguments)


def mix_of(run: Run) -> Mix:
    """Return the mix of a run, which has one."""
    assert run.mix is not None
    return run.mix


def measured(run: Run, written: Mapping[str, Sequence[bytes]], sounds: Tensor) -> list[Figure]:
    """Return what the model of a run does on what was held out.

    Args:
        run: finished.
        written: texts that it wrote after the media held out, by kind.
        sounds: what it said, see `said`.
    """
    mix, figures = mix_of(run), []
    for kind, texts in written.items():
        items, batches = mix.held_out_items(kind), list(mix.held_out(kind))
        found = [values_of(kind, text) for text in texts]
        wanted = [values_of(kind, item.text) for item in items]
        figures.append(
            Figure(f"{kind}: slots right", share_right(found, wanted), guessed(wanted), GOALS["slots"])
        )
        bpb = mix.validated[kind]["val_bpb"]
        of_slots = slot_bits(kind) * len(items) / sum(batch.taught_bytes() for batch in batches)
        goal = of_slots * (1 - GOALS["margin"])
        value = math.nan if bpb is None else bpb
        figures.append(Figure(f"{kind}: bits per byte", value, of_slots, goal, lower=True))
    mean = mean_error(mix)
    before, *errors = errors_by_step(run)
    figures.append(Figure("video: squared error of the latent", errors[-1], mean, mean, lower=True))
    for step, error in enumerate(errors):
        figures.append(Figure(f"video: error after step {step + 1}", error, before, before, lower=True))
        before = error
    figures.append(
        Figure("speech: vowels right", vowels_right(run, sounds), 1 / len(VOWELS), GOALS["vowels"])
    )
    figures.append(Figure("router: choices right", routed(run), 1 / len(MODALITIES), GOALS["router"]))
    return figures


def continued(run: Run, batches: Sequence[Batch]) -> list[bytes]:
    """Return the texts that the model writes after the media of some batches, the likeliest byte each time."""
    texts = []
    for batch in batches:
        media = [
            {name: value[place, None] for name, value in batch.media.items()}
            for place in range(len(batch.ids_BT))
        ]
        texts += generate_batch(
            run.model,
            [b""] * len(media),
            40,
            temperature=0,
            seeds=[0] * len(media),
            stop=[CAPTION_END],
            media=media,
        )
    return texts


def share_right(written: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Return the share of slots that have the right value."""
    pairs = [
        (a, b)
        for ours, theirs in zip(written, wanted, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def guessed(wanted: Sequence[Sequence[str]]) -> float:
    """Return the share of slots that are right for whoever says the most frequent value of each slot."""
    slots = list(zip(*wanted, strict=True))
    return sum(Counter(slot).most_common(1)[0][1] for slot in slots) / sum(map(len, slots))


def mean_error(mix: Mix) -> float:
    """Return the squared error, on the videos held out, of the mean latent of those that were learned from."""
    learned = torch.stack([mix.reader.feature("video", item) for item in mix.training_items("video")])
    held_out = torch.stack([mix.reader.feature("video", item) for item in mix.held_out_items("video")])
    return float((held_out - learned.mean(dim=0)).square().mean())


def errors_by_step(run: Run) -> list[float]:
    """Return the squared error of the latents of videos held out: of the noise that the head starts from, then after each step."""
    head = run.model.video_head
    assert head is not None
    sums, count = [0.0] * (head.num_steps + 1), 0
    with torch.no_grad():
        for batch in mix_of(run).held_out("video"):
            assert batch.targets is not None and batch.targets.latent is not None
            target, h_BPD = batch.targets.latent, text_of(run.model, batch)
            begin = (
                head.noise(torch.zeros(1, dtype=torch.int64)).expand(len(target), -1).reshape(target.shape)
            )
            drawn = [begin, *(head(h_BPD, steps=step + 1) for step in range(head.num_steps))]
            for step, latent in enumerate(drawn):
                sums[step] += float((latent - target).square().mean()) * len(target)
            count += len(target)
    return [total / count for total in sums]


def said(run: Run) -> Tensor:
    """Return what the model says of the texts of sounds held out, a second each, float32 [B, 16000]."""
    mix = mix_of(run)
    frames = RATE // SAMPLES_PER_FRAME
    tokens = [run.model.say(torch.tensor([list(item.text)]), frames) for item in mix.held_out_items("speech")]
    return mix.reader.codec.speak(torch.cat(tokens))


def vowels_right(run: Run, sounds: Tensor) -> float:
    """Return the share of vowels that `sounds` say right: the mean spectrum of their part is nearest to that of the vowel."""
    mix = mix_of(run)
    learned = mix.training_items("speech")[:JUDGES]
    examples = torch.stack([read_audio(item.medium()) for item in learned])
    parts = len(SLOTS["audio"])
    heard: dict[str, list[Tensor]] = {}
    for row, item in zip(parts_of(examples, parts), learned, strict=True):
        for part, vowel in zip(row, values_of("audio", item.text), strict=True):
            heard.setdefault(vowel, []).append(part)
    names, centres = list(heard), torch.stack([torch.stack(each).mean(dim=0) for each in heard.values()])
    right = [
        names[int((centres - part).square().sum(dim=-1).argmin())] == value
        for row, item in zip(parts_of(sounds, parts), mix.held_out_items("speech"), strict=True)
        for part, value in zip(row, values_of("audio", item.text), strict=True)
    ]
    return sum(right) / len(right)


def parts_of(audio_BT: Tensor, parts: int) -> Tensor:
    """Return the mean spectrum of each of some equal parts of sounds, [B, parts, S]."""
    return spectra(audio_BT).unflatten(1, (parts, -1)).mean(dim=2)


def routed(run: Run) -> float:
    """Return the share of right choices of the router, as a mean over texts and each kind of media."""
    mix, model = mix_of(run), run.model
    assert model.router is not None
    batches = [Batch("text", windows_BT) for windows_BT in run.text.windows_WT.split(run.settings.batch)]
    batches += [batch for kind in (*SLOTS, "speech") for batch in mix.held_out(kind)]
    right: dict[str, list[Tensor]] = {}
    absent_3 = torch.tensor([name not in model.answering for name in MODALITIES])
    with torch.no_grad():
        for batch in batches:
            h_BPD = text_of(model, batch)
            scores_B3 = model.router(h_BPD).masked_fill(absent_3, -math.inf)
            answer = MODALITIES.index(ANSWERED_BY.get(batch.kind, "text"))
            right.setdefault(batch.kind, []).append(scores_B3.argmax(dim=-1) == answer)
    shares = [float(torch.cat(each).float().mean()) for each in right.values()]
    return sum(shares) / len(shares)


def text_of(model: ArbModel, batch: Batch) -> Tensor:
    """Return the streams of the texts of a batch as the heads read them, [B, P, D]."""
    h_BPD = model.trunk(batch.ids_BT, **batch.media).h_BPD[:, 2 - batch.ids_BT.shape[1] :]
    taught_BT = None if batch.targets is None else batch.targets.taught_BT
    return h_BPD if taught_BT is None else ended_streams(h_BPD, taught_BT)


def sheet(run: Run, texts: Sequence[bytes], path: Path) -> None:
    """Draw pictures held out with what the model wrote of them, and latents of videos: of the file, and as drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page

    mix = mix_of(run)
    items = mix.held_out_items("image")[:SHOWN]
    page = Page(figsize=(12, 9))
    FigureCanvasAgg(page)
    axes = page.subplots(4, SHOWN // 2)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item, text in zip(axes[:2].flat, items, texts, strict=False):
        axis.imshow(read_image(item.medium()).movedim(0, 2).numpy())
        axis.set_title(shown(text.decode("ascii", errors="replace")), fontsize=8)
    videos: list[Item] = mix.held_out_items("video")[: SHOWN // 2]
    batch = next(iter(mix.held_out("video")))
    with torch.no_grad():
        assert run.model.video_head is not None
        drawn = run.model.video_head(text_of(run.model, batch))
    for column, item in enumerate(videos):
        for row, latent, name in (
            (2, mix.reader.feature("video", item), "latent of the file"),
            (3, drawn[column], "drawn"),
        ):
            axes[row, column].imshow(latent.flatten(0, 2).numpy().T, aspect="auto", vmin=-2, vmax=2)
            label = item.text.decode() if row == 2 else name
            axes[row, column].set_title(label, fontsize=8)
    page.tight_layout()
    page.savefig(path, dpi=80)


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a table."""
    lines = [f"{'held out':36} {'model':>8} {'without':>8} {'goal':>8}"]
    for figure in figures:
        goal = "" if figure.goal is None else f"{'<=' if figure.lower else '>='} {figure.goal:.3f}"
        mark = "" if figure.reached() else "  missed"
        lines.append(f"{figure.name:36} {figure.value:8.3f} {figure.baseline:8.3f} {goal:>8}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
