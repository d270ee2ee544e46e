"""The paths of the optimized op set: which one a call takes, what is said where CUDA C++ is missing, and that results agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized import ops as optimized_ops
from arbitor.optimized import settings
from arbitor.optimized.cuda import compiler, product
from arbitor.optimized.cuda import launch as launching
from arbitor.optimized.cuda.compiler import Kernel
from arbitor.optimized.ops import paths
from arbitor.optimized.training import whole_file
from conformance import cuda_calls
from conformance.case import Case
from conformance.compare import exact
from conformance.families import compare
from conformance.report import skip
from conformance.subject import Subject, needs_cuda, needs_ours

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CALLS = list(cuda_calls.calls())


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


def test_a_wait_for_a_kernel_survives_a_cache_that_cannot_be_looked_into(
    compiled: list[tuple[Kernel, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARB_CACHE", str(tmp_path / ("x" * 300)))
    with (
        compiler.waiting(lambda look: look()),
        pytest.warns(RuntimeWarning, match="compiled kernels are not kept in"),
    ):
        compiler.machine_code(Kernel.of("step", "step_trits", CARRY=0), "sm_90")
    assert len(compiled) == 1


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


def on_cuda_alone(subject: Subject) -> None:
    needs_ours(subject, "CUDA C++ kernels")
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
