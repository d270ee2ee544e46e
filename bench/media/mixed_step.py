"""Take training steps of a whole multimodal model from raw media, with its sidecars at full size: seconds, memory, and votes.

    python -m bench.media.mixed_step --preset r11 --device cuda --out docs/runs/graph-h200/mixed-r11

The sidecars are those of the seed documents (DINOv2-small, Moonshine-base, the Wan autoencoder), saved with random weights by their
own libraries and loaded by ours, in int8. A batch has a picture, a second of sound and a frame of video for each sample, and the
samples are answered by text, video and audio in turn. One JSON object is written after each stage, and printed as Markdown at the
end. The status is 1 where a loss is not finite, a weight gets no vote, a sidecar changes, or anything fails.

Legend: B samples, T bytes, F frames of sound, L numbers of a latent.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor import ArbModel
from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.media import encoders_of
from arbitor.optimized.training.media_speech import tokens_of
from arbitor.optimized.training.runtime import Runtime, choose_runtime, versions
from arbitor.optimized.training.schedule import GAIN
from arbitor.reference.audit import audit
from arbitor.reference.config import NUM_BYTES, ArbConfig
from arbitor.reference.graph import Targets
from arbitor.reference.graph.codec import AudioCodec
from arbitor.reference.graph.router import MODALITIES
from arbitor.reference.graph.video import latent_shape
from arbitor.reference.presets import PRESETS
from arbitor.sidecars import Encoders, audit_of
from arbitor.sidecars.audio import SAMPLE_RATE
from arbitor.sidecars.audit import STANDARD
from arbitor.sidecars.libraries import library
from arbitor.sidecars.precision import stored_tensors
from bench import machine, parts

SIDE = 256
"""Side of a picture and of a frame, in pixels. The latent of such a frame is the seeds' [16, 1, 32, 32]."""

KINDS = {"vision": "DINOv2-small", "audio": "Moonshine-base", "video": "Wan 2.1 VAE (pig-vae)"}
"""The sidecar of each kind, by its name in `STANDARD`."""


def write_standard(root: Path) -> dict[str, str]:
    """Write the sidecars of the seed documents with random weights into a folder, and return the settings that name them."""
    torch.manual_seed(0)
    for kind in ("vision", "audio"):
        STANDARD[KINDS[kind]]().save_pretrained(root / kind)
    network = STANDARD[KINDS["video"]]()
    file = root / "video" / "vae.safetensors"
    file.parent.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    library("safetensors.torch").save_file(tensors, str(file))
    network.save_config(str(file.parent))
    return {"vision": str(root / "vision"), "audio": str(root / "audio"), "video": str(file)}


class Raw:
    """Media and texts of a batch, drawn from a seed.

    Attributes:
        ids_BT:  bytes, int64.
        images:  B pictures, uint8 [3, 256, 256].
        sounds:  B sounds of a second, float32 [16000].
        clips:   B clips of one frame, uint8 [1, 3, 256, 256].
        modality_B: int64, the heads that answer, in turn.
    """

    def __init__(self, batch: int, context: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids_BT = torch.randint(NUM_BYTES, (batch, context), generator=generator)
        drawn = torch.randint(256, (batch, 2, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        self.images, self.clips = list(drawn[:, 0]), list(drawn[:, 1:])
        self.sounds = list(torch.rand(batch, SAMPLE_RATE, generator=generator) - 0.5)
        self.modality_B = torch.arange(batch) % len(MODALITIES)


def mixed(config: ArbConfig, sources: Mapping[str, str], report: dict[str, Any], say: Callable[[], None],
          *, runtime: Runtime, batch: int, context: int, passes: int, seed: int) -> dict[str, Any]:  # fmt: skip
    """Load the sidecars, build the model, and take steps; fill a report stage by stage.

    Args:
        config:  of the model, which has every kind of medium and head.
        sources: settings that name the sidecars.
        report:  gets the stages.
        say:     is called after each stage.
        runtime: where it runs.
        batch, context, passes, seed: B, T, steps, and seed of weights, media and dither.

    Raises RuntimeError for a loss that is not finite, a weight that no step's votes reach, or a sidecar that changes.
    """
    raw = Raw(batch, context, seed=seed)
    encoders = encoders_of(sources, device=runtime.device)
    report["sidecars"] = {}
    for kind in KINDS:
        took, sidecar = measured(runtime, partial(encoders.sidecar, kind))
        counted = audit_of(kind, sidecar.network)
        on_cpu = encoders_of(sources, device="cpu")
        off = difference(encoded(encoders, kind, raw), encoded(on_cpu, kind, raw))
        report["sidecars"][kind] = {
            "seconds": took["seconds"], "precision": sidecar.precision, "modules": dict(counted.modules),
            "stored_bytes": counted.stored_bytes, "difference_to_cpu": off,
        }  # fmt: skip
        say()
    before = {kind: digest_of(encoders, kind) for kind in KINDS}
    took, model = measured(
        runtime, lambda: ArbModel(config, device=runtime.device, dtype=runtime.dtype, ops=runtime.ops(), seed=seed)
    )  # fmt: skip
    model.use_encoders(encoders)
    report["model"] = {**took, "weights": model.num_weights, "state_bytes": model.state_bytes}
    say()
    codec = AudioCodec(config, ops=runtime.ops(), device=runtime.device, seed=seed)
    report["steps"] = []
    for step in range(passes):
        with values_vouched_for():
            report["steps"].append(one_step(model, codec, raw, runtime, step=step))
        say()
    if unmoved := without_votes(model):
        raise RuntimeError(f"weights got no vote in {passes} steps: {', '.join(unmoved)}")
    if before != {kind: digest_of(encoders, kind) for kind in KINDS}:
        raise RuntimeError("a step changed a sidecar, but sidecars are frozen")
    return {}


def one_step(model: ArbModel, codec: AudioCodec, raw: Raw, runtime: Runtime, *, step: int) -> dict[str, Any]:
    """Take one training step from raw media; return seconds and peaks of its parts, and the losses before it."""
    encoders, side = model.encoders, latent_shape(model.config.video_latent)[-1]
    assert encoders is not None
    ids_BT = raw.ids_BT.to(runtime.device)
    of_targets, targets = measured(
        runtime,
        lambda: Targets(
            raw.modality_B.to(runtime.device),
            latent=encoders.latents(raw.clips, side=side).to(runtime.device),
            tokens_BN=torch.stack(tokens_of(codec, raw.sounds)).to(runtime.device),
        ),
    )
    of_forward, losses = measured(
        runtime, lambda: model.losses(ids_BT, images=raw.images, sounds=raw.sounds, targets=targets)
    )
    values = {name: value.item() for name, value in losses.items()}

    def update() -> bool:
        voted = model.backward(losses, rate=GAIN * model.config.theta, step=step, undo=False)
        model.step()
        return voted

    of_update, voted = measured(runtime, update)
    if not voted:
        raise RuntimeError(f"a loss is not finite: {values}")
    times = {"targets": of_targets, "forward": of_forward, "update": of_update}
    return {**times, "losses": values, "without_votes": without_votes(model)}


def without_votes(model: ArbModel) -> list[str]:
    """Return the weights of a model that learn, and that no vote has reached since they were drawn, by name."""
    return [
        name
        for name, module in model.ternary_modules().items()
        if not module.frozen and not module.weight.trit_accum.any()
    ]


def measured(runtime: Runtime, call: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Return seconds and peak bytes of a call, and its result."""
    runtime.synchronize()
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = call()
    runtime.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if runtime.device == "cuda" else None
    return {"seconds": seconds, "peak_bytes": peak}, result


def encoded(encoders: Encoders, kind: str, raw: Raw) -> Tensor:
    """Return what a sidecar makes of the media, on the CPU."""
    if kind == "vision":
        return encoders.pictures(raw.images[:1]).cpu()
    if kind == "audio":
        return encoders.sounds(raw.sounds[:1]).cpu()
    return encoders.latents(raw.clips[:1], side=SIDE // 8).cpu()


def difference(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of a difference over the norm of what was wanted."""
    return float((got - wanted).norm() / wanted.norm())


def digest_of(encoders: Encoders, kind: str) -> str:
    """Return a digest of all that a sidecar stores."""
    network, digest = encoders.sidecar(kind).network, hashlib.sha256()
    for tensor in [*network.parameters(), *network.buffers()]:
        for stored in stored_tensors(tensor):
            digest.update(stored.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def table(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [
        "| sidecar | loaded s | int8 modules | stored MiB | off the CPU's by |",
        "|---|---:|---|---:|---:|",
    ]
    for kind, row in report.get("sidecars", {}).items():
        modules = ", ".join(f"{count} {name}" for name, count in row["modules"].items()) or row["precision"]
        lines.append(
            f"| {kind} | {row['seconds']:.2f} | {modules} | {row['stored_bytes'] / 2**20:.2f} | {row['difference_to_cpu']:.1e} |"
        )
    if "model" in report:
        model = report["model"]
        lines.append(
            f"\n{model['weights']:,} weights, {model['state_bytes'] / 2**20:,.2f} MiB of state on the device, built in "
            f"{model['seconds']:.1f} s\n"
        )
    lines += [
        "| step | targets s | forward s | update s | peak MiB | losses |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for step, row in enumerate(report.get("steps", [])):
        taken = [row[part] for part in ("targets", "forward", "update")]
        seconds = " | ".join(f"{part['seconds']:.3f}" for part in taken)
        peaks = [part["peak_bytes"] for part in taken if part["peak_bytes"] is not None]
        peak = f"{max(peaks) / 2**20:,.0f}" if peaks else ""
        losses = ", ".join(f"{name} {value:.3f}" for name, value in row["losses"].items())
        lines.append(f"| {step} | {seconds} | {peak} | {losses} |")
    if "failed" in report:
        lines.append(f"\nFailed: {report['failed']}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the steps, write the JSON file, print the tables; return 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.media.mixed_step", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", default="r11", choices=list(PRESETS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=len(MODALITIES), help="samples")
    parser.add_argument("--ctx", type=int, default=128, help="bytes of a text")
    parser.add_argument("--passes", type=int, default=4, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the JSON file, without its suffix")
    asked = parser.parse_args(argv)
    runtime, config = choose_runtime(asked.device), PRESETS[asked.preset]
    out = None if asked.out is None else asked.out.with_suffix(".json")
    report: dict[str, Any] = {"device": machine.device_name(), "versions": versions(), "preset": asked.preset}
    report |= {
        "batch": asked.batch,
        "context": asked.ctx,
        "seed": asked.seed,
        "weights": audit(config).weights,
    }
    options = {"batch": asked.batch, "context": asked.ctx, "passes": asked.passes, "seed": asked.seed}
    with tempfile.TemporaryDirectory() as folder:
        sources = write_standard(Path(folder))
        say = partial(parts.write, out, report)
        report |= parts.attempt(partial(mixed, config, sources, report, say, runtime=runtime, **options))
    parts.write(out, report)
    print(table(report))
    return parts.exit_status([report])


if __name__ == "__main__":
    sys.exit(main())
