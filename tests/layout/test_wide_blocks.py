"""Layouts of blocks of 192 x 128: no square, and no power of two."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F

from sparse_compile.expr import KV, H, MaskExpr, Q, evaluate
from sparse_compile.layout import build_views
from sparse_compile.layout.block_layout import EMPTY, FULL, PARTIAL
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec

MASKS = {
    "causal": MaskExpr(KV <= Q),
    "window": MaskExpr((KV <= Q) & (Q - KV < 300)),
    "prefix": MaskExpr((KV <= Q) | (KV < 130)),
    "by head": MaskExpr((KV <= Q) & (Q - KV < 200 * (H + 1))),
    "global": MaskExpr((sympy.Abs(Q - KV) < 50) | (Q < 3) | (KV < 3)),
}


@pytest.mark.parametrize("n", [(1, 1), (192, 128), (193, 129), (1000, 1000), (1536, 700)])
@pytest.mark.parametrize("name", MASKS)
def test_kinds_are_those_of_the_pairs(name: str, n: tuple[int, int]) -> None:
    mask, (n_q, n_kv), heads = MASKS[name], n, 3
    shape = ProblemShape(1, heads, n_q, n_kv)
    layout = build_views(AttentionSpec(mask, block_q=192, block_kv=128), shape).views[0]
    axes = {"b": 1, "h": heads, "q": n_q, "kv": n_kv}
    coordinates = {
        axis: torch.arange(size).view([-1 if i == k else 1 for i in range(4)])
        for k, (axis, size) in enumerate(axes.items())
    }
    dense = evaluate(mask, coordinates, n_q, n_kv).expand(1, layout.heads, n_q, n_kv)[0]
    rows, columns = -(-n_q // 192), -(-n_kv // 128)
    padded = F.pad(dense, (0, columns * 128 - n_kv, 0, rows * 192 - n_q))
    blocks = padded.view(-1, rows, 192, columns, 128)
    some, every = blocks.any(4).any(2), blocks.all(4).all(2)
    wanted = torch.where(every, FULL, torch.where(some, PARTIAL, EMPTY))
    assert torch.equal(layout.kinds(), wanted.to(torch.int8))
    assert torch.equal(layout.cols.counts.sum((1, 2)), (wanted != EMPTY).sum((1, 2)).int())
