"""Which rank owns which rows: work is shared, whole matrices are dealt, and stacks are cut between theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arbitor.optimized.distributed.owners import owned_rows, work
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel
from conformance.distributed.cuts_at_work import CUT
from conformance.training import nano

HEADS = ("image_sequencer.", "audio_sequencer.", "video_head.", "talker_head.", "router.")
"""What begins the names of matrices that a pass over text leaves alone."""


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("config", [nano.WHOLE, CUT])
def test_owners_share_the_work_evenly(count: int, config: ArbConfig) -> None:
    """No rank has more work than another one by more than a matrix, or a stack that is not cut, in text and in media."""
    model = ArbModel(config, device="meta")
    shapes = {module.tensor_id: module.weight.shape for module in model.ternary_modules().values()}
    works = {module.tensor_id: work(module) for module in model.ternary_modules().values()}
    found = owned_rows(model, count)
    for tensor_id, rows in found.items():
        assert sum(map(len, rows)) == shapes[tensor_id][0] and len(rows) == count
        owned = [each for each in rows if each]
        assert [each.start for each in owned] == [0, *(each.stop for each in owned[:-1])]
    is_cut = {each for each, rows in found.items() if sum(map(bool, rows)) > 1}
    assert all(all(found[each]) for each in is_cut)
    heads = {each.tensor_id for name, each in model.ternary_modules().items() if name.startswith(HEADS)}
    assert heads.isdisjoint(is_cut) and bool(heads & found.keys()) == (config is nano.WHOLE)
    for dealt in filter(None, (found.keys() - heads, found.keys() & heads)):
        loads = [
            sum(works[each] * len(found[each][rank]) // shapes[each][0] for each in dealt)
            for rank in range(count)
        ]
        largest = max(works[each] // (7 if each in is_cut else 1) for each in dealt)
        assert max(loads) - min(loads) <= largest
    frozen_or_table = {
        module.tensor_id
        for name, module in model.ternary_modules().items()
        if "norm" in name.rpartition(".")[2] or name == "embedding.table"
    }
    assert config is not CUT or found.keys() == shapes.keys() - frozen_or_table


def test_a_stack_is_cut_between_its_matrices() -> None:
    """Canonical bytes hold trits of two rows, so a stack whose matrices are no whole bytes is cut in a layout of rows alone."""
    odd = replace(CUT, expert_rank=33, shared_inner=41)
    for config, cuts in ((CUT, {None: 2, True: 2, False: 2}), (odd, {None: 0, True: 2, False: 0})):
        model = ArbModel(config, device="meta")
        for starts_rows_anew, wanted in cuts.items():
            found = owned_rows(model, 3, starts_rows_anew=starts_rows_anew)
            several = [rows for rows in found.values() if sum(map(bool, rows)) > 1]
            assert len(several) == wanted
            for rows in several:
                height = sum(map(len, rows)) // 7
                assert all(each and each.start % height == each.stop % height == 0 for each in rows)
    for config, count in (
        (CUT, 8),
        (replace(CUT, average_gradients=True), 2),
        (replace(CUT, expert_rank=30), 2),
    ):
        owned = owned_rows(ArbModel(config, device="meta"), count, starts_rows_anew=True)
        assert all(sum(map(bool, rows)) == 1 for rows in owned.values())
