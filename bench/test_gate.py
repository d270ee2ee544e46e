"""Tests of the gate: what it checks takes the path through the code that is then timed, and misses no op that a case uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from arbitor.optimized.cuda import denoise as cuda_denoise
from arbitor.optimized.cuda import many_rows
from arbitor.optimized.cuda import product as cuda_product
from arbitor.optimized.cuda import update as cuda_update
from arbitor.optimized.kernels import (
    attention,
    codebook,
    denoise,
    edges,
    experts,
    norm,
    orthogonal,
    products,
    scale,
    segments,
    update,
    votes,
)
from arbitor.optimized.kernels.launch import row_tile
from arbitor.optimized.layouts import words_per_row
from arbitor.reference import ops as reference_ops
from arbitor.reference.constants import groups_per_row
from arbitor.reference.op_table import OP_TABLE
from bench import cases, gate, inputs, train_step
from bench.inputs import Sizes
from bench.peers import peers_of

PROGRAMS = 2 * 132
"""Programs that an H100 or H200 runs at once, as the codebook's kernels count them."""

# Not by name: `ops` has ops of the names of its files.
expert_ops = import_module("arbitor.optimized.ops.experts")
linear_ops = import_module("arbitor.optimized.ops.linear")


def tile(size: int, most: int) -> tuple[int, bool]:
    """Return the width of a tile, and whether there are several."""
    block, tiles = row_tile(size, most)
    return block, tiles > 1


def columns(*most: int) -> Callable[[Sizes], Any]:
    return lambda s: [tile(s["K"], at_most) for at_most in most]


def voting(s: Sizes) -> Any:
    places, block, tiles = votes.tile_of(s["G"], groups_per_row(s["K"], s["G"]))
    return places, block, tiles > 1, tile(s["K"], votes.BLOCK_COLUMNS)


def counting(s: Sizes) -> Any:
    """As votes, and what the CUDA C++ kernel chooses: whole words, whole chunks, and whether counts of exponents come by fours."""
    by_fours = groups_per_row(s["K"], s["G"]) % 4 == 0
    return voting(s), s["K"] % 16 == 0, s["K"] % cuda_update.CHUNK == 0, by_fours


def stepping(s: Sizes) -> Any:
    groups = groups_per_row(s["K"], s["G"])
    return (
        tile(groups, update.BLOCK_GROUPS),
        tile(words_per_row(s["K"]), update.BLOCK_WORDS),
        s["K"] % 16 == 0,
    )


def few(s: Sizes) -> bool:
    return expert_ops.few_slots(s["M"], s["E"])


def product(s: Sizes, num_slots: int, num_groups: int, *, transposed: bool = False) -> Any:
    wide = s["float_bytes"] == 4
    outputs, inputs = (s["K"], s["N"]) if transposed else (s["N"], s["K"])
    rank = min(outputs, inputs)
    tiling = products.Tiling.of(num_slots, num_groups, rank, transposed=transposed, wide=wide)
    tiling = tiling.within(outputs, inputs)
    several = outputs > tiling.block_n, inputs > tiling.block_k
    return tiling.parts(outputs, inputs)[0] > 1, tiling, several, outputs % 8, inputs % 8


def grouped(s: Sizes, *, transposed: bool = False) -> Any:
    """All but whether sums are cut: uncut, few slots would have more weights than the reference has time for."""
    if not transposed and s["float_bytes"] == 2 and many_rows.pays_for_experts(s["N"], s["K"]):
        return many_rows.slot_form_of(s["M"], s["E"])
    return few(s), product(s, 1 if few(s) else s["M"], s["E"], transposed=transposed)[1:]


def adding(s: Sizes) -> Any:
    most = 64 if s["float_bytes"] == 4 else 128
    widths = tile(s["N"], most), tile(s["K"], most)
    tiles = -(-s["N"] // widths[0][0]) * -(-s["K"] // widths[1][0])
    return widths, experts.is_cut(s["M"], tiles)


def of_many_rows(s: Sizes) -> Any:
    """What the kernel for many rows chooses: its form, and whether sums are cut."""
    form = many_rows.form_of(s["M"], s["N"])
    return replace(form, parts=0), form.parts > 1, s["K"] > cuda_product.STEP


def multiplied(s: Sizes, *, transposed: bool = False) -> Any:
    if not transposed and s["float_bytes"] == 2 and many_rows.pays(s["M"], s["N"], s["K"]):
        return of_many_rows(s)
    if s["M"] > linear_ops.FEW_ROWS or s["float_bytes"] == 4:
        return tile(s["K"], scale.BLOCK_COLUMNS)
    tiles = -(-s["N"] // cuda_product.OUTPUTS)
    takes = not transposed and s["M"] <= cuda_product.FEW
    block = cuda_product.block_of(tiles, s["M"]) if takes else None
    return block, product(s, s["M"], 1, transposed=transposed)


def nearest(s: Sizes) -> Any:
    queries = next((size for size in codebook.TILES if s["M"] <= size), max(codebook.TILES))
    code_tiles = -(-s["N"] // codebook.TILES[queries][0])
    return queries, s["M"] > queries, code_tiles > PROGRAMS


def among(s: Sizes) -> Any:
    candidates = s["probes"] * -(-s["N"] // 2 ** s["sign_bits"])
    return candidates > codebook.BLOCK_CANDIDATES, 2 * s["M"] <= PROGRAMS


def attending(s: Sizes) -> Any:
    return (
        tile(s["L"], 2**30),
        s["R"],
        s["S"] > attention.PART_SLOTS,
        s["S"] > attention.NEAR_SLOTS,
        attention.tile_of(s["H"]),
    )


def looping(s: Sizes) -> Any:
    widths = (denoise.BLOCK, denoise.BLOCK_COLUMNS, denoise.BLOCK_MIXED)
    tokens = s["P"] > denoise.BLOCK_MIXED_TOKENS, s["B"] <= linear_ops.FEW_FLOAT_ROWS
    one_launch = cuda_denoise.plan_of(
        s["B"], s["L"], s["P"], s["D"], s["float_bytes"], many_rows.PROCESSORS, many_rows.SHARED_BYTES
    )
    by_triton = tile(s["L"], denoise.BLOCK), [tile(s["D"], width) for width in widths], tokens
    return by_triton, one_launch is None, s["halting"]


def normalizing(s: Sizes) -> Any:
    return tile(s["K"], norm.BLOCK_COLUMNS), norm.parts_of(s["M"], norm.PROGRAMS, 1)[0] > 1


def summing(s: Sizes) -> Any:
    block, row_blocks = row_tile(s["K"], norm.BLOCK_SUMS)
    parts = norm.parts_of(s["M"], -(-norm.PROGRAMS // row_blocks), norm.PART_ROWS)[1]
    return tile(s["K"], norm.BLOCK_COLUMNS), block, row_blocks > 1, parts > 1


def orthogonalized(s: Sizes) -> Any:
    return tile(s["K"], orthogonal.BLOCK_COLUMNS), s["N"] // s["E"] > s["K"]


def convolved(s: Sizes) -> Any:
    """As the linear that it is, with a row for each place of its output."""
    places = (s["L"] + 2 * s["padding"] - s["J"]) // s["stride"] + 1
    return multiplied({**s, "M": s["B"] * places, "K": s["C"] * s["J"]})


PATHS: dict[str, Callable[[Sizes], Any]] = {
    "dequantize": columns(scale.BLOCK_COLUMNS),
    "initial_weight": lambda s: tile(words_per_row(s["K"]), scale.BLOCK_WORDS),
    "row_exponents": columns(votes.BLOCK_COLUMNS),
    "count_nonfinite_rows": columns(votes.BLOCK_COLUMNS),
    "sign_votes": columns(votes.BLOCK_COLUMNS),
    "stochastic_votes": voting,
    "accumulate": voting,
    "accumulate_gradient": counting,
    "apply_step": stepping,
    "linear": multiplied,
    "linear_input_grad": lambda s: multiplied(s, transposed=True),
    "conv1d": convolved,
    "conv1d_input_grad": lambda s: tile(s["C"] * s["J"], scale.BLOCK_COLUMNS),
    "rms_norm": normalizing,
    "add_rms_norm": normalizing,
    "rms_norm_input_grad": normalizing,
    "rms_norm_weight_grad": summing,
    "embedding": columns(scale.BLOCK_COLUMNS),
    "embedding_row_grads": columns(segments.BLOCK_COLUMNS),
    "denoise_loop": looping,
    "initial_codebook": lambda s: s["sign_bits"],
    "candidate_codes": lambda s: s["sign_bits"],
    "revive_codes": lambda s: s["sign_bits"],
    "nearest_codes": nearest,
    "nearest_candidates": among,
    "grouped_linear": grouped,
    "grouped_linear_input_grad": lambda s: grouped(s, transposed=True),
    "orthogonalize": orthogonalized,
    "grouped_linear_weight_grad": adding,
    "decode_attention": attending,
    "edge_sum": lambda s: (s["J"], columns(edges.BLOCK_COLUMNS)(s)),
    "edge_sum_input_grad": columns(segments.BLOCK_COLUMNS),
    "edge_sum_sign_grad": columns(edges.BLOCK_SIGN_COLUMNS),
    "ngram_rows": lambda s: s["order"],
}
"""What the code of an op chooses by its sizes: tiles, and whether there are several of them."""


@pytest.mark.parametrize("op", PATHS)
def test_what_is_checked_takes_the_path_that_is_timed(op: str) -> None:
    row = cases.rows()[op]
    for sizes in row.shapes.values():
        assert PATHS[op](gate.small(row, sizes)) == PATHS[op](sizes), sizes


def test_few_slots_are_checked_as_few() -> None:
    case = cases.all_cases()["grouped_linear-21216_m4-ours"]
    checked = gate.small(case.row, case.sizes)
    assert few(case.sizes) and few(checked) and checked["E"] == 32


def test_a_compound_is_checked_at_its_own_sizes_where_its_ops_have_them() -> None:
    update_step, train_step = (
        cases.all_cases()[name] for name in ("update_step-2^30-ours", "train_step-small-ours")
    )
    assert gate.called_with(update_step, "apply_step") == cases.UPDATE_SHAPES["2^30"]
    of_bfloat16 = cases.all_cases()["update_step-2^30_bf16-ours"]
    checked = gate.small(
        cases.rows()["accumulate_gradient"], gate.called_with(of_bfloat16, "accumulate_gradient")
    )
    assert (
        inputs.INPUTS["accumulate_gradient"](inputs.Maker("cpu", "x"), checked)[0][1].dtype == torch.bfloat16
    )
    assert gate.called_with(train_step, "grouped_linear") == OP_TABLE["grouped_linear"].shapes["small"]
    assert gate.called_with(train_step, "linear") == OP_TABLE["linear"].shapes["tiny"]


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("train_step", {"linear", "apply_step"}),
        ("train_step_every_module", {"edge_sum", "nearest_codes"}),
        ("train_step_transformer", {"embedding_row_grads", "orthogonalize"}),
    ],
)
def test_a_train_step_is_timed_after_all_of_its_ops_are_checked(name: str, some: set[str]) -> None:
    """Its ops are those seen in one step. More steps of other windows, longer ones where the model takes them, use no other."""
    gates = cases.rows()[name].gates()
    sizes = (8, 64) if name == train_step.TRANSFORMER else (2, 24)
    ids_BT = torch.randint(0, 256, sizes, generator=torch.Generator().manual_seed(1))
    assert train_step.ops_seen(name, ids_BT, steps=3) == set(gates) >= some
    assert cases.all_cases()[f"{name}-tiny-ours"].row.gates() == gates


@pytest.mark.parametrize("op", OP_TABLE)
def test_every_op_takes_its_inputs(op: str) -> None:
    """At the smallest shape of the table. Of the others the gate makes sizes that fit: as many codes as there are buckets."""
    row = cases.rows()[op]
    first = next(iter(row.shapes.values()))
    args, kwargs = inputs.INPUTS[op](inputs.Maker("cpu", op), first)
    getattr(reference_ops, op)(*args, **kwargs)
    for sizes in row.shapes.values():
        checked = gate.small(row, sizes)
        assert checked.get("N", 2**30) >= 2 ** checked.get("sign_bits", 0)


def test_the_layer_of_transformers_reads_every_slot_and_leaves_the_cache_as_it_was() -> None:
    pytest.importorskip("transformers", reason="the peer is a layer of the library transformers")
    [peer] = [peer for peer in peers_of("decode_attention") if peer.needs == "transformers"]
    sizes = OP_TABLE["decode_attention"].shapes["tiny"]
    (q, keys, bias), kwargs = inputs.INPUTS["decode_attention"](inputs.Maker("cpu", "slots"), sizes)

    def outputs(keys: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        step = peer.build(((q, keys, bias), kwargs), sizes)
        return [step(), step()]

    first, second = outputs(keys)
    assert torch.equal(first, second)
    for slot in (0, sizes["S"] - 2):
        changed = keys.clone()
        changed[:, slot] += 8.0
        assert not torch.equal(outputs(changed)[0], first)


@pytest.mark.parametrize("halting", [0, 1])
def test_the_peer_of_the_loop_halts_too(halting: int) -> None:
    [peer] = peers_of("denoise_loop")
    sizes = {**OP_TABLE["denoise_loop"].shapes["tiny"], "halting": halting}
    gate.Gate(torch.device("cpu")).peer("denoise_loop", peer, sizes)
    arguments = inputs.INPUTS["denoise_loop"](inputs.Maker("cpu", "loop"), sizes)
    other = inputs.INPUTS["denoise_loop"](inputs.Maker("cpu", "loop"), {**sizes, "halting": 1 - halting})
    assert gate.relative_error(peer.build(arguments, sizes)(), peer.build(other, sizes)()) > gate.PEER_ERROR
