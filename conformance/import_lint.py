"""Who may import whom, read from the syntax trees: the oracle shares no arithmetic with its subject.

    python -m conformance.import_lint        # prints file:line for each breach, exit status 1 if there is one

reference imports torch, the standard library and itself, and imports at the top of a file only. optimized imports of reference
what holds no op. Modules of either import each other in one direction: no circle, not even one for type checkers alone. Nothing
that is installed imports conformance or bench. The modules of arbitor itself may import all that is installed, and nothing that
is installed imports them. The suite that is installed as arbitor.conformance is links to files here, which import each other
relatively, so that they work under both names. sidecars imports of ours the checks of reference and its reader of JSON. It alone
imports libraries of other projects, by `libraries.library`. Environment variables named ARB_* are read in optimized/settings.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE_FOR_OPTIMIZED = (
    "constants",
    "types",
    "promises",
    "in_graphs",
    "checks",
    "config",
    "presets",
    "json_text",
    "op_table",
    "graph",
    "audit",
)
FRONT = "arbitor"
INSTALLED = (FRONT, "reference", "optimized", "sidecars")
SETTINGS = Path("optimized/settings.py")
SUITE = Path("arbitor/conformance")
IN_SUITE = {link.resolve().relative_to(ROOT) for link in (ROOT / SUITE).iterdir() if link.is_symlink()}
"""Files and folders that are installed as `arbitor.conformance`."""
TEST_PACKAGES = ("conformance", "bench")
REFERENCE_FOR_SIDECARS = ("checks", "json_text")
FOR_SIDECARS = ("arbitor", "numpy", "torch")
OF_OTHERS = ("accelerate", "av", "datasets", "diffusers", "huggingface_hub", "optimum", "PIL", "transformers")
"""Libraries that `sidecars/libraries.py` imports by name, so that they may be missing."""


def breaches(root: Path = ROOT) -> list[str]:
    """Return every breach as `file:line: what`."""
    found = []
    for folder in (*INSTALLED, *TEST_PACKAGES):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            found += [f"{relative}:{line}: {what}" for line, what in breaches_of(path.read_text(), relative)]
    return found + [f"import circle: {' -> '.join(names)}" for names in circles(import_graph(root))]


def breaches_of(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and reason of each breach in a file."""
    folder = path.parts[0]
    is_ours = folder in INSTALLED and path != SETTINGS and SUITE not in path.parents
    for node in ast.walk(ast.parse(source)):
        for module in imported(node, path):
            reason = refused(folder, module) or _refused_of_suite(path, node, module)
            if reason:
                yield node.lineno, f"imports {module}: {reason}"
        if folder == "reference" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    yield inner.lineno, "imports inside of a function: reference imports at the top of a file"
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_ours and is_text and re.fullmatch(r"ARB_[A-Z0-9_]+", node.value):
            yield node.lineno, f"names {node.value}: environment variables are read in {SETTINGS}"


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return the modules that each installed module imports, by name. The name of a package stands for its `__init__`.

    Whoever imports a module from outside of its package imports the package as well, since Python runs it first.
    """
    files = {module_name(path, root): path for folder in INSTALLED for path in (root / folder).rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        of_tree = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text())):
            for target in imported(node, of_tree):
                # A name that a module defines is imported from that module.
                while target not in files and "." in target:
                    target = target.rpartition(".")[0]
                while target in files:
                    if target != name and not name.startswith(f"{target}."):
                        graph[name].add(target)
                    target = target.rpartition(".")[0]
    return graph


def module_name(path: Path, root: Path) -> str:
    """Return the import name of a file: `arbitor.reference.ops` for reference/ops/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(_within_arbitor(parts[:-1] if parts[-1] == "__init__" else parts))


def _within_arbitor(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parts of an import name for those of a path."""
    return parts if parts[:1] == (FRONT,) else (FRONT, *parts)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return a shortest circle of imports for each module that is on one, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        came_from: dict[str, str] = {}
        frontier = [start]
        while frontier and start not in came_from:
            following = []
            for name in frontier:
                for target in sorted(graph[name] - came_from.keys()):
                    came_from[target] = name
                    following.append(target)
            frontier = following
        if start in came_from:
            circle = [start]
            while circle[-1] != start or len(circle) == 1:
                circle.append(came_from[circle[-1]])
            found.setdefault(frozenset(circle), circle[::-1])
    return list(found.values())


def imported(node: ast.AST, path: Path) -> list[str]:
    """Return the modules that a statement imports. Names imported from a package count as modules of it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            package = _within_arbitor(path.parts[: len(path.parts) - node.level])
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
    """Return why code in a folder may not import a module, or None if it may."""
    top, *rest = module.split(".")
    if folder in INSTALLED and top in TEST_PACKAGES:
        return "what is installed does not import the tests"
    if folder in INSTALLED and folder != FRONT and top == FRONT and (not rest or rest[0] not in INSTALLED):
        return "modules of arbitor itself are imported by users only"
    if folder == "conformance" and top == "bench":
        return "conformance does not import bench"
    if folder == "reference":
        if top == "arbitor" and rest[:1] != ["reference"]:
            return "reference imports nothing of ours but itself"
        if top not in ("arbitor", "torch") and top not in sys.stdlib_module_names:
            return "reference imports torch and the standard library only"
    of_reference = top == "arbitor" and rest[:1] == ["reference"]
    if folder in INSTALLED and top in OF_OTHERS:
        return "libraries of other projects are imported by sidecars/libraries.py, by name"
    if folder == "sidecars":
        if top not in FOR_SIDECARS and top not in sys.stdlib_module_names:
            return f"sidecars imports {', '.join(FOR_SIDECARS)} and the standard library"
        if (
            top == "arbitor"
            and rest[:1] != ["sidecars"]
            and (len(rest) < 2 or rest[1] not in REFERENCE_FOR_SIDECARS)
        ):
            return f"sidecars imports of ours only reference.{', reference.'.join(REFERENCE_FOR_SIDECARS)}"
    if folder == "optimized" and of_reference and (len(rest) < 2 or rest[1] not in REFERENCE_FOR_OPTIMIZED):
        return f"optimized imports of reference only {', '.join(REFERENCE_FOR_OPTIMIZED)}"
    return None


def _refused_of_suite(path: Path, node: ast.AST, module: str) -> str | None:
    """Return why the file may not import a module of the suite that is installed, or None if it may."""
    in_suite = path in IN_SUITE or path.parent in IN_SUITE
    if in_suite and module.split(".")[0] == "conformance":
        return "a file that arbitor/conformance links to imports others of the suite relatively"
    of_suite = module.split(".")[:2] == list(SUITE.parts)
    if of_suite and path.parts[0] == FRONT and SUITE not in path.parents:
        return "what is installed does not import the tests"
    return None


def main() -> int:
    """Print breaches. Return the exit status."""
    found = breaches()
    print("\n".join(found) or "imports: no breach")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
