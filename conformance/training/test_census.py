"""What a run reports of its weights, codes and experts: on weights made by hand, and on whole models beside their trits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.training import census as census_of
from arbitor.optimized.training.census import (
    KINDS,
    Census,
    by_kind,
    code_use,
    count_accumulators,
    count_state,
    kind_of,
)
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.reference import ops as reference_ops
from arbitor.reference.config import with_modules
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.parts import row_parts
from arbitor.reference.ops.packing import trits_of, weight_of_trits
from arbitor.reference.presets import PRESETS
from arbitor.reference.types import TernaryWeight
from conformance.graph.models import RATE, ops_with, random_ids
from conformance.subject import Subject
from conformance.training.nano import NANO, WHOLE


@pytest.fixture(params=["reference", "subject"])
def ops(request: pytest.FixtureRequest, subject: Subject) -> ModuleType | SimpleNamespace:
    """Both kinds of layout: the canonical form, and that of the implementation under test."""
    return reference_ops if request.param == "reference" else subject.ops


def by_hand(
    trits: list[list[int]], accum: list[list[int]], exponents: list[list[int]], **fields: Any
) -> TernaryWeight:
    """A weight in groups of six columns."""
    exponents_NK, accum_NK = (torch.tensor(rows, dtype=torch.int8) for rows in (exponents, accum))
    weight = weight_of_trits(torch.tensor(trits, dtype=torch.int8), exponents_NK, 6, **fields)
    return weight.with_tensors(trit_accum=accum_NK)


def random_weight(rows: int, columns: int) -> TernaryWeight:
    draw = torch.Generator().manual_seed(rows * columns)
    trits = torch.randint(-1, 2, (rows, columns), generator=draw, dtype=torch.int8)
    groups = (rows, -(-columns // 6))
    weight = weight_of_trits(trits, torch.randint(-9, 3, groups, generator=draw, dtype=torch.int8), 6)
    return weight.with_tensors(
        trit_accum=torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
    )


def holder(weight: Any, theta: int) -> Any:
    """Return what stands in for the module of a weight, all rows of which this rank keeps."""
    config = SimpleNamespace(theta=theta)
    return SimpleNamespace(own_rows=lambda: weight, config=config, device=weight.exponents.device)


def test_every_weight_has_a_kind_and_every_kind_a_weight() -> None:
    assert tuple(by_kind(ArbModel(WHOLE, device="meta").ternary_modules())) == KINDS
    for config in PRESETS.values():
        for name in ArbModel(config, device="meta").ternary_modules():
            assert kind_of(name) in KINDS
    expected = {
        "embedding.table": "embedding",
        "layers.3.attention.query_up": "attention",
        "layers.0.moe_graph.moe.expert_up": "experts",
        "layers.0.moe_graph.moe.router": "router",
        "layers.0.moe_graph.halt": "router",
        "router.inner": "output_router",
        "byte_head.vocabulary": "head",
        "shared_vq.down": "vq",
        "shared_vq.bridge.tables.audio": "codebook",
        "composite.codebook": "codebook",
        "composite.gate": "composite",
        "graph.message": "graph",
        "graph.edges": "edges",
        "composite.edges": "edges",
    }
    assert {name: kind_of(name) for name in expected} == expected
    with pytest.raises(ValueError, match="must name a module of"):
        kind_of("elsewhere.weight")


@pytest.mark.parametrize("columns", [7, 10, 33])
def test_parts_of_a_weight_are_its_rows(ops: Any, subject: Subject, columns: int) -> None:
    weight = random_weight(23, columns)
    laid_out = ops.from_spec(weight if ops is reference_ops else weight.to(subject.device))
    parts = [ops.to_spec(part).to("cpu") for part in row_parts(laid_out, 10 * columns)]
    assert [part.shape for part in parts] == [(10, columns), (10, columns), (3, columns)]
    assert torch.equal(torch.cat([trits_of(part) for part in parts]), trits_of(weight))
    for name in ("exponents", "trit_accum", "exponent_accum"):
        assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), weight.tensors()[name])
    # Never less than five rows.
    assert [part.shape[0] for part in row_parts(laid_out, 1)] == [5, 5, 5, 5, 3]
    assert len(list(row_parts(laid_out))) == 1


def test_rail_and_saturation_of_known_accumulators(ops: Any, subject: Subject) -> None:
    """At theta 16 a trit of +1 is at the rail from -8 votes on, one of -1 from +8 on, one of 0 never."""
    weight = by_hand(
        [[1, 1, 1, -1, -1, 0], [-1, -1, 0, 1, 1, 1]],
        [[-8, -7, 8, 8, 127, -127], [-127, 7, 0, -15, 127, -126]],
        [[0], [0]],
    )
    laid_out = ops.from_spec(weight if ops is reference_ops else weight.to(subject.device))

    def counts(theta: int) -> tuple[int, int]:
        found = count_accumulators(holder(laid_out, theta), ops)
        return int(found["rail"]), int(found["saturated"])

    # -8 on +1, 8 and 127 on -1, -15 and -126 on +1.
    assert counts(16) == (5, 4)
    # Half of it is 8.5.
    assert counts(17) == (3, 4)
    assert counts(1) == (7, 4)
    assert counts(127) == (2, 4)


def test_zeros_and_exponents_of_known_weights(ops: Any, subject: Subject) -> None:
    trits = [[1, 0, 0, -1, -1, 0, 0], [-1, -1, 0, 1, 1, 1, 1]]
    accum = [[0] * 7] * 2
    for levels, bits, expected, with_mantissa in (
        ([[-3, 15], [-32, -3]], 0, {-32: 1, -3: 2, 15: 1}, -23),
        # -5 is 2**-3 and a half more.
        ([[-5, 3], [-6, 2]], 1, {-3: 2, 1: 2}, -3),
    ):
        weight = by_hand(trits, accum, levels, mantissa_bits=bits)
        laid_out = ops.from_spec(weight if ops is reference_ops else weight.to(subject.device))
        found = count_state(laid_out, ops)
        assert int(found["zeros"]) == 5
        held = {i - 32: count for i, count in enumerate(found["exponents"].tolist()) if count}
        assert held == expected and float(found["with_mantissa"]) == with_mantissa
    assert census_of.summed_up([1] + [0] * 28 + [2] + [0] * 18, -36.0) == {
        "min": -32,
        "mean": -12.0,
        "max": -3,
        "counts": {"-32": 1, "-3": 2},
    }


def test_counts_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(23, 7)

    def counts() -> list[list[int]]:
        found = {
            **count_accumulators(holder(weight, 16), reference_ops),
            **count_state(weight, reference_ops),
        }
        return [tensor.flatten().tolist() for tensor in found.values()]

    whole = counts()
    monkeypatch.setattr(census_of, "looked_at", lambda weight: row_parts(weight, 35))
    assert counts() == whole


def test_use_of_codes() -> None:
    ids = torch.tensor([2, 0, -1, 2, 1, -1])
    use = code_use(ids, 4, 2)
    assert use == {
        "codes": 4,
        "vectors": 4,
        "used": 3,
        "dead": 2,
        # Shares of a half, a quarter, a quarter.
        "perplexity": pytest.approx(2**1.5),
    }
    closed = code_use(torch.tensor([-1, -1]), 4, 0)
    assert closed == {"codes": 4, "vectors": 0, "used": 0, "dead": 0}


def trits_by_name(model: ArbModel) -> dict[str, torch.Tensor]:
    return {name: trits_of(weight).clone() for name, weight in model.weights().items()}


def vote(model: ArbModel, step: int) -> None:
    model.backward(model.losses(random_ids(3, 24, seed=step)), rate=RATE, step=step)


def test_a_report_is_what_the_weights_say() -> None:
    """The reports of the first and the last of three steps agree with numbers taken from the weights themselves."""
    model = ArbModel(replace(WHOLE, theta=2, theta_e=1), seed=3)
    census = Census(model)
    live = [name for name, module in model.ternary_modules().items() if not module.frozen]
    seen: list[dict[str, torch.Tensor]] = []
    for step in range(3):
        vote(model, step)
        before = trits_by_name(model)
        accum = {name: weight.trit_accum.clone() for name, weight in model.weights().items()}
        if step != 1:
            census.before_step()
        model.step()
        if step != 1:
            report = census.after_step()
            seen.append(before)
            assert ("drift" in report["kinds"]["head"]) == (step == 2)
    after, now = trits_by_name(model), model.weights()
    assert any((now[name].exponents % 4).any() for name in live), (
        "no scale has moved, to a step between powers of two"
    )

    def share(names: list[str], count: Any) -> float:
        return sum(int(count(name).sum()) for name in names) / sum(after[name].numel() for name in names)

    assert list(report["kinds"]) == list(KINDS)
    for kind, names in by_kind(live).items():
        numbers = report["kinds"][kind]
        assert numbers["weights"] == sum(after[name].numel() for name in names)
        assert numbers["flip_rate"] == share(names, lambda name: after[name] != before[name])
        assert numbers["drift"] == share(names, lambda name: before[name] != seen[0][name])
        assert numbers["zero_share"] == share(names, lambda name: after[name] == 0)
        pushed = share(
            names,
            lambda name: (
                ((before[name] == 1) & (accum[name] <= -1)) | ((before[name] == -1) & (accum[name] >= 1))
            ),
        )
        assert numbers["rail_share"] == pushed
        assert numbers["saturation"] == share(names, lambda name: accum[name].abs() == 127)
        exponents = torch.cat(
            [now[name].exponents.flatten() >> now[name].mantissa_bits for name in names]
        ).double()
        assert (
            numbers["exponents"]["min"] == exponents.min() and numbers["exponents"]["max"] == exponents.max()
        )
        with_mantissa = torch.cat(
            [now[name].exponents.flatten().double() / 2 ** now[name].mantissa_bits for name in names]
        )
        assert numbers["exponents"]["mean"] == pytest.approx(float(with_mantissa.mean()))
        assert sum(numbers["exponents"]["counts"].values()) == exponents.numel()
    assert report["flip_rate"] == share(live, lambda name: after[name] != before[name]) > 0
    assert report["kinds"]["head"]["rail_share"] > 0


def test_a_report_does_not_depend_on_the_layout(subject: Subject) -> None:
    """The same state, votes under way, then another one in its place: counted in the layout of each op set."""
    layout = ("from_spec", "to_spec", "count_state", "count_changed_trits")
    first, second = (ArbModel(NANO, seed=seed) for seed in (3, 9))
    vote(first, 0)
    reports = []
    for ops, device in (
        (reference_ops, torch.device("cpu")),
        (ops_with(**{name: getattr(subject.ops, name) for name in layout}), subject.device),
    ):
        model = ArbModel(NANO, ops=ops, device=device)
        model.load_weights(first.weights())
        census = Census(model)
        census.before_step()
        model.load_weights(second.weights())
        reports.append(census.after_step())
    assert reports[0] == reports[1]
    assert reports[0]["flip_rate"] > 0.3 and reports[0]["kinds"]["head"]["rail_share"] == 0


def test_a_report_counts_the_votes_of_sums() -> None:
    """Those of several micro-batches are cast with the step, and are there when the census looks. Nothing else becomes of them."""
    counted, plain = ArbModel(NANO, seed=3), ArbModel(NANO, seed=3)
    for number in range(2):
        for each in (counted, plain):
            losses = each.losses(random_ids(2, 16, seed=number))
            each.backward(losses, rate=100.0, step=number, accum=2)
    census = Census(counted)
    census.before_step()
    for each in (counted, plain):
        each.step()
    kinds = census.after_step()["kinds"]
    assert kinds["head"]["rail_share"] > 0.05
    assert state_sha256(counted.state()) == state_sha256(plain.state())


def test_a_report_of_codes() -> None:
    model = ArbModel(WHOLE, seed=3)
    census = Census(model)
    # Two passes of one step.
    for step in (0, 1):
        vote(model, step)
    table = model.shared_vq.bridge.tables["text"]
    # The notes are read and not delivered, because that is what the census has to do.
    ids = torch.cat([note.seen[1].flatten() for note in model.voting.notes if note.tell == table.record])
    census.before_step()
    model.step()
    codebooks = census.after_step()["codebooks"]
    # No image, no audio.
    assert list(codebooks) == ["shared_vq.bridge.tables.text", "composite.codebook"]
    use = codebooks["shared_vq.bridge.tables.text"]
    shares = torch.bincount(ids) / ids.numel()
    entropy = -sum(share * math.log(share) for share in shares.tolist() if share)
    assert (use["codes"], use["vectors"], use["used"]) == (40, 2 * 3 * 22, ids.unique().numel())
    assert use["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert use["dead"] == int((table.usage == 0).sum())


def test_a_report_of_experts_counts_since_the_one_before() -> None:
    """With a router of zeros and without handicaps, every position takes the first two of four experts."""
    model = ArbModel(replace(NANO, num_experts=4, top_k=2), seed=3)
    moe = model.layers[0].moe_graph.moe
    router = moe.router
    zeros = torch.zeros(router.weight.shape, dtype=torch.int8)
    # From before the run was resumed.
    moe.get_buffer("load").copy_(torch.tensor([1000, 0, 0, 5]))
    census = Census(model)
    expected = iter((66, 132))
    for step in range(3):
        levels, bits = router.weight.exponents, router.weight.mantissa_bits
        router.load(weight_of_trits(zeros, levels, mantissa_bits=bits))
        moe.get_buffer("handicap").zero_()
        vote(model, step)
        if step == 1:
            model.step()
            continue
        census.before_step()
        model.step()
        n = next(expected)
        assert census.after_step()["experts"] == {
            "layers.0.moe_graph.moe": {"load": [n, n, 0, 0], "max_over_mean": 2.0, "min_over_mean": 0.0}
        }


def test_what_a_model_does_not_have_is_not_reported() -> None:
    model = ArbModel(with_modules(NANO, moe=False), seed=3)
    census = Census(model)
    vote(model, 0)
    census.before_step()
    model.step()
    report = census.after_step()
    assert list(report) == ["flip_rate", "kinds"]
    assert list(report["kinds"]) == ["embedding", "attention", "head"]
    model = ArbModel(NANO, seed=3)
    # A step without a vote.
    census = Census(model)
    census.before_step()
    model.step()
    report = census.after_step()
    assert list(report) == ["flip_rate", "kinds"] and report["flip_rate"] == 0
    assert list(report["kinds"]) == ["embedding", "attention", "experts", "router", "head"]


def test_a_census_changes_no_bit() -> None:
    plain, watched = (ArbModel(WHOLE, seed=3) for _ in range(2))
    census = Census(watched)
    generator = torch.random.get_rng_state()
    for step in range(4):
        vote(plain, step)
        vote(watched, step)
        plain.step()
        census.before_step()
        watched.step()
        census.after_step()
    assert state_sha256(watched.state()) == state_sha256(plain.state())
    assert torch.equal(torch.random.get_rng_state(), generator)
