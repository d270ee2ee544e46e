"""What holds for an implementation as a whole: names, signatures, imports, repeatability, graphs, compilation."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.op_table import OP_TABLE
from conformance import import_lint
from conformance.case import Case
from conformance.compare import exact, same_sums
from conformance.families import CASES
from conformance.poison import PATTERNS
from conformance.subject import Subject, needs_cuda, weight_of

CAPTURABLE = [name for name, row in OP_TABLE.items() if row.capturable]


def test_names_mirror_the_reference(subject: Subject) -> None:
    assert sorted(subject.ops.__all__) == sorted(reference_ops.__all__)


@pytest.mark.parametrize("name", OP_TABLE)
def test_signature_mirrors_the_reference(subject: Subject, name: str) -> None:
    """Arguments, their order and their defaults are the same. Annotations may differ, as layouts do."""
    shape = lambda op: [(p.name, p.kind, p.default) for p in inspect.signature(op).parameters.values()]  # noqa: E731
    assert shape(subject.raw(name)) == shape(getattr(reference_ops, name))


@pytest.mark.parametrize("name", OP_TABLE)
def test_op_is_documented(subject: Subject, name: str) -> None:
    assert inspect.getdoc(subject.raw(name)), f"{name} has no docstring"


@pytest.mark.parametrize("name", OP_TABLE)
def test_reference_docstring_has_its_headings(name: str) -> None:
    """A docstring has a sentence, what the op raises and where the rule comes from. Layouts refuse nothing and have no rule."""
    doc = inspect.getdoc(getattr(reference_ops, name)) or ""
    assert doc.splitlines()[0].endswith((".", ":")), f"{name}: the first line is no sentence"
    if OP_TABLE[name].family != "layout":
        missing = [heading for heading in ("Raises:", "Source:") if heading not in doc]
        assert not missing, f"{name} lacks {missing}"


@pytest.mark.parametrize("name", [name for name in OP_TABLE if name != "step_from_loss"])
def test_repeat_runs_give_identical_bits(subject: Subject, name: str) -> None:
    """A call under both poisons and in both layouts has one result. No order of threads and no old memory shows."""

    @settings(max_examples=max(2, settings.default.max_examples // 5))
    @given(case=CASES[name])
    def run(case: Case) -> None:
        for device_layout in (False, True):
            results = []
            for pattern in (*PATTERNS, PATTERNS[0]):
                fresh = case.copy()
                results.append(
                    subject.call_with(name, fresh.args, fresh.kwargs, pattern, device_layout=device_layout)
                )
            exact(results[1], results[0], f"{name} under another poison")
            exact(results[2], results[0], f"{name} once more")

    run()


def test_import_does_not_touch_cuda() -> None:
    """Neither package looks for a GPU when it is imported, nor initialises one."""
    script = (
        "import torch\n"
        "def refuse(*_): raise SystemExit('import asked CUDA')\n"
        "torch._C._cuda_getDeviceCount = refuse\n"
        "torch.cuda._lazy_init = refuse\n"
        "import arbitor.reference.ops, arbitor.optimized, arbitor.optimized.ops\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_imports_keep_the_rules() -> None:
    found = import_lint.breaches()
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/a.py", "import numpy"),
        ("reference/a.py", "from arbitor.optimized import settings"),
        ("reference/ops/a.py", "from conformance import compare"),
        ("optimized/a.py", "from arbitor.reference.ops.votes import row_exponents"),
        ("optimized/a.py", "from arbitor.reference import ops"),
        ("optimized/a.py", "import arbitor.reference.ops.votes as v"),
        ("optimized/a.py", "import importlib; importlib.import_module('arbitor.reference.ops')"),
        ("optimized/ops/a.py", "from ...reference import ops"),
        ("reference/a.py", "def f(): import torch"),
        ("reference/a.py", "class A:\n    def f(self):\n        from arbitor.reference import checks"),
        ("optimized/a.py", "import os; os.environ['ARB_X']"),
        ("conformance/a.py", "import bench"),
        ("optimized/a.py", "import transformers"),
        ("optimized/a.py", "from arbitor import ArbModel"),
        ("optimized/a.py", "import arbitor.front"),
        ("arbitor/a.py", "from conformance import compare"),
        ("arbitor/a.py", "from arbitor.conformance import compare"),
        ("conformance/law.py", "from conformance.mutant import Mutant"),
        ("conformance/ops/test_votes.py", "from conformance import oracle"),
        ("arbitor/a.py", "from huggingface_hub import HfApi"),
        ("sidecars/a.py", "from diffusers import AutoencoderKLWan"),
        ("sidecars/a.py", "import scipy"),
        ("sidecars/a.py", "from arbitor.reference import ops"),
        ("sidecars/a.py", "from arbitor.optimized import settings"),
    ],
)
def test_import_lint_rejects(path: str, source: str) -> None:
    assert list(import_lint.breaches_of(source, Path(path)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/a.py", "import math, torch; from arbitor.reference.types import TernaryWeight"),
        ("optimized/a.py", "from arbitor.reference import checks, types; import triton, numpy"),
        ("optimized/settings.py", "import os; os.environ.get('ARB_X')"),
        (
            "sidecars/a.py",
            "import torch, numpy; from arbitor.reference import checks; from arbitor.sidecars import audio",
        ),
        ("arbitor/a.py", "from arbitor.optimized.ops import linear; from arbitor.reference import ops"),
        ("conformance/ops/test_votes.py", "from .. import oracle"),
        ("bench/a.py", "from conformance.compare import exact; from arbitor.reference import ops"),
    ],
)
def test_import_lint_accepts(path: str, source: str) -> None:
    assert not list(import_lint.breaches_of(source, Path(path)))


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from arbitor.reference import b", "b": "from arbitor.reference.a import f"}, {"a", "b"}),
        (
            {"a": "import arbitor.reference.b", "b": "from . import c", "c": "from .a import f"},
            {"a", "b", "c"},
        ),
        (
            {
                "a": "if TYPE_CHECKING:\n    from arbitor.reference.b import B",
                "b": "from arbitor.reference.a import f",
            },
            {"a", "b"},
        ),
        (
            {
                "a": "from arbitor.reference.p.x import f",
                "p/__init__": "import arbitor.reference.p.y",
                "p/x": "",
                "p/y": "import arbitor.reference.a",
            },
            {"a", "p", "p.y"},
        ),
        (
            {
                "a": "from arbitor.reference.p.x import f",
                "p/__init__": "import arbitor.reference.p.x",
                "p/x": "from arbitor.reference.p import y",
                "p/y": "",
            },
            None,
        ),
    ],
    ids=["two", "three", "for type checkers", "through a package", "none"],
)
def test_import_lint_finds_circles(tmp_path: Path, files: dict[str, str], circle: set[str] | None) -> None:
    for name, source in files.items():
        path = tmp_path / "reference" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = [
        {name.removeprefix("arbitor.reference.") for name in names}
        for names in import_lint.circles(import_lint.import_graph(tmp_path))
    ]
    assert found == ([circle] if circle else [])


def test_no_kernel_compiles_again_for_another_batch(subject: Subject) -> None:
    """No token count (odd, even, one, a multiple of sixteen) is a reason to compile again. Strides and offsets are none either."""
    needs_cuda(subject, "recompilation")
    import triton

    compiled: list[str] = []
    weight, norm = weight_of(subject, 96, 160), weight_of(subject, 1, 160)
    table, taps = weight_of(subject, 300, 160), weight_of(subject, 24, 5 * 4)
    # 0-dim views of this tensor lie at any address.
    rates = torch.linspace(0.5, 3.0, 5000, device=subject.device)
    steps = torch.arange(5000, device=subject.device)

    def everything(count: int) -> None:
        device = subject.device
        dy = torch.randn(count, 96, device=device, dtype=torch.bfloat16)
        ids = torch.arange(count, device=device) % 300
        rate, step = rates[count], steps[count]
        op = subject.raw
        layouts = (
            torch.randn(count, 160, device=device, dtype=torch.bfloat16),
            torch.randn(160, count, device=device, dtype=torch.bfloat16).T,
            torch.randn(count, 3, 160, device=device, dtype=torch.bfloat16)[:, -1],
        )
        for x in layouts:
            op("linear")(x, weight)
            op("linear_input_grad")(dy, weight)
            op("linear_weight_grad")(dy, x)
            op("rms_norm")(x, norm)
            op("rms_norm_input_grad")(x, x, norm)
            op("rms_norm_weight_grad")(x, x)
            op("denoise_step")(x, x, alpha=0.5)
            op("denoise_step_backward")(x, alpha=0.5)
            op("embedding")(ids, table)
            rows, grads = op("embedding_row_grads")(ids, x)
            op("stochastic_votes")(grads, rate, seed=1, step=step, tensor_id=2)
            op("stochastic_votes")(x, rate, seed=1, step=step, tensor_id=2)
            op("sign_votes")(x, 3)
            op("accumulate_gradient")(table, grads, rate, seed=1, step=step, tensor_id=2, rows=rows)
            op("accumulate_gradient")(table, grads, 1.0, seed=1, step=count, tensor_id=2, rows=rows)
            op("apply_step")(table, rows=rows)
        signals = (
            torch.randn(2, 5, count + 3, device=device, dtype=torch.bfloat16),
            torch.randn(2, count + 3, 5, device=device, dtype=torch.bfloat16).transpose(1, 2),
        )
        for x_BCL in signals:
            y = op("conv1d")(x_BCL, taps, kernel_size=4)
            op("conv1d_input_grad")(y, taps, length=count + 3, kernel_size=4)
            op("conv1d_weight_grad")(y, x_BCL, kernel_size=4)

    # The choice of tiles may depend on the size: decoding, small batches and large ones.
    for count in (1, 16, 64, 4096):
        everything(count)
    hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr") or kwargs.get("key")))  # noqa: E731
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        for count in (2, 15, 33, 48, 65, 100, 1000, 2047, 3072):
            everything(count)
    assert not compiled, f"compiled again: {compiled}"


@pytest.mark.parametrize("name", CAPTURABLE)
def test_op_replays_from_a_cuda_graph(subject: Subject, name: str) -> None:
    """A captured call replays to the same bits as an eager one."""
    needs_cuda(subject, "CUDA graphs")

    @settings(max_examples=4)
    @given(case=CASES[name])
    def run(case: Case) -> None:
        moved: dict[int, object] = {}
        args = tuple(subject.to_device(value, False, moved) for value in case.args)
        # Each replay would write these again. The test of a captured update has them.
        written = ("out", "faults")
        kwargs = {
            key: subject.to_device(v, False, moved) for key, v in case.kwargs.items() if key not in written
        }
        op = subject.raw(name)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # This call uses the very same memory, and compiles outside of the capture.
            want = op(*args, **kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = op(*args, **kwargs)
        graph.replay()
        torch.cuda.synchronize()
        same_sums(subject.to_cpu(result), subject.to_cpu(want), name)

    run()


def test_captured_votes_draw_fresh_dither(subject: Subject) -> None:
    """With a step that lives on the device each replay votes as an eager call at that step does."""
    needs_cuda(subject, "fresh dither in a CUDA graph")
    grad = torch.randn(40, 50, device=subject.device)
    step = torch.tensor(7, device=subject.device)
    votes = lambda step: subject.raw("stochastic_votes")(grad, 0.4, seed=1, step=step, tensor_id=2)  # noqa: E731
    votes(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = votes(step)
    for value in (8, 9, 2**32 - 2):
        step.fill_(value)
        graph.replay()
        exact(captured.cpu(), votes(value).cpu(), f"step {value}")


@pytest.mark.parametrize("some_rows", [False, True], ids=["matrix", "table"])
def test_captured_update_replays_to_the_eager_weight(subject: Subject, some_rows: bool) -> None:
    """What training captures: votes counted in place, then a step in place, with gradient, rate and step on the device.

    After each of several replays the weight holds the bytes that as many eager updates leave, and faults count on.
    """
    needs_cuda(subject, "in-place updates in a CUDA graph")
    device, num_steps = subject.device, 6
    rng = torch.Generator().manual_seed(1)
    grads = torch.randn(num_steps, 40, 50, generator=rng)
    grads[2, 7, 3] = float("nan")
    choices = torch.stack([torch.randperm(90, generator=rng)[:40] for _ in range(num_steps)])
    # These slots are not used.
    choices[:, -2:] = -1
    rates = torch.linspace(0.5, 3.0, num_steps)

    def update(state: tuple[Any, Tensor], grad: Tensor, rows: Tensor, rate: Tensor, step: Any) -> None:
        weight, faults = state
        named = rows if some_rows else None
        subject.raw("accumulate_gradient")(
            weight, grad, rate, seed=3, step=step, tensor_id=2, rows=named, faults=faults, out=weight
        )
        subject.raw("apply_step")(weight, theta=2, theta_e=3, on_flip="carry", rows=named, out=weight)

    def start() -> tuple[Any, Tensor]:
        return weight_of(subject, 90 if some_rows else 40, 50), torch.zeros(
            (), dtype=torch.int64, device=device
        )

    grad, rows, rate = grads[0].to(device), choices[0].to(device), rates[0].to(device)
    step = torch.tensor(0, device=device)
    # This call compiles outside of the capture.
    update(start(), grad, rows, rate, step)
    captured, eager = start(), start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(captured, grad, rows, rate, step)
    first = subject.to_cpu(eager[0]).clone()
    for count in range(num_steps):
        # The steps reach up to the last one that votes may use.
        clock = 2**32 - 1 - num_steps + count
        for target, value in ((grad, grads), (rows, choices), (rate, rates)):
            target.copy_(value[count])
        step.fill_(clock)
        graph.replay()
        update(eager, grads[count].to(device), choices[count].to(device), float(rates[count]), clock)
        exact(subject.to_cpu(captured), subject.to_cpu(eager), f"after update {count}")
    assert eager[1].item() == 1
    assert not torch.equal(subject.to_cpu(eager[0]).packed, first.packed), "no trit moved"
