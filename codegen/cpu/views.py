"""Masks in several views on the CPU: each view in tokens put in its own order, merged afterwards.

The executor of one view reads runs of adjacent tokens. So the tokens of a view that is not in plain
order are gathered in the order of its blocks, O(n) of them, and its results put back. Tokens that
fill up the last block of a class stand for none: the mask of the gathered problem says so.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen import by_token
from sparse_compile.codegen.attend import Gradients, add, merge
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import careful, executor
from sparse_compile.expr import KV, N_KV, N_Q, MaskExpr, Q, table
from sparse_compile.layout import BlockLayout, Layout
from sparse_compile.layout.block_layout import places_of
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.view import View, natural


@torch.no_grad()
def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over the visited blocks of all views.

    Returns:
        out [B, Hq, Nq, Dv] in q.dtype, and lse fp32 [B, Hq, Nq]; 0 and -inf on rows without a key.
    """
    out, lse = merge([_in_order(at, call) for at in _views(call)], call.q.dtype)
    return (out, lse) if careful.is_finite(out) else careful.mend(call, out, lse)


@torch.no_grad()
def backward(call: AttentionCall, result: AttentionResult) -> Gradients:
    """Gradients of :func:`forward`; each view uses the merged ``out`` and ``lse``."""
    grads = _sums(call, result)
    return grads if careful.is_finite(*grads) else careful.gradients(call, result)


def _sums(call: AttentionCall, result: AttentionResult) -> Gradients:
    """The sums of the gradients through all views."""
    views, grads = _views(call), []
    for at in views:
        found = executor.backward(at.call(call), at.result(result))
        if at.plain and len(views) == 1:
            return found
        dq, dk, dv, *learned = found
        grads.append((at.q.put_back(dq), at.kv.put_back(dk), at.kv.put_back(dv), *learned))
    dq, dk, dv, *learned = add(grads)
    sums = (dq, call.q), (dk, call.k), (dv, call.v)
    return *(by_token.stored(total, of) for total, of in sums), *learned


def _in_order(at: _Reordered, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of one view; out in fp32 where its queries were gathered."""
    out, lse = executor.forward(at.call(call))
    if at.plain:
        return out, lse
    return at.q.put_back(out).to(call.q.dtype), at.q.put_back(lse, -math.inf)


def _views(call: AttentionCall) -> list[_Reordered]:
    views = zip(call.spec.parts, call.blocks.views, strict=True)
    return [_Reordered.of(part, view, call.spec) for part, view in views]


@dataclass(frozen=True, eq=False)
class _Side:
    """The queries, or the keys, in the order of a view.

    Attributes:
        n: how many tokens there are.
        tokens: which of them stands at each place, ``n`` for none; None: all, in plain order.
    """

    n: int
    tokens: Tensor | None = None

    def taken(self, x: Tensor, absent: float = 0.0) -> Tensor:
        """[B, H, n, ...] in the order of the view."""
        if self.tokens is None:
            return x
        taken = x.index_select(2, self.tokens.clamp(max=max(self.n - 1, 0)))
        missing = (self.tokens >= self.n).view(1, 1, -1, *[1] * (x.dim() - 3))
        return taken.masked_fill(missing, absent) if bool(missing.any()) else taken

    def put_back(self, x: Tensor, absent: float = 0.0) -> Tensor:
        """The reverse of :meth:`taken`, fp32."""
        if self.tokens is None:
            return x.float()
        shape = (*x.shape[:2], self.n + 1, *x.shape[3:])
        result = x.new_full(shape, absent, dtype=torch.float32)
        return result.index_copy_(2, self.tokens, x.float())[:, :, : self.n]


@dataclass(frozen=True, eq=False)
class _Reordered:
    """One view as a problem in plain order.

    Attributes:
        layout: the same blocks, in runs of gathered tokens.
        spec: the same part of the mask, of gathered tokens.
        q, kv: which tokens are gathered: of both sides, or of none.
    """

    layout: BlockLayout
    spec: AttentionSpec
    q: _Side
    kv: _Side

    @property
    def plain(self) -> bool:
        """Whether the view is in plain order, and nothing is gathered."""
        return self.q.tokens is None

    @staticmethod
    def of(part: View, view: BlockLayout, spec: AttentionSpec) -> _Reordered:
        """The problem of a view."""
        lengths = view.n_q, view.n_kv
        if part.is_natural:
            alone = replace(spec, mask=spec.part_mask(part), coverage=())
            return _Reordered(view, alone, *map(_Side, lengths))
        q, kv = places_of(part.q, view.n_q), places_of(part.kv, view.n_kv)
        runs = natural(view.block_q), natural(view.block_kv)
        moved = replace(view, q=runs[0], kv=runs[1], n_q=q.numel(), n_kv=kv.numel())
        own = replace(spec, mask=spec.part_mask(part), coverage=())
        moved_spec = _of_tokens(own, *lengths)
        return _Reordered(moved, moved_spec, _Side(view.n_q, q), _Side(view.n_kv, kv))

    def call(self, call: AttentionCall) -> AttentionCall:
        """The call of this view alone, in its order."""
        tokens = [side.tokens for side in (self.q, self.kv) if side.tokens is not None]
        return replace(
            call,
            q=self.q.taken(call.q),
            k=self.kv.taken(call.k),
            v=self.kv.taken(call.v),
            tables=[*call.tables, *tokens],
            spec=self.spec,
            layout=Layout(self.spec, (self.layout,), *call.shape[:2]),
        )

    def result(self, result: AttentionResult) -> AttentionResult:
        """The result of all views, in the order of this one."""
        out, grad_out = self.q.taken(result.out), self.q.taken(result.grad_out)
        grad_lse = None if result.grad_lse is None else self.q.taken(result.grad_lse)
        lse = self.q.taken(result.lse, -math.inf)
        return AttentionResult(out, lse, grad_out, grad_lse, result.wanted)


@functools.lru_cache(maxsize=256)
def _of_tokens(spec: AttentionSpec, n_q: int, n_kv: int) -> AttentionSpec:
    """A mask, false where there is no token, and scores, at tokens that two tables name."""
    mask, score, dropout = spec.mask, spec.score, spec.dropout
    q, kv = table(len(mask.tables))(Q), table(len(mask.tables) + 1)(KV)
    # Lengths stay those of the tokens, not of the gathered problem.
    lengths = {N_Q: sympy.Integer(n_q), N_KV: sympy.Integer(n_kv)}

    def at_tokens(expr: sympy.Basic) -> sympy.Basic:
        return expr.xreplace({Q: q, KV: kv}).xreplace(lengths)

    predicate = sympy.And(at_tokens(mask.predicate), (q < n_q) & (kv < n_kv))
    moved = MaskExpr(predicate, (*mask.tables, "int64", "int64"), mask.n_sizes)
    score = score and replace(score, value=at_tokens(score.value))
    dropout = dropout and replace(dropout, q=q, kv=kv)
    return replace(spec, mask=moved, score=score, dropout=dropout)
