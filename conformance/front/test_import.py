"""`import arbitor`: what users write first, in a fresh process each."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import arbitor
from conformance.import_lint import FRONT, INSTALLED, ROOT


def printed(script: str, **environment: str) -> str:
    """Return what a script prints in a process that imports `arbitor` as this one does."""
    paths = os.pathsep.join([str(Path(arbitor.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ARB_", "TRITON_INTERPRET"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick() -> None:
    """Nothing heavy comes with it; and a name brings no more than it needs."""
    heavy = "{'torch', 'triton', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)"
    assert printed(f"import sys, arbitor; print({heavy})") == "set()"
    assert printed("import sys, arbitor; arbitor.__version__; print('torch' in sys.modules)") == "False"
    assert printed("import sys; from arbitor import ArbConfig; print('triton' in sys.modules)") == "False"


def test_a_run_on_the_cpu_needs_no_triton() -> None:
    """It is no dependency outside of Linux. The suite sets its variables before anything may import it."""
    script = (
        "import sys, torch\n"
        "from arbitor.optimized.training import loop\n"
        "print('triton' in sys.modules)\n"
        "from arbitor.optimized.distributed import sums\n"
        "parts = torch.ones(2, 3, 4)\n"
        "sums.sum_in_order(parts, torch.empty(3, 4))\n"
        "sums.sum_eight_bits(torch.stack([sums.in_eight_bits(each) for each in parts]), torch.empty(3, 4))\n"
        "print('triton' in sys.modules)"
    )
    assert printed(script) == "False\nFalse"


def test_names_are_those_of_their_homes() -> None:
    script = (
        "import arbitor\n"
        "from arbitor.reference import config, presets, types\n"
        "assert arbitor.ArbConfig is config.ArbConfig and arbitor.TernaryWeight is types.TernaryWeight\n"
        "assert arbitor.PRESETS is presets.PRESETS and arbitor.preset is presets.preset\n"
        "assert set(arbitor.__all__) <= set(dir(arbitor))\n"
        "namespace = {}\n"
        "exec('from arbitor import *', namespace)\n"
        "print(sorted(set(arbitor.__all__) - set(namespace)))"
    )
    assert printed(script) == "[]"


def test_type_checkers_see_every_name() -> None:
    """The imports for type checkers bind the names of `__all__`, and no others."""
    [block] = [
        node
        for node in ast.parse((ROOT / FRONT / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    bound = {
        alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "types"
        for alias in node.names
    } | {
        node.target.id
        for node in block.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert bound == set(arbitor.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'arbitor' has no attribute 'ArbModle'"):
        arbitor.ArbModle  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "arbitor.reference.ops"),
        ({"ARB_BACKEND": "triton", "TRITON_INTERPRET": "1"}, "arbitor.optimized.ops"),
    ],
)
def test_ops_are_those_of_the_machine(environment: dict[str, str], name: str) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", **environment}
    assert printed("import arbitor; print(arbitor.ops.__name__)", **hidden) == name


def test_subpackages_are_the_folders_of_the_repository() -> None:
    for name in INSTALLED[1:]:
        assert (ROOT / FRONT / name).resolve() == ROOT / name
