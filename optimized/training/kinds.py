"""What a weight is for: its kind, by which a run reports. The audit's areas, three of them split."""

from __future__ import annotations

from arbitor.reference.audit import AREA_OF, area_of

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
"""The kind of what is in an area, unless SPLIT says otherwise."""

SPLIT = {
    AREA_OF["moe_graph"]: {"graph": "graph", "router": "router", "halt": "router"},
    AREA_OF["shared_vq"]: {"tables": "codebook"},
    AREA_OF["composite"]: {"codebook": "codebook"},
}
"""Modules of an area that are for something else than the rest of it: what chooses experts and ends the loop, the messages of
the graph, and the tables of codes, which would hide the matrices beside them."""

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


def kind_of(weight_name: str) -> str:
    """The kind of a weight by its name in the model.

    Raises:
        ValueError: a name that belongs to no area.
    """
    area = area_of(weight_name)
    inside = SPLIT.get(area, {})
    found = [inside[part] for part in weight_name.split(".") if part in inside]
    return found[-1] if found else KIND_OF_AREA[area]
