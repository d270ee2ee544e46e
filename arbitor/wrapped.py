"""What other libraries put around a model, and how a refusal names the model in it."""

from __future__ import annotations

from typing import Any

from arbitor.reference.graph.stateful import Stateful

HOLDERS = ("arb", "_orig_mod", "module", "model")
"""Attributes under which a wrapper holds a model: `ArbForCausalLM`, torch.compile, torch.nn.parallel, accelerate and others."""

HELD = f"{HOLDERS[0]}."
"""What the names of the tensors of a model begin with in an `ArbForCausalLM`."""


def inner_model(given: Any) -> str:
    """Return the end of a refusal that names the attribute of a wrapper which holds a model; nothing where there is none."""
    for name in HOLDERS:
        if isinstance(getattr(given, name, None), Stateful):
            return f": give its attribute {name}"
    return ""
