"""How much code the package has: ``python -m tests.code_lines [FOLDER]`` prints it.

A line counts if it holds more than a comment, and belongs neither to a docstring nor to a kernel
template: a string of several lines that a module assigns to a name.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparse_compile", "passes", "codegen")
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def sources(root: Path = ROOT) -> list[Path]:
    """The files of the package; those behind a link once."""
    return [
        path
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def code_lines(text: str) -> int:
    """Lines of code of a module, without docstrings and kernel templates.

    >>> code_lines('"Title."\\n\\nKERNEL = \\'\\'\\'\\nx = 1\\n\\'\\'\\'\\ny = 2  # why\\n')
    1
    """
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {
        line
        for token in tokens
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    tree = ast.parse(text)
    for string in (*_docstrings(tree), *_templates(tree)):
        lines -= set(range(string.lineno, (string.end_lineno or 0) + 1))
    return len(lines)


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    """Of modules, classes, functions and attributes: every string that stands alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and _is_string(node.value):
            yield node.value


def _templates(tree: ast.Module) -> Iterator[ast.expr]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(
            node.value, (ast.Constant, ast.BinOp, ast.Dict)
        ):
            for part in ast.walk(node.value):
                if _is_string(part) and part.end_lineno != part.lineno:
                    yield part


def _is_string(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", nargs="?", default=ROOT, type=Path, help="of a checkout")
    root = parser.parse_args().folder
    found = {folder: 0 for folder in FOLDERS}
    for path in sources(root):
        found[path.relative_to(root).parts[0]] += code_lines(path.read_text())
    for folder, lines in {**found, "all": sum(found.values())}.items():
        print(f"{lines:7}  {folder}")


if __name__ == "__main__":
    main()
