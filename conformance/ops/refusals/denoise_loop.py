"""Calls of the whole denoise loop that must be refused."""

from __future__ import annotations

from typing import Any

import torch

from conformance.ops.refusals.refusal import F16, Refusal, meta, ones, refused, weight

# L = 14 numbers of a latent, D = 5, two rows of steps.
_ARGUMENTS: dict[str, Any] = {
    "latent_BL": ones(2, 14),
    "tokens_BPD": ones(2, 3, 5),
    "latent_in": lambda: weight(5, 14),
    "query": lambda: weight(5, 5),
    "step_rows": lambda: weight(2, 5),
    "latent_out": lambda: weight(14, 5),
}


def loop(why: str, error: type[Exception], says: str, **changes: Any) -> Refusal:
    """Return a refusal of the loop with some of its arguments exchanged."""
    options = {name: changes.pop(name) for name in ("alphas", "halt_threshold") if name in changes}
    return refused(
        "denoise_loop", why, error, says, *{**_ARGUMENTS, **changes}.values(), **{"alphas": (0.5,), **options}
    )


REFUSALS: tuple[Refusal, ...] = (
    loop("no steps", ValueError, "alphas", alphas=()),
    loop("one number", TypeError, "alphas", alphas=0.5),
    loop("alpha 0", ValueError, "alphas", alphas=(0.5, 0.0)),
    loop("alpha 1.1", ValueError, "alphas", alphas=(1.1,)),
    loop("a word", TypeError, "alphas", alphas="fast"),
    loop("threshold 0", ValueError, "halt_threshold", halt_threshold=0.0),
    loop("threshold 2", ValueError, "halt_threshold", halt_threshold=2.0),
    loop("threshold True", TypeError, "halt_threshold", halt_threshold=True),
    loop("more steps than rows", ValueError, "step_rows", alphas=(0.5, 0.5, 0.5)),
    loop("rows of another width", ValueError, "step_rows", step_rows=lambda: weight(2, 6)),
    loop("a query that is not square", ValueError, "query", query=lambda: weight(5, 6)),
    loop("an output of another size", ValueError, "latent_out", latent_out=lambda: weight(13, 5)),
    loop("an output of another width", ValueError, "latent_out", latent_out=lambda: weight(14, 6)),
    loop("a latent of 13", ValueError, "latent_BL", latent_BL=ones(2, 13)),
    loop("one latent", ValueError, "latent_BL", latent_BL=ones(14)),
    loop("float16", TypeError, "latent_BL", latent_BL=ones(2, 14, dtype=F16)),
    loop("two dtypes", TypeError, "tokens_BPD", tokens_BPD=ones(2, 3, 5, dtype=torch.bfloat16)),
    loop("tokens of another width", ValueError, "tokens_BPD", tokens_BPD=ones(2, 3, 6)),
    loop("tokens of three samples", ValueError, "tokens_BPD", tokens_BPD=ones(3, 3, 5)),
    loop("no tokens", ValueError, "tokens_BPD", tokens_BPD=ones(2, 0, 5)),
    loop("two dimensions of tokens", ValueError, "tokens_BPD", tokens_BPD=ones(2, 5)),
    loop("another device", ValueError, "tokens_BPD", tokens_BPD=meta(2, 3, 5)),
)
"""Every call that must be refused."""
