"""What a run of the trainer asks of the processes that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.owners import owned_rows
from arbitor.optimized.distributed.ranks import GroupRanks
from arbitor.optimized.distributed.traffic import Recorded
from arbitor.optimized.distributed.world import World, code_sha256
from arbitor.optimized.training.checkpoint import Checkpoint, adapter_sha256
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import TRITS_PER_BYTE
from arbitor.reference.graph import ArbModel
from arbitor.reference.types import TernaryWeight

OF_A_PLACE = ("data", "preset", "init_from")
"""Settings in which ranks may differ: the names of files, whose contents are compared."""


def check_agreement(
    world: World, *, config: Mapping[str, Any], document: Mapping[str, Any], checkpoint: Checkpoint | None
) -> None:
    """Refuse ranks that would not do the same.

    Args:
        world: the processes of the run.
        config: configuration of the model, as JSON data.
        document: settings of the run, and what is known of its data, as JSON data.
        checkpoint: what the run goes on from; None for a new run.

    Raises:
        TrainingError: they differ in the data, a setting, the code or the checkpoint; it names the first difference.
    """
    if world.count == 1:
        return
    facts = {name: value for name, value in document.items() if name not in OF_A_PLACE}
    world.agree({**facts, **config, "code_sha256": code_sha256(), **_facts_of(checkpoint)})


def _facts_of(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what tells a checkpoint from others: a step may leave the state as it is, and adapters do not change their base."""
    if checkpoint is None:
        return {}
    adapter = checkpoint.adapter
    return {
        "checkpoint_step": checkpoint.step,
        # Ranks that differ in how many steps they take, or in the best so far, would save at different times.
        "checkpoint_steps": checkpoint.run["steps"],
        "checkpoint_best_bpb": checkpoint.best_bpb,
        "checkpoint_state_sha256": checkpoint.state_sha256,
        "checkpoint_adapter_sha256": None if adapter is None else adapter_sha256(adapter),
    }


def train_together(model: ArbModel, world: World, *, exchange: str) -> None:
    """Let the processes of a run train a model, which is the same on each of them. One process alone changes nothing.

    Args:
        model, world: the model, and the processes.
        exchange: how gradients travel, as for `GroupRanks`.
    """
    if world.count > 1:
        GroupRanks(model, world, exchange=exchange)


def kept_rows(
    config: ArbConfig, world: World, spreads: Mapping[str, Any], *, starts_rows_anew: bool
) -> dict[int, range]:
    """Return the rows whose accumulators this rank will keep, of weights of which others keep some, as `ArbModel` takes them.

    So no accumulators are kept here that belong to another rank.

    Args:
        config, world: of the run.
        spreads: what `spreads_over` returned.
        starts_rows_anew: as for `owned_rows`.
    """
    if world.count == 1:
        return {}
    model = ArbModel(config, device="meta", **spreads)
    owned = owned_rows(model, world.count, starts_rows_anew=starts_rows_anew)
    num_rows = {module.tensor_id: module.weight.shape[0] for module in model.ternary_modules().values()}
    return {
        tensor_id: rows[world.number]
        for tensor_id, rows in owned.items()
        if len(rows[world.number]) < num_rows[tensor_id]
    }


def spreads_over(
    config: ArbConfig, world: World, *, codes: bool, experts: bool
) -> dict[str, tuple[int, int]]:
    """Return what is spread over ranks, as `ArbModel` takes it.

    Args:
        config, world: of the run.
        codes, experts: whether the rows of codebooks and experts are to be spread. One rank, which may go on with a run of several,
            keeps all of them.

    Raises:
        ValueError: the model has no codebook of five rows for each rank, or does not search all codes; or it has fewer experts than
            ranks.
    """
    if world.count == 1:
        return {}
    if codes:
        _check_codes(config, world.count)
    num_experts = config.num_experts if config.use_moe else 0
    if experts and num_experts < world.count:
        raise ValueError(
            f"shard_experts is True, but a layer has {num_experts} experts, and must have one for each of the {world.count} ranks"
        )
    asked = {"codes_over": codes, "experts_over": experts}
    return {name: (world.number, world.count) for name, is_asked in asked.items() if is_asked}


def _check_codes(config: ArbConfig, count: int) -> None:
    if config.code_search != "exact":
        raise ValueError(
            f"shard_codes is True, but must be False with code_search {config.code_search!r}: ranks search all of their codes"
        )
    largest = max(config.num_codes, config.image_codes, config.audio_codes, config.composite_codes)
    if largest // TRITS_PER_BYTE < count:
        raise ValueError(
            f"shard_codes is True, but the largest codebook has {largest} codes, and must have {TRITS_PER_BYTE} for each of the "
            f"{count} ranks"
        )


def whole_state(model: ArbModel) -> dict[str, TernaryWeight | Tensor] | None:
    """Return all that training changes, for a checkpoint: whole on rank 0, None on other ranks. Every rank must call this."""
    ranks = model.voting.ranks
    return ranks.state() if isinstance(ranks, GroupRanks) else model.state()


def add_up(model: ArbModel, tensors: Sequence[Tensor]) -> None:
    """Put the sum over ranks in the place of each tensor, float32. Every rank must call this with the same shapes."""
    ranks = model.voting.ranks
    if isinstance(ranks, GroupRanks) and tensors:
        ranks.add_up(tensors)


def unrecorded(world: World, spreads: Mapping[str, Any]) -> str:
    """Return which exchanges of the ranks cannot be recorded in CUDA graphs, in words; "" if all can be.

    Args:
        world, spreads: the processes of a run, and what is spread over them, as `spreads_over` returns it.
    """
    if world.count == 1:
        return ""
    if spreads:
        # How long they are follows from what the windows chose, and ranks tell each other on the host.
        return f"rows that {world.count} ranks keep for each other"
    return "" if world.exchanges_over_nccl else f"{world.count} ranks that exchange without NCCL"


def recorded_exchanges(model: ArbModel) -> AbstractContextManager[Recorded]:
    """Record what the ranks of a model exchange in CUDA graphs within the block; give what is to be told of replays and of the end.

    A process that is alone exchanges nothing, and counts the replays of nothing.
    """
    ranks = model.voting.ranks
    return ranks.recording() if isinstance(ranks, GroupRanks) else nullcontext(Recorded())


def faults(model: ArbModel) -> int:
    """Return the gradient rows that were not finite, counted over all ranks. Every rank must call this."""
    return int(model.voting.ranks.total(model.voting.faults))


def begin_measuring(model: ArbModel) -> None:
    """Begin the time of which `measured` tells next. What ranks did before, as while they validated, does not count."""
    ranks = model.voting.ranks
    if isinstance(ranks, GroupRanks):
        ranks.measured()


def measured(model: ArbModel, *, steps: int) -> dict[str, float]:
    """Return the metrics that only several ranks have, since `begin_measuring`. Every rank must call this.

    Args:
        model: what the ranks train.
        steps: steps since then.

    Returns:
        ``waiting_share``: time that ranks waited for others, of all their time; ``exchanged_bytes``: bytes a step that all ranks
        together received. Nothing for a process that is alone.
    """
    ranks = model.voting.ranks
    if not isinstance(ranks, GroupRanks):
        return {}
    # By the clock of each rank: one that has begun early waits for those that are late.
    seconds = ranks.seconds()
    own = torch.tensor([seconds, *ranks.measured()], dtype=torch.float64)
    all_seconds, waited, received = (float(each) for each in ranks.total(own))
    return {"waiting_share": waited / all_seconds, "exchanged_bytes": received / steps}
