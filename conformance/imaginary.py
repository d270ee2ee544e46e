"""An op that does not exist is written into a copy of the tree, with what docs/adding-an-op.md asks for and nothing else.

`mirror_trits` reverses trits along their last dimension. It is added either as a new family `mirror` or to the family `packing`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from conformance.import_lint import ROOT

OP = "mirror_trits"

PIECES: dict[str, str] = {
    "docs/spec/<family>.md": """
### mirror_trits

y[..., k] = x[..., K - 1 - k].
""",
    "reference/ops/<family>.py": '''

@op
def mirror_trits(trits: Tensor) -> Tensor:
    """Return trits in the opposite order along their last dimension.

    Math:    y[..., k] = x[..., K - 1 - k]
    Shapes:  trits int8 [..., K], each in -1 .. 1
    Returns: int8, the same shape
    Raises:  TypeError for another dtype, ValueError for another value
    Laws:    mirrored twice, trits are what they were
    Source:  docs/spec/<family>.md
    """
    checks.dtype_in("trits", trits, (torch.int8,))
    checks.values_between("trits", trits, -1, 1)
    return trits.flip(-1)
''',
    "reference/op_table/<family>.py": """
OPS = (
    *OPS,
    OpRow(
        "mirror_trits", "<family>", EXACT, MATRIX,
        bytes_min=lambda s: 2 * elements(s), ops_min=lambda s: elements(s),
    ),
)
""",
    "conformance/ops/test_<family>.py": """

@calls("mirror_trits")
def mirror_trits_calls(draw: st.DrawFn) -> Case:
    return Case((draw(ss.trit_tensors(draw(ss.matrix_shapes()))),))


@law(
    trits=ss.matrix_shapes().flatmap(ss.trit_tensors),
    rejects=[mutant("mirror_rolls", "trits.flip(-1)", "trits.roll(1, -1)", compared="mirror_trits")],
)
def test_mirror_trits_twice(ops: Subject, trits: Tensor) -> None:
    exact(ops.mirror_trits(ops.mirror_trits(trits)), trits)


test_refusals_of_<family>_mirrored = refusals(
    "<family>_mirrored",
    refused("mirror_trits", "int16", TypeError, "trits", ones(5, dtype=torch.int16)),
    refused("mirror_trits", "a trit of 2", ValueError, "trits", lambda: torch.tensor([2], dtype=torch.int8)),
    rejects=[mutant("mirror_takes_all", 'trits, -1, 1)\\n    return trits.flip', 'trits, -2, 2)\\n    return trits.flip')],
)
""",
    "conformance/vectors/<op>.json": """{
  "op": "mirror_trits",
  "cases": [
    {"name": "three", "why": "the last of three comes first", "args": [{"dtype": "int8", "data": [1, 0, -1]}],
     "want": {"dtype": "int8", "data": [-1, 0, 1]}}
  ]
}
""",
    "bench/inputs/<family>.py": """
INPUTS = {**INPUTS, "mirror_trits": lambda make, s: ((make.trits((s["N"], s["K"])),), {})}
""",
    "optimized/kernels/<family>.py": '''

@triton.jit(do_not_specialize=["num_columns"])
def _mirror_kernel(x_ptr, y_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_columns
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(x_ptr + row + num_columns - 1 - columns, mask=inside)
    tl.store(y_ptr + row + columns, x, mask=inside)


def mirror(trits: Tensor) -> Tensor:
    """Launch `mirror_trits` on int8 [..., K]."""
    trits = trits.contiguous()
    out, num_columns = torch.empty_like(trits), trits.shape[-1]
    if trits.numel():
        _mirror_kernel[(trits.numel() // num_columns, triton.cdiv(num_columns, 64))](trits, out, num_columns, BLOCK=64)
    return out
''',
    "optimized/ops/<family>.py": '''

@op()
def mirror_trits(trits: Tensor) -> Tensor:
    """See reference."""
    checks.dtype_in("trits", trits, (torch.int8,))
    values_between("trits", trits, -1, 1)
    return <family>.mirror(trits)
''',
}
"""What each file of every op gets at its end."""

ALL = '\n__all__ = [*__all__, "mirror_trits"]\n'
"""How a file of ops names the op. The op's function stands behind it."""

HEADS: dict[str, str] = {
    "docs/spec/<family>.md": "# Mirror\n\nCode: `reference/ops/mirror.py`.\n",
    "reference/ops/<family>.py": '''"""Mirrored trits."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.promises import op

__all__ = []
''',
    "reference/op_table/<family>.py": '''"""Rows of the family mirror."""

from __future__ import annotations

from arbitor.reference.op_table.row import EXACT, OpRow
from arbitor.reference.op_table.work import MATRIX, elements

OPS = ()
''',
    "conformance/ops/test_<family>.py": '''"""Laws of mirrored trits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import strategies as ss
from ..case import Case, calls
from ..compare import exact
from ..law import law
from ..mutant import mutants_of
from ..refusal import ones, refusals, refused
from ..subject import Subject

mutant = mutants_of("mirror")
''',
    "bench/inputs/<family>.py": '''"""Inputs of the family mirror."""

from __future__ import annotations

INPUTS = {}
''',
    "optimized/kernels/<family>.py": '''"""Mirroring kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
''',
    "optimized/ops/<family>.py": '''"""Mirrored trits. See `arbitor.reference.ops.mirror`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbitor.optimized.kernels import mirror
from arbitor.optimized.kernels.launch import values_between
from arbitor.optimized.ops.op import op
from arbitor.reference import checks

__all__ = []
''',
    "reference/ops/__init__.py": "from arbitor.reference.ops.mirror import *\n",
    "optimized/ops/__init__.py": "from arbitor.optimized.ops.mirror import *\n",
}
"""How the files of a new family begin, and the line that a package gets for it."""


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what an op is made of, without results and caches. Return the copy."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("reference", "optimized", "conformance", "bench", "docs/spec"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    # Its links are relative, so that they lead to the copies.
    shutil.copytree(ROOT / "arbitor", folder / "arbitor", ignore=ignored, symlinks=True)
    return folder


def add(folder: Path, family: str) -> set[str]:
    """Add the op to a family of a copy, or to a new family if none has this name. Return the paths written."""
    is_new = not (folder / "reference" / "ops" / f"{family}.py").exists()
    written = set()
    for pattern in PIECES.keys() | (HEADS.keys() if is_new else set()):
        name = path_of(pattern, family)
        path = folder / name
        text = path.read_text() if path.exists() else ""
        head = HEADS.get(pattern, "") if is_new else ""
        # The new line stands before the lines that collect the names.
        if pattern.endswith("__init__.py"):
            first, collects, rest = text.partition("# A function without a row")
            text = first.rstrip() + "\n" + head + "\n" + collects + rest
        else:
            names = ALL if pattern.startswith(("reference/ops", "optimized/ops")) else ""
            text += head + names + PIECES.get(pattern, "").replace("<family>", family)
        path.write_text(text)
        written.add(name)
    return written


def path_of(pattern: str, family: str) -> str:
    """Return the path of a file of the guide."""
    return pattern.replace("<family>", family).replace("<op>", OP)
