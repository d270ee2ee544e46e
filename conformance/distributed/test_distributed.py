"""Ranks of torch.distributed over gloo compute what docs/spec/distributed.md says: 2 and 3 of them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from conformance.distributed import micro_at_work, passes_at_work, ranks_at_work
from conformance.distributed.started import Found, both, device_of_ranks, two

of_each_case = pytest.mark.parametrize(
    ("found", "case"),
    [
        pytest.param(count, case, id=f"{case}-{name}")
        for count, name in ((2, "two_ranks"), (3, "three_ranks"))
        for case in ranks_at_work.cases_of(count, device_of_ranks())
    ],
    indirect=["found"],
)


@both
def test_every_check_ran(found: Found) -> None:
    for of_rank in found[1]:
        asked = ranks_at_work.checks_of(len(found[1]))
        assert list(of_rank) == [*(check.__name__ for check in asked), "leaves"], of_rank


@both
def test_a_rank_that_is_done_leaves_no_threads_of_exchange(found: Found) -> None:
    """One that is busy when Python ends would abort the process. What trains adapters once kept them."""
    for of_rank in found[1]:
        before, after = of_rank["leaves"]
        assert before and not after, after


@of_each_case
def test_gradients_are_summed_in_rank_order_before_they_vote(found: Found, case: str) -> None:
    """Every bit of the state is the oracle's, after two steps, one of them of two passes."""
    of_cases = found[1][0]["sums_as_the_rule_says"]
    ours, oracles = of_cases[case]["hashes"]
    assert ours == oracles
    assert sum(each["hashes"][0] == ours for each in of_cases.values()) == 1, "two cases are one"


@both
def test_terms_are_added_from_rank_0_on(found: Found) -> None:
    wanted = [None, None, 2.0**30, 0.0][len(found[1])]
    each = [of_rank["adds_in_order"] for of_rank in found[1]]
    assert all(one["total"] == wanted for one in each), each
    assert [one["voted"] for one in each if one["steps"]] == [[[wanted]]]
    assert not any(one["voted"] for one in each if not one["steps"])


@of_each_case
def test_a_census_counts_over_all_ranks(found: Found, case: str) -> None:
    ours, oracles = found[1][0]["sums_as_the_rule_says"][case]["censuses"]
    assert ours == oracles
    assert any(kind["rail_share"] for kind in ours["kinds"].values())


@both
def test_ranks_are_one_batch(found: Found) -> None:
    """Gradients are alike (the ranks compare them), every weight has a rank that steps it, and integer tables are equal."""
    each = [of_rank["is_one_batch"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert sorted({name for one in each for name in one["compared"]}) == each[0]["all"]
    assert each[0]["same"] and all(all(one["same"].values()) for one in each), each


@both
def test_all_ranks_read_the_same_weights_and_tables(found: Found) -> None:
    assert len({of_rank["agrees_after_steps"]["read"] for of_rank in found[1]}) == 1


@both
def test_one_rank_keeps_the_accumulators_of_a_matrix(found: Found) -> None:
    kept = [of_rank["agrees_after_steps"]["kept"] for of_rank in found[1]]
    owners = {name: sum(one[name] for one in kept) for name in kept[0]}
    matrices = {name for name, number in owners.items() if number == 1}
    shared = {name for name, number in owners.items() if number == len(kept)}
    assert matrices | shared == set(owners)
    assert "byte_head.gate" in matrices and "embedding.table" in shared
    assert all(any(one[name] for name in matrices) for one in kept), "each rank owns some"


@both
def test_codes_that_ranks_keep_for_each_other_are_one_table(found: Found) -> None:
    """With rows of codebooks spread over ranks, the state, the census and the checkpoint are those without."""
    each = [of_rank["spreads_codes"] for of_rank in found[1]]
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"], each[0]["hashes"]
    assert all(one["same_census"] for one in each)
    # Each rank of the one model revives all codes, of the other its own.
    revived = [one["revived"] for one in each]
    assert {of_all for of_all, _ in revived} == {sum(own for _, own in revived)} and revived[0][0] > 0


@both
def test_a_rank_keeps_its_part_of_the_codes(found: Found) -> None:
    """Bytes in memory of four codebooks and two tables of edges: accumulators, counts of use and neighbours among them."""
    kept = [of_rank["spreads_codes"]["kept"] for of_rank in found[1]]
    for name in kept[0]:
        whole, parts = kept[0][name][0], [one[name][1] for one in kept]
        few = len(kept) == 3 and name.endswith("audio")
        assert parts == [whole] * len(kept) if few else sum(parts) == whole > max(parts), name
    assert len(kept[0]) == 6


@both
def test_bytes_of_codes_are_those_of_the_formulas(found: Found) -> None:
    """A codebook whose rows are spread sends fewer."""
    whole, spread = found[1][0]["counts_bytes_of_codes"]
    assert whole[0] == whole[1] and spread[0] == spread[1] > 0


@both
def test_experts_that_ranks_keep_for_each_other_learn_as_in_one_process(found: Found) -> None:
    """Gradients are alike, as the ranks compare. The state is one for one seed, and what one process and new ranks load."""
    each = [of_rank["spreads_experts"] for of_rank in found[1]]
    assert all(isinstance(one, dict) for one in each), each
    assert sorted({name for one in each for name in one["compared"]}) == each[0]["all"]
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@both
def test_a_rank_keeps_its_experts(found: Found) -> None:
    """Bytes in memory, accumulators among them, but for the last byte of the trits of a part, which is not full."""
    kept = [of_rank["spreads_experts"]["kept"] for of_rank in found[1]]
    for name, (whole, _) in kept[0].items():
        parts = [one[name][1] for one in kept]
        assert whole <= sum(parts) < whole + len(parts) and max(parts) < whole, name
    assert len(kept[0]) == 2


@both
def test_votes_of_spread_experts_are_those_of_one_process(found: Found) -> None:
    """Outputs, gradients and state, of sums that are exact; and the bytes that were received are those of the formula."""
    each = [of_rank["votes_as_one_process"] for of_rank in found[1]]
    assert all(one["same"][:2] == [True, True] for one in each) and each[0]["same"][2]
    received, wanted = each[0]["bytes"]
    assert received == wanted > 0


@both
def test_the_owner_of_a_matrix_alone_keeps_its_mean(found: Found) -> None:
    """Both tables of a mean. Rank 0 collects them, and one process and new ranks that load the state have them all."""
    each = [of_rank["keeps_means"] for of_rank in found[1]]
    for name in each[0]["owned"]:
        assert sum(one["owned"][name] for one in each) == 1
        assert all(one["kept"][name] == [one["owned"][name]] * 2 for one in each), name
        assert all(one["led"][name] == one["owned"][name] for one in each), name
        (owner,) = (one for one in each if one["owned"][name])
        assert each[0]["collected"][name] == owner["means"][name], name
    assert sum(any(one["owned"].values()) for one in each) > 1, "one rank owns all"
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@both
def test_a_rank_keeps_the_means_of_its_experts(found: Found) -> None:
    """They are those of one process, and lie in parts. One process and new ranks go on with them."""
    each = [of_rank["spreads_means"] for of_rank in found[1]]
    assert len(each[0]["same"]) == 2 and all(each[0]["same"].values()) and each[0]["led"], each[0]
    for name, (whole, _) in each[0]["kept"].items():
        parts = [one["kept"][name][1] for one in each]
        assert sum(parts) == whole > max(parts), name
    assert len(each[0]["kept"]) == 2
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]


@both
def test_each_rank_owns_some_matrices_of_a_stack(found: Found) -> None:
    """Accumulators of seven experts lie in parts, and only there. One process and new ranks go on with the state."""
    each = [of_rank["cuts_stacks"] for of_rank in found[1]]
    for name, rows in each[0]["owned"].items():
        heights = {"expert_down": 35, "expert_up": 40}[name.rpartition(".")[2]]
        ends = [each[-1] + 1 for each in rows]
        assert rows == [list(range(*pair)) for pair in pairwise([0, *ends])]
        assert ends[-1] == 7 * heights and not any(end % heights for end in ends)
        for rank, one in enumerate(each):
            columns, trit_accum, exponent_accum, *left = one["kept"][name]
            assert [trit_accum, exponent_accum] == [
                len(rows[rank]) * size for size in (columns, -(-columns // 12))
            ]
            assert left == [1, 1]
    assert len(each[0]["owned"]) == 2
    assert len(set(each[0]["hashes"])) == 1 and None not in each[0]["hashes"]
    assert all(one["wrote"] and one["undone"] for one in each)


@both
def test_bytes_are_those_of_the_table(found: Found) -> None:
    for way, (counted, wanted) in found[1][0]["counts_bytes"].items():
        assert counted == wanted > 0, way
    *sizes, several, whole = [counted for counted, _ in found[1][0]["counts_bytes"].values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    # Of three micro-batches the sums are exchanged, and no gradient. What a step changes is not the same.
    assert several == pytest.approx(sizes[1], rel=0.1)
    assert whole > sizes[1]


@both
@pytest.mark.parametrize("case", micro_at_work.CASES)
def test_sums_of_micro_batches_are_exchanged_once_a_step(found: Found, case: str) -> None:
    """And vote as the sum that one process has of all gradients, to the bit where these are whole numbers."""
    for number, of_rank in enumerate(found[1]):
        each = of_rank["sums_micro_batches"][case]
        ours, alone = each["digests"]
        assert ours == (None if number else alone) and not each["waits"]
        of_passes, of_steps = (
            each["exchanged"],
            each["exchanged"][micro_at_work.ACCUM :: micro_at_work.ACCUM + 1],
        )
        assert len(of_passes) == 8 and sum(of_passes) == sum(of_steps) > 0
    digests = [each["digests"][1] for each in found[1][0]["sums_micro_batches"].values()]
    assert len(set(digests)) == len(digests)


@two
def test_runs_of_micro_batches_end_alike(found: Found) -> None:
    whole, resumed, votes = found[1][0]["trains_in_micro_batches"]
    assert whole == resumed != votes


@both
def test_a_small_table_sends_its_rows_and_not_its_slots(found: Found) -> None:
    for of_rank in found[1]:
        plain, longer = of_rank["sends_no_more_rows_than_there_are"]
        assert plain == longer and plain[1:3] == plain[3:] and plain[1] > 0


@both
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_all(found: Found) -> None:
    for of_rank in found[1]:
        assert of_rank["refuses_what_is_not_finite"]["accepted"] is False
    assert found[1][0]["refuses_what_is_not_finite"]["changed"] is False


@both
def test_a_fault_is_counted_once(found: Found) -> None:
    """One row of a matrix and one of a table; and one of a table whose rows are spread."""
    assert [of_rank["counts_faults"] for of_rank in found[1]] == [[2, 1]] * len(found[1])


@both
def test_triton_and_the_reference_agree_on_ranks(found: Found) -> None:
    reference, triton = found[1][0]["agrees_on_triton"]
    assert reference == triton is not None


@two
@pytest.mark.parametrize("case", passes_at_work.CASES)
def test_recorded_passes_of_ranks_are_those_that_are_launched(found: Found, case: str) -> None:
    """Nats, states and bytes received are equal, and a loss that is not finite on one rank changes nothing."""
    of_ranks = [of_rank["replays_what_it_launches"][case] for of_rank in found[1]]
    for each in of_ranks:
        assert each["RecordedPasses"] == each["Passes"]
        assert each["RecordedPasses"]["recordings"] == 0, "their graphs are gone"
        assert each["Passes"]["received"] > 0 and None not in each["Passes"]["nats"]
        assert each["Passes"]["refused"] is None and len(set(each["Passes"]["states"])) == 1
        # The pass that is refused is replayed too, and leaves nothing to step.
        graphs, accum = each["graphs of a step"], passes_at_work.CASES[case][-1]
        if accum == 1:
            # One of the tables, and one of each piece.
            assert graphs == each["parts of a step"] > 1
        else:
            assert graphs == 0, "steps of sums are launched"
        assert (
            each["replays"]
            == 2 * (passes_at_work.REPLAYED_PASSES + 1) + graphs * passes_at_work.REPLAYED_STEPS
        )
    digests = [each["Passes"]["states"] for each in of_ranks]
    assert [each[0] is None for each in digests] == [False] + [True] * (len(digests) - 1)
