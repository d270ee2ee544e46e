"""Peers: what a user would run instead, on the same inputs, in the same run.

A peer takes the arguments that the op was given (weights in canonical form), gets ready, and returns the call to time.
Its bytes and operations are its own: a dense bfloat16 weight is 2 bytes a weight, which is where the physical limit of a
ratio comes from. Its output is checked as well: a fast wrong peer is no baseline.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from bench.inputs import Arguments, Sizes


@dataclass(frozen=True)
class Peer:
    """One implementation to compare with.

    Attributes:
        name:       as tables print it.
        build:      from an op's arguments and sizes, the call to time.
        bytes_min:  least memory traffic of the peer, in bytes.
        ops_min:    least arithmetic, or None where it is the op's own.
        note:       what is not equal between the two.
        checked:    whether its output is compared with the op's; `note` says why where it is not.
        matched:    from its output and the op's, the two that must agree within the rounding of the peer's dtype.
        capturable: whether it may be recorded in a CUDA graph.
        needs:      a package that an installation may lack, or nothing. Without it, or on a CPU, the peer is left out.
    """

    name: str
    build: Callable[[Arguments, Sizes], Callable[[], Any]]
    bytes_min: Callable[[Sizes], int]
    ops_min: Callable[[Sizes], int] | None = None
    note: str = ""
    checked: bool = True
    matched: Callable[[Any, Any], tuple[Any, Any]] = lambda output, expected: (output, expected)
    capturable: bool = True
    needs: str = ""


def peers_of(op: str) -> tuple[Peer, ...]:
    """Return the peers of an op."""
    return _all_peers().get(op, ())


@cache
def _all_peers() -> Mapping[str, tuple[Peer, ...]]:
    """Return the peers by op, from every file of this folder; raise ValueError where two peers of one op have one name."""
    found: dict[str, tuple[Peer, ...]] = {}
    for file in sorted(file.name for file in pkgutil.iter_modules(__path__)):
        for op, peers in import_module(f"{__name__}.{file}").PEERS.items():
            found[op] = (*found.get(op, ()), *peers)
            names = [peer.name for peer in found[op]]
            if len(set(names)) < len(names):
                raise ValueError(
                    f"bench/peers/{file}.py has a peer of {op} with the name of another one: {names}"
                )
    return MappingProxyType(found)


def dense(weight: Any, dtype: Any) -> Any:
    """Return a canonical weight as a float matrix: by Triton on a GPU, where tables are large; it is exact either way."""
    if weight.device.type == "cuda":
        from arbitor.optimized import ops
    else:
        from arbitor.reference import ops
    return ops.dequantize(weight, dtype=dtype)
