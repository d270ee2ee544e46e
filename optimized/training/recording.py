"""CUDA graphs: work that is the same from one time to the next is recorded once, and then launched as a whole.

A pass of a model is some thousand small kernels, and Python launches them more slowly than a GPU computes them. Replaying gives
the bits that launching gives.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from arbitor.optimized.training.runtime import Runtime
from arbitor.reference.graph.voting import Voting, in_turn

LAUNCHED_FIRST = 2
"""Runs before the one that is recorded: in them kernels are compiled, and libraries set themselves up."""

BRANCHES = 8
"""Most branches of a CUDA graph that begin at one place."""


def records(
    asked: bool | None,
    runtime: Runtime,
    *,
    vote_rule: str | None = None,
    exchange: str = "",
    adapted: bool = False,
) -> bool:
    """Whether passes are recorded and replayed, for what was asked; if nothing was, they are wherever they can be.

    Args:
        asked: what the user said.
        runtime: where the model runs.
        vote_rule: of the votes of these passes; None for passes in which nothing votes. The sign rule derives the size of a vote
            from the loss, on the host, so that no two of its passes need be the same.
        exchange: what ranks exchange in the passes that cannot be recorded, in words, as `distributed.run.unrecorded` returns it.
        adapted: whether the model has adapters, with which attention reads a ledger by rows, and not in one op.

    Raises:
        ValueError: they cannot be, but were asked for.
    """
    possible = (
        runtime.device == "cuda"
        and runtime.backend == "triton"
        and vote_rule in (None, "stochastic")
        and not exchange
        and not adapted
    )
    if asked and not possible:
        votes, only = "", ""
        if vote_rule is not None:
            votes, only = f" and vote rule {vote_rule}", " with stochastic votes"
        if exchange:
            votes, only = f"{votes} and {exchange}", f"{only} without {exchange}"
        if adapted:
            votes, only = f"{votes} and adapters", f"{only} without adapters"
        raise ValueError(
            f"cuda_graph is True, but must be False or None for device {runtime.device}, backend {runtime.backend}{votes}: "
            f"only the triton backend on cuda{only} can be recorded"
        )
    return possible if asked is None else asked


def recorded(*runs: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
    """Record some runs, which does not run them. They share memory: a later one may read what an earlier one leaves."""
    graphs: list[torch.cuda.CUDAGraph] = []
    with _no_garbage():
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].pool() if graphs else None
            # What other threads do to the device is no matter: a process group asks about work that was sent before.
            # Nothing is launched in the stream of the recording itself. What libraries keep for it is freed with any of its graphs
            # from release 2.12 of torch on (https://github.com/pytorch/pytorch/issues/193402).
            with (
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
                _forked(1) as [branch],
                torch.cuda.stream(branch),
            ):
                run()
            graphs.append(graph)
    return graphs


class Readout:
    """Reads a few numbers of a device, while the device goes on with the work that is launched after them.

    Attributes:
        tensor: what is read. Between `begin` and `numbers` only work may write to it that is launched after `begin` on its stream.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Begin with a tensor. On CUDA its copy has pinned memory, so that the host does not wait for the copy to end."""
        self.tensor = tensor
        self._copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._done = torch.cuda.Event() if tensor.is_cuda else None

    def begin(self) -> None:
        """Read the numbers once all work that was launched so far is done."""
        self._copy.copy_(self.tensor, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def numbers(self) -> list[float]:
        """Wait for the numbers that were read last, and for no later work, and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


@contextmanager
def in_branches(voting: Voting, work: str = "apart") -> Iterator[None]:
    """Let independent work be recorded side by side within the block: that of votes and steps, or what `reads_apart` runs."""
    before = getattr(voting, work)
    setattr(voting, work, side_by_side)
    try:
        yield
    finally:
        setattr(voting, work, before)


def side_by_side(pieces: Sequence[Callable[[], None]]) -> None:
    """Run pieces of work that do not depend on each other as branches of the CUDA graph that is being recorded.

    Small kernels leave most of a device idle. Kernels of several branches fill it. Where nothing is recorded the pieces run in
    turn. What is given to a piece must live until this function returns.
    """
    if len(pieces) < 2 or not torch.cuda.is_current_stream_capturing():
        in_turn(pieces)
        return
    with _forked(min(BRANCHES, len(pieces))) as branches:
        for place, piece in enumerate(pieces):
            with torch.cuda.stream(branches[place % len(branches)]):
                piece()


_branches: dict[torch.cuda.Stream, list[torch.cuda.Stream]] = {}
"""The streams that branch off each stream, the same in all recordings. A library keeps 32 MiB for each in which it multiplies."""


@contextmanager
def _forked(count: int) -> Iterator[Sequence[torch.cuda.Stream]]:
    """Branch the CUDA graph that is being recorded for the block; yield the streams of its branches."""
    stem = torch.cuda.current_stream()
    known = _branches.setdefault(stem, [])
    known += [torch.cuda.Stream(stem.device_index) for _ in range(count - len(known))]
    branches = known[:count]
    for branch in branches:
        branch.wait_stream(stem)
    try:
        yield branches
    except BaseException:
        # A recording that ends with an open branch raises an error of its own, which would hide this one.
        with suppress(RuntimeError):
            _join(stem, branches)
        raise
    _join(stem, branches)


def _join(stem: torch.cuda.Stream, branches: Sequence[torch.cuda.Stream]) -> None:
    """End branches of a CUDA graph in the stream that they branched off."""
    for branch in branches:
        stem.wait_stream(branch)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage before, and none within: what a finalizer does to the device would end a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
