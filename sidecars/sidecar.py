"""What all sidecars have in common: they are frozen, they keep their precision, and they are no part of a model's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn


class SidecarError(RuntimeError):
    """A fault that a user can act on: a missing library, a checkpoint that does not fit, a file that cannot be decoded."""


class MachineError(SidecarError):
    """Something that the machine lacks, for good or at the moment. No file is at fault, and another file would fare no better."""


class MissingLibraryError(MachineError):
    """A library that is not installed."""


class Sidecar(nn.Module):
    """A frozen network of another project.

    The network is held beside the registry of submodules. It is therefore in no `state_dict`, `parameters()` or `modules()` of the
    model that owns the sidecar, and is neither saved nor trained. It moves between devices with its owner.

    Args:
        network:   the network, frozen.
        identity:  a digest of the network's source, for the keys of cached features (`arbitor.sidecars.source.identity_of`).
        precision: `int8` or `bfloat16`, how the weights are kept.

    Raises ValueError where a parameter of the network requires a gradient.
    """

    def __init__(self, network: nn.Module, *, identity: str, precision: str) -> None:
        super().__init__()
        trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(f"network has trainable parameters ({trainable[0]!r} first), but must be frozen")
        self._held = (network.eval(),)
        self.identity, self.precision = identity, precision

    @property
    def network(self) -> Any:
        """The network of the other project."""
        return self._held[0]

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Return this sidecar; its network stays in evaluation mode, whatever its owner does."""
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return this sidecar, which is frozen.

        Raises RuntimeError if `requires_grad` is True.
        """
        if requires_grad:
            raise RuntimeError("requires_grad is True, but a sidecar is frozen: it must be False")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the network to another device, as torch does; refuse another dtype."""
        probe = torch.empty(0, dtype=torch.float32, device=self.device)
        wanted = fn(probe).dtype
        if wanted is not torch.float32:
            raise TypeError(
                f"a sidecar was asked to become {str(wanted).removeprefix('torch.')}, but it keeps the precision that it was "
                f"loaded with, {self.precision}: move it by .to(device)"
            )
        if recurse:
            self.network._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this sidecar itself. It never changes, so copies of a model share it."""
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to pickle, because the libraries cannot read back a quantised network that they wrote."""
        raise RuntimeError("a sidecar cannot be pickled: load it again from its source in the other process")

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call of the network, without gradients and without autocast, which breaks quantised weights."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return call(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the text of a sidecar in `repr`."""
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        return f"{type(self.network).__name__}, {weights:,} weights, {self.precision}, frozen"
