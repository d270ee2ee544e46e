"""What a run begins to step with: its text, its model, and what is recorded of both. Nothing is written here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from arbitor.optimized.ahead.start import Ahead, awaited, compiled_ahead
from arbitor.optimized.distributed.run import (
    check_agreement,
    kept_rows,
    spreads_over,
    train_together,
    unrecorded,
)
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.adaptation import Adaptation, open_adaptation
from arbitor.optimized.training.batch_size import BatchSize, fitting_batch, most_windows
from arbitor.optimized.training.beginning import Beginning, begin_with, same_beginning
from arbitor.optimized.training.checkpoint import check_fits
from arbitor.optimized.training.media import FOLDERS, data_of
from arbitor.optimized.training.media_mix import Mix, open_mix
from arbitor.optimized.training.options import EXCHANGES, Settings
from arbitor.optimized.training.plan import run_config
from arbitor.optimized.training.recording import records
from arbitor.optimized.training.run_folder import Found
from arbitor.optimized.training.run_text import RunText, read_text
from arbitor.optimized.training.runtime import Runtime
from arbitor.optimized.training.setting import AUTO
from arbitor.optimized.training.sizes import check_memory, sum_bytes
from arbitor.reference.config import NGRAM, ArbConfig
from arbitor.reference.graph import ArbModel


@dataclass(frozen=True)
class Prepared:
    """What a run begins to step with.

    Attributes:
        settings: of the run, the runtime's choices among them.
        runtime: where it runs.
        world: the processes that it is made of.
        found: what it goes on from, without the tensors of its checkpoint.
        text: what it learns from and is judged by.
        mix: the data that it has beside one text, or None.
        model: what learns, as it is before the first step of this process.
        adaptation: the adapters of the model, which learn instead of its weights, or None.
        config: configuration of the model, as JSON data.
        recorded: whether passes are recorded and replayed.
        beginning: the weights of another run, where this process has begun with them; else None.
        document: settings of the run, and what is known of its data, as JSON data.
        warnings: sentences that the user should read.
        batch_size: why a micro-batch has as many windows as it has, where the machine decided it.
        ahead: what compiles the kernels of its passes, or None.
    """

    settings: Settings
    runtime: Runtime
    world: World
    found: Found
    text: RunText
    mix: Mix | None
    model: ArbModel
    adaptation: Adaptation | None
    config: dict[str, Any]
    recorded: bool
    beginning: Beginning | None
    document: dict[str, Any]
    warnings: tuple[str, ...]
    batch_size: BatchSize | None = None
    ahead: Ahead | None = None

    def is_longer(self) -> bool:
        """Return whether the run has more steps now than its newest checkpoint says."""
        checkpoint = self.found.checkpoint
        return checkpoint is not None and self.settings.steps > checkpoint.run["steps"]


def prepare(
    settings: Settings,
    runtime: Runtime,
    world: World,
    *,
    found: Found,
    folder: Path | None,
    auto_batch: bool = False,
) -> Prepared:
    """Return what a run begins to step with: its data, read, and its model, made or loaded.

    Args:
        settings: of the run, decided.
        runtime: where it runs, as the settings say.
        world: the processes that the run is made of.
        found: what to go on from.
        folder: of the run, which is no part of its data; or None where nothing is written.
        auto_batch: whether memory decides how many windows a micro-batch has.

    Raises:
        TrainingError: the data, the checkpoint or the device is refused, or the ranks do not agree.
        ValueError: a setting does not fit the model, the data or the number of ranks.
    """
    settings = replace(
        settings,
        device=runtime.device,
        backend=runtime.backend,
        dtype=str(runtime.dtype).removeprefix("torch."),
    )
    if auto_batch and world.count > 1:
        raise ValueError(f"batch is {AUTO!r}, but must be a number where {world.count} ranks share it")
    world.check_batch(settings.batch)
    if world.count == 1 and settings.exchange != EXCHANGES[0] and found.settings is None:
        raise ValueError(
            f"exchange is {settings.exchange!r}, but does nothing with one rank, which sends no gradients"
        )
    sharded = [name for name in ("shard_codes", "shard_experts") if getattr(settings, name)]
    if world.count == 1 and sharded and found.settings is None:
        raise ValueError(f"{sharded[0]} is True, but does nothing with one rank, which keeps the whole model")
    text = read_text(settings, folder, found.settings)
    config, lost = run_config(settings, found.model)
    spreads = spreads_over(config, world, codes=settings.shard_codes, experts=settings.shard_experts)
    if spreads and settings.init_from is not None and found.checkpoint is None:
        raise ValueError(
            f"{sharded[0]} is True, but must be False with init_from {settings.init_from!r}, whose weights are taken over whole"
        )
    sums = 0
    if settings.summed > 1 and settings.lora_rank is None and config.vote_rule == "stochastic":
        windows = 1 if auto_batch else settings.batch // world.count
        positions = windows * (settings.context - NGRAM + 1)
        of_media = not data_of(settings).keys().isdisjoint(FOLDERS)
        sums = sum_bytes(config, runtime.dtype, positions=positions, of_media=of_media, spreads=spreads)
    check_memory(config, runtime.device, num_ranks=world.count, spreads=spreads, sums=sums)
    recorded = (
        len(data_of(settings)) == 1
        and settings.lora_rank is None
        and records(
            settings.cuda_graph,
            runtime,
            vote_rule=config.vote_rule,
            exchange=unrecorded(world, spreads),
        )
    )
    is_first = world.number == world.of_host.start
    if not is_first:
        # So that the first rank of a host finds no other one at work, and says what is compiled.
        world.wait()
    ahead = _ahead(config, settings, runtime, world, recorded=recorded, auto_batch=auto_batch)
    if is_first:
        world.wait()
    with awaited(ahead):
        batch_size = fitting_batch(config, settings, runtime) if auto_batch else None
    if batch_size is not None:
        settings = replace(settings, batch=batch_size.windows)
        text = replace(text, settings=settings)
    mix = open_mix(
        settings,
        config,
        runtime,
        corpus=text.corpus,
        split=text.split,
        run=folder,
        recorded=found.settings,
        world=world,
    )
    model = ArbModel(
        config,
        ops=runtime.ops(),
        device=runtime.device,
        dtype=runtime.dtype,
        seed=settings.seed,
        kept_rows=kept_rows(config, world, spreads, starts_rows_anew=runtime.starts_rows_anew),
        **spreads,
    )
    config_json = json.loads(config.to_json())
    beginning = None
    if found.checkpoint is not None:
        whole = ArbModel(config, device="meta") if spreads else model
        check_fits(found.checkpoint, whole)
        model.load_state(found.checkpoint.state)
    elif settings.init_from is not None:
        beginning = begin_with(
            model,
            settings.init_from,
            keep_votes=settings.keep_votes,
            as_base=settings.lora_rank is not None,
        )
    adaptation = open_adaptation(model, settings, found.checkpoint)
    document = {
        **settings.as_json(),
        **text.document(),
        "threads": torch.get_num_threads(),
        **({} if mix is None else mix.document()),
        "ranks": world.count,
    }
    if settings.init_from is not None:
        document["init_sha256"] = same_beginning(settings.init_from, beginning, found.settings)
    check_agreement(world, config=config_json, document=document, checkpoint=found.checkpoint)
    if found.checkpoint is not None:
        # The model has the tensors now, and a run keeps no second copy of them.
        found = replace(found, checkpoint=replace(found.checkpoint, state={}, adapter=None))
    train_together(model, world, exchange=settings.exchange)
    return Prepared(
        settings=settings,
        runtime=runtime,
        world=world,
        found=found,
        text=text,
        mix=mix,
        model=model,
        adaptation=adaptation,
        config=config_json,
        recorded=recorded,
        beginning=beginning,
        document=document,
        batch_size=batch_size,
        ahead=ahead,
        warnings=(*found.warnings, *lost, *(() if beginning is None else beginning.all_warnings())),
    )


def _ahead(
    config: ArbConfig,
    settings: Settings,
    runtime: Runtime,
    world: World,
    *,
    recorded: bool,
    auto_batch: bool,
) -> Ahead | None:
    """Start to compile the kernels of a run, or return None."""
    adapters = {
        "rank": settings.lora_rank,
        "alpha": settings.lora_alpha,
        "targets": settings.lora_targets,
    }
    return compiled_ahead(
        runtime,
        config=config.to_json(),
        context=settings.context,
        windows=(1, most_windows(settings.context)) if auto_batch else (settings.batch // world.count,),
        passes="run",
        recorded=recorded,
        # As many show how rows of several passes are united.
        accum=min(settings.accum, 2),
        sums=settings.summed > 1 and settings.lora_rank is None,
        adapters=None if settings.lora_rank is None else adapters,
        ranks=tuple(world.of_host),
        of_ranks=world.count,
        exchange=settings.exchange,
    )
