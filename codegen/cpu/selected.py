"""Attention over selected keys by gathering them, some queries at a time; for any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu.careful import mixed
from sparse_compile.codegen.precision import full_precision
from sparse_compile.expr import ScoreData, evaluate, evaluate_slope

#: Numbers that the gathered keys and the scores of a chunk have at most.
_MOST = 1 << 23


def _chunks(call: AttentionCall) -> Iterator[_Chunk]:
    """The units of queries, as many at a time as fit."""
    batch, units, most = call.q.shape[0], call.index.shape[2], call.index.shape[3]
    keys, rows = most * call.spec.unit_kv, call.members * call.spec.unit_q
    width = call.q.shape[3] + call.v.shape[3] + rows
    step = max(1, _MOST // max(1, batch * call.groups * keys * width))
    for first in range(0, units, step):
        yield _Chunk(call, first, min(first + step, units))


def _by_group(call: AttentionCall, t: Tensor) -> Tensor:
    """[B, heads, ...] of keys or lists as [B, groups, ...]."""
    return t.repeat_interleave(call.groups // t.shape[1], 1)


@dataclass(frozen=True)
class _Chunk:
    """Some units of queries; U of them, R = members * unit_q rows each, L gathered keys."""

    call: AttentionCall
    first: int
    end: int

    def rows(self, t: Tensor) -> Tensor:
        """[B, Hq, Nq, X] as fp32 [B, groups, U, R, X], 0 beyond the last query."""
        call, unit = self.call, self.call.spec.unit_q
        part = t[:, :, self.first * unit : self.end * unit].float()
        missing = (self.end - self.first) * unit - part.shape[2]
        part = torch.nn.functional.pad(part, (0, 0, 0, missing))
        shape = (t.shape[0], call.groups, call.members, self.end - self.first, unit, t.shape[3])
        return part.view(shape).transpose(2, 3).flatten(3, 4)

    def write(self, to: Tensor, rows: Tensor) -> None:
        """The inverse of :meth:`rows`."""
        call, unit = self.call, self.call.spec.unit_q
        batch, groups, units, _, width = rows.shape
        part = rows.view(batch, groups, units, call.members, unit, width).transpose(2, 3)
        part = part.reshape(batch, groups * call.members, units * unit, width)
        until = min(self.end * unit, to.shape[2])
        to[:, :, self.first * unit : until] = part[:, :, : until - self.first * unit]

    def keys(self) -> tuple[Tensor, Tensor]:
        """The gathered keys: int64 [B, groups, U, L], and which of them are selected and exist."""
        call, unit = self.call, self.call.spec.unit_kv
        index = _by_group(call, call.index[:, :, self.first : self.end]).long()
        count = _by_group(call, call.count[:, :, self.first : self.end])
        used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        used &= (index >= 0) & (index * unit < call.k.shape[2])
        tokens = index[..., None] * unit + torch.arange(unit, device=index.device)
        exist = used[..., None] & (tokens < call.k.shape[2])
        return tokens.clamp(0, call.k.shape[2] - 1).flatten(3), exist.flatten(3)

    def gathered(self, t: Tensor, keys: Tensor) -> Tensor:
        """Rows of [B, Hkv, Nkv, X] as fp32 [B, groups, U, L, X]."""
        group = torch.arange(self.call.groups, device=t.device) // (self.call.groups // t.shape[1])
        batch = torch.arange(t.shape[0], device=t.device)
        return t[batch[:, None, None, None], group[:, None, None], keys].float()

    def where(self, keys: Tensor) -> dict[str, Tensor]:
        """The coordinates of the pairs, which broadcast to [B, groups, U, R, L]."""
        call, unit = self.call, self.call.spec.unit_q
        device = keys.device
        row = torch.arange(call.members * unit, device=device)
        head = torch.arange(call.groups, device=device)[:, None] * call.members + row // unit
        token = torch.arange(self.first, self.end, device=device)[:, None] * unit + row % unit
        return {
            "b": torch.arange(call.q.shape[0], device=device).view(-1, 1, 1, 1, 1),
            "h": head[:, None, :, None],
            "q": token[:, :, None],
            "kv": keys[:, :, :, None, :],
        }

    def scores(self) -> _Scores:
        """The scores of the chunk."""
        keys, exist = self.keys()
        call, where = self.call, self.where(keys)
        query, key = self.rows(call.q), self.gathered(call.k, keys)
        data = call.q.shape[2], call.k.shape[2], call.tables, call.sizes
        score, slope = (query @ key.mT) * call.scale, None
        if call.spec.score is not None:
            score, slope = evaluate_slope(call.spec.score, score, ScoreData(where, *data))
        keep = evaluate(call.spec.mask, where, *data) & exist[:, :, :, None, :]
        keep = keep.expand(score.shape)
        return _Scores(query, key, score.masked_fill(~keep, -math.inf), slope, keys, keep)


@dataclass(frozen=True)
class _Scores:
    """Queries, gathered keys, scores with -inf where masked, which keys they are, and what is not
    masked.

    Attributes:
        slope: the derivative of a score by the scaled product; None for 1.
    """

    query: Tensor
    key: Tensor
    score: Tensor
    slope: Tensor | None
    keys: Tensor
    keep: Tensor

    def weight(self, total: Tensor) -> Tensor:
        """The weights, 0 where masked even in rows that are NaN; ``total`` is the log-sum-exp."""
        weight = (self.score - total.masked_fill(total == -math.inf, 0)).exp()
        return weight.masked_fill(~self.keep, 0)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over selected keys.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, 0 on empty rows; the natural log-sum-exp [B, Hq, Nq] in
        fp32, -inf on empty rows.
    """
    with full_precision(call.q.device.type):
        return _forward(call)


def _forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    q, v = call.q, call.v
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    for chunk in () if call.is_empty else _chunks(call):
        found = chunk.scores()
        keys, keep = found.keys, found.keep
        total = found.score.logsumexp(-1, keepdim=True)
        weight = found.weight(total)
        chunk.write(out, mixed(weight, keep, chunk.gathered(v, keys)).to(out.dtype))
        chunk.write(lse[..., None], total)
    return out, lse


def backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``(dq, dk, dv)`` in the dtypes of q, k and v."""
    with full_precision(call.q.device.type):
        return _backward(call, result)


def _backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.zeros_like(call.q)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (call.k, call.v))
    delta = (result.grad_out.float() * result.out.float()).sum(-1, keepdim=True)
    if result.grad_lse is not None:
        delta = delta - result.grad_lse.float()[..., None]
    for chunk in () if call.is_empty else _chunks(call):
        found = chunk.scores()
        keys, keep = found.keys, found.keep
        weight = found.weight(chunk.rows(result.lse[..., None]))
        grad = chunk.rows(result.grad_out)
        d_weight = grad @ chunk.gathered(call.v, keys).mT
        d_score = weight * (d_weight - chunk.rows(delta)) * call.scale
        if found.slope is not None:
            d_score *= found.slope
        d_score = d_score.masked_fill(~keep, 0)
        chunk.write(dq, mixed(d_score, keep, found.key).to(dq.dtype))
        _scatter(dk, keys, mixed(d_score.mT, keep.mT, found.query))
        _scatter(dv, keys, mixed(weight.mT, keep.mT, grad))
    return dq, dk.to(call.k.dtype), dv.to(call.v.dtype)


def _scatter(to: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Add [B, groups, U, L, X] to the rows ``keys`` of [B, Hkv, Nkv, X]."""
    batch, heads, n, width = to.shape
    group = torch.arange(keys.shape[1], device=to.device) // (keys.shape[1] // heads)
    owner = torch.arange(batch, device=to.device)[:, None] * heads + group
    place = owner[:, :, None, None] * n + keys
    to.view(-1, width).index_add_(0, place.flatten(), rows.reshape(-1, width))
