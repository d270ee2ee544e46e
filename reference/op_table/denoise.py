"""Rows of the family denoise."""

from __future__ import annotations

from arbitor.reference.op_table.row import TWICE, OpRow, Shape
from arbitor.reference.op_table.work import ROWS, sizes, values


def denoise_weights(s: Shape) -> tuple[tuple[int, int], ...]:
    """Return the shapes of latent_in, query, latent_out and step_rows."""
    return (s["D"], s["L"]), (s["D"], s["D"]), (s["L"], s["D"]), (s["T"], s["D"])


# B samples of L numbers, P tokens of width D, T steps; the others generate on the heads of the presets of those names: all
# steps, or with `halting` as many as a sample asks for, which is what a head does unless it is told otherwise.
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
    ),
    OpRow(
        "denoise_step_backward", "denoise", TWICE, ROWS,
        bytes_min=lambda s: 3 * s["float_bytes"] * s["M"] * s["K"],
        ops_min=lambda s: 2 * s["M"] * s["K"],
    ),
    # Least bytes: latents and tokens in, latents out, and every weight once, however many steps.
    OpRow(
        "denoise_loop", "denoise", TWICE, DENOISE_LOOP,
        bytes_min=lambda s: s["float_bytes"] * s["B"] * (2 * s["L"] + s["P"] * s["D"])
        + sum(values({**s, "N": n, "K": k}) for n, k in denoise_weights(s)),
        ops_min=lambda s: s["T"] * s["B"] * (sum(2 * n * k for n, k in denoise_weights(s)[:3]) + 4 * s["P"] * s["D"]),
    ),
)
# fmt: on
