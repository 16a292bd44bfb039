"""Attention over selected keys by gathering them, some queries at a time; for any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.expr import evaluate
from sparse_compile.selected_spec import SelectedSpec

#: Numbers that the gathered keys and the scores of a chunk have at most.
_MOST = 1 << 23


@dataclass(frozen=True)
class _Call:
    """Operands of a call, and how its heads are grouped.

    A *group* is the query heads that share both a key head and a selection.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    count: Tensor
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    scale: float
    spec: SelectedSpec

    @property
    def groups(self) -> int:
        return math.lcm(self.k.shape[1], self.index.shape[1])

    @property
    def members(self) -> int:
        """Query heads of a group."""
        return self.q.shape[1] // self.groups

    def chunks(self) -> Iterator[_Chunk]:
        """The units of queries, as many at a time as fit; none if there are no keys."""
        if not self.k.shape[2]:
            return
        batch, units, most = self.q.shape[0], self.index.shape[2], self.index.shape[3]
        keys, rows = most * self.spec.unit_kv, self.members * self.spec.unit_q
        width = self.q.shape[3] + self.v.shape[3] + rows
        each = max(1, batch * self.groups * keys * width)
        step = max(1, _MOST // each)
        for first in range(0, units, step):
            yield _Chunk(self, first, min(first + step, units))

    def by_group(self, t: Tensor) -> Tensor:
        """[B, heads, ...] of keys or lists as [B, groups, ...]."""
        return t.repeat_interleave(self.groups // t.shape[1], 1)


@dataclass(frozen=True)
class _Chunk:
    """Some units of queries; U of them, R = members * unit_q rows each, L gathered keys."""

    call: _Call
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
        index = call.by_group(call.index[:, :, self.first : self.end]).long()
        count = call.by_group(call.count[:, :, self.first : self.end])
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

    def keep(self, keys: Tensor, exist: Tensor) -> Tensor:
        """Which pairs attend: bool, broadcasts to [B, groups, U, R, L]."""
        call, unit = self.call, self.call.spec.unit_q
        device = keys.device
        row = torch.arange(call.members * unit, device=device)
        head = torch.arange(call.groups, device=device)[:, None] * call.members + row // unit
        token = torch.arange(self.first, self.end, device=device)[:, None] * unit + row % unit
        where = {
            "b": torch.arange(call.q.shape[0], device=device).view(-1, 1, 1, 1, 1),
            "h": head[:, None, :, None],
            "q": token[:, :, None],
            "kv": keys[:, :, :, None, :],
        }
        allowed = evaluate(
            call.spec.mask, where, call.q.shape[2], call.k.shape[2], call.tables, call.sizes
        )
        return allowed & exist[:, :, :, None, :]

    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, gathered keys, scores with -inf where masked, and which keys they are."""
        keys, exist = self.keys()
        query, key = self.rows(self.call.q), self.gathered(self.call.k, keys)
        score = (query @ key.mT) * self.call.scale
        return query, key, score.masked_fill(~self.keep(keys, exist), -math.inf), keys


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: SelectedSpec,
) -> tuple[Tensor, Tensor]:
    """Attention over selected keys.

    Args:
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        v: [B, Hkv, Nkv, Dv].
        index, count: as in :class:`sparse_compile.selection.Selection`.
        tables, sizes: what the mask reads.
        scale: factor on the scores.
        spec: the mask and the units.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, 0 on empty rows; the natural log-sum-exp [B, Hq, Nq] in
        fp32, -inf on empty rows.
    """
    call = _Call(q, k, v, index, count, tables, sizes, scale, spec)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    for chunk in call.chunks():
        *_, score, keys = chunk.scores()
        total = score.logsumexp(-1, keepdim=True)
        weight = (score - total.masked_fill(total == -math.inf, 0)).exp()
        chunk.write(out, (weight @ chunk.gathered(v, keys)).to(out.dtype))
        chunk.write(lse[..., None], total)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: SelectedSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``(dq, dk, dv)`` in the dtypes of q, k and v.

    ``out`` and ``lse`` may be those of a larger attention of which this is a part.
    """
    call = _Call(q, k, v, index, count, tables, sizes, scale, spec)
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.float()[..., None]
    for chunk in call.chunks():
        query, key, score, keys = chunk.scores()
        total = chunk.rows(lse[..., None])
        weight = (score - total.masked_fill(total == -math.inf, 0)).exp()
        grad = chunk.rows(grad_out)
        d_weight = grad @ chunk.gathered(v, keys).mT
        d_score = weight * (d_weight - chunk.rows(delta)) * scale
        chunk.write(dq, (d_score @ key).to(dq.dtype))
        _scatter(dk, keys, d_score.mT @ query)
        _scatter(dv, keys, weight.mT @ grad)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scatter(to: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Add [B, groups, U, L, X] to the rows ``keys`` of [B, Hkv, Nkv, X]."""
    batch, heads, n, width = to.shape
    group = torch.arange(keys.shape[1], device=to.device) // (keys.shape[1] // heads)
    owner = torch.arange(batch, device=to.device)[:, None] * heads + group
    place = owner[:, :, None, None] * n + keys
    to.view(-1, width).index_add_(0, place.flatten(), rows.reshape(-1, width))
