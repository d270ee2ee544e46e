"""Media that are held out, measured by several ranks: each measures its share, and all have the numbers of one process.

The ranks are threads here, and the model is a stand-in. `test_media_ranks.py` has processes and models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.media_batch import Batch, captioned
from arbitor.optimized.training.media_losses import mean_losses
from arbitor.reference.config import NGRAM
from arbitor.reference.graph import Targets
from arbitor.reference.graph.ranks import Ranks
from arbitor.reference.graph.targets import NO_TOKEN
from conformance.distributed.threads import on_ranks

MOST = 12
"""Most samples of a batch that is drawn."""

Found = tuple[dict[str, float | None], list[Tensor]]
"""What a rank says of batches, and the ids of its passes."""


def of_terms(values: Tensor, chosen: Tensor, ranks: Ranks) -> Tensor:
    """Return a mean over chosen terms, as the losses of heads are."""
    return torch.where(chosen, values.float(), 0.0).sum() / ranks.divisor(chosen)


def measured(
    batches: list[Batch], ranks: Ranks, *, change: Callable[[Ranks], float] = lambda _: 0.0
) -> Found:
    """Return what a rank says of batches. Losses are means of the numbers of the batches themselves, which are integers."""
    seen: list[Tensor] = []

    def losses(ids_BT: Tensor, targets: Targets) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        seen.append(ids_BT)
        assert targets.taught_BT is not None and targets.latent is not None and targets.tokens_BN is not None
        every_B = torch.ones(len(ids_BT), dtype=torch.bool)
        return {
            "bytes": of_terms(ids_BT[:, NGRAM:], targets.taught_BT[:, NGRAM:], ranks) + change(ranks),
            "route": targets.latent[:, 0].mean(),
            "latent": of_terms(targets.latent[:, 1], every_B, ranks),
            "tokens": of_terms(targets.tokens_BN, targets.tokens_BN != NO_TOKEN, ranks),
        }

    model: Any = SimpleNamespace(losses=losses, voting=SimpleNamespace(faults=torch.zeros(()), ranks=ranks))
    return mean_losses(model, batches).named("val"), seen


def batch_of(size: int, *, seed: int = 0, longest: int = 9) -> Batch:
    """Return a batch of texts and answers of unequal length. The place of a sample is its first id."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    texts = [bytes([i, *(number(0, 256) for _ in range(number(3, longest)))]) for i in range(size)]
    tokens_BN = torch.full((size, 5), NO_TOKEN)
    for row in tokens_BN:
        row[: number(1, 6)] = number(0, 100)
    latent = torch.randint(0, 100, (size, 2), generator=generator).float()
    return captioned("speech", texts, context=32, modality_B=None, latent=latent, tokens_BN=tokens_BN)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, MOST), min_size=1, max_size=3),
    count=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_ranks_share_what_is_held_out(sizes: list[int], count: int, seed: int) -> None:
    """Every sample is measured, a rank has the fewest samples that are enough, and passes of a turn have one shape."""
    batches = [batch_of(size, seed=seed + place) for place, size in enumerate(sizes)]
    want, _ = measured(batches, Ranks())
    found = on_ranks(count, lambda ranks: measured(batches, ranks))
    assert all(numbers == found[0][0] for numbers, _ in found)
    assert found[0][0].keys() == {"val_bpb", "val_route", "val_latent", "val_tokens"}
    assert found[0][0] == pytest.approx(want, rel=1e-6)
    for _, passes in found:
        assert [ids_BT.shape for ids_BT in passes] == [ids_BT.shape for ids_BT in found[0][1]]
        assert sum(map(len, passes)) == sum(-(-size // count) for size in sizes)
    places = [
        int(ids_T[0])
        for turn in zip(*(passes for _, passes in found), strict=True)
        for ids_BT in turn
        for ids_T in ids_BT
    ]
    assert set(places) == set(range(max(sizes)))


def test_a_process_alone_measures_whole_batches_with_the_bits_of_a_mean() -> None:
    """The loss of a batch counts as often as it has bytes, or samples."""
    batches = [batch_of(7, seed=1), batch_of(3, seed=2)]
    found, passes = measured(batches, Ranks())
    assert [ids_BT.tolist() for ids_BT in passes] == [batch.ids_BT.tolist() for batch in batches]
    sums, taught = 0.0, 0
    for batch in batches:
        assert batch.targets is not None and batch.targets.tokens_BN is not None
        tokens = batch.targets.tokens_BN
        sums += of_terms(tokens, tokens != NO_TOKEN, Ranks()).item() * len(tokens)
    assert found["val_tokens"] == sums / 10
    sums = 0.0
    for batch in batches:
        assert batch.targets is not None and batch.targets.taught_BT is not None
        mask = batch.targets.taught_BT[:, NGRAM:]
        sums += of_terms(batch.ids_BT[:, NGRAM:], mask, Ranks()).item() * int(mask.sum())
        taught += int(mask.sum())
    assert found["val_bpb"] == sums / taught / math.log(2)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_loss_that_is_not_finite_on_one_rank_is_none_for_all(where: int, size: int) -> None:
    """A rank that reads what another one reads before it, since nothing is left for it, is not asked."""
    found = on_ranks(
        3,
        lambda ranks: measured(
            [batch_of(size)], ranks, change=lambda ranks: math.nan if ranks.number == where else 0.0
        ),
    )
    counts = where < size
    assert [math.isnan(numbers["val_bpb"] or math.nan) for numbers, _ in found] == [counts] * 3
    assert [numbers["val_bpb"] is None for numbers, _ in found] == [counts] * 3
    assert all(numbers["val_route"] is not None for numbers, _ in found)


@pytest.mark.parametrize("count", [1, 2])
def test_texts_of_which_no_byte_is_predicted_have_no_bits(count: int) -> None:
    """Nothing is predicted of the first three bytes. A sum of none was divided by none."""
    batch = captioned(
        "speech",
        [b"one", b"no"],
        context=32,
        modality_B=None,
        latent=torch.ones(2, 2),
        tokens_BN=torch.ones(2, 5, dtype=torch.int64),
    )
    assert batch.taught_bytes() == 0
    found = on_ranks(count, lambda ranks: measured([batch], ranks))
    assert [numbers for numbers, _ in found] == [
        {"val_bpb": None, "val_route": 1.0, "val_latent": 1.0, "val_tokens": 1.0}
    ] * count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12])
def test_parts_are_the_batch_one_after_the_other(size: int, count: int) -> None:
    batch = batch_of(size)
    parts = batch.parts(count)
    assert torch.cat([part.ids_BT for part in parts]).equal(batch.ids_BT)
    assert [len(part.ids_BT) for part in parts] == [size // count] * (count * (size >= count)) + [1] * (
        size % count
    )
    for part in parts:
        assert part.targets is not None and part.targets.tokens_BN is not None
        assert len(part.targets.tokens_BN) == len(part.ids_BT)
    if size % count == 0:
        for number, part in enumerate(parts):
            assert part.ids_BT.equal(batch.share(World(number, count)).ids_BT)
