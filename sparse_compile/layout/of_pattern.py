"""Patterns on actual sizes: the dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.expr import COORDINATES, evaluate
from sparse_compile.patterns.base import Pattern


def dense(
    pattern: Pattern,
    n_q: int,
    n_kv: int,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask of ``pattern`` as a tensor.

    Args:
        pattern: any pattern.
        n_q: number of queries.
        n_kv: number of keys.
        batch: batch size.
        heads: number of query heads.
        device: where the mask is made.

    Returns:
        bool [batch, heads, n_q, n_kv], True where attention is allowed; 1 in place of ``batch`` or
        ``heads`` where the mask does not depend on them.

    Raises:
        BadPattern: if the pattern does not fit these sizes.

    >>> from sparse_compile import patterns as P
    >>> dense(P.Causal(), 2, 3).int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]]]
    """
    pattern.check(n_q, n_kv, batch, heads)
    bound = pattern.bound()
    tables = bound.tables(device, n_q, n_kv, batch, heads)
    extents = [n_q, n_kv]
    for size, coordinate in ((heads, COORDINATES[1]), (batch, COORDINATES[0])):
        extents.insert(0, size if bound.expr.depends_on(coordinate) else 1)
    where = {
        coordinate.name: torch.arange(extent, device=device).view([-1] + [1] * (3 - dim))
        for dim, (coordinate, extent) in enumerate(zip(COORDINATES, extents, strict=True))
    }
    mask = evaluate(bound.expr, where, n_q, n_kv, tables)
    return mask.expand(extents).contiguous()
