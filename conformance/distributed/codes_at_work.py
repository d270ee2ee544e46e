"""What ranks find out together that keep the rows of codebooks for each other. See `ranks_at_work`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor.optimized.distributed import run
from arbitor.optimized.distributed.sizes import CodebookUse, codes_received_spread, codes_received_whole
from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.census import Census
from arbitor.optimized.training.loop import train
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.graph import spread as spread_module
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.ternary_graph import EdgeTable
from conformance.distributed.at_work import (
    RATE,
    Place,
    digest_of,
    handed_on,
    memory_of,
    ranks_of,
    received_by_all,
    refused,
    take_pass,
    together,
    told,
    whole_run,
)
from conformance.training import nano

CODES = replace(nano.NANO, num_codes=40, code_dim=18, num_hops=0, num_experts=3)
"""A model with codes, without a graph of them, and with an expert for each rank."""


def spreads_codes(world: World, folder: Path) -> Any:
    """Steps of a model of every module whose codebooks are spread over ranks, beside one whose ranks have all rows."""
    models, reports, revived = [], [], []
    for spread in (False, True):
        model = together(nano.WHOLE, world, spread=spread)
        census = Census(model)
        with pytest.MonkeyPatch.context() as patch:
            vectors = watch_revivals(patch)
            for step in range(3):
                take_pass(model, world, step)
                if step == 1:
                    continue
                census.before_step()
                model.step()
                reports.append(census.after_step())
        models.append(model)
        revived.append(sum(int((each >= 0).sum()) for each in vectors))
    whole, model = models
    of_codes = (TernaryVQCodebook, EdgeTable)
    tables = {name: each for name, each in model.table_modules().items() if isinstance(each, of_codes)}
    return {
        "hashes": [digest_of(whole), *handed_on(model, world, spread=True)],
        "same_census": reports[:2] == reports[2:],
        "revived": revived,
        "kept": {
            name: [memory_of(each) for each in (whole.get_submodule(name), table)]
            for name, table in tables.items()
        },
    }


def watch_revivals(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that fills with the vectors that codes of this rank become."""
    found: list[torch.Tensor] = []
    revive = Place.ops.revive_codes

    def watched(weight: Any, z_RC: torch.Tensor, vectors: torch.Tensor, **more: Any) -> Any:
        found.append(vectors)
        return revive(weight, z_RC, vectors, **more)

    patch.setattr(Place.ops, "revive_codes", watched)
    return found


def counts_bytes_of_codes(world: World, folder: Path) -> Any:
    """What all ranks received for a codebook in a step, and the formulas of docs/scaling.md, without and with spreading."""
    found = []
    for is_spread in (False, True):
        model = together(CODES, world, spread=is_spread)
        ranks = ranks_of(model)
        assert model.shared_vq is not None
        book = model.shared_vq.bridge.codebooks["text"]
        columns, count, num_vectors = book.weight.shape[1], world.count, 9
        generator = torch.Generator().manual_seed(world.number)
        z = torch.randn(num_vectors, columns, generator=generator).to(Place.device).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            farthest = watch_farthest(patch)
            ranks.measured()
            with model.voting.taking(rate=RATE, step=0, undo=False):
                ids, c, losses = book.quantize(z)
                (c.sum() + losses["codebook"]).backward()
            model.step()
        if book.spread is None:
            use = CodebookUse(num_vectors, 0, 0, (num_vectors,))
            wanted = float(codes_received_whole(use, book.num_codes, columns, count, 4))
        else:
            elsewhere = int((book.spread.keepers(ids.unique()) != world.number).sum())
            use = CodebookUse(num_vectors, elsewhere, elsewhere, (num_vectors,))
            wanted = codes_received_spread(use, columns, count, share=1.0)
            # The lengths of what is sent in eight exchanges, the farthest vectors of other ranks, and their unused codes.
            lengths, dead = 8 * 8 * count * (count - 1), 16 * (count - 1)
            wanted += lengths + dead + 16 * (count - 1) * farthest[0]
        found.append(received_by_all(model, wanted))
    return found


def watch_farthest(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with the number of codes of this rank that have a vector far from them."""
    found: list[int] = []
    keys = spread_module.revival_keys

    def watched(*given: Any) -> torch.Tensor:
        made = keys(*given)
        found.append(len(made))
        return made

    patch.setattr(spread_module, "revival_keys", watched)
    return found


def trains_with_spread_codes(world: World, folder: Path) -> Any:
    """A run whose ranks keep codes for each other, beside one whose ranks keep all, and what another model is told."""
    options = whole_run(folder)
    plain = train(replace(options, save=False)).summary  # type: ignore[type-var]
    spread = train(replace(options, run=folder / "spread", shard_codes=True)).summary  # type: ignore[type-var]
    laid_down = train(TrainOptions(run=folder / "spread", resume=True, shard_codes=False)).summary
    small = replace(nano.WHOLE, num_codes=9, composite_codes=9, image_codes=8, audio_codes=5)
    some = replace(nano.WHOLE, code_search="candidates", sign_bits=2, num_probes=1)
    return {
        "runs": [
            {name: run[name] for name in ("state_sha256", "val_bpb")} for run in (plain, spread, laid_down)
        ],
        "no codes": refused(replace(options, preset="nano", shard_codes=True, save=False)),  # type: ignore[type-var]
        "begun": refused(
            replace(options, init_from=str(folder / "unfinished"), shard_codes=True, save=False)  # type: ignore[type-var]
        ),
        "few codes": told(lambda: run.spreads_over(small, world, codes=True, experts=False)),
        "candidates": told(lambda: run.spreads_over(some, world, codes=True, experts=False)),
    }
