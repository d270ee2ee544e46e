"""Growth: a model with other modules takes over from an earlier one every part that both have.

A part is a weight or a table of integers. A part that both models have in the same layout keeps every byte. The rows of edge tables
belong to the codes of all modalities, whose ids shift where pictures or sounds come or go. So a row goes where its code goes, and
the ids in it are exchanged for those that the codes have now.

Legend: N codes of the new model, M codes of the earlier one, J slots of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import BESIDE_TRITS
from arbitor.reference.graph.model import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.types import LaidOutWeight, TernaryWeight, overwrite

State = Mapping[str, TernaryWeight | Tensor]
"""Weights in canonical form and tables by name."""

BRIDGE = "shared_vq.bridge.tables"
"""Where the codebooks of the modalities are."""

TARGETS: Mapping[str, str | None] = {"graph.edges": None, "composite.edges": "composite.codebook"}
"""Edge tables, of which each row belongs to a code of some modality, and the codebook whose codes are the neighbours in it. None
stands for the codes of all modalities."""


@dataclass(frozen=True)
class Growth:
    """What a model took over from an earlier one, part by part.

    Fields:
        kept:     parts that are those of the earlier model in every byte.
        moved:    edge tables of another number of codes, or of other ids: the rows of codes that both models have were taken over.
        fresh:    parts of the model that stayed as they were drawn.
        left_out: parts of the earlier model that the model does not have.
    """

    kept: tuple[str, ...]
    moved: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]


def grow(model: ArbModel, before: ArbConfig, state: State, *, votes: bool = True) -> Growth:
    """Take over into a model all that fits it of the state of an earlier one, in place.

    Args:
        model:  newly made, of any configuration. What does not fit stays as it is.
        before: configuration of the earlier model.
        state:  of the earlier model, whose values were checked. A table with a value that the model cannot have does not fit.
        votes:  whether the votes that weights have gathered are taken over too.

    Math:    a weight is kept if shape, group size and mantissa agree; a table if shape and dtype agree, its values are in range
             and every weight of its module was kept. Running means of gradients go with the votes. Edge tables: row n is row m
             of the earlier one, where code n was code m, and a neighbour that the model has no more leaves a slot that never
             held one
    Source:  docs/spec/growth.md; REFACTOR12 (a text-only checkpoint goes on with other modules)
    """
    modules, tables, ranges = model.ternary_modules(), model.tables(), model.table_ranges()
    of_votes = {owner for owner, keeper in model.table_modules().items() if keeper.of_votes}
    taken = _Taken(state, votes=votes)
    with torch.no_grad():
        for name, module in modules.items():
            if name not in TARGETS and taken.fits(name, module.weight):
                module.load(taken.weight(name))
                taken.kept.append(name)
        for name, table in tables.items():
            owner = name.rpartition(".")[0]
            # A mean of gradients is a part of its weight.
            home = owner.rpartition(".")[0] if owner in of_votes else owner
            inside = [weight for weight in modules if f"{weight}.".startswith(f"{home}.")]
            is_whole = all(weight in taken.kept for weight in inside) and (votes or owner not in of_votes)
            if owner not in TARGETS and is_whole and taken.fits_table(name, table, ranges[name]):
                overwrite(table, taken.table(name))
                taken.kept.append(name)
        codes_N = code_map(before, model.config, kept=taken.kept)
        for owner in TARGETS:
            if owner in modules:
                _take_edges(model, owner, codes_N, taken)
        for keeper in model.table_modules().values():
            keeper.note_loaded()
    parts = [*modules, *tables]
    return Growth(
        kept=tuple(name for name in parts if name in taken.kept),
        moved=tuple(name for name in parts if name in taken.moved),
        fresh=tuple(name for name in parts if name not in taken.kept and name not in taken.moved),
        left_out=tuple(name for name in state if name not in modules and name not in tables),
    )


def code_map(before: ArbConfig, after: ArbConfig, *, kept: list[str]) -> Tensor:
    """Return the id that each code of a model had in an earlier one, int64 [N]; -1 for a code that is new.

    Args:
        before, after: configurations of the earlier model and of the model.
        kept: parts that the model took over. The codes of a modality are the same ones if its codebook was kept.
    """
    old, new = _codes(before), _codes(after)
    begins = dict(zip(old, accumulate(old.values(), initial=0), strict=False))
    ids = []
    for modality, size in new.items():
        is_known = f"{BRIDGE}.{modality}" in kept
        ids.append(torch.arange(size) + begins[modality] if is_known else torch.full((size,), -1))
    return torch.cat(ids)


def _codes(config: ArbConfig) -> dict[str, int]:
    """Return the number of codes of each modality, in the order of their ids."""
    return {"text": config.num_codes, "image": config.image_codes, "audio": config.audio_codes}


class _Taken:
    """The state of the earlier model, and the names of the parts that were taken over."""

    def __init__(self, state: State, *, votes: bool) -> None:
        self.state, self.votes = state, votes
        self.kept: list[str] = []
        self.moved: list[str] = []

    def fits(self, name: str, weight: LaidOutWeight, *, any_rows: bool = False) -> bool:
        """Whether the earlier model has a weight of this name and layout, or one that differs in its number of rows alone."""
        there = self.state.get(name)
        if not isinstance(there, TernaryWeight) or there.shape[1] != weight.shape[1]:
            return False
        formats = (there.group_size, there.mantissa_bits) == (weight.group_size, weight.mantissa_bits)
        return formats and (any_rows or there.shape[0] == weight.shape[0])

    def fits_table(
        self, name: str, table: Tensor, bounds: tuple[int, int], *, any_rows: bool = False
    ) -> bool:
        """Whether the earlier model has such a table, with values between bounds; see `fits`."""
        there = self.state.get(name)
        if not isinstance(there, Tensor) or there.dtype != table.dtype or there.ndim != table.ndim:
            return False
        same = there.shape[1:] == table.shape[1:] and (any_rows or there.shape[0] == table.shape[0])
        low, high = bounds
        return same and (there.numel() == 0 or (low <= int(there.min()) and int(there.max()) <= high))

    def weight(self, name: str) -> TernaryWeight:
        """Return a weight of the earlier model, without its votes if none are taken over."""
        weight = self.state[name]
        assert isinstance(weight, TernaryWeight)
        if self.votes:
            return weight
        return replace(
            weight,
            trit_accum=torch.zeros_like(weight.trit_accum),
            exponent_accum=torch.zeros_like(weight.exponent_accum),
        )

    def table(self, name: str) -> Tensor:
        """Return a table of the earlier model."""
        table = self.state[name]
        assert isinstance(table, Tensor)
        return table


def _take_edges(model: ArbModel, owner: str, codes_N: Tensor, taken: _Taken) -> None:
    """Take over the rows of an edge table whose codes both models have: signs, neighbours and scores."""
    module, tables, ranges = model.ternary_modules()[owner], model.tables(), model.table_ranges()
    names = [owner, *(f"{owner}.{table}" for table in ("neighbours", "scores"))]
    of_codes = TARGETS[owner] is None
    there = taken.state.get(owner)
    most = there.shape[0] - 1 if of_codes and isinstance(there, TernaryWeight) else ranges[names[1]][1]
    bounds = {names[1]: (-1, most), names[2]: ranges[names[2]]}
    if not (
        taken.fits(owner, module.weight, any_rows=True)
        and all(taken.fits_table(name, tables[name], bounds[name], any_rows=True) for name in names[1:])
        and (of_codes or TARGETS[owner] in taken.kept)
    ):
        return
    weight, neighbours_MJ, scores_MJ = taken.weight(owner), *(taken.table(name).cpu() for name in names[1:])
    to_R = (codes_N >= 0).nonzero().squeeze(1)
    from_R = codes_N[to_R]
    if torch.equal(codes_N, torch.arange(len(neighbours_MJ))):
        module.load(weight)
        taken.kept.extend(names)
    elif len(to_R):
        module.load(_with_rows(module, weight, to_R, from_R))
        taken.moved.extend(names)
        if of_codes:
            now_M = torch.full((len(neighbours_MJ),), -1)
            now_M[from_R] = to_R
            neighbours_MJ = torch.where(neighbours_MJ < 0, -1, now_M[neighbours_MJ.long().clamp(min=0)])
            scores_MJ = torch.where(neighbours_MJ < 0, 0, scores_MJ)
    else:
        return
    for name, table_MJ in zip(names[1:], (neighbours_MJ, scores_MJ), strict=True):
        tables[name][to_R.to(tables[name].device)] = table_MJ[from_R].to(tables[name])


def _with_rows(module: TernaryModule, before: TernaryWeight, to_R: Tensor, from_R: Tensor) -> TernaryWeight:
    """Return the weight of a module with rows R of an earlier weight in its own rows R."""
    ops, device = module.ops, module.device
    weight, before = ops.to_spec(module.weight), before.to(device)
    to_R, from_R = to_R.to(device), from_R.to(device)
    trits = ops.unpack_trits(weight.packed, weight.shape)
    trits[to_R] = ops.unpack_trits(before.packed, before.shape)[from_R]
    tensors = {"packed": ops.pack_trits(trits)}
    for field in BESIDE_TRITS:
        tensors[field] = getattr(weight, field).clone()
        tensors[field][to_R] = getattr(before, field)[from_R]
    grown: TernaryWeight = weight.with_tensors(**tensors)
    return grown
