"""The mutants of a Python file: each changes one statement or one operator of it and leaves every other byte alone.

Not mutated: docstrings, annotations, assertions, `__all__`, imports, also those for type checkers alone, the text of messages (an
error is dropped whole), how a figure looks, and how a kernel is spread over a GPU (`num_warps`, `num_stages`), which changes no
result.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
LOGIC = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
NEGATIONS = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
"""Comparisons whose swap negates them: a condition of one of them is not negated a second time."""

EXTREMES = dict(
    pair
    for one, other in (
        ("min", "max"),
        ("minimum", "maximum"),
        ("amin", "amax"),
        ("argmin", "argmax"),
        ("floor", "ceil"),
        ("any", "all"),
    )
    for pair in ((one, other), (other, one))
)
KINDS = {
    "delete": "a statement is left out",
    "negate": "a condition is turned around",
    "swap": "another operator, extreme or sign",
    "value": "another number, truth value or default",
}
STATEMENTS = ("delete", "negate")
"""Kinds of change that delete or flip a statement."""

LAUNCH = ("num_warps", "num_stages")
LOOKS = (
    "grid", "legend", "set_axis_off", "set_label", "set_major_locator", "set_title", "set_ylim", "set_yscale", "set_yticks",
    "suptitle",
)  # fmt: skip
"""Methods of matplotlib's axes and figures that people judge, and no test."""

SHOWN = 90
"""Characters of source, about, that the description of a mutant shows."""


@dataclass(frozen=True)
class Mutant:
    """One change to a file.

    Fields:
        file:      path from the root of the tree.
        line:      where the change starts.
        kind:      one of `KINDS`.
        function:  name of the innermost function around it, "" at the top of a module or a class.
        decorated: names of that function's decorators.
        what:      the change in words.
        number:    1, or more for a further mutant of the same file, function and words.
        span:      first byte and the byte after the last one that `text` takes the place of.
    """

    file: str
    line: int
    kind: str
    function: str
    decorated: str
    what: str
    number: int
    span: tuple[int, int]
    text: str

    @property
    def id(self) -> str:
        """Return a name that stays when lines move."""
        return f"{self.file} {self.function or '(module)'}: {self.what} #{self.number}"

    def applied(self, source: bytes) -> bytes:
        """Return the source of the file with the change."""
        return source[: self.span[0]] + self.text.encode() + source[self.span[1] :]


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Return the mutants of a file of a tree, in the order of the file."""
    found, seen = [], Counter[tuple[str, str]]()
    for change in sorted(_Changes((root / file).read_bytes()).all(), key=lambda change: change[4]):
        kind, function, decorated, what, span, text, line = change
        seen[function, what] += 1
        number = seen[function, what]
        found.append(Mutant(file, line, kind, function, decorated, what, number, span, text))
    return found


Change = tuple[str, str, str, str, tuple[int, int], str, int]
"""Kind, function, its decorators, description, span, text that takes its place, line."""


class _Changes:
    """Walks over a file and collects its changes."""

    def __init__(self, source: bytes) -> None:
        self.source, self.tree = source, ast.parse(source)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.function, self.decorated, self.bound = "", "", set[str]()
        self.conditions: set[ast.AST] = set()
        self.found: list[Change] = []

    def all(self) -> list[Change]:
        """Return every change that leaves valid Python."""
        self.visit(self.tree)
        return [change for change in self.found if self._parses(change)]

    def _around(self, first: int, last: int) -> tuple[int, int]:
        """Return where the function, class or other statement of the module is that holds a span. Python reads each by itself.

        To read all of the file for each change took seconds for a long file.
        """
        for node in self.tree.body:
            lines = [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]
            begin, end = self.starts[min(lines) - 1], self.starts[node.end_lineno or -1]
            if begin <= first and last <= end:
                return begin, end
        return 0, len(self.source)

    def _parses(self, change: Change) -> bool:
        """Return whether Python reads the file with a change. A dropped `with` in parentheses, for example, leaves one of them."""
        first, last = change[4]
        begin, end = self._around(first, last)
        statement = self.source[begin:first] + change[5].encode() + self.source[last:end]
        try:
            ast.parse(statement)
        except SyntaxError:
            return False
        return True

    def span(self, node: ast.AST) -> tuple[int, int]:
        first = self.starts[node.lineno - 1] + node.col_offset
        return first, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, span: tuple[int, int]) -> str:
        return self.source[span[0] : span[1]].decode()

    def add(self, kind: str, span: tuple[int, int], text: str, shown: tuple[int, int]) -> None:
        """Note a change; `shown` is the expression that the description shows before and after."""
        if kind == "delete":
            words = f"without `{_short(self.text(shown))}`"
        else:
            first, last = max(shown[0], span[0] - SHOWN // 2), min(shown[1], span[1] + SHOWN // 2)
            before, after = (
                self.source[cut].decode(errors="ignore")
                for cut in (slice(first, span[0]), slice(span[1], last))
            )
            words = f"`{_short(before + self.text(span) + after)}` -> `{_short(before + text + after)}`"
        line = 1 + self.source[: span[0]].count(b"\n")
        self.found.append((kind, self.function, self.decorated, words, span, text, line))

    def visit(self, node: ast.AST) -> None:
        """Collect the changes of a node and of those within it."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.within(node)
            return
        for change in (self.statement, self.condition, self.expression):
            change(node)
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        for child in self.children(node):
            self.visit(child)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            self.bound |= (
                {name.id for name in ast.walk(target) if isinstance(name, ast.Name)} if target else set()
            )

    def within(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Collect the changes of a function: its defaults, and its body under its own name."""
        outer = self.function, self.decorated, self.bound
        self.function = node.name
        self.decorated = " ".join(self.text(self.span(item)) for item in node.decorator_list)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.bound = {argument.arg for argument in arguments}
        for default in filter(None, (*node.args.defaults, *node.args.kw_defaults)):
            is_text = isinstance(default, ast.Constant) and isinstance(default.value, str)
            if is_text or isinstance(default, (ast.Name, ast.Attribute)):
                self.add("value", self.span(default), '""' if is_text else "None", self.span(default))
            self.visit(default)
        for child in (*node.decorator_list, *node.body):
            self.visit(child)
        self.function, self.decorated, self.bound = outer

    def children(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield what is mutated within a node."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                is_launch = isinstance(child, ast.keyword) and child.arg in LAUNCH
                is_names = (
                    isinstance(child, ast.Assign) and self.text(self.span(child.targets[0])) == "__all__"
                )
                if isinstance(child, ast.AST) and not is_launch and not is_names:
                    yield child

    def statement(self, node: ast.AST) -> None:
        """Delete a call, a rebinding, a write to a part, an early exit, a raise, a loop, a context."""
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await))
        is_call = is_call and not _sets_looks(node.value)
        is_branch = isinstance(node, (ast.If, ast.For)) and not node.orelse and not _only_raises(node.body)
        is_branch = is_branch and not (
            isinstance(node, ast.If) and self.text(self.span(node.test)) == "TYPE_CHECKING"
        )
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            rebinds = isinstance(target, ast.Name) and bool(self.function) and target.id in self.bound
            is_call = rebinds or isinstance(target, (ast.Attribute, ast.Subscript))
        if is_call or is_branch or isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue)):
            if self.source[self.span(node)[0] :].startswith(b"elif"):
                return
            self.add("delete", self.span(node), "pass", self.span(node))
        if isinstance(node, ast.With) and all(item.optional_vars is None for item in node.items):
            header = self.span(node)[0], self.span(node.items[-1].context_expr)[1]
            self.add("delete", header, "if True", header)

    def condition(self, node: ast.AST) -> None:
        """Negate what an `if`, a `while` or a comprehension asks."""
        tests = node.ifs if isinstance(node, ast.comprehension) else [getattr(node, "test", None)]
        if isinstance(node, ast.Assert):
            return
        for test in filter(None, tests):
            negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
            swapped = isinstance(test, ast.Compare) and isinstance(test.ops[0], NEGATIONS)
            if negated or swapped:
                # `expression` turns it around, by its own operator.
                self.conditions.add(test)
            elif self.text(self.span(test)) != "TYPE_CHECKING":
                self.add("negate", self.span(test), f"not ({self.text(self.span(test))})", self.span(test))

    def expression(self, node: ast.AST) -> None:
        """Swap an operator, an extreme or a sign, change a number."""
        kind = "negate" if node in self.conditions else "swap"
        if isinstance(node, ast.Compare):
            for left, op, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators, strict=False
            ):
                self.swap(left, right, COMPARISONS[type(op)], node, kind)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                self.swap(left, right, LOGIC[type(node.op)], node)
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if not any(map(_is_sequence, (node.left, node.right))):
                self.swap(node.left, node.right, ARITHMETIC[type(node.op)], node)
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            self.swap(node.target, node.value, ARITHMETIC[type(node.op)], node)
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            width = {ast.Not: 3, ast.USub: 1, ast.Invert: 1}.get(type(node.op), 0)
            first = self.span(node)[0]
            if width:
                self.add(kind, (first, first + width), "", self.span(node))
        elif isinstance(node, ast.Call):
            name = self.text(self.span(node.func)).rpartition(".")[2]
            if name in EXTREMES:
                last = self.span(node.func)[1]
                self.add("swap", (last - len(name), last), EXTREMES[name], self.span(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = not node.value if isinstance(node.value, bool) else node.value + 1
            if isinstance(node.value, float):
                value = 2 * node.value or 1.0
            line = self.starts[node.lineno - 1], self.starts[node.lineno]
            comment = self.source.find(b"  #", self.span(node)[1], line[1])
            self.add("value", self.span(node), repr(value), (line[0], line[1] if comment < 0 else comment))

    def swap(
        self, left: ast.AST, right: ast.AST, pair: tuple[str, str], whole: ast.AST, kind: str = "swap"
    ) -> None:
        """Swap the operator that stands between two operands."""
        first, last = self.span(left)[1], self.span(right)[0]
        match = re.search(rf"(?<!\w){re.escape(pair[0])}(?!\w)", self.text((first, last)))
        if match:
            self.add(kind, (first + match.start(), first + match.end()), pair[1], self.span(whole))


def _short(text: str) -> str:
    """Return source on one line, cut where it is very long."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN + 30 else f"{text[: SHOWN - 25]} ... {text[-20:]}"


def _only_raises(body: list[ast.stmt]) -> bool:
    """Return whether a branch does nothing but raise."""
    return len(body) == 1 and isinstance(body[0], ast.Raise)


def _sets_looks(node: ast.expr) -> bool:
    """Return whether an expression is a call that decides how a figure looks."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOKS


def _is_sequence(node: ast.AST) -> bool:
    """Return whether an operand is a text, a tuple or a list, which `+` joins."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, (ast.JoinedStr, ast.Tuple, ast.List))
