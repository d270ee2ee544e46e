"""The paths of the optimized op set: which one a call takes, what is said where CUDA C++ is missing, and that results agree."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized import settings
from arbitor.optimized.cuda import compiler, many_rows, product
from arbitor.optimized.cuda import denoise as cuda_denoise
from arbitor.optimized.cuda import launch as launching
from arbitor.optimized.cuda import update as cuda_update
from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.kernels import product_sum
from arbitor.optimized.layouts import DeviceWeight, words_per_row
from arbitor.optimized.ops import paths
from arbitor.optimized.training import whole_file
from arbitor.reference.constants import GROUP_SIZES, groups_per_row
from arbitor.reference.types import TernaryWeight
from conformance import cuda_calls, preset_calls
from conformance.case import Case
from conformance.compare import exact
from conformance.families import compare
from conformance.ops import test_denoise_loop
from conformance.report import skip
from conformance.subject import OURS, Subject, needs_cuda

# Not by name: `ops` has ops of the names of its files.
denoise_ops = import_module("arbitor.optimized.ops.denoise")
experts_ops = import_module("arbitor.optimized.ops.experts")
linear_ops = import_module("arbitor.optimized.ops.linear")
orthogonal_ops = import_module("arbitor.optimized.ops.orthogonal")
update_ops = import_module("arbitor.optimized.ops.update")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CALLS = list(cuda_calls.calls())

SHARED_MEMORY = 48 * 1024
"""Bytes of shared memory that every GPU gives to a block without being asked."""


@contextmanager
def looked_at_anew(*cached: Any) -> Iterator[None]:
    """Look anew at what is looked at once in a process, and once more after the block."""
    for once in cached:
        once.cache_clear()
    try:
        yield
    finally:
        for once in cached:
            once.cache_clear()


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Pretend a GPU that can run the kernels. What is changed in the dictionary is what is found."""
    found: dict[str, Any] = {"capability": (9, 0), "missing": None, "unknown": None}
    monkeypatch.delenv("ARB_PATH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: found["capability"])
    monkeypatch.setattr(compiler, "why_missing", lambda: found["missing"])
    monkeypatch.setattr(compiler, "why_unknown", lambda capability: found["unknown"])
    with looked_at_anew(paths._why_not, paths._warn_once):
        yield found


def test_the_path_of_a_call(pretended_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.takes_cuda(True, CUDA) and not paths.takes_cuda(False, CUDA)
        assert not paths.takes_cuda(True, CPU)
        monkeypatch.setenv("ARB_PATH", "triton")
        assert not paths.takes_cuda(True, CUDA)
        monkeypatch.setenv("ARB_PATH", "cuda")
        assert paths.takes_cuda(True, CUDA) and not paths.takes_cuda(False, CUDA)
        # A kernel may be for one compute capability.
        assert paths.takes_cuda(True, CUDA, only=(9, 0)) and not paths.takes_cuda(True, CUDA, only=(10, 0))
        monkeypatch.delenv("ARB_PATH")
        assert paths.takes_cuda(True, CUDA, only=(9, 0)) and not paths.takes_cuda(True, CUDA, only=(10, 0))
        monkeypatch.setenv("ARB_PATH", "cuda")
    with pytest.raises(RuntimeError, match=r"ARB_PATH is 'cuda', but CUDA .* and a tensor is on cpu"):
        paths.takes_cuda(True, CPU)
    monkeypatch.setenv("ARB_PATH", "ptx")
    with pytest.raises(ValueError, match="ARB_PATH is 'ptx', but must be one of cuda, triton"):
        paths.takes_cuda(True, CUDA)


@pytest.mark.parametrize("op", ["accumulate_gradients", "apply_steps"])
def test_updates_of_several_weights_look_at_the_path(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """As those of one weight do, though only Triton takes several. What is refused is not written."""
    made = optimized_ops.constant_weight((4, 24), trit=1, exponent=0, device=subject.device)
    other, weight = optimized_ops.from_spec(made), optimized_ops.from_spec(made)
    weight.trit_accum.fill_(5)
    grad_NK = torch.zeros(4, 24, device=subject.device)
    call = {
        "accumulate_gradients": lambda: optimized_ops.accumulate_gradients(
            (weight,), grad_NK, 1.0, seed=0, step=0, tensor_ids=(0,), out=(other,)
        ),
        "apply_steps": lambda: optimized_ops.apply_steps((weight,), out=(other,)),
    }[op]
    monkeypatch.setenv("ARB_PATH", "ptx")
    with pytest.raises(ValueError, match="ARB_PATH is 'ptx', but must be one of cuda, triton"):
        call()
    if subject.device == CPU:
        monkeypatch.setenv("ARB_PATH", "cuda")
        with pytest.raises(RuntimeError, match=r"ARB_PATH is 'cuda', but CUDA .* and a tensor is on cpu"):
            call()
    assert not other.trit_accum.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"missing": "CUDA C++ kernels need cuda-core"}, "CUDA C.. kernels need cuda-core"),
        ({"capability": (7, 5)}, r"need compute capability 8\.0, and cuda:0 has 7\.5"),
        ({"unknown": "NVRTC 12.8 does not know"}, r"NVRTC 12\.8 does not know"),
    ],
)
def test_what_is_missing_is_said_once_and_refused_where_it_was_asked_for(
    pretended_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    pretended_gpu.update(change)
    with pytest.warns(RuntimeWarning, match=f"{reason}.*Triton kernels are used") as said:
        assert not paths.takes_cuda(True, CUDA)
        assert not paths.takes_cuda(True, CUDA)
    assert len(said) == 1
    monkeypatch.setenv("ARB_PATH", "cuda")
    # A call that Triton would take anyhow is refused too, so that the answer does not depend on a shape.
    for fits in (True, False):
        with pytest.raises(RuntimeError, match=f"ARB_PATH is 'cuda', but .*{reason}"):
            paths.takes_cuda(fits, CUDA)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}\nand more")

    monkeypatch.setattr(compiler.importlib, "import_module", missing)
    with looked_at_anew(compiler.why_missing):
        assert compiler.why_missing() == (
            "CUDA C++ kernels need cuda-core and NVRTC (pip install arbitor[cuda]), "
            "but ModuleNotFoundError: No module named 'cuda.core'"
        )


def test_a_gpu_that_the_compiler_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call would otherwise end in the compiler's error, where Triton may know the GPU."""
    compiler_here = SimpleNamespace(
        nvrtcGetSupportedArchs=lambda: (0, [80, 90, 100]), nvrtcVersion=lambda: (0, 12, 8)
    )
    monkeypatch.setattr(compiler.importlib, "import_module", lambda name: compiler_here)
    with looked_at_anew(compiler.why_unknown, compiler._compiler_version):
        assert [compiler.why_unknown(capability) for capability in ((8, 0), (9, 0), (10, 0))] == [None] * 3
        assert compiler.why_unknown((12, 1)) == (
            "NVRTC 12.8 does not know the compute capability 12.1; a newer torch brings a newer NVRTC"
        )


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert settings.cache_folder() == Path("/home/somebody/.cache/arbitor")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert settings.cache_folder() == Path("/caches/arbitor")
    monkeypatch.setenv("ARB_CACHE", "/mine")
    assert settings.cache_folder() == Path("/mine")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Kernel, str]]:
    """Return what is compiled, by a compiler that compiles nothing. Compiled kernels are kept in `cache` of the test's folder."""
    done: list[tuple[Kernel, str]] = []

    def compile(text: str, kernel: Kernel, architecture: str) -> bytes:
        done.append((kernel, architecture))
        return f"{kernel} for {architecture}".encode()

    monkeypatch.setattr(compiler, "_compile", compile)
    monkeypatch.setattr(compiler, "_compiler_version", lambda: (13, 0))
    monkeypatch.setenv("ARB_CACHE", str(tmp_path / "cache"))
    return done


def test_a_kernel_is_compiled_once_for_all_that_its_code_depends_on(
    compiled: list[tuple[Kernel, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reset, carry = (Kernel.of("step", "step_trits", CARRY=value) for value in (0, 1))
    asked = [
        (reset, "sm_90"),
        (carry, "sm_90"),
        (reset, "sm_80"),
        (Kernel.of("votes", "count_votes"), "sm_90"),
    ]
    first = [compiler.machine_code(*one) for one in asked]
    assert compiled == asked
    assert [compiler.machine_code(*one) for one in asked] == first and len(compiled) == len(asked)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cubin"] * len(asked)
    monkeypatch.setattr(compiler, "_compiler_version", lambda: (13, 1))
    compiler.machine_code(*asked[0])
    assert len(compiled) == len(asked) + 1
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "step.cu").write_text("// another text")
    monkeypatch.setattr(compiler, "FOLDER", folder)
    compiler.machine_code(*asked[0])
    assert len(compiled) == len(asked) + 2


def test_a_cache_that_cannot_be_written_costs_time_alone(
    compiled: list[tuple[Kernel, str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    kernel = Kernel.of("step", "step_trits", CARRY=0)
    with pytest.warns(RuntimeWarning, match="compiled kernels are not kept in .*cache") as said:
        codes = {compiler.machine_code(kernel, "sm_90") for _ in range(3)}
    assert codes == {f"{kernel} for sm_90".encode()} and len(compiled) == 3
    assert len({str(warning.message) for warning in said}) == len(said) <= 2


def test_processes_that_compile_one_kernel_at_once_do_not_disturb_each_other(
    compiled: list[tuple[Kernel, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process keeps the kernel when this one has written its file and not put it in place yet."""
    kernel, real, codes = Kernel.of("step", "step_trits", CARRY=0), whole_file.rename, list[bytes]()

    def rename(source: Path, target: Path) -> None:
        monkeypatch.setattr(whole_file, "rename", real)
        codes.append(compiler.machine_code(kernel, "sm_90"))
        real(source, target)

    monkeypatch.setattr(whole_file, "rename", rename)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes += [compiler.machine_code(kernel, "sm_90") for _ in range(2)]
    assert len(compiled) == 2 and len(set(codes)) == 1 and len(codes) == 3
    [kept] = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == codes[0]


def device_weight(num_rows: int, num_columns: int, group_size: int = 12) -> DeviceWeight:
    """Return a weight of zeros in device layout, without a kernel that lays it out."""
    groups = groups_per_row(num_columns, group_size)
    words = torch.zeros(num_rows, words_per_row(num_columns), dtype=torch.int32)
    levels, counts = (torch.zeros(num_rows, width, dtype=torch.int8) for width in (groups, num_columns))
    return DeviceWeight(
        words, levels, counts, torch.zeros_like(levels), (num_rows, num_columns), group_size, 2
    )


@pytest.fixture
def words(subject: Subject) -> None:
    """Skip a test that makes device layouts where the subject is not the optimized op set."""
    if subject.name != OURS:
        skip("paths", f"they are those of {OURS}, not of {subject.name}")


@pytest.mark.usefixtures("words")
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


@pytest.mark.usefixtures("words")
def test_what_an_update_takes() -> None:
    weight, grad = device_weight(20, 96), torch.zeros(20, 96)
    assert cuda_update.fits_count(weight, grad, None) and cuda_update.fits_step(weight, None)
    rows = torch.arange(20)
    assert not cuda_update.fits_count(weight, grad, rows) and not cuda_update.fits_step(weight, rows)
    ragged = device_weight(20, 100)
    assert not cuda_update.fits_count(ragged, torch.zeros(20, 100), None)
    assert not cuda_update.fits_step(ragged, None)
    taken = {size for size in GROUP_SIZES if cuda_update.fits_count(device_weight(20, 96, size), grad, None)}
    assert taken == {6, 12, 16, 24, 48}
    assert not cuda_update.fits_count(weight, torch.zeros(20 * 96 + 1)[1:].reshape(20, 96), None)


@pytest.mark.usefixtures("words")
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


@pytest.mark.usefixtures("words")
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


def on_cuda_alone(subject: Subject) -> None:
    needs_cuda(subject, "CUDA C++ kernels")
    if (reason := paths.why_not(CUDA)) is not None:
        skip("CUDA C++ kernels", reason)


def source_of(name: str, case: Case) -> str:
    """Return the source whose kernels take a call of `cuda_calls`."""
    sources = {
        "accumulate_gradient": "votes",
        "apply_step": "step",
        "denoise_loop": "denoise",
        "grouped_linear": "many_rows",
    }
    return sources.get(name) or ("product" if len(case.args[0]) <= product.FEW else "many_rows")


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("place", range(len(CALLS)))
def test_kernels_and_the_reference(subject: Subject, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Each call is compared in the class of its op, and a CUDA C++ kernel has taken it."""
    on_cuda_alone(subject)
    monkeypatch.setenv("ARB_PATH", "cuda")
    launched: list[Kernel] = []
    loaded = launching.loaded
    monkeypatch.setattr(
        launching, "loaded", lambda kernel, where: launched.append(kernel) or loaded(kernel, where)
    )
    with cuda_calls.of_any_size():
        compare(subject, *CALLS[place])
    source = source_of(*CALLS[place])
    if source in compiler.HOPPER_SOURCES and torch.cuda.get_device_capability(CUDA) != compiler.HOPPER:
        skip("CUDA C++ kernels for Hopper", f"{source}.cu is for Hopper alone")
    assert {kernel.source for kernel in launched} == {source}


@pytest.mark.usefixtures("words")
def test_a_graph_records_the_kernels(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda_alone(subject)
    monkeypatch.setenv("ARB_PATH", "cuda")
    ops, draws = subject.ops, torch.Generator().manual_seed(3)
    start = ops.from_spec(cuda_calls.random_weight(draws, 40, 1536, 12, 2).to(CUDA))
    x, grad = torch.randn(4, 1536, device=CUDA).to(torch.bfloat16), torch.randn(40, 1536, device=CUDA)
    step = torch.tensor(7, device=CUDA)

    def work(weight: Any) -> torch.Tensor:
        ops.accumulate_gradient(weight, grad, 5.9, seed=1, step=step, tensor_id=2, out=weight)
        ops.apply_step(weight, out=weight)
        found: torch.Tensor = ops.linear(x, weight)
        return found

    launched, replayed = start.clone(), start.clone()
    work(start.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = work(replayed)
    for at in (7, 8, 9):
        step.fill_(at)
        graph.replay()
        exact(y.cpu(), work(launched).cpu(), f"step {at}")
    exact(*(ops.to_spec(weight).to("cpu") for weight in (replayed, launched)), what="the weight")


@pytest.mark.usefixtures("words")
def test_a_graph_records_a_loop_whose_blocks_wait(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda_alone(subject)
    monkeypatch.setenv("ARB_PATH", "cuda")
    case = next(case for name, case in CALLS if name == "denoise_loop" and len(case.args[0]) > 1)
    latent, tokens = (value.to(CUDA) for value in case.args[:2])
    weights = [subject.ops.from_spec(weight.to(CUDA)) for weight in case.args[2:]]

    def work() -> torch.Tensor:
        found: torch.Tensor = subject.ops.denoise_loop(latent, tokens, *weights, **case.kwargs)
        return found

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for _ in range(3):
        latent.mul_(0.5)
        graph.replay()
        exact(found.cpu(), work().cpu())


def test_halting_of_the_calls_is_no_matter_of_rounding() -> None:
    for name, case in CALLS:
        if name == "denoise_loop":
            assert test_denoise_loop.walk(case)[2] > test_denoise_loop.MARGIN


@pytest.mark.usefixtures("words")
def test_a_loop_gets_the_arguments_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would take what comes, whatever it is."""
    given: list[Any] = []
    monkeypatch.setattr(cuda_denoise, "launch", lambda kernel, arguments, **how: given.extend(arguments))
    weights = [device_weight(*shape) for shape in ((32, 64), (32, 32), (3, 32), (64, 32))]
    cuda_denoise.denoise_loop(torch.zeros(1, 64), torch.zeros(1, 3, 32), weights, (0.5, 0.7), 0.9)
    source = compiler.source_text("denoise")
    declared = source[source.index("denoise_loop(const") :].partition("(")[2].partition(")")[0].split(",")
    kinds = {"float": np.float32, "int": np.int32, "float2": np.complex64}
    for parameter, value in zip(declared, given, strict=True):
        kind = parameter.split()[0]
        assert isinstance(value, torch.Tensor if "*" in parameter else kinds[kind]), parameter


@pytest.mark.usefixtures("words")
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


@pytest.mark.usefixtures("words")
def test_kernels_run_on_the_device_of_their_tensors(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda_alone(subject)
    if torch.cuda.device_count() < 2:
        skip("CUDA C++ kernels on another device", f"needs two GPUs, and {torch.cuda.device_count()} is here")
    monkeypatch.setenv("ARB_PATH", "cuda")
    op, case = CALLS[0]
    here, there = (
        subject.raw(op)(case.args[0].to(device), case.args[1].to(device)) for device in ("cuda:0", "cuda:1")
    )
    assert there.device.index == 1
    exact(there.cpu(), here.cpu())


@pytest.mark.usefixtures("words")
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


BOTH_WAYS = tuple(itertools.product((False, True), repeat=2))


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
    if subject.name != OURS:
        skip("products that are added", f"they are how {OURS} computes, not {subject.name}")
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


def test_tiles_of_a_product() -> None:
    """A tile is the largest that a matrix half fills and that gives every multiprocessor a program, or the smallest of all."""
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
        for other in tiles[: place + (place < len(tiles) - 1)]:
            programs = shape[0] * other.count(*shape[1:3])
            fills = 2 * shape[1] > other.block_m and 2 * shape[2] > other.block_n
            assert (fills and programs >= product_sum.PROGRAMS) is (other == tiles[place]), (shape, other)
    assert found == set(places.values())


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


@pytest.mark.usefixtures("words")
def test_what_the_product_that_adds_takes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of bfloat16 with sides below those from which the library is faster, and no others."""

    class Taken(Exception):
        pass

    def take(*_: Any, **__: Any) -> torch.Tensor:
        raise Taken

    for module in (linear_ops, orthogonal_ops):
        monkeypatch.setattr(module, "product_sum", take)
    monkeypatch.setattr(linear_ops, "LEAST_LIBRARY_SIDE", 96)
    monkeypatch.setattr(orthogonal_ops, "LEAST_SIDE", 96)

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
