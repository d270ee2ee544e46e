"""The one place where a path is picked: the CUDA C++ kernel of an op, a product of the library, or its Triton kernel.

A CUDA C++ kernel takes some calls of an op, by the dtype, the shape and the memory of its arguments (`fits` of `optimized/cuda`).
Triton takes every call, and is the only path in its interpreter. `ARB_PATH` is `triton` for Triton alone, and `cuda` for users who
want an error where CUDA C++ kernels cannot be had. Without it, they are used where they can be, and a sentence says once why they
cannot be. Integers are the same on both paths, and floats are held to the same class.

A product of the library takes some calls too, by what `fits` says of it and by the GPU. `ARB_PATH=triton` keeps calls from it.
"""

from __future__ import annotations

import functools
import warnings

import torch

from arbitor.optimized import settings
from arbitor.optimized.cuda import compiler


def takes_cuda(fits: bool, device: torch.device, *, only: tuple[int, int] | None = None) -> bool:
    """Return whether a call goes to its CUDA C++ kernel.

    Args:
        fits: whether the kernel takes such a call.
        device: of the tensors.
        only: the compute capability of the GPUs that the kernel is for, where it is not for all later ones.

    Raises:
        RuntimeError: `ARB_PATH` is `cuda`, and CUDA C++ kernels cannot be had on the device.
        ValueError: `ARB_PATH` names no path.
    """
    asked = settings.path()
    if asked == "triton":
        return False
    if asked == "cuda":
        reason = why_not(device)
        if reason is not None:
            raise RuntimeError(f"ARB_PATH is 'cuda', but {reason}")
        return fits and _is_for(device, only)
    if not fits or device.type != "cuda" or not _is_for(device, only):
        return False
    reason = why_not(device)
    if reason is not None:
        _warn_once(reason)
    return reason is None


def takes_library(fits: bool, device: torch.device, *, only: tuple[int, int]) -> bool:
    """Return whether a call goes to a product of the library where Triton has a kernel for it.

    Args:
        fits: whether the product takes such a call, and is worth it.
        device: of the tensors.
        only: the compute capability of the GPUs on which it is worth it.

    Raises:
        ValueError: `ARB_PATH` names no path.
    """
    return settings.path() != "triton" and fits and device.type == "cuda" and _is_for(device, only)


def why_not(device: torch.device) -> str | None:
    """Return why CUDA C++ kernels cannot be had on a device, None if they can be."""
    if device.type != "cuda":
        return f"CUDA C++ kernels run on CUDA, and a tensor is on {device}"
    return _why_not(device)


def _is_for(device: torch.device, only: tuple[int, int] | None) -> bool:
    return only is None or torch.cuda.get_device_capability(device) == only


@functools.cache
def _why_not(device: torch.device) -> str | None:
    capability, least = torch.cuda.get_device_capability(device), compiler.LEAST_CAPABILITY
    if capability < least:
        return f"CUDA C++ kernels need compute capability {least[0]}.{least[1]}, and {device} has {capability[0]}.{capability[1]}"
    return compiler.why_missing() or compiler.why_unknown(capability)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}; Triton kernels are used, which give the same integers", RuntimeWarning, stacklevel=2
    )
