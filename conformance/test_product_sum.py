"""Products that are added to what is there, and rounded once: their results, their tiles, and which calls take them."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import pytest
import torch

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized.kernels import product_sum
from conformance import preset_calls
from conformance.compare import exact
from conformance.subject import Subject, needs_ours

# Not by name: `ops` has ops of the names of its files.
linear_ops = import_module("arbitor.optimized.ops.linear")
orthogonal_ops = import_module("arbitor.optimized.ops.orthogonal")

BOTH_WAYS = tuple(itertools.product((False, True), repeat=2))


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "products that are added")


@pytest.mark.parametrize(
    ("shape", "turned", "tile"),
    [
        *(
            (shape, turned, product_sum.TILES[-1])
            for shape in ((1, 70, 33, 129), (2, 1, 5, 7))
            for turned in BOTH_WAYS
        ),
        *(((3, 64, 128, 64), turned, product_sum.TILES[0]) for turned in BOTH_WAYS),
        *(((1, 300, 520, 72), (False, False), tile) for tile in product_sum.TILES),
    ],
)
def test_products_are_added_and_rounded_once(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    turned: tuple[bool, bool],
    tile: product_sum.Tile,
) -> None:
    """Of whole numbers whose sums float32 holds, with ragged edges, turned operands, rows that are left out, and in place."""
    monkeypatch.setattr(product_sum, "TILES", (tile,))
    num_matrices, num_rows, num_columns, num_terms = shape
    rng = torch.Generator().manual_seed(sum(shape))

    def operand(rows: int, columns: int, is_turned: bool) -> torch.Tensor:
        size = (num_matrices, columns, rows) if is_turned else (num_matrices, rows, columns)
        made = torch.randint(-16, 17, size, generator=rng).to(torch.bfloat16).to(subject.device)
        return made.mT if is_turned else made

    a, b = operand(num_rows, num_terms, turned[0]), operand(num_terms, num_columns, turned[1])
    product = (a.to(torch.float64) @ b.to(torch.float64)).cpu()
    # The opposite, so that what bfloat16 cuts off is left.
    added = (-0.25 * product).to(torch.bfloat16)
    want = (0.5 * product + 2.0 * added.to(torch.float64)).to(torch.bfloat16)
    assert num_terms < 64 or not torch.equal((0.5 * product).to(torch.bfloat16) + 2.0 * added, want)
    exact(product_sum.product_sum(a, b, factor=0.5).cpu(), (0.5 * product).to(torch.bfloat16))
    squares = torch.ones(num_matrices * num_rows, dtype=torch.float64, device=subject.device)
    squares[0], squares[-1] = torch.inf, torch.nan
    there = added.to(subject.device)
    options = {"factor": 0.5, "added": there, "added_factor": 2.0}
    exact(product_sum.product_sum(a, b, **options).cpu(), want)
    marked = product_sum.product_sum(a, b, squares_N=squares, **options).cpu().flatten(0, 1)
    assert marked[0].isnan().all() and marked[-1].isnan().all()
    exact(marked[1:-1], want.flatten(0, 1)[1:-1])
    assert product_sum.product_sum(a, b, out=there, **options) is there
    exact(there.cpu(), want)


# (matrices, rows, columns, terms), the tile that was chosen, and by how much it was slower than the best of all on an H200.
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        # So many that the largest tile fills all multiprocessors: 1.0 to 1.06.
        ((1, 16384, 4096, 4096), 128, 256),
        ((1, 16384, 768, 3072), 128, 256),
        # Its 144 tiles of 128 x 128 would give 12 multiprocessors two of them: 1.19 in place of 1.0.
        ((4, 768, 768, 768), 64, 128),
        ((4, 3072, 768, 768), 64, 128),
        # 112 tiles, a round: 1.05.
        ((7, 512, 512, 512), 128, 128),
        # Few: 1.0 to 1.1.
        ((1, 512, 512, 512), 64, 64),
        ((6, 256, 256, 512), 64, 64),
    ],
)
def test_tiles_that_were_timed(shape: tuple[int, int, int, int], rows: int, columns: int) -> None:
    tile = product_sum.tile_of(*shape)
    assert (tile.block_m, tile.block_n) == (rows, columns)


def test_tiles_of_a_product() -> None:
    """A matrix fills more than half of its tile, unless that is the smallest. Steps are no longer than the sum."""
    tiles = product_sum.TILES
    places = {(tile.block_m, tile.block_n): place for place, tile in enumerate(tiles)}
    assert len(places) == len(tiles)
    found = set()
    for shape in itertools.product(
        (1, 6, 100), (1, 32, 160, 512, 16384), (1, 24, 128, 512, 3072), (5, 64, 1024)
    ):
        tile = product_sum.tile_of(*shape)
        place = places[tile.block_m, tile.block_n]
        found.add(place)
        assert product_sum.LEAST_TERMS <= tile.block_k <= tiles[place].block_k
        assert tile.block_k < 2 * max(shape[3], product_sum.LEAST_TERMS)
        fills = 2 * shape[1] > tile.block_m and 2 * shape[2] > tile.block_n
        assert fills or place == len(tiles) - 1, (shape, tile)
    assert found == set(places.values())
    # Elements that are read one by one need an address each.
    for unit in (1, 2, 4):
        smallest = product_sum.tile_of(100, 512, 512, 512, unit)
        assert (smallest.block_m, smallest.block_n) == (tiles[-1].block_m, tiles[-1].block_n)


def test_every_tile_has_a_preset_like_call() -> None:
    """A tile that no call asks for is not compiled without a GPU."""
    shapes = []
    for op, case in itertools.chain(preset_calls.of_rows(), preset_calls.of_updates()):
        if op == "linear_input_grad" and "out" in case.kwargs:
            grad, weight = case.args
            shapes.append((1, len(grad), weight.shape[1], weight.shape[0]))
        elif op == "orthogonalize":
            count = case.kwargs.get("num_groups", 1)
            rows, columns = len(case.args[0]) // count, case.args[0].shape[1]
            side = min(rows, columns)
            shapes += [(count, side, side, max(rows, columns)), (count, rows, columns, side)]
    tiles = {(tile.block_m, tile.block_n) for tile in product_sum.TILES}
    assert {(tile.block_m, tile.block_n) for tile in itertools.starmap(product_sum.tile_of, shapes)} == tiles


def test_what_the_product_that_adds_takes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of bfloat16 with sides below those from which the library is faster, and no others."""

    class Taken(Exception):
        pass

    def take(*_: Any, **__: Any) -> torch.Tensor:
        raise Taken

    for module in (linear_ops, orthogonal_ops):
        monkeypatch.setattr(module, "product_sum", take)
    monkeypatch.setattr(linear_ops, "MOST_KERNEL_SIDE", 95)
    monkeypatch.setattr(orthogonal_ops, "MOST_SIDE_OF_A_SUM", 95)
    monkeypatch.setattr(orthogonal_ops, "MOST_SIDE_OF_S", 0)

    def takes(op: str, *args: Any, **kwargs: Any) -> bool:
        try:
            getattr(optimized_ops, op)(*args, **kwargs)
        except Taken:
            return True
        return False

    def sums(num_rows: int, num_columns: int, dtype: torch.dtype) -> bool:
        weight = optimized_ops.constant_weight(
            (num_rows, num_columns), trit=1, exponent=0, device=subject.device
        )
        grad, out = (
            torch.zeros(3, size, dtype=dtype, device=subject.device) for size in (num_rows, num_columns)
        )
        return takes("linear_input_grad", grad, weight, out=out)

    assert sums(16, 24, torch.bfloat16) and sums(88, 192, torch.bfloat16) and sums(192, 84, torch.bfloat16)
    assert not sums(96, 96, torch.bfloat16) and not sums(16, 24, torch.float32)
    for shape, taken in (((95, 200), True), ((200, 95), True), ((96, 200), False), ((128, 128), False)):
        grad = torch.zeros(shape, dtype=torch.bfloat16, device=subject.device)
        assert takes("orthogonalize", grad) is taken, shape
        assert not takes("orthogonalize", grad.float())
    monkeypatch.setattr(orthogonal_ops, "MOST_SIDE_OF_S", 96)
    assert takes("orthogonalize", torch.zeros(96, 200, dtype=torch.bfloat16, device=subject.device))
