# %% [markdown]
# # Train a model, and look inside
#
# The preset `tiny` learns from Python's own sources, in about five minutes on a CPU. Then we look at its trits and
# scales, and save it. Run it as a script, or cell by cell in an editor that knows `# %%`. In a checkout `make install` makes the
# environment for it, and `source .venv/bin/activate` enters it:
#
#     python docs/scripts/train_and_look.py                      # 150 steps
#     python docs/scripts/train_and_look.py 5 --preset nano.json # fewer steps, another model

# %%
import argparse
import math
import sys
import sysconfig
import tempfile
from pathlib import Path

try:
    import torch

    from arbitor import ArbConfig, ArbModel, ArbOptimizer, preset
except ModuleNotFoundError as error:
    sys.exit(
        f"the package {error.name!r} is not installed: run `make install`, and then `source .venv/bin/activate`"
    )

parser = argparse.ArgumentParser(description="Train a model, and look inside.")
parser.add_argument("steps", nargs="?", type=int, default=150, help="at least 1 [150]")
parser.add_argument("--preset", type=Path, help="JSON file of a configuration [the preset tiny]")
# A notebook has arguments of its own.
asked = parser.parse_args([] if "ipykernel" in sys.modules else None)
STEPS = asked.steps
if STEPS < 1:
    parser.error(f"steps is {STEPS}, but must be at least 1")
try:
    config = ArbConfig.from_json(asked.preset.read_text()) if asked.preset else preset("tiny")
except (OSError, ValueError) as error:
    parser.error(f"the preset {asked.preset} cannot be used: {error}")
WINDOWS, BYTES = 8, 128

sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
# Every tenth block of 4,096 bytes judges the model, and the model never learns from it.
blocks = data[: len(data) // 4096 * 4096].view(-1, 4096)
held_out = torch.arange(len(blocks)) % 10 == 9
learns, judges = blocks[~held_out], blocks[held_out]
print(f"{learns.numel():,} bytes to learn from, {judges.numel():,} to be judged by", flush=True)

# %% [markdown]
# ## Train
#
# `ArbOptimizer` steps a model as an optimizer of torch would, and takes its schedulers. Weights vote while the backward pass runs,
# so `optimizer.backward(loss)` stands where `loss.backward()` would.

# %%
torch.manual_seed(0)
model = ArbModel(config, seed=0)
print(
    f"{model.num_weights:,} ternary weights in {len(model.weights())} matrices; print(model) shows its modules",
    flush=True,
)
optimizer = ArbOptimizer(model, rate=6.0)
# Flat for the first 40 %, then down to 0.
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (1 - step / STEPS) / 0.6))
device = model.context.device


def windows(blocks: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return windows at random places, int64 [WINDOWS, BYTES]."""
    rows = torch.randint(len(blocks), (WINDOWS,), generator=generator).tolist()
    starts = torch.randint(4096 - BYTES, (WINDOWS,), generator=generator).tolist()
    pairs = zip(rows, starts, strict=True)
    return torch.stack([blocks[row, start : start + BYTES] for row, start in pairs]).to(device)


@torch.no_grad()
def judged() -> float:
    """Return bits per byte on held-out windows, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    losses = [model.losses(windows(judges, generator))["bytes"].item() for _ in range(4)]
    return sum(losses) / len(losses) / math.log(2)


begun, snapshot = judged(), model.snapshot_trits()
for step in range(STEPS):
    losses = model.losses(windows(learns))
    optimizer.backward(losses)
    optimizer.step()
    schedule.step()
    # A line every few seconds, also into a pipe.
    if step % max(1, STEPS // 50) == 0:
        print(f"step {step:3}: {losses['bytes'].item() / math.log(2):.3f} bits a byte", flush=True)
ended = judged()
print(
    f"held out: {begun:.3f} -> {ended:.3f} bits a byte; {model.flip_rate(snapshot):.1%} of all trits differ now"
)

# %% [markdown]
# ## Look inside
#
# A weight of the model is its trits and one scale for each group of twelve. `weights()` gives them in canonical form. A scale has
# four levels an octave: level 0 is 1, level -4 is 1/2, and level -12 is 1/8. Scales of codebooks have one level an octave. A
# counter is near full if it has 48 or more of the 64 votes that move a trit.

# %%
shown = [name for name in model.weights() if not name.endswith("norm")]
for name in shown[:: max(1, len(shown) // 8)]:
    weight = model.weights()[name]
    trits = torch.bincount(
        model.ops.unpack_trits(weight.packed, weight.shape).flatten().cpu().long() + 1, minlength=3
    )
    minus, zero, plus = (trits / trits.sum()).tolist()
    low, high = weight.exponents.min().item(), weight.exponents.max().item()
    full = (weight.trit_accum.abs() >= 48).float().mean().item()
    print(
        f"{name:44} {minus:.0%} -1, {zero:.0%} 0, {plus:.0%} +1; levels of scales {low} to {high}; "
        f"{full:.1%} of counters near full"
    )

# %% [markdown]
# ## Write, save, load

# %%
print(repr(model.generate("def ", max_new_bytes=80, temperature=0.8, seed=1)))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    model = ArbModel.from_pretrained(folder)
    assert judged() == ended, "the loaded model is another one"
print(f"saved in {size:,} bytes, {size / model.num_weights:.2f} a weight, and loaded the same")
