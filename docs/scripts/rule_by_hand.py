# %% [markdown]
# # The rule by hand
#
# A table that predicts the next byte from the one before, trained by the operations of the specification alone: no model, no
# autograd, no optimizer. Run it as a script, or cell by cell in an editor that knows `# %%`. It takes half a minute on a CPU.
# In a checkout `make install` makes the environment for it, and `source .venv/bin/activate` enters it:
#
#     python docs/scripts/rule_by_hand.py          # 600 steps
#     python docs/scripts/rule_by_hand.py 50

# %%
import argparse
import codecs
import contextlib
import io
import math
import sys

with contextlib.redirect_stdout(io.StringIO()):
    import this

try:
    import torch

    from arbitor import ops
except ModuleNotFoundError as error:
    sys.exit(
        f"the package {error.name!r} is not installed: run `make install`, and then `source .venv/bin/activate`"
    )

parser = argparse.ArgumentParser(description="Train a table by the operations alone.")
parser.add_argument("steps", nargs="?", type=int, default=600, help="at least 1 [600]")
# A notebook has arguments of its own.
STEPS = parser.parse_args([] if "ipykernel" in sys.modules else None).steps
if STEPS < 1:
    parser.error(f"steps is {STEPS}, but must be at least 1")

# The Zen of Python, which every Python has: 856 bytes that it keeps in rot13.
text = codecs.decode(this.s, "rot13").encode()
symbols = sorted(set(text))
size = len(symbols)
ids = torch.tensor([symbols.index(byte) for byte in text])
before, after = ids[:-1], ids[1:]
print(f"{len(text)} bytes of {size} kinds")

# %% [markdown]
# ## A weight
#
# One row for each byte that comes next, one column for each byte before. A weight is a trit, -1, 0 or +1, times the scale of its
# group of twelve. Two mantissa bits give a scale four levels an octave. The device is the CPU unless the ops are Triton's.

# %%
device = "cuda" if ops.__name__ == "arbitor.optimized.ops" else "cpu"
before, after = before.to(device), after.to(device)
weight = ops.initial_weight((size, size), std=1.5, seed=0, tensor_id=0, device=device).with_mantissa(2)
one_hot = torch.nn.functional.one_hot(before, size).float()
print(f"{size * size:,} weights take {weight.state_bytes:,} bytes, all that training keeps of them included")

# %% [markdown]
# ## Steps
#
# 1. The output is `ops.linear`, and the gradient of the loss is softmax minus the truth, divided by the number of bytes.
# 2. `linear_weight_grad` sums it over the text. This is the only float that the weight meets, and it is thrown away.
# 3. `stochastic_votes` turns each row into int8: the gradient over the row's scale, times the rate, rounded at random.
# 4. `accumulate` adds votes to the counters of trits and scales, and `apply_step` moves those whose counters are full.
#
# The rate is 6 for the first 40 % of the steps, and falls to 0 by the end.


# %%
def loss_of(weight) -> tuple[float, torch.Tensor]:
    """Return bits per byte, and the logits."""
    logits = ops.linear(one_hot, weight)
    return torch.nn.functional.cross_entropy(logits, after).item() / math.log(2), logits


flips = 0
first = loss_of(weight)[0]
for step in range(STEPS):
    bits, logits = loss_of(weight)
    gradient = (logits.softmax(dim=1) - torch.nn.functional.one_hot(after, size)) / len(after)
    weight_gradient = ops.linear_weight_grad(gradient, one_hot)
    rate = 6.0 * min(1.0, (1 - step / STEPS) / 0.6)
    votes = ops.stochastic_votes(weight_gradient, rate, seed=0, step=step, tensor_id=0)
    voted = ops.accumulate(weight, votes, seed=0, step=step, tensor_id=0)
    stepped = ops.apply_step(voted)
    moved = int(ops.count_changed_trits(weight, stepped))
    flips, weight = flips + moved, stepped
    if step % max(1, STEPS // 10) == 0:
        row = votes[symbols.index(ord("e"))].tolist()
        print(
            f"step {step:4}: {bits:.3f} bits a byte, {moved:4} trits move; votes of the row of 'e': {row[:12]}...",
            flush=True,
        )
last = loss_of(weight)[0]

# %% [markdown]
# ## What came out
#
# The best that any table can do here is the entropy of a byte, given the one before. The ternary table ends 0.4 bits above it:
# twelve neighbours of a row share a scale, so that it cannot say how much rarer one byte is than another.
#
# The end is not the best step: from step 486 on the loss goes up and down between 3.17 and 3.30. A trit moves by a whole level,
# which may be more than its gradient asked for, and at the small rate of the last steps nothing moves it back.

# %%
counts = torch.zeros(size, size).index_put_(
    (before.cpu(), after.cpu()), torch.ones(len(after)), accumulate=True
)
shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
entropy = -(counts * shares.clamp(min=1e-12).log2()).sum().item() / len(after)
trits = ops.unpack_trits(ops.to_spec(weight).packed, (size, size))
print(
    f"{first:.3f} -> {last:.3f} bits a byte after {flips:,} moves of trits; no table can have less than {entropy:.3f}"
)
print("trits of the row of 'e':", trits[symbols.index(ord("e"))].tolist())
