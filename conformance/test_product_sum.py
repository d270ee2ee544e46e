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
from conformance.case import Case
from conformance.compare import exact
from conformance.families import compare
from conformance.subject import Subject, needs_ours

# Not by name: `ops` has ops of the names of its files.
linear_ops = import_module("arbitor.optimized.ops.linear")
orthogonal_ops = import_module("arbitor.optimized.ops.orthogonal")

BOTH_WAYS = tuple(itertools.product((False, True), repeat=2))


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "products that are added")


def operand(rng: torch.Generator, shape: tuple[int, int, int], *, turned: bool, device: str) -> torch.Tensor:
    """Return a stack of matrices of whole numbers, or of transposes of them."""
    num_matrices, rows, columns = shape
    size = (num_matrices, columns, rows) if turned else shape
    made = torch.randint(-16, 17, size, generator=rng).to(torch.bfloat16).to(device)
    return made.mT if turned else made


@pytest.mark.parametrize(
    ("shape", "turned", "tile"),
    [
        *(
            (shape, turned, product_sum.TILES[-1])
            for shape in ((1, 72, 40, 136), (2, 8, 16, 8))
            for turned in BOTH_WAYS
        ),
        *(((3, 64, 128, 64), turned, product_sum.TILES[0]) for turned in BOTH_WAYS),
        *(((1, 304, 520, 72), (False, False), tile) for tile in product_sum.TILES),
        # Rows that are no multiple of 8.
        ((2, 7, 16, 24), (False, True), product_sum.TILES[-1]),
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
    rng, device = torch.Generator().manual_seed(sum(shape)), subject.device
    a = operand(rng, (num_matrices, num_rows, num_terms), turned=turned[0], device=device)
    b = operand(rng, (num_matrices, num_terms, num_columns), turned=turned[1], device=device)
    product = (a.to(torch.float64) @ b.to(torch.float64)).cpu()
    # The opposite, so that what bfloat16 cuts off is left.
    added = (-0.25 * product).to(torch.bfloat16)
    want = (0.5 * product + 2.0 * added.to(torch.float64)).to(torch.bfloat16)
    assert num_terms < 64 or not torch.equal((0.5 * product).to(torch.bfloat16) + 2.0 * added, want)
    assert product_sum.has_descriptors(a, b, added)
    exact(product_sum.product_sum(a, b, factor=0.5).cpu(), (0.5 * product).to(torch.bfloat16))
    there = added.to(device)
    options = {"factor": 0.5, "added": there, "added_factor": 2.0}
    exact(product_sum.product_sum(a, b, **options).cpu(), want)
    with_diagonal = 0.5 * product + 2.0 * added.to(torch.float64) + 3.0 * torch.eye(num_rows, num_columns)
    exact(product_sum.product_sum(a, b, diagonal=3.0, **options).cpu(), with_diagonal.to(torch.bfloat16))
    assert product_sum.product_sum(a, b, out=there, **options) is there
    exact(there.cpu(), want)


@pytest.mark.parametrize(
    "tile",
    [tile for tile in product_sum.TILES if tile.block_m == tile.block_n],
    ids=lambda tile: f"{tile.block_m}",
)
@pytest.mark.parametrize(("side", "terms"), [(8, 24), (136, 40), (264, 72)])
@pytest.mark.parametrize("turned", [False, True])
def test_half_of_a_symmetric_product(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    terms: int,
    turned: bool,
    tile: product_sum.Tile,
) -> None:
    """It is what all of it would be, and no tile below the diagonal is computed."""
    monkeypatch.setattr(product_sum, "TILES", (tile,))
    rng, device = torch.Generator().manual_seed(side), subject.device
    x = operand(rng, (2, side, terms), turned=turned, device=device)
    s = product_sum.product_sum(x, x.mT, symmetric=True)
    want = (x.to(torch.float64) @ x.to(torch.float64).mT).to(torch.bfloat16)
    exact(s.cpu(), want.cpu())
    options = {"factor": 0.25, "added": s, "added_factor": -1.5, "diagonal": 7.0}
    whole = product_sum.product_sum(s, s, **options)
    exact(product_sum.product_sum(s, s, symmetric=True, **options), whole)
    # With another matrix on the right the product has no symmetry, so what lies below the diagonal is what lies above.
    other = operand(rng, (2, terms, side), turned=False, device=device)
    above = product_sum.product_sum(x, other, symmetric=True)
    product = (x.to(torch.float64) @ other.to(torch.float64)).to(torch.bfloat16)
    block = torch.arange(side, device=device) // tile.block_m
    exact(above.cpu(), torch.where(block[:, None] > block, product.mT, product).cpu())


def test_a_diagonal_is_added_with_a_matrix_alone(subject: Subject) -> None:
    s = torch.zeros(1, 8, 8, dtype=torch.bfloat16, device=subject.device)
    with pytest.raises(ValueError, match=r"^diagonal is 2\.0, but must be 0 where nothing is added$"):
        product_sum.product_sum(s, s, diagonal=2.0)


def test_matrices_at_odd_addresses(subject: Subject) -> None:
    """A stack at an address that no descriptor takes gives the same bits: which way is taken follows from shapes alone."""
    rng = torch.Generator().manual_seed(3)

    def moved(stack: torch.Tensor) -> torch.Tensor:
        room = torch.empty(stack.numel() + 1, dtype=stack.dtype, device=stack.device)
        there = room[1:].view(stack.shape)
        there.copy_(stack)
        assert there.data_ptr() % 16
        return there

    a, b = (operand(rng, (2, 16, 16), turned=False, device=subject.device) for _ in range(2))
    added = operand(rng, (2, 16, 16), turned=False, device=subject.device)
    want = product_sum.product_sum(a, b, added=added, factor=0.5)
    exact(
        product_sum.product_sum(moved(a), moved(b).mT.contiguous().mT, added=moved(added), factor=0.5), want
    )
    out = moved(added)
    assert product_sum.product_sum(a, b, added=out, out=out, factor=0.5) is out
    exact(out, want)
    # All that is asked for is handed on where the result goes to such an address.
    x, other = (
        operand(rng, shape, turned=False, device=subject.device) for shape in ((1, 136, 8), (1, 8, 136))
    )
    options = {"factor": 0.5, "added": product_sum.product_sum(x, other), "added_factor": -1.5}
    for more in ({"symmetric": True}, {"diagonal": 5.0}):
        want = product_sum.product_sum(x, other, **options, **more)
        out = moved(torch.zeros_like(want))
        exact(product_sum.product_sum(x, other, out=out, **options, **more), want)
    # There is room between the rows of these.
    few = [each[..., :12] for each in (a, b, added)]
    want = product_sum.product_sum(few[0], few[1][:, :12], added=few[2])
    moved_few = [moved(each)[..., :12] for each in (a, b, added)]
    exact(product_sum.product_sum(moved_few[0], moved_few[1][:, :12], added=moved_few[2]), want)
    want = product_sum.product_sum(few[0].mT, b)
    exact(product_sum.product_sum(moved_few[0].mT, moved(b)), want)


def test_which_matrices_have_descriptors() -> None:
    def stack(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    assert product_sum.has_descriptors(stack(2, 3, 8), stack(1, 5, 16).mT)
    assert not product_sum.has_descriptors(stack(2, 8, 12)) and not product_sum.has_descriptors(
        stack(1, 12, 4).mT
    )
    assert not product_sum.has_descriptors(stack(2, 8, 8), stack(2, 8, 8, dtype=torch.float32))


# (matrices, rows, columns, terms), whether the result is symmetric, and the tile that was fastest on an H200, or within a tenth.
@pytest.mark.parametrize(
    ("shape", "symmetric", "rows", "columns", "stages"),
    [
        # Sums of so many terms that the end of a program does not count: 1.0.
        ((1, 4096, 4096, 4096), False, 128, 256, 3),
        ((1, 7168, 21216, 7168), False, 128, 256, 3),
        # Two smaller programs hide each other's end: 1.0, where the largest tile took 1.1.
        ((14, 1024, 512, 512), False, 128, 128, 3),
        ((4, 3072, 768, 768), False, 128, 128, 3),
        # Few: 1.0 to 1.1.
        ((1, 1024, 1024, 1024), False, 64, 128, 4),
        ((6, 256, 256, 256), False, 64, 64, 4),
        ((1, 7168, 7168, 21216), True, 128, 128, 4),
        ((4, 1536, 1536, 1536), True, 128, 128, 4),
        ((1, 3072, 3072, 21216), True, 128, 128, 4),
        # Many matrices: programs that run together hide each other's end, 1.0, where reading further ahead took 1.2.
        ((64, 1408, 1408, 2048), True, 128, 128, 3),
        ((1, 1024, 1024, 1024), True, 64, 64, 4),
        ((6, 512, 512, 512), True, 64, 64, 4),
    ],
)
def test_tiles_that_were_timed(
    shape: tuple[int, int, int, int], symmetric: bool, rows: int, columns: int, stages: int
) -> None:
    tile = product_sum.tile_of(*shape, symmetric=symmetric)
    assert (tile.block_m, tile.block_n, tile.num_stages) == (rows, columns, stages)


def test_tiles_of_a_product() -> None:
    """A matrix fills more than half of its tile, unless that is the smallest. Steps are no longer than the sum."""
    tiles = product_sum.TILES
    places = {(tile.block_m, tile.block_n, tile.num_stages): place for place, tile in enumerate(tiles)}
    assert len(places) == len(tiles)
    found = set()
    for shape in itertools.product(
        (1, 6, 100), (1, 32, 160, 512, 16384), (1, 24, 128, 512, 3072), (5, 64, 4096)
    ):
        for symmetric in {False, shape[1] == shape[2]}:
            tile = product_sum.tile_of(*shape, symmetric=symmetric)
            place = places[tile.block_m, tile.block_n, tile.num_stages]
            found.add(place)
            assert tile.block_m == tile.block_n or not symmetric
            assert product_sum.LEAST_TERMS <= tile.block_k <= tiles[place].block_k
            assert tile.block_k < 2 * max(shape[3], product_sum.LEAST_TERMS)
            fills = 2 * shape[1] > tile.block_m and 2 * shape[2] > tile.block_n
            assert fills or place == len(tiles) - 1, (shape, tile)
    assert found == set(places.values())


def test_every_tile_has_a_preset_like_call() -> None:
    """A tile that no call asks for is not compiled without a GPU."""
    found = []
    for op, case in itertools.chain(preset_calls.of_rows(), preset_calls.of_updates()):
        if op == "linear_input_grad" and "out" in case.kwargs:
            grad, weight = case.args
            found.append(product_sum.tile_of(1, len(grad), weight.shape[1], weight.shape[0]))
        elif op == "orthogonalize":
            count = case.kwargs.get("num_groups", 1)
            rows, columns = len(case.args[0]) // count, case.args[0].shape[1]
            side, other = min(rows, columns), max(rows, columns)
            found += [
                product_sum.tile_of(count, side, side, terms, symmetric=True) for terms in (side, other)
            ]
    tiles = {(tile.block_m, tile.block_n, tile.num_stages) for tile in product_sum.TILES}
    assert {(tile.block_m, tile.block_n, tile.num_stages) for tile in found} == tiles


def test_what_the_product_that_adds_takes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of bfloat16 with sides below those from which the library is faster, whose rows have descriptors, and no others."""

    class Taken(Exception):
        pass

    def take(*_: Any, **__: Any) -> torch.Tensor:
        raise Taken

    monkeypatch.setattr(linear_ops, "product_sum", take)
    monkeypatch.setattr(linear_ops, "MOST_KERNEL_SIDE", 95)

    def takes(num_rows: int, num_columns: int, dtype: torch.dtype) -> bool:
        weight = optimized_ops.constant_weight(
            (num_rows, num_columns), trit=1, exponent=0, device=subject.device
        )
        grad, out = (
            torch.zeros(3, size, dtype=dtype, device=subject.device) for size in (num_rows, num_columns)
        )
        try:
            optimized_ops.linear_input_grad(grad, weight, out=out)
        except Taken:
            return True
        return False

    assert takes(16, 24, torch.bfloat16) and takes(88, 192, torch.bfloat16) and takes(192, 88, torch.bfloat16)
    assert not takes(96, 96, torch.bfloat16) and not takes(16, 24, torch.float32)
    assert not takes(192, 84, torch.bfloat16)
    monkeypatch.setattr(linear_ops, "copies_in_bulk", lambda device: False)
    assert not takes(16, 24, torch.bfloat16)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (66, 72), (130, 66)])
def test_orthogonalize_returns_rows_that_touch(subject: Subject, shape: tuple[int, int]) -> None:
    """Matrices whose rows no descriptor finds are computed with room between rows, which no result has.

    It may have several tiles.
    """
    grad = torch.randn(2 * shape[0], shape[1], generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float32):
        assert optimized_ops.orthogonalize(grad.to(subject.device, dtype), num_groups=2).is_contiguous()
        compare(subject, "orthogonalize", Case((grad.to(dtype),), {"iterations": 3, "num_groups": 2}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_orthogonalize_takes_a_lone_row_of_a_wider_matrix(
    subject: Subject, dtype: torch.dtype, turned: bool
) -> None:
    """Torch calls it contiguous, and so it calls a lone column of a row, but their strides are those of the wider matrix."""
    wider = torch.randn(4, 104, generator=torch.Generator().manual_seed(1)).to(subject.device, dtype)
    for width in (104, 100, 96):
        row = wider[:1, :width]
        grad = row.mT if turned else row
        assert grad.is_contiguous() and 104 in grad.stride()
        plain = torch.tensor(grad.tolist(), dtype=dtype, device=subject.device)
        exact(optimized_ops.orthogonalize(grad), optimized_ops.orthogonalize(plain))


@pytest.mark.parametrize(("shape", "num_groups"), [((40, 72), 1), ((72, 40), 2), ((5, 7), 3)])
def test_gpus_before_hopper_take_the_library(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], num_groups: int
) -> None:
    """The result is that of the rule, also with a row that is not finite."""
    monkeypatch.setattr(orthogonal_ops, "copies_in_bulk", lambda device: False)
    monkeypatch.delattr(orthogonal_ops, "product_sum")
    grad = torch.randn(num_groups * shape[0], shape[1], generator=torch.Generator().manual_seed(5))
    grad[1, 3] = torch.nan
    options = {"iterations": 2, "num_groups": num_groups}
    compare(subject, "orthogonalize", Case((grad.to(torch.bfloat16),), options))


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_copy_in_bulk(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert product_sum.copies_in_bulk(torch.device("cuda", 0)) is wanted
    assert product_sum.copies_in_bulk(torch.device("cpu"))
