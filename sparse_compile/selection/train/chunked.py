"""Scores of all keys for some queries at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor

from sparse_compile.errors import BadShape, PatternMisuse
from sparse_compile.expr import MaskExpr, evaluate, grid
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import blocks, whole
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.scores import in_units

#: Numbers that the scores of a chunk have at most, unless those of one unit of queries are more.
MOST = 1 << 23


@dataclass(frozen=True)
class Chunk:
    """The queries ``start, ..., stop - 1``: whole units of queries, the last may be shorter."""

    q: Tensor
    k: Tensor
    mask: MaskExpr
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    unit_q: int
    unit_kv: int
    start: int
    stop: int

    def keep(self) -> Tensor:
        """Who may attend to whom: bool [B or 1, Hq or 1, stop - start, Nkv]."""
        device, n_q, n_kv = self.q.device, self.q.shape[2], self.k.shape[2]
        of_heads = {"b": range(self.q.shape[0]), "h": range(self.q.shape[1])}
        where = grid(device, **of_heads, q=range(self.start, self.stop), kv=range(n_kv))
        keep = evaluate(self.mask, where, n_q, n_kv, self.tables, self.sizes)
        keep = keep.view((1,) * (4 - keep.dim()) + keep.shape)
        return keep.expand(-1, -1, self.stop - self.start, n_kv)

    def scores(self, scale: float) -> Tensor:
        """fp32 [B, Hq, stop - start, Nkv], -inf where masked."""
        batch, heads, _, dim = self.q.shape
        # The query heads of a key head are rows of one product, so keys are not repeated.
        rows = self.q[:, :, self.start : self.stop].float() * scale
        rows = rows.reshape(batch, self.k.shape[1], -1, dim)
        score = (rows @ self.k.float().mT).view(batch, heads, -1, self.k.shape[2])
        return score.masked_fill_(~self.keep(), -math.inf)

    def by_unit_of_keys(self, t: Tensor) -> Tensor:
        """[..., Nkv] as [..., units, unit_kv], zero beyond the last key."""
        return in_units(t, -1, self.unit_kv)

    def by_unit_of_queries(self, t: Tensor) -> Tensor:
        """[B, H, stop - start, X] as [B, H, units, unit_q, X], zero beyond the last query."""
        return in_units(t, -2, self.unit_q)


def chunks_of(
    who: str,
    q: Tensor,
    k: Tensor,
    unit_q: int,
    unit_kv: int,
    mask: MaskExpr | Pattern | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> list[Chunk]:
    """All queries, as many at a time as fit; ``who`` asks, for messages."""
    unit_q, unit_kv = whole(f"{who}: unit_q", unit_q, 1), whole(f"{who}: unit_kv", unit_kv, 1)
    check_heads(who, q, k)
    expr, tables = bound(mask, q, k, tables)
    each = q.shape[0] * q.shape[1] * unit_q * k.shape[2]
    given = q, k, expr, tables, sizes, unit_q, unit_kv
    return [
        Chunk(*given, first * unit_q, min(end * unit_q, q.shape[2]))
        for first, end in chunks(blocks(q.shape[2], unit_q), each, MOST)
    ]


def bound(
    mask: Any, q: Tensor, k: Tensor, tables: Sequence[Tensor]
) -> tuple[MaskExpr, Sequence[Tensor]]:
    """The predicate of a mask, and its tables for q and k.

    Raises:
        PatternMisuse: it is neither a pattern, a :class:`MaskExpr` nor None, or it selects.
        BadPattern: the pattern does not fit q and k.
    """
    if mask is None:
        return MaskExpr(sympy.true), ()
    if isinstance(mask, MaskExpr):
        return mask, tables
    if not isinstance(mask, Pattern):
        raise PatternMisuse(
            f"sparse_compile: no mask of this kind: {type(mask).__name__}. Pass a pattern of "
            "sparse_compile.patterns, a MaskExpr, or None."
        )
    sizes = q.shape[2], k.shape[2], q.shape[0], q.shape[1]
    mask.check(*sizes)
    pattern = mask.bound()
    return pattern.expr, pattern.tables(q.device, *sizes)


def check_heads(who: str, q: Tensor, k: Tensor) -> None:
    """Raise unless q is [B, Hq, Nq, D] and k is [B, Hkv, Nkv, D], Hkv divides Hq, none empty."""
    fits = q.dim() == k.dim() == 4 and min(*q.shape, *k.shape) > 0
    fits = fits and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or q.shape[1] % k.shape[1]:
        raise BadShape(
            f"sparse_compile: {who} got q {list(q.shape)} and k {list(k.shape)}. Pass q "
            "[B, Hq, Nq, D] and k [B, Hkv, Nkv, D], not empty; Hkv divides Hq."
        )
