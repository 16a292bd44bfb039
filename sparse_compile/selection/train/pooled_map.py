"""Pooled attention maps: how much attention units of queries give to units of keys.

They are what a gate learns to predict (SeerAttention, arXiv:2410.13276), and what the recall of a
selection is measured with. Dense scores exist for one chunk of queries at a time only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import MaskExpr
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import choice
from sparse_compile.selection.train.chunked import Chunk, chunks_of


@torch.no_grad()
def pooled_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    unit_q: int = 1,
    unit_kv: int = 64,
    mask: MaskExpr | Pattern | None = None,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    scale: float | None = None,
    reduce: str = "max",
    lists: int | None = None,
) -> Tensor:
    """The weights ``exp(scale * q . k - lse)`` pooled over units; without gradient.

    It takes the time of a dense forward pass. Memory grows with the map and with the scores of a
    chunk of queries, never with Nq * Nkv. It does not synchronise.

    Args:
        q: [B, Hq, Nq, D], floating.
        k: [B, Hkv, Nkv, D]; Hkv divides Hq.
        lse: [B, Hq, Nq], the natural log-sum-exp of the attention whose weights are meant, as the
            attention operators return it: -inf on empty rows. None: computed here.
        unit_q, unit_kv: consecutive queries, and keys, that make a unit; the last may be shorter.
        mask: who may attend to whom; None: everyone to everyone.
        tables, sizes: what a :class:`MaskExpr` reads; a pattern brings its own.
        scale: factor on the scores; 1 / sqrt(D) unless given.
        reduce: ``"max"``: the largest weight in each pair of units, and among the heads that share
            a list. ``"sum"``: the mass that a query gives to a unit of keys, averaged over those
            queries of the unit that attend to anything, and over the heads that share: every row of
            a head sums to 1, or to 0 where no query attends to anything.
        lists: how many lists of units there are, Hs of a :class:`Selection`: a divisor of Hq, and
            Hq // lists consecutive heads share one. None: every query head has its own.

    Returns:
        fp32 [B, lists, ceil(Nq / unit_q), ceil(Nkv / unit_kv)].

    Raises:
        BadShape, BadPattern: q, k, lse, the mask, the units or the lists do not fit together.

    >>> q = k = torch.zeros(1, 1, 4, 8)
    >>> pooled_attention(q, k, unit_q=2, unit_kv=2, reduce="sum")[0, 0].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    choice("pooled_attention: reduce", reduce, ("max", "sum"))
    chunks = chunks_of("pooled_attention", q, k, unit_q, unit_kv, mask, tables, sizes)
    lists = _divisor(q.shape[1] if lists is None else lists, q.shape[1])
    if lse is not None and lse.shape != q.shape[:3]:
        raise BadShape(
            f"sparse_compile: pooled_attention got lse {list(lse.shape)} for q {list(q.shape)}. "
            "Pass the log-sum-exp [B, Hq, Nq] of the same attention, or None."
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    maps = [_pooled(chunk, lse, factor, reduce, lists) for chunk in chunks]
    return torch.cat(maps, 2)


def _pooled(chunk: Chunk, lse: Tensor | None, scale: float, reduce: str, lists: int) -> Tensor:
    """The rows of the map that belong to a chunk."""
    score = chunk.scores(scale)
    if lse is None:
        total = score.logsumexp(-1, keepdim=True)
    else:
        total = lse[:, :, chunk.start : chunk.stop, None].float()
    weight = score.sub_(total.masked_fill(total == -math.inf, 0)).exp_()
    weight = chunk.by_unit_of_keys(weight)
    if reduce == "max":
        by_query = chunk.by_unit_of_queries(weight.amax(-1))
        return torch.unflatten(by_query.amax(3), 1, (lists, -1)).amax(2)
    mass = chunk.by_unit_of_queries(weight.sum(-1)).sum(3)
    attends = chunk.by_unit_of_queries((total != -math.inf).float()).sum(3)
    return torch.unflatten(mass / attends.clamp_min(1), 1, (lists, -1)).mean(2)


@torch.no_grad()
def allowed_units(
    q: Tensor,
    k: Tensor,
    *,
    unit_q: int = 1,
    unit_kv: int = 64,
    mask: MaskExpr | Pattern | None = None,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    lists: int | None = None,
) -> Tensor:
    """Which pairs of units have a pair of a query and a key that the mask allows.

    Args:
        q, k: only their shapes, their device and their number of heads are read.
        unit_q, unit_kv, mask, tables, sizes, lists: as in :func:`pooled_attention`. A unit is
            allowed to a list if it is to one of its heads.

    Returns:
        bool [B or 1, lists or 1, ceil(Nq / unit_q), ceil(Nkv / unit_kv)]: one where all are alike.

    >>> from sparse_compile import patterns
    >>> q = torch.empty(1, 1, 4, 8)
    >>> allowed_units(q, q, unit_q=2, unit_kv=2, mask=patterns.Causal()).int().tolist()
    [[[[1, 0], [1, 1]]]]
    """
    chunks = chunks_of("allowed_units", q, k, unit_q, unit_kv, mask, tables, sizes)
    lists = _divisor(q.shape[1] if lists is None else lists, q.shape[1])
    parts = []
    for chunk in chunks:
        keep = chunk.by_unit_of_queries(chunk.by_unit_of_keys(chunk.keep()).any(-1)).any(3)
        if keep.shape[1] > 1:
            keep = torch.unflatten(keep, 1, (lists, -1)).any(2)
        parts.append(keep)
    return torch.cat(parts, 2)


def _divisor(lists: int, heads: int) -> int:
    if lists < 1 or heads % lists:
        raise BadShape(
            f"sparse_compile: {lists} lists for {heads} query heads. The heads that share a list "
            "are equally many: write a divisor of the number of query heads."
        )
    return lists
