"""Which file imports which: at the top, inside functions, and by a string.

Strings in the :data:`NAMED` places are no imports here: what they are for is to close a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The top folders, and the name of the package that each is imported as.
PACKAGES = {
    "sparse_compile": "sparse_compile",
    "passes": "sparse_compile.passes",
    "codegen": "sparse_compile.codegen",
    "benchmarks": "benchmarks",
}
#: The lazy package, what loads generators, and what leads from patterns to layouts and selections.
NAMED = ("sparse_compile", "sparse_compile.codegen.generators", "sparse_compile.patterns.doors")
Imports = dict[str, frozenset[str]]


def modules() -> dict[str, Path]:
    """Every module of the package and of the benchmarks, by name; those behind a link once."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            inner = inner[:-1] if inner[-1] == "__init__" else inner
            found[".".join((package, *inner))] = path
    return found


def imports() -> Imports:
    """What each module imports of the others, imports for type checkers left out."""
    files = modules()
    return {
        name: frozenset(
            target
            for node in _read_at_run_time(ast.parse(path.read_text()))
            for target in _targets(node, name, files)
            if target in files and target != name
        )
        for name, path in files.items()
    }


def _read_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for part in node.orelse for inner in ast.walk(part))
            continue
        yield node
        yield from _read_at_run_time(node)


def _targets(node: ast.AST, here: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a statement imports; a part of a package counts as itself."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{here}: write the whole name of a module"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in files else str(node.module) for name in whole)
    elif (named := by_string(node)) is not None and here not in NAMED:
        yield from _named(named, here, files)


def by_string(node: ast.AST) -> ast.expr | None:
    """The string of an import by string."""
    if not isinstance(node, ast.Call):
        return None
    function = ast.unparse(node.func)
    return node.args[0] if function.endswith(("import_module", "__import__")) else None


def _named(argument: ast.expr, here: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a string names: of one that is filled in, all that begin like it."""
    if isinstance(argument, ast.Constant):
        yield str(argument.value)
    elif isinstance(argument, ast.JoinedStr):
        start = ""
        for part in argument.values:
            if isinstance(part, ast.Constant):
                start += str(part.value)
            elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "__name__":
                start += here
            else:
                yield from (name for name in files if name.startswith(start))
                return
        yield start


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """The sets of modules that reach each other (Tarjan's strong components), sorted."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in number:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], number[target])
        if lowest[name] == number[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return sorted(found)
