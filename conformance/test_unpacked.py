"""Weights that a training pass unpacks once: the same bits in fewer launches, and never the floats of an earlier weight."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized.kernels import scale, unpack
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.passes import Passes, RecordedPasses
from arbitor.optimized.training.run import Run
from arbitor.reference.graph import ArbModel
from conformance.compare import exact
from conformance.graph import models
from conformance.subject import Subject, needs_cuda, needs_ours
from conformance.training import nano
from conformance.training.no_graphs import FIRST_BYTES, some_losses_are_not_finite, without_graphs
from conformance.unpacked_weights import floats, unpacked, weight_like

SHAPES = (
    ((5, 24), 1),
    ((8, 35), 1),
    ((1, 1), 1),
    ((16, 48), 1),
    ((30, 24), 6),
    ((12, 13), 3),
    ((300, 260), 1),
)
"""Shapes of weights, and how many matrices of each stand side by side."""


@pytest.fixture(autouse=True)
def ours(subject: Subject) -> None:
    needs_ours(subject, "weights that are unpacked once")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The launches that unpack, by their kind: of whole weights, of some rows, of several weights."""
    counts: Counter[str] = Counter()

    def counted(kernel: Any, kind: Callable[[dict[str, Any]], str]) -> Any:
        class Launched:
            def __getitem__(self, grid: Any) -> Callable[..., Any]:
                def launch(*args: Any, **kwargs: Any) -> Any:
                    counts[kind(kwargs)] += 1
                    return kernel[grid](*args, **kwargs)

                return launch

        return Launched()

    of_one = counted(scale._dequantize_kernel, lambda given: "rows" if given["HAS_ROWS"] else "whole")
    monkeypatch.setattr(scale, "_dequantize_kernel", of_one)
    of_several = counted(unpack._unpack_together_kernel, lambda given: "together")
    monkeypatch.setattr(unpack, "_unpack_together_kernel", of_several)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_multiple", [1, 8])
def test_weights_are_unpacked_together_as_each_by_itself(
    subject: Subject, launches: Counter[str], dtype: torch.dtype, row_multiple: int
) -> None:
    """Ragged rows, stacks, rows of zeros after the last, and formats that need a launch each."""
    formats = [(12, 0), (12, 2), (24, 2)]
    weights = [
        weight_like(subject, *shape, seed=place, group_size=size, bits=bits)
        for place, (shape, _) in enumerate(SHAPES)
        for size, bits in formats
    ]
    groups = [count for _, count in SHAPES for _ in formats]
    made = unpack.unpacked_together(weights, groups, dtype, row_multiple=row_multiple)
    assert launches == {"together": len(formats)}
    assert sorted(made) == list(range(len(weights)))
    for place, (weight, count) in enumerate(zip(weights, groups, strict=True)):
        want = scale.dense_rows(weight, dtype, num_groups=count, row_multiple=row_multiple)
        exact(made[place], want, f"{weight.shape}, {count} matrices")
        assert made[place].is_contiguous() and made[place].storage_offset() % 256 == 0


def test_weights_out_of_reach_are_refused(subject: Subject, launches: Counter[str]) -> None:
    """As by every kernel: on a CPU where nothing interprets it, and before it is launched."""
    weight = weight_like(subject, 24, 36)
    on_cpu = weight.to("cpu")
    with triton.knobs.runtime.scope(), pytest.raises(RuntimeError, match="but Triton kernels run on CUDA"):
        triton.knobs.runtime.interpret = False
        unpack.unpacked_together([on_cpu], [1], torch.float32, row_multiple=1)
    assert not launches


def test_a_recording_without_a_table_unpacks_nothing_together(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, launches: Counter[str]
) -> None:
    """Each weight is then unpacked at its first product, once in the pass as before."""
    weight, x = weight_like(subject, 24, 36), floats(subject, 5, 36)
    copies = unpacked.Copies()
    with copies.in_pass({"w": weight}, x.dtype):
        want = optimized_ops.linear(x, weight)
    monkeypatch.setattr(unpack, "table_of", lambda rows, device: None)
    launches.clear()
    with copies.in_pass({"w": weight}, x.dtype):
        exact(optimized_ops.linear(x, weight), want)
        optimized_ops.linear_input_grad(want, weight)
    assert launches == {"whole": 1}


def every_product(subject: Subject, weight: Any, dtype: torch.dtype, num_groups: int = 1) -> list[Tensor]:
    """Return products of a weight in each way that unpacks it whole. Rows are so many that no other kernel takes them."""
    num_rows, num_columns = weight.shape[0] // num_groups, weight.shape[1] * num_groups
    x, grad = floats(subject, 70, num_columns, dtype), floats(subject, 71, num_rows, dtype)
    added = floats(subject, 71, num_columns, dtype)
    found = [
        optimized_ops.linear(x, weight, num_groups=num_groups),
        optimized_ops.linear_input_grad(grad, weight, num_groups=num_groups),
        optimized_ops.linear_input_grad(grad, weight, num_groups=num_groups, out=added),
    ]
    if num_groups == 1:
        grad_BNP = grad.T.reshape(1, num_rows, 71)
        found.append(optimized_ops.conv1d_input_grad(grad_BNP, weight, length=71, kernel_size=1))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_groups"), [((20, 35), 1), ((24, 48), 1), ((30, 24), 3)])
def test_every_product_of_a_pass_reads_one_copy(
    subject: Subject,
    launches: Counter[str],
    dtype: torch.dtype,
    shape: tuple[int, int],
    num_groups: int,
) -> None:
    weight = weight_like(subject, *shape)
    want = every_product(subject, weight, dtype, num_groups)
    assert launches == {"whole": len(want)}
    copies = unpacked.Copies()
    for how in ("whole", "together"):
        launches.clear()
        with copies.in_pass({"w": weight}, dtype):
            found = every_product(subject, weight, dtype, num_groups)
        assert launches == {how: 1}
        for one, other in zip(found, want, strict=True):
            exact(one, other)


def write_unseen(weight: Any) -> None:
    """Change a weight as the replay of a graph does: no version says so."""
    versions = weight.words._version, weight.exponents._version
    weight.words.data.copy_(weight.words.flip(0))
    assert (weight.words._version, weight.exponents._version) == versions


def after_a_pass(subject: Subject, ends: Callable[[Any], Any]) -> bool:
    """Write a weight unseen after a pass that ends in some way. Return whether later products are those of the new weight."""
    weight, x, copies = weight_like(subject, 24, 36), floats(subject, 5, 36), unpacked.Copies()
    for _ in range(2):
        with ends(copies.in_pass({"w": weight}, x.dtype)):
            optimized_ops.linear(x, weight)
    write_unseen(weight)
    want = optimized_ops.linear(x, weight.clone())
    is_right = torch.equal(optimized_ops.linear(x, weight), want)
    with copies.in_pass({"w": weight}, x.dtype):
        return is_right and torch.equal(optimized_ops.linear(x, weight), want)


@contextmanager
def well(block: Any) -> Iterator[None]:
    with block:
        yield


@contextmanager
def with_an_error(block: Any) -> Iterator[None]:
    with pytest.raises(KeyboardInterrupt), block:
        yield
        raise KeyboardInterrupt


@pytest.mark.parametrize("ends", [well, with_an_error])
def test_copies_end_with_their_pass(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, ends: Callable[[Any], Any]
) -> None:
    """Also with one that raises. With a copy that is not dropped, as it is planted then, products would be wrong."""
    assert after_a_pass(subject, ends)
    assert not unpacked._open
    monkeypatch.setattr(unpacked._Pass, "end", lambda each: None)
    monkeypatch.setattr(unpacked, "_opening", Forgetful())
    assert not after_a_pass(subject, ends)


def test_passes_open_and_end_under_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open is read and written anew, so that of two passes that open at one time one would be forgotten."""
    seen: list[int] = []

    class Watched:
        """A lock that notes how many passes are open when it is taken and when it is released."""

        def __enter__(self) -> None:
            seen.append(len(unpacked._open))

        def __exit__(self, *_: Any) -> None:
            seen.append(len(unpacked._open))

    monkeypatch.setattr(unpacked, "_opening", Watched())
    with unpacked.Copies().in_pass({}, torch.float32):
        assert seen == [0, 1]
    assert seen == [0, 1, 1, 0]


class Forgetful:
    """A lock under which passes that have ended stay open."""

    def __init__(self) -> None:
        self.known: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self.known = tuple(dict.fromkeys((*unpacked._open, *self.known)))

    def __exit__(self, *_: Any) -> None:
        unpacked._open = tuple(dict.fromkeys((*self.known, *unpacked._open)))


@pytest.fixture(autouse=True)
def no_pass_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_open", ())


def test_backward_passes_of_other_threads_read_the_copies(subject: Subject, launches: Counter[str]) -> None:
    """Autograd runs those of a GPU in threads of its own."""
    weight, x, found = weight_like(subject, 24, 36), floats(subject, 5, 36), []
    grad = floats(subject, 6, 24)
    with unpacked.Copies().in_pass({"w": weight}, x.dtype):
        optimized_ops.linear(x, weight)
        thread = threading.Thread(target=lambda: found.append(optimized_ops.linear_input_grad(grad, weight)))
        thread.start()
        thread.join()
    assert launches == {"whole": 1}
    exact(found[0], optimized_ops.linear_input_grad(grad, weight))


def test_what_is_computed_again_in_a_backward_pass_reads_the_copies(
    subject: Subject, launches: Counter[str]
) -> None:
    weight, grads = weight_like(subject, 36, 36), []
    for is_open in (False, True):
        launches.clear()
        x = floats(subject, 5, 36).requires_grad_()
        with unpacked.Copies().in_pass({"w": weight} if is_open else {}, x.dtype):
            twice = lambda x: optimized_ops.linear(torch.tanh(optimized_ops.linear(x, weight)), weight)  # noqa: E731
            y: Any = checkpoint(twice, x, use_reentrant=False)
            y.sum().backward()
        # Two products, the same two again, and two input gradients.
        assert launches == {"whole": 1 if is_open else 6}
        grads.append(x.grad)
    exact(grads[1], grads[0])


def test_models_of_one_process_keep_their_own_copies(subject: Subject, launches: Counter[str]) -> None:
    one, other = weight_like(subject, 24, 36, seed=1), weight_like(subject, 24, 36, seed=2)
    x = floats(subject, 5, 36)
    wants = [optimized_ops.linear(x, each) for each in (one, other)]
    of_one, of_other = unpacked.Copies(), unpacked.Copies()
    for _ in range(2):
        launches.clear()
        with of_one.in_pass({"w": one}, x.dtype):
            exact(optimized_ops.linear(x, one), wants[0])
            # No pass of the other model is open.
            exact(optimized_ops.linear(x, other), wants[1])
            with of_other.in_pass({"w": other}, x.dtype):
                for weight, want in zip((other, one, other), (wants[1], wants[0], wants[1]), strict=True):
                    exact(optimized_ops.linear(x, weight), want)
            exact(optimized_ops.linear(x, one), wants[0])
            exact(optimized_ops.linear(x, other), wants[1])
    assert launches == {"together": 2, "whole": 2}


def test_a_weight_of_another_object_has_no_copy(subject: Subject, launches: Counter[str]) -> None:
    """A module that is given other buffers within a pass has another weight. So has a model that has grown, by the next pass."""
    weight, x, copies = weight_like(subject, 24, 36), floats(subject, 5, 36), unpacked.Copies()
    other = weight_like(subject, 40, 36, seed=2)
    alike = replace(weight, words=weight.words.view_as(weight.words))
    with copies.in_pass({"w": weight}, x.dtype):
        for each in (weight, other, alike, other):
            exact(optimized_ops.linear(x, each), optimized_ops.linear(x, each.clone()))
    launches.clear()
    with copies.in_pass({"w": other}, x.dtype):
        found = optimized_ops.linear(x, other)
    assert launches == {"together": 1}
    exact(found, optimized_ops.linear(x, other.clone()))


@pytest.mark.parametrize("why", ["dtype", "form", "place", "size", "inference"])
def test_where_no_copy_serves_a_product_unpacks_for_itself(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, launches: Counter[str], why: str
) -> None:
    """A product in another dtype, of another stack, on another stream or in a recording; a large model; uncounted versions."""
    with torch.inference_mode(why == "inference"):
        weight = weight_like(subject, 24, 36)
    x = floats(subject, 5, 36)
    want = optimized_ops.linear(x, weight)
    if why == "size":
        monkeypatch.setattr(unpacked, "MOST_WEIGHTS", 24 * 36 - 1)
    copies = unpacked.Copies()
    for _ in range(2):
        with monkeypatch.context() as patch:
            launches.clear()
            with copies.in_pass({"w": weight}, torch.bfloat16 if why == "dtype" else x.dtype):
                if why == "form":
                    optimized_ops.linear(floats(subject, 5, 72), weight, num_groups=2)
                if why == "place":
                    optimized_ops.linear(x, weight)
                    patch.setattr(unpacked, "_place", lambda device: ("another stream", True))
                for _ in range(2):
                    exact(optimized_ops.linear(x, weight), want)
        assert launches["whole"] >= 2 and launches["whole"] + launches["together"] == 2 + (
            why in ("form", "place")
        )


def test_nothing_is_kept_between_passes(subject: Subject) -> None:
    weight, x, copies = weight_like(subject, 24, 36), floats(subject, 5, 36), unpacked.Copies()
    with copies.in_pass({"w": weight}, x.dtype):
        optimized_ops.linear(x, weight)
        [taken] = unpacked._open
        assert list(taken._copies) == ["w"]
    assert not taken._copies and not taken._weights and not taken._names and not unpacked._open


EVENTS = ("accepted", "accepted", "step", "validated", "refused", "accepted", "step")
"""Passes of a model, between which it is stepped and validated."""


def done(passes: Passes, launches: Counter[str]) -> list[tuple[str, Any, dict[str, int]]]:
    """Let EVENTS happen. Return what came of each, with the launches that unpacked whole weights."""
    found: list[tuple[str, Any, dict[str, int]]] = []
    for number, event in enumerate(EVENTS):
        launches.clear()
        ids_BT = models.random_ids(1, 9, seed=number)
        ids_BT[0, 0] = FIRST_BYTES.get(event, FIRST_BYTES["accepted"])
        if event == "step":
            passes.step()
            outcome: Any = state_sha256(passes.model.state())
        elif event == "validated":
            with torch.no_grad():
                outcome = float(passes.model.loss(ids_BT.to(passes.model.voting.faults.device)))
        else:
            outcome = passes.take(ids_BT, rate=models.RATE, step=number)
        found.append((event, outcome, {kind: launches[kind] for kind in ("whole", "together")}))
        assert not unpacked._open
    return found


@pytest.mark.usefixtures("wide_programs")
def test_passes_unpack_once_and_leave_the_same_bits(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, launches: Counter[str]
) -> None:
    """Of several micro-batches, of a loss that is refused, launched and from graphs, with validation between them."""
    some_losses_are_not_finite(monkeypatch)
    lively = replace(nano.NANO, theta=1, theta_e=1)

    def model() -> ArbModel:
        ops = models.drawn_by_the_reference(optimized_ops)
        return ArbModel(lively, ops=ops, device=subject.device, seed=3)

    with monkeypatch.context() as patch:
        patch.setattr(unpacked, "MOST_WEIGHTS", 0)
        before = done(Passes(model()), launches)
    after = done(Passes(model()), launches)
    without_graphs(monkeypatch, replayed := [])
    replays = done(RecordedPasses(model()), launches)
    assert [each[:2] for each in after] == [each[:2] for each in replays] == [each[:2] for each in before]
    assert replayed.count("forward") == 2
    once = before[0][2]["whole"] // 2
    assert once > 10
    for place, event in enumerate(EVENTS):
        of_before, of_after, of_replays = (each[place][2] for each in (before, after, replays))
        if event == "accepted":
            assert of_before == {"whole": 2 * once, "together": 0}
            first = place == 0
            assert of_after == of_replays == {"whole": once * first, "together": 1 - first}
        elif event == "refused":
            assert of_before == {"whole": once, "together": 0}
            assert of_after == of_replays == {"whole": 0, "together": 1}
        else:
            assert of_after == of_replays == of_before


def test_passes_of_a_mix_unpack_once() -> None:
    """They are no passes of `Passes.take`."""
    told: list[str] = []

    @contextmanager
    def unpacking() -> Iterator[None]:
        told.append("begins")
        yield
        told.append("ends")

    run: Any = SimpleNamespace(
        model=None,
        mix=SimpleNamespace(take=lambda model, **_: told.append("taken")),
        passes=SimpleNamespace(unpacking=unpacking, accum=3),
    )
    Run._take_pass(run, 1.0, 0)
    assert told == ["begins", "taken", "ends"]


def test_copies_of_recorded_passes_and_streams(subject: Subject, launches: Counter[str]) -> None:
    """On a GPU: a copy is of no use to another stream, or to a recording that did not make it. A replay unpacks anew."""
    needs_cuda(subject, "streams and recordings of copies")
    weight, x, copies = weight_like(subject, 64, 96), floats(subject, 5, 96), unpacked.Copies()
    for _ in range(2):
        with copies.in_pass({"w": weight}, x.dtype):
            optimized_ops.linear(x, weight)
            launches.clear()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimized_ops.linear(x, weight)
            torch.cuda.current_stream().wait_stream(stream)
            assert launches == {"whole": 1}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = optimized_ops.linear(x, weight)
            assert launches == {"whole": 2}
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    launches.clear()
    with copies.in_pass({"w": weight}, x.dtype):
        with torch.cuda.graph(graphs[0]):
            y = optimized_ops.linear(x, weight)
        with torch.cuda.graph(graphs[1], pool=graphs[0].pool()):
            dx = optimized_ops.linear_input_grad(y, weight)
    assert launches == {"together": 1}
    for _ in range(2):
        write_unseen(weight)
        for graph in graphs:
            graph.replay()
        exact(y, optimized_ops.linear(x, weight))
        exact(dx, optimized_ops.linear_input_grad(y, weight))
