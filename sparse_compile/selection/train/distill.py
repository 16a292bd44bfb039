"""Distillation: what a gate learns to predict, and the loss that teaches it that.

The pooled attention map says how much attention units of queries give to units of keys
(SeerAttention, arXiv:2410.13276); the recall of a selection is measured with it, too. Dense scores
exist for one chunk of queries at a time only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.errors import BadShape, PatternMisuse
from sparse_compile.expr import MaskExpr, evaluate, grid
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import blocks, choice, whole
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
    weight = in_units(weight, -1, chunk.unit_kv)
    if reduce == "max":
        by_query = in_units(weight.amax(-1), -2, chunk.unit_q)
        return torch.unflatten(by_query.amax(3), 1, (lists, -1)).amax(2)
    mass = in_units(weight.sum(-1), -2, chunk.unit_q).sum(3)
    attends = in_units((total != -math.inf).float(), -2, chunk.unit_q).sum(3)
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
        by_unit_of_keys = in_units(chunk.keep(), -1, chunk.unit_kv).any(-1)
        keep = in_units(by_unit_of_keys, -2, chunk.unit_q).any(3)
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


def distillation_loss(
    gate_scores: Tensor, pooled_map: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """How far softmax(gate scores) is from the pooled attention map, row by row.

    It is the Kullback-Leibler divergence from the map, every row divided by its sum, to the softmax
    of the gate's scores over the allowed units; 0 if and only if they are equal. Gradients reach
    the scores only. It does not synchronise.

    Args:
        gate_scores: [B, Hs, Uq, Ukv], floating; before the softmax.
        pooled_map: [B, Hs, Uq, Ukv], not negative, of
            :func:`sparse_compile.selection.pooled_attention` with the same lists, units and mask.
        allowed: bool, broadcasts to the scores; see :func:`sparse_compile.selection.allowed_units`.
            The other units take no part. None: all units whose score is not -inf.

    Returns:
        fp32 scalar: the mean over the rows that have any mass on allowed units, 0 if none has.

    Raises:
        BadShape: the scores and the map differ in shape, or ``allowed`` does not broadcast.

    >>> scores = torch.tensor([[[[0.0, 0.0, 9.0]]]])
    >>> seen = torch.tensor([True, True, False])
    >>> float(distillation_loss(scores, torch.tensor([[[[0.3, 0.3, 0.0]]]]), seen))
    0.0
    """
    _check(gate_scores, pooled_map, allowed)
    scores = gate_scores.float()
    allowed = scores.detach() != -math.inf if allowed is None else allowed.expand(scores.shape)
    mass = pooled_map.detach().float().masked_fill(~allowed, 0)
    total = mass.sum(-1, keepdim=True)
    counts = total > 0
    target = mass / total.where(counts, torch.ones_like(total))
    # Rows that do not count get harmless numbers, so that no NaN reaches the gradients.
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(~counts, 0)
    predicted = scores.log_softmax(-1).masked_fill(~allowed, 0)
    by_row = (torch.xlogy(target, target) - target * predicted).sum(-1)
    return by_row.sum() / counts.sum().clamp_min(1)


def _check(scores: Tensor, pooled_map: Tensor, allowed: Tensor | None) -> None:
    if scores.shape != pooled_map.shape:
        raise BadShape(
            f"sparse_compile: distillation_loss got gate scores {list(scores.shape)} and a pooled "
            f"map {list(pooled_map.shape)}. Make the map with the gate's unit_q and unit_kv, and "
            "with lists= the number of lists of the gate."
        )
    if allowed is None:
        return
    pairs = zip(reversed(allowed.shape), reversed(scores.shape), strict=False)
    fits = allowed.dim() <= scores.dim() and all(a in (1, s) for a, s in pairs)
    if not fits or allowed.dtype != torch.bool:
        raise BadShape(
            f"sparse_compile: distillation_loss got allowed {list(allowed.shape)} of "
            f"{allowed.dtype} for gate scores {list(scores.shape)}. Pass a bool tensor that "
            "broadcasts to the scores."
        )
