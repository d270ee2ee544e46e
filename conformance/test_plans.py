"""What CUDA C++ kernels take, and how they share the work out. No GPU is needed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized.cuda import compiler, many_rows, product
from arbitor.optimized.cuda import denoise as cuda_denoise
from arbitor.optimized.cuda import launch as launching
from arbitor.optimized.cuda import update as cuda_update
from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.kernels.launch import Clock
from arbitor.optimized.layouts import DeviceWeight, words_per_row
from arbitor.reference.constants import GROUP_SIZES, groups_per_row
from arbitor.reference.types import TernaryWeight
from conformance import cuda_calls
from conformance.ops import test_denoise_loop
from conformance.subject import Subject, needs_ours

# Not by name: `ops` has ops of the names of its files.
denoise_ops = import_module("arbitor.optimized.ops.denoise")
experts_ops = import_module("arbitor.optimized.ops.experts")
linear_ops = import_module("arbitor.optimized.ops.linear")
update_ops = import_module("arbitor.optimized.ops.update")

CALLS = list(cuda_calls.calls())

SHARED_MEMORY = 48 * 1024
"""Bytes of shared memory that every GPU gives to a block without being asked."""


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "plans of CUDA C++ kernels")


def device_weight(num_rows: int, num_columns: int, group_size: int = 12) -> DeviceWeight:
    """Return a weight of zeros in device layout, without a kernel that lays it out."""
    groups = groups_per_row(num_columns, group_size)
    words = torch.zeros(num_rows, words_per_row(num_columns), dtype=torch.int32)
    levels, counts = (torch.zeros(num_rows, width, dtype=torch.int8) for width in (groups, num_columns))
    return DeviceWeight(
        words, levels, counts, torch.zeros_like(levels), (num_rows, num_columns), group_size, 2
    )


def test_what_a_product_takes() -> None:
    weight, x = device_weight(20, 192), torch.zeros(8, 192, dtype=torch.bfloat16)
    assert product.fits(x, weight) and product.fits(x[:1], weight)
    assert not product.fits(x[:0], weight)
    assert not product.fits(torch.zeros(9, 192, dtype=torch.bfloat16), weight)
    # More rows, by the size of the weight.
    for size, taken_rows in ((2**21, ()), (2**22, (17, 512)), (2**24, (9, 1024)), (2**27, (9, 2**20))):
        for count in (1, 8, 9, 16, 17, 512, 513, 1024, 1025, 2**20):
            inside = bool(taken_rows) and taken_rows[0] <= count <= taken_rows[1]
            assert many_rows.pays(count, size // 1024, 1024) is inside, (size, count)
    # Experts, by the size of one.
    for outputs, inputs, is_taken in (
        (21216, 1024, True),
        (640, 1024, True),
        (24, 21216, False),
        (700, 700, False),
    ):
        assert many_rows.pays_for_experts(outputs, inputs) is is_taken
    assert many_rows.fits_slots(torch.zeros(3, 640, dtype=torch.bfloat16), device_weight(2048, 640), 2)
    assert not many_rows.fits_slots(torch.zeros(3, 640, dtype=torch.bfloat16), device_weight(2048, 640), 4)
    large = device_weight(2**17, 32)
    assert many_rows.fits(torch.zeros(17, 32, dtype=torch.bfloat16), large)
    assert not many_rows.fits(torch.zeros(17, 32), large)
    assert not product.fits(x.float(), weight)
    assert not product.fits(torch.zeros(8, 196, dtype=torch.bfloat16), device_weight(20, 196))
    taken = {size for size in GROUP_SIZES if product.fits(x, device_weight(20, 192, size))}
    assert taken == {6, 12, 16, 24, 32, 48, 96}
    # A row that starts between two multiples of 16 bytes.
    assert not product.fits(torch.zeros(193, dtype=torch.bfloat16)[1:].reshape(1, 192), weight)


def test_what_an_update_takes() -> None:
    weight, grad = device_weight(20, 96), torch.zeros(20, 96)
    assert cuda_update.fits_count(weight, grad) and cuda_update.fits_step(weight, None)
    assert cuda_update.fits_count(weight, grad[:3]) and not cuda_update.fits_step(weight, torch.arange(20))
    odd = device_weight(20, 104)
    assert cuda_update.fits_count(odd, torch.zeros(20, 104)) and cuda_update.fits_step(odd, None)
    # Of such a weight a part may begin at a multiple of 8 bytes, and of another one at a multiple of 16.
    moved = torch.zeros(20 * 104 + 8, dtype=torch.int8)[8:].view(20, 104)
    assert moved.data_ptr() % 16 == 8 and cuda_update.fits_step(replace(odd, trit_accum=moved), None)
    assert not cuda_update.fits_step(
        replace(weight, trit_accum=moved.flatten()[: 20 * 96].view(20, 96)), None
    )
    ragged = device_weight(20, 100)
    assert not cuda_update.fits_count(ragged, torch.zeros(20, 100))
    assert not cuda_update.fits_step(ragged, None)
    taken = {size for size in GROUP_SIZES if cuda_update.fits_count(device_weight(20, 96, size), grad)}
    assert taken == {6, 12, 16, 24, 48}
    assert not cuda_update.fits_count(weight, torch.zeros(20 * 96 + 1)[1:].reshape(20, 96))


def test_blocks_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block gets its shared memory unasked, and the sums of a row are cut alike whatever rows come with it."""
    launched: list[tuple[dict[str, int], dict[str, Any], int]] = []

    def note(kernel: Kernel, arguments: Any, **how: Any) -> None:
        launched.append((dict(kernel.constants), how, int(arguments[-1])))

    monkeypatch.setattr(product, "launch", note)
    for num_rows in (1, 4799, 4801, 9583, 9585):
        weight = device_weight(num_rows, 3072)
        launched.clear()
        for count in range(1, 9):
            x = torch.zeros(count, 3072, dtype=torch.bfloat16)
            assert product.fits(x, weight)
            product.few_rows_product(x, weight)
        for constants, how, phase_steps in launched:
            tiles, splits = constants["TILES"], constants["SPLITS"]
            assert how["threads"] == 32 * tiles * splits <= 1024
            assert how["blocks"] * tiles * 16 >= num_rows > (how["blocks"] - 1) * tiles * 16
            assert how["shared_bytes"] <= SHARED_MEMORY
            assert how["shared_bytes"] >= tiles * splits * 512
            # Every warp of a tile has a step in each phase.
            assert phase_steps % splits == 0
        assert len({constants["SPLITS"] for constants, _, _ in launched}) == 1


def test_blocks_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as a form counts on fit a multiprocessor, all outputs have a block, and slabs that stay have their room."""
    launched: list[tuple[Kernel, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        many_rows, "launch", lambda kernel, given, **how: launched.append((kernel, given, how))
    )
    monkeypatch.setattr(many_rows, "add_parts", lambda sums, out: out)
    weight = device_weight(1000, 3000)
    forms = [many_rows.form_of(count, 1000) for count in (9, 17, 64, 65, 129, 5000)]
    for form in [*forms, *(many_rows.slot_form_of(count, 10) for count in (10, 100, 200, 2000))]:
        launched.clear()
        many_rows.many_rows_product(torch.zeros(33, 3000, dtype=torch.bfloat16), weight, form)
        (laying, _, of_rows), (product_, given, how) = launched
        constants = dict(product_.constants)
        assert laying.constants == product_.constants and not of_rows.get("starts_early", False)
        assert how["threads"] * form.blocks <= 2048 and how["shared_bytes"] * form.blocks < 227 * 1024
        steps = 8 if constants["RESIDENT"] else 1
        assert how["shared_bytes"] == steps * 6 * 128 * form.rows
        parts, _, tiles, runs = map(int, given[-4:])
        assert how["blocks"] == parts * tiles * runs and tiles * form.rows >= 33
        assert form.runs or runs * form.outputs >= 1000
        assert given[3].dtype is (torch.float32 if parts > 1 else torch.bfloat16)


def test_every_form_has_a_call() -> None:
    """A form that no call asks for is neither compiled without a GPU nor compared on one."""

    def cut(form: many_rows.Form) -> many_rows.Form:
        return replace(form, parts=1, runs=0)

    asked, asked_by_slots = set(), set()
    for name, case in CALLS:
        if name == "linear" and len(case.args[0]) > product.FEW:
            asked.add(cut(many_rows.form_of(len(case.args[0]), case.args[1].shape[0])))
        elif name == "grouped_linear":
            asked_by_slots.add(cut(many_rows.slot_form_of(case.args[2].numel(), case.kwargs["num_groups"])))
    sizes = itertools.product(range(product.FEW + 1, 2000, 8), (64, 1000, 20000))
    assert asked == {cut(many_rows.form_of(*size)) for size in sizes}
    assert asked_by_slots == {cut(many_rows.slot_form_of(count, 10)) for count in range(1, 3000)}


def test_a_limit_of_shared_memory_is_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel has one limit for launches of all sizes, of which a larger one may come after a smaller one."""
    asked: list[int] = []
    monkeypatch.setattr(launching, "_ALLOWED", {})
    monkeypatch.setattr(launching, "_set_limit", lambda kernel, device, num_bytes: asked.append(num_bytes))
    kernel, device = Kernel.of("many_rows", "many_rows_product"), torch.device("cuda", 0)
    for num_bytes in (0, 1000, 98304, 196608, 98304, 196608):
        launching._allow_shared(kernel, device, num_bytes)
    assert asked == [98304, 196608]


def test_halting_of_the_calls_is_no_matter_of_rounding() -> None:
    for name, case in CALLS:
        if name == "denoise_loop":
            assert test_denoise_loop.walk(case)[2] > test_denoise_loop.MARGIN


def declared(source: str, entry: str) -> list[str]:
    """Return the parameters of a kernel, as its source declares them."""
    _, _, rest = compiler.source_text(source).partition(f"\n{entry}(")
    return [" ".join(each.split()) for each in rest.partition(")")[0].split(",")]


KINDS = {
    "float": np.float32,
    "int": np.int32,
    "unsigned": np.int32,
    "long long": np.int64,
    "float2": np.complex64,
}
"""The number of NumPy that stands for one of C, by the type that a kernel declares."""


def fit(parameters: list[str], given: list[Any]) -> None:
    """Fail unless arguments are what a kernel declares. A GPU would take what comes, whatever it is."""
    for parameter, value in zip(parameters, given, strict=True):
        if "*" in parameter:
            assert value is None or isinstance(value, torch.Tensor), parameter
        else:
            assert isinstance(value, KINDS[parameter.rpartition(" ")[0]]), parameter


def test_a_loop_gets_the_arguments_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(cuda_denoise, "launch", lambda kernel, arguments, **how: given.extend(arguments))
    weights = [device_weight(*shape) for shape in ((32, 64), (32, 32), (3, 32), (64, 32))]
    cuda_denoise.denoise_loop(torch.zeros(1, 64), torch.zeros(1, 3, 32), weights, (0.5, 0.7), 0.9)
    assert all(value is not None for value in given)
    fit(declared("denoise", "denoise_loop"), given)


def test_votes_get_the_arguments_that_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[Any]] = []
    monkeypatch.setattr(
        cuda_update, "launch", lambda kernel, arguments, **how: launched.append(list(arguments))
    )
    exponents = torch.zeros(20, dtype=torch.int32)
    monkeypatch.setattr(cuda_update, "exponents_of_rows", lambda *_: exponents)
    for rate, step, rows in ((5.9, 7, None), (torch.tensor(5.9), torch.tensor(7), torch.arange(3))):
        weight, clock = device_weight(20, 96), Clock.of(1, step, 2, torch.device("cpu"))
        grad = torch.zeros(20 if rows is None else len(rows), 96)
        # The last group of the table is the last that a kernel can name.
        last_place = 2**32 // 8 - 20
        cuda_update.count_votes_(weight, grad, rate, clock, "score", rows, None, last_place)
    for given in launched:
        fit(declared("votes", "count_votes"), given)
    assert len(launched) == 2
    # A launch has at least one block.
    no_rows = torch.arange(0)
    assert cuda_update.fits_count(weight, grad[no_rows])
    cuda_update.count_votes_(weight, grad[no_rows], 5.9, clock, "score", no_rows, None, 0)
    assert len(launched) == 2


def test_what_a_loop_takes() -> None:
    latent, tokens = torch.zeros(1, 64), torch.zeros(1, 3, 32)
    weights = [device_weight(*shape) for shape in ((32, 64), (32, 32), (3, 32), (64, 32))]

    def taken(
        latent: torch.Tensor, tokens: torch.Tensor, weights: list[DeviceWeight] = weights, steps: int = 3
    ) -> bool:
        return cuda_denoise.fits(latent, tokens, weights, steps)

    assert taken(latent, tokens) and taken(latent.bfloat16(), tokens.bfloat16())
    assert taken(latent.expand(4, 64).clone(), tokens.expand(4, 3, 32).clone())
    assert not taken(latent.expand(5, 64).clone(), tokens.expand(5, 3, 32).clone())
    assert taken(latent, tokens, steps=8) and not taken(latent, tokens, steps=9)
    # Weights of two kinds, and rows that start between two multiples of 16 bytes.
    assert not taken(latent, tokens, [*weights[:3], device_weight(64, 32, 16)])
    assert not taken(torch.zeros(65)[1:].reshape(1, 64), tokens)
    assert not taken(torch.zeros(1, 62), tokens) and not taken(latent, torch.zeros(1, 3, 30))
    # Operands that do not fit a block.
    assert taken(torch.zeros(1, 30_000), tokens) and not taken(torch.zeros(2, 30_000), torch.zeros(2, 3, 32))


def test_plans_of_a_loop() -> None:
    """All blocks fit the GPU at once, tokens are dealt out whole, and a sample is cut alike whatever samples come with it."""
    sizes = itertools.product(
        (4, 4096, 16384), (1, 298, 1024, 100_000), (4, 512, 7168), (2, 4), (1, 114, 132)
    )
    for size, num_tokens, width, float_bytes, processors in sizes:
        cuts = set()
        for num_samples in range(1, 5):
            plan = cuda_denoise.plan_of(
                num_samples, size, num_tokens, width, float_bytes, processors, 227 * 1024
            )
            if plan is None:
                continue
            cuts.add((plan.blocks, plan.part_tokens))
            assert 1 <= plan.blocks <= processors and plan.shared_bytes <= 227 * 1024
            assert plan.blocks * plan.part_tokens >= num_tokens
            assert plan.sums >= 4 * 32 * max(cuda_denoise.WARPS, -(-max(size, width) // 16) // plan.blocks)
        assert len(cuts) <= 1


def test_a_kernel_takes_every_call_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none of them is compared on Triton's path by mistake. This runs without a GPU."""

    def stop(fits: bool, device: torch.device, *, only: tuple[int, int] | None = None) -> bool:
        if fits:
            raise InterruptedError
        return False

    for module in (denoise_ops, experts_ops, linear_ops, update_ops):
        monkeypatch.setattr(module, "takes_cuda", stop)
    for op, case in CALLS:
        args = [
            device_weight(*value.shape, value.group_size) if isinstance(value, TernaryWeight) else value
            for value in case.args
        ]
        with pytest.raises(InterruptedError), cuda_calls.of_any_size():
            getattr(optimized_ops, op)(*args, **case.kwargs)
