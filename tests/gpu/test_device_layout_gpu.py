"""Block lists built by generated kernels on a CUDA device: equal to those of the CPU, and fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.triton.layout.build import DeviceProblem
from sparse_compile.expr import KV, B, FloorDiv, FloorMod, MaskExpr, Q, table
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec.view import Order, natural
from tests.layout.device_cases import CASES, DeviceCase, check, check_packed, near, residues

DOCUMENTS = sympy.Eq(table(0)(B, Q), table(0)(B, KV))
NAMES = ("window", "global tokens", "documents", "per-head window", "whole axis", "all at once")
LARGE = [case for case in CASES if case.name in NAMES]
ROWS, COLUMNS = FloorDiv(Q, 1024) - FloorDiv(KV, 1024), FloorMod(Q - KV, 1024)
RUNS, CLASSES = natural(64), residues(1024, 64)
PATTERNS: dict[str, tuple[Any, Order]] = {
    "causal": (KV <= Q, RUNS),
    "causal window": ((KV <= Q) & (Q - KV < 4096), RUNS),
    "Longformer": (near(Q, KV, 256) | (Q < 64) | (KV < 64), RUNS),
    "documents": (DOCUMENTS, RUNS),
    "strided": (sympy.Eq(COLUMNS, 0), CLASSES),
    "axial rows": (sympy.Eq(ROWS, 0), RUNS),
    "axial columns": (sympy.Eq(COLUMNS, 0) & sympy.Ne(ROWS, 0), CLASSES),
    "window of documents": ((near(Q, KV, 256) & DOCUMENTS) | (Q < 64) | (KV < 64), RUNS),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gpu_lists_what_the_cpu_lists(case: DeviceCase) -> None:
    check(replace(case, span=None), torch.device("cuda"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_in_one_vector(case: DeviceCase) -> None:
    check_packed(replace(case, span=None), torch.device("cuda"))


@pytest.mark.parametrize("n", [1000, 4096])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_long_lists_in_one_vector(case: DeviceCase, n: int) -> None:
    small = replace(case, n_q=n, n_kv=n + 77, q=natural(64), kv=natural(32), size=300, span=None)
    check_packed(small, torch.device("cuda"))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_small_spans(case: DeviceCase) -> None:
    check(case, torch.device("cuda"))


@pytest.mark.parametrize("n", [1000, 16384])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_long_sequences(case: DeviceCase, n: int) -> None:
    small = replace(case, n_q=n, n_kv=n + 77, q=natural(64), kv=natural(32), size=300, span=None)
    check(small, torch.device("cuda"))


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_16384(name: str) -> None:
    predicate, order = PATTERNS[name]
    case = DeviceCase(name, predicate, 16384, 16384, order, order, batch=1, heads=1, span=None)
    check(case, torch.device("cuda"))


def unequal_documents(n: int, mean: int) -> Tensor:
    """int64 [1, n]: the document of each token, with lengths from one to two ``mean``."""
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(n, dtype=torch.int64)
    first[torch.randperm(n, generator=generator)[: n // mean]] = 1
    return first.cumsum(0)[None].cuda()


def seconds(action: Callable[[], Any], times: int) -> float:
    """The median of some runs, by the clock on the wall, with the device idle before and after."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_layout_of_a_million_tokens_takes_milliseconds(name: str) -> None:
    """From predicate, lengths and tables to lists on the device, nothing kept from earlier."""
    predicate, order = PATTERNS[name]
    for n, limit in ((65536, None), (1 << 20, 10e-3)):
        mask = MaskExpr(predicate, ("int64",))
        given = Problem.of(mask, ProblemShape(1, 8, n, n), (order, order))
        tables = [unequal_documents(n, 1024)]

        def both(given: Problem = given, tables: list[Tensor] = tables) -> None:
            problem = DeviceProblem.of(given, tables, torch.device("cuda"))
            problem.rows(), problem.cols()

        def rows(given: Problem = given, tables: list[Tensor] = tables) -> None:
            DeviceProblem.of(given, tables, torch.device("cuda")).rows()

        both()  # compiles
        one, two = seconds(rows, 21), seconds(both, 21)
        print(f"{name}, N = {n}: rows {one * 1e6:.0f} us, rows and columns {two * 1e6:.0f} us")
        assert limit is None or two <= limit
