"""The kernel that chooses, in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.codegen.triton.selection import choose, printable
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops.indexer import INDEXED_TOPK
from sparse_compile.selection import Selection
from sparse_compile.selection.builders import BUILDERS
from sparse_compile.spec.indexer import IndexerSpec
from tests.handed_in import serve_nothing, serve_the_cpu

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

INF = float("inf")
DOCUMENTS = torch.tensor([[0] * 40 + [1] * 31, [0] * 20 + [1] * 51])
RULES: list[Any] = [
    lambda **more: P.TopK(3, **more),
    lambda **more: P.TopK(9, sink=1, local=2, **more),
    lambda **more: P.TopRatio(0.3, sink=1, **more),
    lambda **more: P.TopP(0.6, local=1, **more),
    lambda **more: P.TopP(1.0, most=4, **more),
    lambda **more: P.Threshold(0.5, diagonal=True, **more),
    lambda **more: P.Threshold(0.1, of="softmax", most=3, **more),
]
MASKS: list[Any] = [
    None,
    P.Causal(align="lower_right"),
    P.SlidingWindow(30),
    P.heads([P.Causal(), P.SlidingWindow(20), P.All(), P.Causal()]),
    P.Documents(DOCUMENTS, q_ids=DOCUMENTS[:, 15:25]),
]


def both(
    pattern: Any, q: Tensor, k: Tensor, mask: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Selection]:
    """What the kernel selects, and what torch does."""
    expr, tables = None, []
    if mask is not None:
        bound = mask.bound()
        expr = bound.expr
        tables = bound.tables("cpu", q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    found = []
    for serve in (serve_the_cpu, serve_nothing):
        serve(BUILDERS, monkeypatch)
        found.append(pattern.select(q, k, expr, tables, []))
    return found


def assert_same(found: list[Selection]) -> None:
    mine, wanted = found
    torch.testing.assert_close(mine.count, wanted.count, rtol=0, atol=0)
    used = torch.arange(mine.index.shape[-1]) < wanted.count[..., None]
    torch.testing.assert_close(mine.index[used], wanted.index[used], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rule", "unit_q", "mask"),
    [  # what is visible does not depend on the rule: each rule with two masks, each mask in turn
        pytest.param(rule, unit_q, mask, id=f"{number}-{mask}")
        for number, (rule, unit_q) in enumerate([*((r, 1) for r in RULES), (RULES[1], 16)])
        for mask in (MASKS[number % len(MASKS)], MASKS[(number + 1) % len(MASKS)])
    ],
)
def test_rules(rule: Any, mask: Any, unit_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers, so that scores are exact and often equal.
    shapes = (2, 4, 10, 4), (2, 2, 71, 4)
    q, k = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    pattern = rule(unit_kv=16, unit_q=unit_q, scorer=P.MinMax())
    assert_same(both(pattern, q, k, mask, monkeypatch))


@pytest.mark.parametrize("share", ["group", "all", "none"])
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
def test_heads_and_corners(share: str, align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 90, 8)
    pattern = P.TopK(3, unit_kv=16, block=32, local=1, share=share, align=align)
    assert_same(both(pattern, q, k, P.Causal(align="lower_right"), monkeypatch))
    for lists in {"group": [2], "all": [1], "none": [4]}[share]:
        by_head = P.TopK(tuple(range(1, lists + 1)), unit_kv=1, share=share)
        assert_same(both(by_head, q, k, P.Causal(), monkeypatch))


@pytest.mark.parametrize("rule", RULES[:3] + RULES[3:])
def test_scores_that_are_not_numbers(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    special = torch.tensor([math.nan, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1.0, 1.0, INF, -3.0])
    scores = special.repeat(2, 2, 12, 1)
    scores[0, 0, 3:5] = -INF
    scores[0, 0, 9:11] = math.nan
    scores[1, 1, 5:7] = INF
    q, k = torch.zeros(2, 2, 12, 4), torch.zeros(2, 2, 11, 4)
    pattern = rule(unit_kv=1, scorer=lambda q, k: scores)
    assert_same(both(pattern, q, k, None, monkeypatch))


def test_one_query_and_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 3000, 4)
    assert_same(both(P.TopK(700, unit_kv=1), q, k, None, monkeypatch))


@pytest.mark.parametrize(
    ("heads", "dim", "unit_q", "block", "dtype"),
    [
        (3, 8, 1, 1, torch.float32),
        (16, 20, 1, 16, torch.bfloat16),
        (40, 16, 16, 200, torch.float32),
        (40, 16, 16, 200, torch.bfloat16),
    ],
)
def test_indexer(
    heads: int, dim: int, unit_q: int, block: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_q, n_kv = 70, 210
    # Whole numbers, so that sums are exact in any order.
    q, k, w = (
        torch.randint(-3, 4, shape).to(dtype)
        for shape in ((2, heads, n_q, dim), (2, n_kv, dim), (2, n_q, heads))
    )
    unit = 16 if block == 16 else 1
    pattern = P.TopK(5, unit_kv=unit, block=block, unit_q=unit_q, scorer=P.Indexer(q, k, w))
    found = []
    for serve in (serve_the_cpu, serve_nothing):
        serve(BUILDERS, monkeypatch)
        operands = torch.zeros(2, 2, n_q, 4), torch.zeros(2, 2, n_kv, 4)
        found.append(pattern.select(*operands, P.Causal().bound().expr, [], []))
    assert_same(found)


def test_more_blocks_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "HELD", 64)
    monkeypatch.setattr(printable, "_launcher", printable._launcher.__wrapped__)
    q, k = (torch.randint(-2, 3, (1, h, n, 4)).float() for h, n in ((2, 6), (1, 1100)))
    for pattern in (P.TopK(40, unit_kv=1, sink=1, local=2), P.TopK(2000, unit_kv=1)):
        assert_same(both(pattern, q, k, P.Causal(align="lower_right"), monkeypatch))


@pytest.mark.parametrize(("fill", "adds"), [(-INF, False), (-INF, True), (-1e30, True)])
def test_the_operator_of_an_indexer(
    fill: float, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, w = (
        torch.randint(-3, 4, shape).bfloat16() for shape in ((1, 40, 5, 8), (1, 70, 8), (1, 40, 5))
    )
    mask = MaskExpr(KV <= Q + 9)
    steps = (("mul", 0.5),), (("div", 4.0),)
    spec = IndexerSpec(*steps, True, mask, fill, adds, single=True)
    scores = ((q.float() @ k.float().mT[:, None] * 0.5).relu() * w.float()[..., None]).sum(2) / 4
    keep = torch.arange(70) <= torch.arange(40)[:, None] + 9
    scores = torch.where(keep, scores, scores + fill if adds else fill)
    wanted = scores.topk(6).values
    for serve in (serve_the_cpu, serve_nothing):
        serve(BUILDERS, monkeypatch)
        args = q, k.mT, w.float(), [], [], 6, spec.text
        torch.testing.assert_close(scores.gather(-1, INDEXED_TOPK(*args)), wanted)
