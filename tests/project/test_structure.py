"""Boundaries and budgets, as tests: who may import whom, how large files may grow."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.code_lines import code_lines
from tests.imports import NAMED, by_string, circles, imports, modules
from tests.tiers import ONE_IN

ROOT = Path(__file__).parents[2]
FOLDERS = ("sparse_compile", "passes", "codegen")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)
#: Folders from the innermost outwards: each imports only those before it.
ORDER = (
    *("errors", "expr", "spec", "patterns", "layout", "selection", "sites", "codegen", "ops"),
    *("passes", "api", "flex", "integrations", "backend", "inspect", "cli"),
)
RANK = {name: number for number, name in enumerate(ORDER)}
RANK |= {"reference": RANK["expr"], "options": RANK["spec"]}
#: What imports by string what is not ours: the user's model, and libraries that may be missing.
OF_OTHERS = {"sparse_compile.cli.factory", "sparse_compile.cli.doctor"}


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Each file, parsed once."""
    return {path: ast.parse(path.read_text()) for path in SOURCES}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sparse_compile" and len(parts) > 1 else None


def room_of_file(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return room_of(".".join(parts if parts[0] == "sparse_compile" else ("sparse_compile", *parts)))


@functools.cache
def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [alias.name for alias in node.names]))
    return found


def test_rooms_import_inwards_only() -> None:
    outwards = [
        f"{path.relative_to(ROOT)} must not import {room}"
        for path in SOURCES
        if (here := room_of_file(path)) not in (None, "__init__")
        for room in rooms_imported(path)
        if RANK[room] > RANK[here]
    ]
    assert outwards == []


def rooms_imported(path: Path) -> set[str]:
    targets: list[str] = []
    for module, names in imports_of(path):
        whole = module == "sparse_compile"
        targets += [f"{module}.{name}" for name in names] if whole else [module]
    return {room for target in targets if (room := room_of(target)) in RANK}


def test_rooms_are_ranked() -> None:
    rooms = {room_of_file(path) for path in SOURCES} - {"__init__", None}
    assert rooms == set(RANK)


def test_no_circle_of_imports() -> None:
    """Between files; imports inside functions count, for type checkers and by string not."""
    assert circles(imports()) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": set(), "f": {"a"}}
    assert circles({name: frozenset(targets) for name, targets in graph.items()}) == [["b", "c"]]


def test_imports_by_string_are_in_three_places() -> None:
    found = {
        name
        for name, path in modules().items()
        if any(by_string(node) is not None for node in ast.walk(ast.parse(path.read_text())))
    }
    assert found == {*NAMED, *OF_OTHERS}


def test_the_package_has_few_modules_beside_its_folders() -> None:
    assert len(list((ROOT / "sparse_compile").glob("*.py"))) <= 10


def test_passes_do_not_import_each_other() -> None:
    order = ("expand", "find", "lift", "decide", "rewrite")
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "passes" or parts[1] not in order:
            continue
        for module, _ in imports_of(path):
            if module.startswith("sparse_compile.passes."):
                other = ".".join(module.split(".")[2:])
                allowed = other.split(".")[0] not in {*order} - {parts[1]}
                assert allowed, (path, module)


def test_size_budget() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert not [path for path, lines in lengths.items() if lines > 400], "aim for one idea a file"
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert long == [], "of more than 60 lines"


MOST_PARAMETERS = 8


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a function takes, without ``self``, and keyword-only ones if it is public."""
    taken = function.args
    named = [a.arg for a in (*taken.posonlyargs, *taken.args) if a.arg not in ("self", "cls")]
    own = 0 if is_public(function) else len(taken.kwonlyargs)
    return len(named) + own + sum(part is not None for part in (taken.vararg, taken.kwarg))


def is_public(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    name = function.name
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def has_a_schema(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is an operator or a kernel, whose parameters are all flat; or one of torch's."""
    decorators = [ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list]
    schemas = ("operator", "triton.jit", "gluon.jit", "like_torch")
    return any(decorator.endswith(schemas) for decorator in decorators)


def test_no_function_takes_more_than_eight_parameters() -> None:
    found = Counter(
        node.name
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and parameters(node) > MOST_PARAMETERS
        and not has_a_schema(node)
    )
    assert not found, f"take more than {MOST_PARAMETERS} parameters: {dict(found)}"


def test_top_level_is_fixed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    allowed = {"sparse_compile", "passes", "codegen", "tests", "benchmarks", "docs"}
    assert folders <= allowed | {".ci", ".github"}


@pytest.mark.slow  # a process that imports all of torch
def test_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import sparse_compile, sparse_compile.reference, sparse_compile.ops, torch\n"
        "from sparse_compile.expr import KV, Q, MaskExpr\n"
        "from sparse_compile.spec import AttentionSpec\n"
        "q = torch.randn(1, 2, 40, 16)\n"
        "text = AttentionSpec(MaskExpr(KV <= Q), block_q=16, block_kv=16).text\n"
        "ops, cpu = torch.ops.sparse_compile, torch.device('cpu')\n"
        "lists = ops.layout([], '[]', [], 1, 2, 40, 40, 2, text, cpu, [])\n"
        "print(ops.attention(q, q, q, [], [], [], lists, 0.25, text)[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[1, 2, 40, 16]" in done.stdout


TYPES = pytest.param("mypy", marks=pytest.mark.slow)


@pytest.mark.parametrize("tool", ["ruff check .", "ruff format --check .", TYPES])
def test_lint_and_types(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *tool.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lines_of_code_are_counted() -> None:
    lines = [
        *('"""Title."""', "", "#: A kernel.", 'K = """', "x = 1", '"""', ""),
        *("def f():", '    "Doc."', "    return (", "        1  # why", "    )"),
    ]
    assert code_lines("\n".join(lines)) == 4


def test_tiers_name_files_that_exist() -> None:
    files = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert set(ONE_IN) <= files
