"""Attention over selected keys on a CUDA device: against fp64, without waiting, in CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sympy
import torch

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton import calls as calls_module
from sparse_compile.codegen.triton.selected import executor, united
from sparse_compile.expr import MaskExpr
from sparse_compile.ops import ATTENTION
from sparse_compile.selection import canonical
from tests.gpu.waiting import no_waiting
from tests.selection.cases import CASES, Case, check_executor
from tests.selection.united import COSTS, DECIDED, writers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")
WIDE = [
    replace(CASES[0], name=f"D={dim}, unit {unit}", dim=dim, value_dim=dim, unit_kv=unit, n_kv=300)
    for dim, unit in ((64, 64), (128, 64), (128, 128), (256, 64), (256, 1), (96, 16))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check_executor(executor, case, CUDA, dtype)


@pytest.mark.parametrize(
    "case", [c for c in [*CASES, *WIDE] if c.unit_kv >= 16 and c.dim <= 256], ids=str
)
def test_keys_outermost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "PREPARED", {})
    monkeypatch.setattr(executor, "is_by_key", lambda launch: True)
    check_executor(executor, case, CUDA, torch.bfloat16)


UNITED = [
    *(c for c in [*CASES, *WIDE] if c.unit_kv >= 16 and c.dim <= 256 and c.n_q > 1),
    *(replace(WIDE[1], name=f"groups of {n}", q_heads=2 * n) for n in (1, 5, 8, 16, 32)),
    replace(WIDE[0], name="long lists", n_q=200, n_kv=2000, most=25),
]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("writer", COSTS)
@pytest.mark.parametrize("case", UNITED, ids=str)
def test_unions(
    case: Case, writer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(united, "COSTS", COSTS[writer])
    few = case.unit_q * (case.q_heads // math.lcm(case.kv_heads, case.lists)) <= 32
    assert writers(case, CUDA, dtype) == {writer if few else "query alone"}


@pytest.mark.parametrize(("case", "writer"), DECIDED, ids=str)
def test_the_lists_decide_whether_they_are_united(case: Case, writer: str) -> None:
    assert writers(case, CUDA, torch.bfloat16) == {writer}


def test_unions_in_a_recorded_graph_follow_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording serves lists for which unions pay, and such for which they do not."""
    monkeypatch.setattr(calls_module, "PREPARED", {})
    monkeypatch.setattr(united, "is_large", lambda launch: True)
    monkeypatch.setattr(executor, "parts_of", lambda launch: 1)
    calls = [case for case, _ in DECIDED]
    q, k, v = (t.cuda().bfloat16() for t in calls[0].operands()[:3])
    chosen = [case.selection() for case in calls]
    index, count = chosen[0].index.cuda(), chosen[0].count.cuda()

    def run() -> torch.Tensor:
        lists = index, count
        return executor.forward(AttentionCall(q, k, v, [], [], lists, 0.2, calls[0].spec))[0]

    run()
    with no_waiting():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for one in (*chosen, chosen[0]):
        index.copy_(one.index)
        count.copy_(one.count)
        graph.replay()
        torch.testing.assert_close(out, run(), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_keys_in_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "PREPARED", {})
    monkeypatch.setattr(executor, "parts_of", lambda launch: parts)
    check_executor(executor, CASES[2], CUDA, torch.bfloat16)


def test_nothing_waits() -> None:
    case = CASES[0]
    q, k, v = (t.cuda().requires_grad_() for t in case.operands()[:3])
    index = case.index().cuda()

    def run() -> None:
        lists = canonical(index, -(-case.n_kv // case.unit_kv))
        ATTENTION(q, k, v, [], [], [], lists, 0.2, case.spec.text)[0].sum().backward()

    run()  # compiles
    with no_waiting():
        run()


def test_a_recorded_graph_follows_a_changing_selection() -> None:
    case = replace(CASES[0], n_q=1, mask=MaskExpr(sympy.true))
    q, k, v = (t.cuda() for t in case.operands()[:3])
    units = -(-case.n_kv // case.unit_kv)
    index = case.index().cuda()

    def run() -> torch.Tensor:
        lists = canonical(index, units)
        return ATTENTION(q, k, v, [], [], [], lists, 0.2, case.spec.text)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        index.copy_(torch.randint(-1, units, index.shape, generator=generator))
        graph.replay()
        torch.testing.assert_close(out, run(), rtol=0, atol=0)
