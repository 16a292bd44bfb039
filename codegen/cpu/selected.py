"""Attention over selected keys by gathering them, some queries at a time; for any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.attend import Gradients
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu.careful import LearnedSums, Pairs, delta_of
from sparse_compile.codegen.precision import full_precision
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.selection import keys_of, rows_at

#: Numbers that the gathered keys and the scores of a chunk have at most.
_MOST = 1 << 23


def _chunks(call: AttentionCall) -> Iterator[_Chunk]:
    """The units of queries, as many at a time as fit."""
    if call.is_empty:
        return
    batch, units, most = call.q.shape[0], call.index.shape[2], call.index.shape[3]
    keys, rows = most * call.spec.unit_kv, call.members * call.spec.unit_q
    width = call.q.shape[3] + call.v.shape[3] + rows
    for first, end in chunks(units, batch * call.groups * keys * width, _MOST):
        yield _Chunk(call, first, end)


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
        call, units = self.call, slice(self.first, self.end)
        members = call.groups // call.index.shape[1]
        lists = call.index[:, :, units], call.count[:, :, units]
        index, count = (of_list.repeat_interleave(members, 1) for of_list in lists)
        return keys_of(index, count, call.spec.unit_kv, call.k.shape[2])

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

    def pairs(self, keys: Tensor, exist: Tensor) -> Pairs:
        """The queries and the gathered keys of the chunk."""
        query, key = self.rows(self.call.q), rows_at(self.call.k, keys).float()
        return Pairs.of(self.call, query, key, self.where(keys), exist[:, :, :, None, :])


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over selected keys.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, 0 on empty rows; the natural log-sum-exp [B, Hq, Nq] in
        fp32, -inf on empty rows.
    """
    q, v = call.q, call.v
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    with full_precision(q.device.type):
        for chunk in _chunks(call):
            keys, exist = chunk.keys()
            rows, total = chunk.pairs(keys, exist).attend(rows_at(v, keys).float())
            chunk.write(out, rows.to(out.dtype))
            chunk.write(lse[..., None], total)
    return out, lse


def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """Gradients of :func:`forward`, in the dtypes of q, k, v and of learned tensors."""
    learned = LearnedSums.of(call, result)
    dq = torch.zeros_like(call.q)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (call.k, call.v))
    given = result.grad_out, delta_of(result), result.lse[..., None]
    with full_precision(call.q.device.type):
        for chunk in _chunks(call):
            keys, exist = chunk.keys()
            (grad, delta, total), values = map(chunk.rows, given), rows_at(call.v, keys).float()
            pairs = chunk.pairs(keys, exist)
            by_query, by_key, by_value = pairs.gradients(values, grad, delta, total, learned)
            chunk.write(dq, by_query.to(dq.dtype))
            _scatter(dk, keys, by_key)
            _scatter(dv, keys, by_value)
    return dq, dk.to(call.k.dtype), dv.to(call.v.dtype), *learned.results(call)


def _scatter(to: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Add [B, groups, U, L, X] to the rows ``keys`` of [B, Hkv, Nkv, X]."""
    batch, heads, n, width = to.shape
    group = torch.arange(keys.shape[1], device=to.device) // (keys.shape[1] // heads)
    owner = torch.arange(batch, device=to.device)[:, None] * heads + group
    place = owner[:, :, None, None] * n + keys
    to.view(-1, width).index_add_(0, place.flatten(), rows.reshape(-1, width))
