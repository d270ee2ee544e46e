"""Inputs of the family denoise.

Legend: M rows of K columns; for the loop B samples of L numbers, P tokens of width D, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from arbitor.reference.config import HALT_THRESHOLD
from bench.inputs.maker import FLOATS, Arguments, Inputs, Maker, Sizes, activations

MOST = {"D": 2112, "L": 16_384, "P": 298}


def loop(make: Maker, s: Sizes) -> Arguments:
    """Return the arguments of `denoise_loop`."""
    floats = FLOATS[s["float_bytes"]]
    shapes = ((s["D"], s["L"]), (s["D"], s["D"]), (s["T"], s["D"]), (s["L"], s["D"]))
    weights = (make.weight(*shape, s["G"]) for shape in shapes)
    latent, tokens = make.normal((s["B"], s["L"]), floats), make.normal((s["B"], s["P"], s["D"]), floats)
    at = {
        "alphas": (0.153, 0.497, 0.819)[: s["T"]],
        "halt_threshold": HALT_THRESHOLD if s["halting"] else None,
    }
    return (latent, tokens, *weights), at


INPUTS: Mapping[str, Inputs] = {
    "denoise_step": lambda make, s: (
        (activations(make, s, "K"), activations(make, s, "K")),
        {"alpha": 0.7},
    ),
    "denoise_step_backward": lambda make, s: ((activations(make, s, "K"),), {"alpha": 0.7}),
    "denoise_loop": loop,
}
