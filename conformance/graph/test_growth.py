"""A model that grows keeps every byte of what it was; one that shrinks again is what it was.

Legend: N codes of the grown model, M codes of the earlier one, J slots of a code, B batch, T bytes, P positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference.config import ArbConfig, with_fields, with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.growth import TARGETS, Growth, code_map, grow
from arbitor.reference.graph.ternary_graph import EdgeTable
from arbitor.reference.ops.packing import trits_of
from arbitor.reference.types import TernaryWeight
from conformance.compare import exact
from conformance.graph.models import NANO, WHOLE, drawn_by_the_reference, random_ids, whole
from conformance.subject import Subject

EDGES = tuple(f"{owner}{table}" for owner in TARGETS for table in ("", ".neighbours", ".scores"))

WITHOUT: dict[str, ArbConfig] = {
    "pictures": with_fields(WHOLE, image_features=0),
    "sounds": with_fields(WHOLE, audio_features=0),
    "media": with_fields(WHOLE, image_features=0, audio_features=0),
    "memory": with_fields(WHOLE, memory_rows=0),
    "heads": with_fields(WHOLE, video_latent=0, talker_tokens=0),
}
"""A whole model without some modules, by what it lacks."""


def same_bytes(one: TernaryWeight | Tensor, other: TernaryWeight | Tensor) -> None:
    """Fail unless two parts are equal in every byte."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        exact(one, other)
        return
    assert isinstance(other, TernaryWeight) and one.shape == other.shape
    for name, tensor in one.tensors().items():
        exact(tensor, other.tensors()[name])


def grown(earlier: ArbModel, config: ArbConfig, **options: Any) -> tuple[ArbModel, Growth]:
    """Return a model of a configuration, of another seed, that took over from an earlier one."""
    model = ArbModel(config, seed=9, **options)
    return model, grow(model, earlier.config, earlier.state())


@pytest.mark.parametrize("lacks", WITHOUT)
def test_what_grew_and_shrinks_is_what_it_was(lacks: str) -> None:
    """Votes and tables too. The rows of edges follow their codes, whose ids shift where pictures come before sounds."""
    earlier = whole(WITHOUT[lacks])
    model, growth = grown(earlier, WHOLE)
    parts, drawn = model.state(), ArbModel(WHOLE, seed=9).state()
    assert sorted((*growth.kept, *growth.moved, *growth.fresh)) == sorted(parts)
    assert growth.left_out == () and growth.fresh
    has_shifted = lacks in ("pictures", "sounds", "media")
    assert set(growth.moved) == (set(EDGES) if has_shifted else set())
    before = earlier.state()
    for name in growth.kept:
        same_bytes(parts[name], before[name])
    for name in growth.fresh:
        assert name not in before
        same_bytes(parts[name], drawn[name])
    back, shrunk = grown(model, earlier.config)
    assert set(shrunk.left_out) == set(growth.fresh) and shrunk.fresh == ()
    for name, part in back.state().items():
        same_bytes(part, before[name])


@pytest.mark.parametrize("lacks", ["pictures", "media", "heads"])
def test_a_text_is_read_as_before(lacks: str) -> None:
    """New media and heads change no bit of what the model makes of a text."""
    earlier = whole(WITHOUT[lacks])
    model, _ = grown(earlier, WHOLE)
    ids_BT = random_ids(2, 20, seed=4)
    with torch.no_grad():
        exact(model(ids_BT), earlier(ids_BT))


def test_edges_follow_their_codes(subject: Subject) -> None:
    """Signs, votes, scores and neighbours of each code are found under the id that the code has now; on this op set."""
    # So that signs have turned.
    config, later = replace(WITHOUT["pictures"], theta=1), replace(WHOLE, theta=1)
    earlier = whole(config)
    ops: Any = drawn_by_the_reference(subject.ops)
    model, growth = grown(earlier, later, ops=ops, device=subject.device)
    codes_N = code_map(config, later, kept=list(growth.kept))
    text, images = WHOLE.num_codes, WHOLE.image_codes
    assert codes_N.tolist() == [*range(text), *[-1] * images, *range(text, text + WHOLE.audio_codes)]
    old, new = (
        earlier.state(),
        {
            name: part.cpu() if isinstance(part, Tensor) else part.to("cpu")
            for name, part in model.state().items()
        },
    )
    kept_N = codes_N >= 0
    for owner, targets in TARGETS.items():
        before, after = old[owner], new[owner]
        assert isinstance(before, TernaryWeight) and isinstance(after, TernaryWeight)
        for field in ("exponents", "trit_accum", "exponent_accum"):
            exact(getattr(after, field)[kept_N], getattr(before, field)[codes_N[kept_N]])
        assert len(trits_of(before).unique()) > 1
        exact(trits_of(after)[kept_N], trits_of(before)[codes_N[kept_N]])
        neighbours_MJ, neighbours_NJ = (state[f"{owner}.neighbours"] for state in (old, new))
        assert isinstance(neighbours_MJ, Tensor) and isinstance(neighbours_NJ, Tensor)
        assert (neighbours_MJ >= 0).any() and (neighbours_NJ[~kept_N] == -1).all()
        found = neighbours_NJ[kept_N].long()
        back = codes_N[found.clamp(min=0)] if targets is None else found
        exact(torch.where(found < 0, -1, back), neighbours_MJ.long())


def test_neighbours_that_are_gone_leave_free_slots() -> None:
    """The codes of pictures go, and with them their rows, and the scores of the slots that named them."""
    earlier = whole()
    neighbours, scores = (earlier.tables()[f"graph.edges.{name}"] for name in ("neighbours", "scores"))
    picture = WHOLE.num_codes + 2
    neighbours[5], scores[5] = torch.tensor([3, picture, 7]), torch.tensor([9, 8, 6])
    model, growth = grown(earlier, WITHOUT["pictures"])
    assert model.tables()["graph.edges.neighbours"][5].tolist() == [3, -1, 7]
    assert model.tables()["graph.edges.scores"][5].tolist() == [9, 0, 6]
    assert {name.partition(".")[0] for name in growth.left_out} == {"image_sequencer", "shared_vq"}


def test_without_votes() -> None:
    earlier = whole(WITHOUT["media"])
    model = ArbModel(WHOLE, seed=9)
    grow(model, earlier.config, earlier.state(), votes=False)
    assert any(module.weight.trit_accum.any() for module in earlier.ternary_modules().values())
    for module in model.ternary_modules().values():
        assert not module.weight.trit_accum.any() and not module.weight.exponent_accum.any()


@pytest.mark.parametrize("votes", [False, True])
def test_means_of_gradients_go_with_the_votes(votes: bool) -> None:
    """They were gathered with the votes, on other bytes."""
    config = with_fields(NANO, average_gradients=True, width=36)
    earlier, model = whole(config), ArbModel(config, seed=9)
    for keeper in earlier.table_modules().values():
        if keeper.of_votes:
            keeper.get_buffer("mean").fill_(3)
    growth = grow(model, config, earlier.state(), votes=votes)
    means = {name for name in model.tables() if name.endswith(".mean")}
    assert means
    assert means <= set(growth.kept if votes else growth.fresh)
    for name in means:
        assert (model.tables()[name] == (3 if votes else 0)).all()


def test_a_mean_begins_anew_with_its_weight() -> None:
    """Weights of other mantissa bits are others, and a mean of their gradients is no mean of these."""
    config = with_fields(NANO, average_gradients=True, width=36)
    model = ArbModel(replace(config, mantissa_bits=0), seed=9)
    growth = grow(model, config, whole(config).state(), votes=True)
    assert not [name for name in growth.kept if ".average." in name]


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        # Codes of another width are other codes, so that their ids mean nothing.
        ({"code_dim": WHOLE.code_dim + 2}, set(EDGES)),
        ({"num_neighbours": WHOLE.num_neighbours + 1}, {name for name in EDGES if name.startswith("graph.")}),
        # Neighbours in another table go with the codes of that table.
        ({"composite_codes": WHOLE.composite_codes + 1}, {name for name in EDGES if name.startswith("composite.")}),
        ({"group_size": 6}, set(EDGES)),
    ],
)  # fmt: skip
def test_edges_that_do_not_fit_begin_anew(change: dict[str, Any], fresh: set[str]) -> None:
    model, growth = grown(whole(), replace(WHOLE, **change))
    assert fresh <= set(growth.fresh) and growth.moved == ()
    drawn = ArbModel(model.config, seed=9).state()
    for name in growth.fresh:
        same_bytes(model.state()[name], drawn[name])


def test_codes_of_one_number_and_another_kind_are_other_codes() -> None:
    """Pictures go, and as many codes of sounds come: the tables have one size, and their rows are not those of before."""
    only_pictures = with_fields(WHOLE, audio_features=0, image_codes=10)
    only_sounds = with_fields(WHOLE, image_features=0, audio_codes=10)
    earlier = whole(only_pictures)
    model, growth = grown(earlier, only_sounds)
    assert set(EDGES) == set(growth.moved)
    assert (model.tables()["graph.edges.neighbours"][WHOLE.num_codes :] == -1).all()
    assert code_map(only_pictures, only_sounds, kept=list(growth.kept))[WHOLE.num_codes :].eq(-1).all()


def test_a_table_with_values_that_cannot_be_begins_anew() -> None:
    earlier = whole(WITHOUT["media"])
    for bad in (len(earlier.tables()["graph.edges.neighbours"]), -2):
        state = {**earlier.state()}
        forged = earlier.tables()["graph.edges.neighbours"].clone()
        forged[0, 0] = bad
        model = ArbModel(WHOLE, seed=9)
        growth = grow(model, earlier.config, {**state, "graph.edges.neighbours": forged})
        assert "graph.edges.neighbours" in growth.fresh and "composite.edges.neighbours" in growth.moved


@pytest.mark.parametrize("name", ["graph.edges.scores", "layers.0.moe_graph.moe.load"])
def test_a_table_of_another_kind_begins_anew(name: str) -> None:
    """The state may lack it, or have it in another dtype, or with another number of dimensions."""
    earlier = whole()
    state = earlier.state()
    table = state.pop(name)
    assert isinstance(table, Tensor)
    for other in ({}, {name: table.to(torch.float64)}, {name: table[None]}):
        growth = grow(ArbModel(WHOLE, seed=9), earlier.config, {**state, **other})
        assert name in growth.fresh, other.keys()


def test_every_edge_table_is_known() -> None:
    model = ArbModel(with_modules(WHOLE), device="meta")
    assert {name for name, module in model.named_modules() if isinstance(module, EdgeTable)} == set(TARGETS)
