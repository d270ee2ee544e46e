"""The census of a step: what it did to each kind of weight, and how codes and experts are used.

A census counts what training changes, in a model that learns; `arbitor.reference.audit` counts what a configuration is made of,
without building it. The census is taken on the device, at log intervals only.

The definitions are those of docs/training.md, "What a line of metrics says". Everything is a count of integers; the host divides.
Nothing of the model is written, nothing random is drawn, and steps that no line is about cost nothing.
Legend: N rows, K columns, E experts, R vectors, W weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.reference.audit import AREA_OF, area_of
from arbitor.reference.constants import EXPONENT_MIN
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.model import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.graph.parts import looked_at
from arbitor.reference.types import LaidOutWeight

KIND_OF_AREA = {
    AREA_OF["embedding"]: "embedding",
    AREA_OF["attention"]: "attention",
    AREA_OF["moe_graph"]: "experts",
    AREA_OF["byte_head"]: "head",
    AREA_OF["shared_vq"]: "vq",
    AREA_OF["edges"]: "edges",
    AREA_OF["memory"]: "memory",
    AREA_OF["composite"]: "composite",
    AREA_OF["image_sequencer"]: "media",
    AREA_OF["video_head"]: "media_heads",
    AREA_OF["router"]: "output_router",
}
"""The kind of every weight of an area of the audit, unless SPLIT says otherwise."""

SPLIT = {
    AREA_OF["moe_graph"]: {"graph": "graph", "router": "router", "halt": "router"},
    AREA_OF["shared_vq"]: {"tables": "codebook"},
    AREA_OF["composite"]: {"codebook": "codebook"},
}
"""Modules that have another kind than the rest of their area: what chooses experts and ends the loop, the messages of the graph,
and the tables of codes, which would hide the matrices beside them."""

KINDS = (
    "embedding",
    "attention",
    "experts",
    "router",
    "head",
    "vq",
    "codebook",
    "graph",
    "edges",
    "memory",
    "composite",
    "media",
    "media_heads",
    "output_router",
)
"""Every kind, in the order of reports: what each model has, then its options, last what bytes alone do not train."""


class Census:
    """Looks at a model twice in a step that is to be reported: before the step rule and after it.

    Memory: one copy of the trits as the op set keeps them (1/4 byte a weight on a device, 1/5 in canonical form), from the first
    reported step on; and, while it looks at a canonical weight, what `row_parts` says of one part. No weight is decoded whole.
    """

    def __init__(self, model: ArbModel) -> None:
        """Begin with a model as it was built or loaded. Loads of experts count from here on."""
        self._model = model
        self._snapshot: dict[str, dict[str, Tensor]] = {}
        self._drift: dict[str, Tensor] = {}
        self._accumulators: dict[str, dict[str, Tensor]] = {}
        self._chosen: dict[str, Tensor] = {}
        self._load = {name: moe.get_buffer("load").clone() for name, moe in self._experts().items()}

    def before_step(self) -> None:
        """Look at what the votes of the step have come to, before the step rule acts on them."""
        model = self._model
        model.voting.vote_sums()
        # Empty the first time.
        self._drift = self._over_all_rows(model.changed_trits(self._snapshot))
        # The old snapshot is let go of before the next one is made, so that there is never a second.
        self._snapshot = {}
        self._snapshot = model.snapshot_trits()
        ranks = model.voting.ranks
        counts = {
            name: count_accumulators(module, model.ops, counts=ranks.answers_for(module.tensor_id))
            for name, module in self._voting_modules().items()
        }
        totals_W2 = ranks.total(torch.stack([torch.stack([*count.values()]) for count in counts.values()]))
        self._accumulators = {
            name: dict(zip(counts[name], total_2, strict=True))
            for name, total_2 in zip(counts, totals_W2, strict=True)
        }
        model.voting.deliver()
        self._chosen = {
            name: torch.cat([ids.flatten() for ids in ranks.everyone([ids for _, ids in module.recorded])])
            for name, module in self._codebooks().items()
            if module.recorded
        }

    def after_step(self) -> dict[str, Any]:
        """Look at what the step rule has done, and report it.

        Returns:
            ``flip_rate``, and ``kinds``, ``codebooks`` and ``experts``, each by name and only where the model has any, as
            docs/training.md lists them. Numbers, lists and mappings: what JSON can hold.
        """
        model, modules = self._model, self._voting_modules()
        flips = self._over_all_rows(model.changed_trits(self._snapshot))
        states = self._states()
        kinds, flipped, total = {}, 0, 0
        for kind, names in by_kind(modules).items():
            size = sum(num_weights(modules[name]) for name in names)
            count = {
                "flips": added(flips[name] for name in names),
                "rail": added(self._accumulators[name]["rail"] for name in names),
                "saturated": added(self._accumulators[name]["saturated"] for name in names),
                "zeros": added(states[name]["zeros"] for name in names),
            }
            kinds[kind] = {
                "weights": size,
                "flip_rate": count["flips"] / size,
                **({"drift": added(self._drift[name] for name in names) / size} if self._drift else {}),
                "zero_share": count["zeros"] / size,
                "rail_share": count["rail"] / size,
                "saturation": count["saturated"] / size,
                "exponents": summed_up(
                    torch.stack([states[name]["exponents"] for name in names]).sum(0).tolist(),
                    float(torch.stack([states[name]["with_mantissa"] for name in names]).sum()),
                ),
            }
            flipped, total = flipped + count["flips"], total + size
        books = self._codebooks()
        groups = {
            "kinds": kinds,
            "codebooks": {
                name: code_use(ids_R, books[name].num_codes, self._dead(books[name]))
                for name, ids_R in self._chosen.items()
            },
            "experts": self._expert_loads(),
        }
        self._chosen, self._accumulators, self._drift = {}, {}, {}
        return {"flip_rate": flipped / total, **{name: group for name, group in groups.items() if group}}

    def _over_all_rows(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return counts of weights by name, over all rows of those that are spread over ranks."""
        modules, ranks = self._model.ternary_modules(), self._model.voting.ranks
        return {name: ranks.whole(modules[name].tensor_id, count) for name, count in counts.items()}

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """Return what `count_state` finds in each weight that can vote, over all of its rows."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, module in self._voting_modules().items():
            for what, count in count_state(module.weight, self._model.ops).items():
                (whole,) = self._over_all_rows({name: count}).values()
                found.setdefault(name, {})[what] = whole
        return found

    def _dead(self, table: TernaryVQCodebook) -> int:
        """Return how many codes of a table are unused, whoever keeps them."""
        dead = torch.count_nonzero(table.get_buffer("usage") == 0)
        return int(self._model.voting.ranks.whole(table.tensor_id, dead))

    def _voting_modules(self) -> dict[str, TernaryModule]:
        """Return every module whose weight can vote, by name."""
        return {name: module for name, module in self._model.ternary_modules().items() if not module.frozen}

    def _codebooks(self) -> dict[str, TernaryVQCodebook]:
        keepers = self._model.table_modules()
        return {name: keeper for name, keeper in keepers.items() if isinstance(keeper, TernaryVQCodebook)}

    def _experts(self) -> dict[str, SharedProjectionMoE]:
        keepers = self._model.table_modules()
        return {name: keeper for name, keeper in keepers.items() if isinstance(keeper, SharedProjectionMoE)}

    def _expert_loads(self) -> dict[str, Any]:
        """Return the loads since the last report, of layers that chose experts at all."""
        loads = {}
        for name, moe in self._experts().items():
            now_E = moe.get_buffer("load")
            since: list[int] = (now_E - self._load[name]).tolist()
            self._load[name] = now_E.clone()
            if sum(since):
                mean = sum(since) / len(since)
                loads[name] = {
                    "load": since,
                    "max_over_mean": max(since) / mean,
                    "min_over_mean": min(since) / mean,
                }
        return loads


def kind_of(weight_name: str) -> str:
    """Return the kind of a weight by its name in the model.

    Raises:
        ValueError: a name that belongs to no area.
    """
    area = area_of(weight_name)
    inside = SPLIT.get(area, {})
    found = [inside[part] for part in weight_name.split(".") if part in inside]
    return found[-1] if found else KIND_OF_AREA[area]


def by_kind(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of weights by kind, in the order of KINDS. A kind without a weight is left out."""
    names: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in modules:
        names[kind_of(name)].append(name)
    return {kind: of_kind for kind, of_kind in names.items() if of_kind}


def count_accumulators(module: TernaryModule, ops: Any, *, counts: bool = True) -> dict[str, Tensor]:
    """Return how many accumulators of a weight are at the ``rail`` and ``saturated``, int64 [] on its device.

    An accumulator is at the rail where 2 T T_accum <= -theta: it has half of what would move the trit, in the direction in which
    the trit can't go. A rank counts those that it keeps. Without `counts` another rank counts them, and both numbers are 0.
    """
    if not counts:
        return {
            name: torch.zeros((), dtype=torch.int64, device=module.device) for name in ("rail", "saturated")
        }
    _, rail, saturated, *_ = counted(module.own_rows(), ops, theta=module.config.theta)
    return {"rail": rail, "saturated": saturated}


def count_state(weight: LaidOutWeight, ops: Any) -> dict[str, Tensor]:
    """Return what a weight holds, counted on its device.

    Returns:
        ``zeros``, int64 []: trits that are 0. ``exponents``, int64 [48]: groups of each exponent, -32 first.
        ``with_mantissa``, float64 []: the sum of E + m / 2**b over all groups, which moves as scales do.
    """
    found = counted(weight, ops)
    with_mantissa = weight.tensors()["exponents"].sum(dtype=torch.float64) / 2**weight.mantissa_bits
    return {"zeros": found[0], "exponents": found[3:], "with_mantissa": with_mantissa}


def counted(weight: LaidOutWeight, ops: Any, **theta: int) -> Tensor:
    """Return what the op `count_state` returns of a whole weight."""
    return torch.stack([ops.count_state(part, **theta) for part in looked_at(weight)]).sum(dim=0)


def added(counts: Iterable[Tensor]) -> int:
    """Return the sum of counts on a device, which is read once."""
    return int(torch.stack(list(counts)).sum())


def summed_up(counts: list[int], with_mantissa: float) -> dict[str, Any]:
    """Return the least, mean and greatest exponent of groups counted by exponent, and the counts that are not 0.

    The mean has the mantissas in it.
    """
    held = {EXPONENT_MIN + i: count for i, count in enumerate(counts) if count}
    mean = with_mantissa / sum(held.values())
    return {"min": min(held), "mean": mean, "max": max(held), "counts": {str(e): n for e, n in held.items()}}


def num_weights(module: TernaryModule) -> int:
    """Return the number of weights of a module, also where ranks keep some of its rows each."""
    num_rows, num_columns = module.weight.shape
    return (num_rows if module.spread is None else module.spread.num_rows) * num_columns


def code_use(ids_R: Tensor, num_codes: int, dead: int) -> Mapping[str, float | int]:
    """Return how a step used a codebook.

    Args:
        ids_R: int64, the code of each vector of its passes; below 0 for a vector that stays without.
        num_codes, dead: the codes that there are, and those that are unused after the step.
    """
    uses = torch.unique(ids_R[ids_R >= 0], return_counts=True)[1].to(torch.float64)
    shares = uses / uses.sum()
    use = {
        "codes": num_codes,
        "vectors": int(uses.sum()),
        "used": uses.numel(),
        "dead": dead,
    }
    if not uses.numel():
        return use
    return {**use, "perplexity": math.exp(-float((shares * shares.log()).sum()))}
