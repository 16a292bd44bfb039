"""How much of the score matrix a mask allows, counted exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr, evaluate
from sparse_compile.layout.block_layout import PARTIAL, BlockLayout

#: Entries of the score matrix evaluated at once.
_PAIRS_AT_ONCE = 1 << 22


def mask_pairs(
    mask: MaskExpr,
    layout: BlockLayout,
    batch: int,
    heads: int,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> int:
    """The number of (b, h, q, kv) that ``mask`` allows.

    FULL blocks count by their area, PARTIAL ones by evaluating the predicate in them, so the cost
    follows the layout. Synchronises with the device of ``layout``, where ``tables`` must be.

    >>> from sparse_compile.expr import KV, Q
    >>> from sparse_compile.layout import Problem, ProblemShape, build_layout
    >>> causal = MaskExpr(KV <= Q)
    >>> layout = build_layout(Problem.of(causal, ProblemShape(1, 2, 100, 100), (16, 16)))
    >>> mask_pairs(causal, layout, batch=1, heads=2) == 2 * (100 * 101 // 2)
    True
    """
    area = layout.block_q * layout.block_kv
    total = int(layout.rows.counts[..., 1].sum(dtype=torch.int64)) * area
    for c in range(layout.classes):
        total += _partial_pairs(mask, layout, c, tables, sizes)
    return total * (batch // layout.batches) * (heads // layout.heads)


def _partial_pairs(
    mask: MaskExpr, layout: BlockLayout, c: int, tables: Sequence[Tensor], sizes: Sequence[int]
) -> int:
    r, k, kind = layout.rows.entries(c)
    r, k = r[kind == PARTIAL], k[kind == PARTIAL]
    b, h = (torch.tensor(value, device=r.device) for value in divmod(c, layout.heads))
    within_q = torch.tensor(layout.q.offsets(), device=r.device)[:, None]
    within_kv = torch.tensor(layout.kv.offsets(), device=r.device)
    at_once = max(1, _PAIRS_AT_ONCE // (layout.block_q * layout.block_kv))
    total = 0
    for rows, cols in zip(torch.split(r, at_once), torch.split(k, at_once), strict=True):
        q = layout.q.base(rows, layout.n_q)[:, None, None] + within_q
        kv = layout.kv.base(cols, layout.n_kv)[:, None, None] + within_kv
        where = {"b": b, "h": h, "q": q, "kv": kv}
        allowed = evaluate(mask, where, layout.n_q, layout.n_kv, tables, sizes)
        total += int(((q < layout.n_q) & (kv < layout.n_kv) & allowed).sum())
    return total
