"""Every kernel compiles for a GPU, on a machine with or without one. The interpreter runs kernels that a compiler refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arbitor.optimized.cuda import compiler
from arbitor.optimized.cuda.compiler import Kernel, why_missing
from arbitor.optimized.kernels.launch import column_step
from conformance.compare import exact
from conformance.compile_cuda import given_up
from conformance.compile_kernels import repeated_operand
from conformance.import_lint import ROOT
from conformance.pretend_cuda import TensorsSayCuda
from conformance.report import skip
from conformance.subject import Subject, needs_ours

BREAKS = {
    # A loop then assigns another shape to it.
    "q_mask": "mask",
    "FEW_HEADS, MANY_HEADS = Tile(16, 32": "FEW_HEADS, MANY_HEADS = Tile(16, 256",
}
"""Changes to kernels/attention.py after which a kernel does not compile, or wants too much shared memory."""

ORPHAN = """

@triton.jit
def _orphan_kernel(x_ptr):
    tl.store(x_ptr, 0)
"""


def package_of(subject: Subject) -> Path:
    """Return the folder of the package whose kernels are compiled. Skip the test for any other package."""
    needs_ours(subject, "compilation of kernels")
    return Path(str(subject.ops.__file__)).parents[1]


def copy_of_the_package(subject: Subject, tree: Path) -> Path:
    """Return a copy of the package, in a tree that `arbitor` can be imported from."""
    package, ignored = package_of(subject), shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tree / "optimized", ignore=ignored)
    shutil.copytree(ROOT / "arbitor", tree / "arbitor", ignore=ignored, symlinks=True)
    (tree / "reference").symlink_to(ROOT / "reference")
    return tree / "optimized"


def compiled(cache: Path, *only: str, tree: Path = ROOT, module: str = "compile_kernels") -> tuple[int, str]:
    """Run compile_kernels or compile_cuda. Return its exit status and output. `tree` is where `arbitor` is imported from."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(tree), str(ROOT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TRITON_CACHE_DIR"] = environment["ARB_CACHE"] = str(cache)
    # A GPU of this machine must change nothing.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = (sys.executable, "-W", "ignore", "-m", f"conformance.{module}", *only)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    return done.returncode, done.stdout + done.stderr


# 100 seconds, where none but those that wait for ranks takes 30.
@pytest.mark.longest
def test_every_kernel_compiles(subject: Subject, tmp_path: Path) -> None:
    package_of(subject)
    status, output = compiled(tmp_path)
    assert status == 0, output


def test_a_product_on_a_pretended_gpu_is_zeros() -> None:
    """It has the shape and the dtype that it has on a GPU. One that a gradient runs through is computed."""
    a, b = torch.ones(2, 3, 5, dtype=torch.bfloat16), torch.ones(2, 5, 4, dtype=torch.bfloat16)
    with TensorsSayCuda():
        wide, stack = torch.mm(a[0], b[0], out_dtype=torch.float32), torch.bmm(a, b)
        learns = torch.mm(a[0], b[0].clone().requires_grad_())
    exact(wide, torch.zeros(3, 4))
    exact(stack, torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert learns.requires_grad
    exact(learns.detach(), torch.full((3, 4), 5.0, dtype=torch.bfloat16))


def cuda_compiler() -> None:
    """Skip a test where CUDA C++ cannot be compiled, with the reason."""
    if (reason := why_missing()) is not None:
        skip("compilation of CUDA C++ kernels", reason)


def test_every_cuda_kernel_compiles(subject: Subject, tmp_path: Path) -> None:
    package_of(subject)
    cuda_compiler()
    status, output = compiled(tmp_path, module="compile_cuda")
    assert status == 0, output
    assert re.search(r"^many_rows: [1-9]\d+ kernels, of at most [1-9]\d+ registers", output, re.MULTILINE), (
        output
    )


def test_broken_cuda_kernels_are_found(subject: Subject, tmp_path: Path) -> None:
    """In a copy of the package one kernel does not compile, and one source is launched by nothing."""
    cuda_compiler()
    copy = copy_of_the_package(subject, tmp_path)
    file = copy / "cuda" / "step.cu"
    file.write_text(file.read_text().replace("if (!any) return;", "if (!ny) return;"))
    (copy / "cuda" / "orphan.cu").write_text("")
    status, output = compiled(tmp_path / "cache", "step", "orphan", tree=tmp_path, module="compile_cuda")
    assert status == 1, output
    assert (
        "step.cu with CARRY=0, PIECE=16 does not compile for sm_80" in output
        and '"ny" is undefined' in output
    ), output
    assert "orphan.cu was not compiled" in output, output


@pytest.mark.parametrize("lost", ["fence", "wait_group"])
def test_products_that_wait_for_one_another_are_found(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Without a fence or a wait the assembler puts in its own, and the products of a tile run one after the other."""
    cuda_compiler()
    constants = {
        "GROUP_SIZE": 12,
        "MANTISSA_BITS": 2,
        "WORD_BYTES": 8,
        "LEVEL_BYTES": 4,
        "SLOTS": 0,
        "ROWS": 16,
    }
    form = {
        "WARP_GROUPS": 1,
        "HEIGHT": 1,
        "COPY_WARPS": 1,
        "BLOCKS": 4,
        "BATCH": 4,
        "PARTS": 1,
        "RESIDENT": 0,
    }
    kernel = Kernel.of("many_rows", "many_rows_product", **constants, **form)
    assert not given_up(compiler.what_the_assembler_says(kernel, "sm_90a"))
    text = compiler.source_text("many_rows")
    broken = re.sub(rf'asm volatile\("wgmma\.{lost}.*\n', "\n", text)
    monkeypatch.setattr(compiler, "source_text", lambda source: broken)
    [sentence] = given_up(compiler.what_the_assembler_says(kernel, "sm_90a"))
    assert "wgmma.mma_async instructions are serialized" in sentence


def test_rows_that_are_read_one_element_at_a_time_are_found(subject: Subject, tmp_path: Path) -> None:
    """In a copy of the package kernels are not told that 1192 columns are a multiple of 8. Triton knows multiples of 16 alone."""
    assert [column_step(columns) for columns in (1, 4, 8, 16, 1184, 1192)] == [1, 1, 8, 1, 1, 8]
    copy = copy_of_the_package(subject, tmp_path)
    file = copy / "kernels" / "common.py"
    source, told = file.read_text(), "return num_columns // STEP * STEP"
    assert told in source, f"{told} is not in kernels/common.py: break something else here"
    file.write_text(source.replace(told, "return num_columns"))
    status, output = compiled(tmp_path / "cache", "update", "votes", tree=tmp_path)
    assert status == 1, output
    found = re.findall(r": (\w+) reads or writes rows one element at a time", output)
    assert sorted(found) == [
        "_accumulate_kernel",
        "_count_together_kernel",
        "_row_exponents_kernel",
        "_sign_votes_kernel",
        "_step_trits_kernel",
        "_stochastic_votes_kernel",
    ]


def test_broken_kernels_are_found(subject: Subject, tmp_path: Path) -> None:
    """In a copy of the package one kernel is broken in two ways, and one is launched by nothing."""
    copy = copy_of_the_package(subject, tmp_path)
    file = copy / "kernels" / "attention.py"
    source = file.read_text()
    for text, broken in BREAKS.items():
        assert text in source, f"{text} is not in kernels/attention.py: break something else here"
        source = source.replace(text, broken)
    file.write_text(source + ORPHAN)
    status, output = compiled(tmp_path / "cache", "attention", tree=tmp_path)
    assert status == 1, output
    kernels = tmp_path / "arbitor" / "optimized" / "kernels"
    loop = 1 + source.splitlines().index(
        "    for start in range(begin, tl.minimum(end, num_slots), BLOCK_S):"
    )
    for complaint in (
        f"{kernels}/attention.py:{loop}: _decode_attention_kernel does not compile\n"
        'AssertionError("Loop-carried variable mask',
        "_decode_attention_kernel wants too much shared memory",
        "_orphan_kernel was not compiled",
    ):
        assert complaint in output, output


@pytest.mark.parametrize(
    ("summed", "width", "major", "bad"),
    [(16, 8, 2, True), (32, 8, 2, False), (16, 4, 2, False), (16, 8, 3, False)],
)
def test_repeated_operands_are_found(summed: int, width: int, major: int, bad: bool) -> None:
    """Layouts are text, as newer releases of Triton no longer make the bad one. A product in another layout is fine."""
    layout = f"#mma = #ttg.nvidia_mma<{{versionMajor = {major}, versionMinor = 0, warpsPerCTA = [2, 2], instrShape = [16, 8]}}>"
    operands = [
        f"tensor<{shape}xbf16, #ttg.dot_op<{{opIdx = {place}, parent = #mma, kWidth = {width}}}>>"
        for place, shape in enumerate((f"64x{summed}", f"{summed}x64"))
    ]
    for place, operand in enumerate(operands):
        fine = "%z = tt.dot %w, %x : tensor<64x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 2}>>"
        other = layout.replace("#mma", "#mma1").replace(f"Major = {major}", "Major = 2")
        found = repeated_operand(f"{other}\n{layout}\n{fine}\n%y = tt.dot %w, %x : {operand}")
        assert (found is not None and f"operand {place}" in found) if bad else found is None
