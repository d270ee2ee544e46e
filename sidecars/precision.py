"""int8 weights for frozen networks: the one module that imports optimum-quanto.

A weight becomes int8 with one float scale for each row or output channel. Weights of modules that quanto does not know stay in
float32, and so do activations. quanto knows linear layers and 2-D convolutions. The causal 3-D convolutions are 96 % of a video
autoencoder. This module adds them by a public class of quanto, and registers nothing for other users of quanto.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.sidecars.libraries import has_quanto, library

PRECISIONS = ("int8", "bfloat16")
"""How the weights of a sidecar may be kept."""


def frozen(network: nn.Module, precision: str) -> tuple[nn.Module, str]:
    """Return a network in evaluation mode with weights that cannot train, and the precision that it got.

    `int8` needs optimum-quanto. Without it the network is kept in bfloat16, and a warning says so.

    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, but must be one of {', '.join(map(repr, PRECISIONS))}")
    if precision == "int8" and not has_quanto():
        warnings.warn(
            "optimum-quanto is not installed, so a frozen encoder is kept in bfloat16, which is not strict; for int8, install it "
            "(pip install 'arbitor[sidecars]')",
            stacklevel=3,
        )
        precision = "bfloat16"
    network.eval()
    if precision == "int8":
        _to_int8(network)
    else:
        network.to(torch.bfloat16)
    # This comes after quanto's freeze, which wraps each weight in a parameter that requires a gradient again.
    network.requires_grad_(False)
    return network, precision


def _to_int8(network: nn.Module) -> None:
    """Quantise every weight that can be quantised, in place."""
    quanto = library("optimum.quanto")
    causal = [name for name, module in network.named_modules() if type(module).__name__ == "WanCausalConv3d"]
    for name in causal:
        parent, _, leaf = name.rpartition(".")
        convolution = _causal_class().from_module(network.get_submodule(name), weights=quanto.qint8)
        setattr(network.get_submodule(parent), leaf, convolution)
    quanto.quantize(network, weights=quanto.qint8)
    quanto.freeze(network)


@cache
def _causal_class() -> Any:
    """Return the class of a causal 3-D convolution with an int8 weight, made on the first call, because it needs quanto."""
    mixin = library("optimum.quanto.nn").QModuleMixin

    class QCausalConv3d(mixin, nn.Conv3d):  # type: ignore[misc, valid-type]
        """A causal 3-D convolution of the Wan autoencoder whose weight is int8, one scale an output channel."""

        @classmethod
        def qcreate(
            cls,
            module: Any,
            weights: Any,
            activations: Any = None,
            optimizer: Any = None,
            device: torch.device | None = None,
        ) -> Any:
            """Return an empty convolution of the same shape, as quanto asks of its modules."""
            made = _any(cls)(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=0,
                bias=module.bias is not None,
                dtype=module.weight.dtype,
                device=device,
                weights=weights,
                activations=activations,
                optimizer=optimizer,
            )
            # (width, width, height, height, time before, time after), which `forward` pads by itself.
            made._padding = module._padding
            return made

        def forward(self, x_BCTHW: Tensor, cache_x: Tensor | None = None) -> Tensor:
            """Return the convolution of a clip, after the frames of an earlier chunk where there are any."""
            padding = list(_any(self)._padding)
            if cache_x is not None and padding[4] > 0:
                x_BCTHW = torch.cat([cache_x.to(x_BCTHW.device), x_BCTHW], dim=2)
                padding[4] -= cache_x.shape[2]
            return _any(self)._conv_forward(F.pad(x_BCTHW, padding), self.qweight, self.bias)

    return QCausalConv3d


def _any(value: Any) -> Any:
    """Return a value as `Any`, because type checkers know nothing of the classes of quanto, which may not be installed."""
    return value


def quantized_modules(network: nn.Module) -> dict[str, int]:
    """Return how many modules of each class hold int8 weights."""
    counts: dict[str, int] = {}
    if has_quanto():
        mixin = library("optimum.quanto.nn").QModuleMixin
        for module in network.modules():
            if isinstance(module, mixin):
                counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return dict(sorted(counts.items()))


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """Return the tensors that store a parameter: int8 values and float scales if it is quantised, else the parameter itself."""
    if has_quanto() and isinstance(parameter, library("optimum.quanto").QTensor):
        names, _ = parameter.__tensor_flatten__()
        return [getattr(parameter, name) for name in names]
    return [parameter]
