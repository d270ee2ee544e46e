"""Rows of the family denoise."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow, Shape
from arbitor.reference.op_table.work import ROWS, sizes, values


def denoise_weights(s: Shape) -> tuple[tuple[int, int], ...]:
    """Return the shapes of latent_in, query, latent_out and step_rows."""
    return (s["D"], s["L"]), (s["D"], s["D"]), (s["L"], s["D"]), (s["T"], s["D"])


# Sizes: B samples of L numbers, P tokens of width D, T steps. `r9` and `r14` have the sizes of those presets' video heads.
# Without `halting` the loop takes all T steps. With it, a sample takes the steps that it needs, which is a head's default.
LOOP = {"T": 3, "G": 12, "float_bytes": 4}

DENOISE_LOOP = sizes(
    tiny={"B": 2, "L": 64, "P": 16, "D": 32, **LOOP, "halting": 0},
    r9={"B": 1, "L": 16384, "P": 298, "D": 512, **LOOP, "halting": 0},
    r9_halting={"B": 1, "L": 16384, "P": 298, "D": 512, **LOOP, "halting": 1},
    r14={"B": 1, "L": 4096, "P": 1024, "D": 7168, **LOOP, "halting": 0},
    r14_halting={"B": 1, "L": 4096, "P": 1024, "D": 7168, **LOOP, "halting": 1},
)

# fmt: off
OPS = (
    OpRow(
        "denoise_step", "denoise", TWICE, ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: 3 * s["M"] * s["K"],
        like=lambda latent, pred, alpha: latent.new_empty(latent.shape),
    ),
    OpRow(
        "denoise_step_backward", "denoise", TWICE, ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: 2 * s["M"] * s["K"],
        like=lambda grad, alpha: (grad.new_empty(grad.shape), grad.new_empty(grad.shape)),
    ),
    # The least bytes are one read of latents, tokens and every weight, and one write of latents, whatever the number of steps.
    OpRow(
        "denoise_loop", "denoise", TWICE, DENOISE_LOOP,
        bytes_min=lambda s: s["float_bytes"] * s["B"] * (2 * s["L"] + s["P"] * s["D"])
        + sum(values({**s, "N": n, "K": k}) for n, k in denoise_weights(s)),
        ops_min=lambda s: s["T"] * s["B"] * (sum(2 * n * k for n, k in denoise_weights(s)[:3]) + 4 * s["P"] * s["D"]),
    ),
)
# fmt: on
