"""Which tests are of a file: found from names, and from imports where no test has the file's name.

`reference/ops/scale.py`, `optimized/ops/scale.py` and `optimized/kernels/scale.py` are tested by `test_scale.py` and by
`test_scale_<part>.py`. `optimized/kernels/segments.py`, which has no tests of its name, is tested by those of the files that
import it. Then come the rest of the folders that these lie in, what lies at the top of `conformance`, and tests of other folders
that import the file by its name, or the command line if the file is a command. A family of ops has nothing to do with the others:
of files of ops and kernels, the tests of another family are left out.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from conformance.import_lint import import_graph, imported, module_name
from conformance.mutation.worker import PRODUCT

REFERENCE_OPS = "arbitor.reference.ops"
OF_THE_SUITE = (
    "test_adding_an_op",
    "test_compare",
    "test_compiles",
    "test_families",
    "test_mutants",
    "test_mutate",
)
"""Tests of the tests, and of what no interpreter runs: they are slow and judge no result of the product."""

OF_OPS = ("reference", "optimized")
"""Parts of the product that have each op."""

OF_COMMANDS = (("optimized", "commands"), ("optimized", "training"))
"""Folders whose files are seen by tests that run commands."""

COMMAND_LINE = ("arbitor.optimized.cli", "conformance.system.command")
"""The modules by which tests run commands, in this process or in one of its own."""


@dataclass(frozen=True, order=True)
class Unit:
    """A file of tests, run against an implementation; `impl` is empty where the suite's own choice stands."""

    tests: str
    impl: str = ""

    def __str__(self) -> str:
        return f"{self.tests} --impl {self.impl}" if self.impl else self.tests


class Selection:
    """Finds the tests of the files of a tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = sorted((root / "conformance").rglob("test_*.py"))
        self.tests = [path.relative_to(root) for path in files if path.stem not in OF_THE_SUITE]
        self.stems = {path.stem for top in PRODUCT for path in (root / top).rglob("*.py")}
        self.stem_of = {test: self.find_stem(test) for test in self.tests}
        # What runs against the implementation that `--impl` names.
        takes_ops = re.compile(r"\bsubject\b|^@law\(", re.MULTILINE)
        self.with_ops = {test for test in self.tests if takes_ops.search((root / test).read_text())}
        self.imported: dict[Path, set[str]] = {}
        self.importers: dict[str, set[str]] = {}
        for name, targets in import_graph(root).items():
            for target in targets:
                self.importers.setdefault(target, set()).add(name)

    def stages(self, file: str) -> list[list[Unit]]:
        """Return the tests of a file in stages: the next one is run where those before found nothing."""
        path = Path(file)
        named = self.named(path) or self.of_importers(path) or self.that_name(path) or self.tests
        folders = {test.parent for test in named} | {Path("conformance")}
        # Checks and types serve every family.
        of_family = path.parent.name in ("ops", "kernels")
        rest = [
            test
            for test in self.tests
            if test not in named
            and (test.parent in folders or self.imports(test, path))
            and not (of_family and self.alone(test))
        ]
        if path.parts[0] != "reference":
            return [[Unit(str(test)) for test in tests] for tests in (named, rest)]
        # Laws find most faults of the reference at once. The comparison of all ops needs another implementation.
        by_itself = [
            [Unit(str(test), REFERENCE_OPS if test in self.with_ops else "") for test in tests]
            for tests in (named, rest)
        ]
        return [*by_itself, [Unit(str(test)) for test in (*named, *rest) if test in self.with_ops]]

    def named(self, path: Path) -> list[Path]:
        """Return the tests with the name of a file, those in the folder with the name of its folder if there are any.

        `graph/test_codebook.py` is not of `optimized/kernels/codebook.py`, which `ops/test_codebook.py` tests, as `reference` alone
        has a graph. Where a file has no nearer test of its name, one of another folder counts, unless a file of the name lies in
        that folder: `distributed/test_mxint8.py` is of `reference/graph/mxint8.py`, but `graph/test_audio.py` not of
        `sidecars/audio.py`.
        """
        found = [test for test in self.tests if self.stem_of[test] == path.stem]
        homes = {
            test: [top for top in PRODUCT if (self.root / top / test.parent.name).is_dir()] for test in found
        }
        nearer = [test for test in found if not homes[test] or path.parts[0] in homes[test]]
        found = nearer or [test for test in found if not self.has_own(test, homes[test], path.name)]
        return [test for test in found if test.parent.name == path.parent.name] or found

    def has_own(self, test: Path, homes: list[str], name: str) -> bool:
        """Return whether a file of some name lies in the folder that tests are of."""
        return any((self.root / top / test.parent.name / name).exists() for top in homes)

    def find_stem(self, test: Path) -> str:
        """Return the name of the file that tests are of: the longest with which the name of the tests begins."""
        name = f"{test.stem.removeprefix('test_')}_"
        return max((stem for stem in self.stems if name.startswith(f"{stem}_")), key=len, default="")

    def of_importers(self, path: Path) -> list[Path]:
        """Return the tests with the name of a file that imports this one, straight away or through files without tests."""
        found: set[Path] = set()
        seen, frontier = set[str](), {module_name(self.root / path, self.root)}
        while frontier:
            seen |= frontier
            importers = {name for module in frontier for name in self.importers.get(module, ())} - seen
            # The modules of arbitor itself, which users import, are no part of the product that is mutated.
            homes = {name: Path(*name.split(".")[1:]) for name in importers}
            homes = {
                name: home for name, home in homes.items() if home.parts[:1] and home.parts[0] in PRODUCT
            }
            tests = {name: self.named(home) for name, home in homes.items()}
            found.update(*tests.values())
            frontier = {name for name in tests if not tests[name]}
        return sorted(found)

    def that_name(self, path: Path) -> list[Path]:
        """Return the tests that name the module of a file, or the package that it is in."""
        module = module_name(self.root / path, self.root)
        for name in (module, module.rpartition(".")[0]):
            found = [
                test
                for test in self.tests
                if re.search(rf"\b{re.escape(name)}\b", (self.root / test).read_text())
            ]
            if found:
                return found
        return []

    def imports(self, test: Path, path: Path) -> bool:
        """Return whether tests import a file of the product by its name, or the command line, where a command may need the file."""
        of_commands = path.parts[:-1] in OF_COMMANDS
        modules = (module_name(self.root / path, self.root), *COMMAND_LINE * of_commands)
        if test not in self.imported:
            nodes = ast.walk(ast.parse((self.root / test).read_text()))
            self.imported[test] = {name for node in nodes for name in imported(node, test)}
        return any(f"{name}.".startswith(f"{each}.") for name in self.imported[test] for each in modules)

    def alone(self, test: Path) -> bool:
        """Return whether a file of tests is of one family of ops."""
        own = Path(test.parent.name) / f"{self.stem_of[test]}.py"
        return all((self.root / top / own).exists() for top in OF_OPS)
