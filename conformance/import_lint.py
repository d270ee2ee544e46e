"""Who may import whom, read from the syntax trees: the oracle shares no arithmetic with its subject.

    python -m conformance.import_lint        # prints file:line for each breach, exit status 1 if there is one

reference imports torch, the standard library and itself. optimized imports of reference what holds no op: types, checks,
config, presets, op_table, graph, audit; and never decodes a weight by the reference's methods. Nothing that is installed imports
conformance or bench. Environment variables named ARB_* are read in optimized/settings.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE_FOR_OPTIMIZED = ("types", "checks", "config", "presets", "op_table", "graph", "audit")
DECODERS = ("trits", "dense", "from_trits")
SETTINGS = Path("optimized/settings.py")
TEST_PACKAGES = ("conformance", "bench")


def breaches(root: Path = ROOT) -> list[str]:
    """Return every breach as `file:line: what`."""
    found = []
    for folder in ("reference", "optimized", *TEST_PACKAGES):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            found += [f"{relative}:{line}: {what}" for line, what in breaches_of(path.read_text(), relative)]
    return found


def breaches_of(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and reason of each breach in a file."""
    folder = path.parts[0]
    for node in ast.walk(ast.parse(source)):
        for module in imported(node, path):
            reason = refused(folder, module)
            if reason:
                yield node.lineno, f"imports {module}: {reason}"
        if folder == "optimized" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in DECODERS:
                yield node.lineno, f"calls .{name}(): optimized decodes weights by its own kernels"
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        is_ours = folder in ("reference", "optimized") and path != SETTINGS
        if is_ours and is_text and re.fullmatch(r"ARB_[A-Z0-9_]+", node.value):
            yield node.lineno, f"names {node.value}: environment variables are read in {SETTINGS}"


def imported(node: ast.AST, path: Path) -> list[str]:
    """Return the modules that a statement imports; names imported from a package count as modules of it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            package = ("arbitor", *path.parts[: len(path.parts) - node.level])
            base = ".".join((*package, *((node.module,) if node.module else ())))
        else:
            base = node.module or ""
        return [f"{base}.{alias.name}" for alias in node.names]
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    if (
        is_call
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ):
        return [node.args[0].value]
    return []


def refused(folder: str, module: str) -> str | None:
    """Return why code in a folder may not import a module; None if it may."""
    top, *rest = module.split(".")
    if folder in ("reference", "optimized") and top in TEST_PACKAGES:
        return "what is installed does not import the tests"
    if folder == "conformance" and top == "bench":
        return "conformance does not import bench"
    if folder == "reference":
        if top == "arbitor" and rest[:1] != ["reference"]:
            return "reference imports nothing of ours but itself"
        if top not in ("arbitor", "torch") and top not in sys.stdlib_module_names:
            return "reference imports torch and the standard library only"
    of_reference = top == "arbitor" and rest[:1] == ["reference"]
    if folder == "optimized" and of_reference and (len(rest) < 2 or rest[1] not in REFERENCE_FOR_OPTIMIZED):
        return f"optimized imports of reference only {', '.join(REFERENCE_FOR_OPTIMIZED)}"
    return None


def main() -> int:
    """Print breaches; return the exit status."""
    found = breaches()
    print("\n".join(found) or "imports: no breach")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
