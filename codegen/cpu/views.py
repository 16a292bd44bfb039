"""Masks in several views on the CPU: each view in tokens put in its own order, merged afterwards.

The executor of one view reads runs of adjacent tokens. So the tokens of a view that is not in plain
order are gathered in the order of its blocks, O(n) of them, and its results put back. Tokens that
fill up the last block of a class stand for none: the mask of the gathered problem says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.cpu import executor
from sparse_compile.codegen.cpu.careful import CarefulCall, is_finite
from sparse_compile.codegen.merge import add, merge
from sparse_compile.expr import KV, N_KV, N_Q, MaskExpr, Q, ScoreProgram, table
from sparse_compile.layout import BlockLayout, Layout
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.view import Order, View, natural


@torch.no_grad()
def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over the visited blocks of all views.

    Returns:
        out [B, Hq, Nq, Dv] in q.dtype, and lse fp32 [B, Hq, Nq]; 0 and -inf on rows without a key.
    """
    out, lse = merge([_in_order(at, call) for at in _views(call)], call.q.dtype)
    return (out, lse) if is_finite(out) else CarefulCall(call).mend(out, lse)


@torch.no_grad()
def backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`; each view uses the merged ``out`` and ``lse``."""
    grads = _sums(call, result)
    return grads if is_finite(*grads) else CarefulCall(call).gradients(result)


def _sums(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the gradients through all views."""
    q, k, views = call.q, call.k, _views(call)
    grads = []
    for at in views:
        found = executor.backward(at.call(call), at.result(result))
        if at.plain and len(views) == 1:
            return found
        dq, dk, dv = found
        grads.append((at.queries_back(dq, q), at.keys_back(dk, k), at.keys_back(dv, k)))
    dq, dk, dv = (total.to(q.dtype).contiguous() for total in add(grads))
    return dq, dk, dv


def _in_order(at: _Reordered, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of one view; out in fp32 where its queries were gathered."""
    out, lse = executor.forward(at.call(call))
    if at.plain:
        return out, lse
    back = at.queries_back(lse.unsqueeze(-1), call.q, -math.inf).squeeze(-1)
    return at.queries_back(out, call.q).to(call.q.dtype), back


def _views(call: AttentionCall) -> list[_Reordered]:
    views = zip(call.spec.parts, call.blocks.views, strict=True)
    return [_Reordered.of(part, view, call.spec) for part, view in views]


@dataclass(frozen=True)
class _Reordered:
    """One view as a problem in plain order.

    Attributes:
        layout: the same blocks, in runs of gathered tokens.
        spec: the same part of the mask, of gathered tokens.
        q_tokens, kv_tokens: which token stands at each place; as many as there are for none.
        plain: whether the view is in plain order, and nothing is gathered.
    """

    layout: BlockLayout
    spec: AttentionSpec
    q_tokens: Tensor
    kv_tokens: Tensor
    plain: bool

    @staticmethod
    def of(part: View, view: BlockLayout, spec: AttentionSpec) -> _Reordered:
        """The problem of a view."""
        nothing = torch.empty(0, dtype=torch.int64)
        if part.q.is_natural and part.kv.is_natural:
            alone = replace(spec, mask=spec.part_mask(part), coverage=())
            return _Reordered(view, alone, nothing, nothing, True)
        q, kv = _tokens(part.q, view.n_q), _tokens(part.kv, view.n_kv)
        runs = natural(view.block_q), natural(view.block_kv)
        moved = replace(view, q=runs[0], kv=runs[1], n_q=q.numel(), n_kv=kv.numel())
        mask = _of_tokens(spec.part_mask(part), view.n_q, view.n_kv)
        lengths = view.n_q, view.n_kv
        score = spec.score and _score_of_tokens(spec.score, len(spec.mask.tables), *lengths)
        return _Reordered(moved, replace(spec, mask=mask, coverage=(), score=score), q, kv, False)

    def call(self, call: AttentionCall) -> AttentionCall:
        """The call of this view alone, in its order."""
        lengths = call.q.shape[0], call.q.shape[1]
        return replace(
            call,
            q=self.queries(call.q),
            k=self.keys(call.k),
            v=self.keys(call.v),
            tables=self.tables(call.tables),
            spec=self.spec,
            layout=Layout(self.spec, (self.layout,), *lengths),
        )

    def result(self, result: AttentionResult) -> AttentionResult:
        """The result of all views, in the order of this one."""
        lse, grad_lse = (
            None if x is None else self.queries(x.unsqueeze(-1), fill).squeeze(-1)
            for x, fill in ((result.lse, -math.inf), (result.grad_lse, 0.0))
        )
        assert lse is not None
        out, grad_out = self.queries(result.out), self.queries(result.grad_out)
        return AttentionResult(out, lse, grad_out, grad_lse)

    def tables(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """What the mask of gathered tokens reads."""
        return list(tables) if self.plain else [*tables, self.q_tokens, self.kv_tokens]

    def queries(self, x: Tensor, absent: float = 0.0) -> Tensor:
        """[B, H, Nq, ...] in the order of the view."""
        return x if self.plain else _gathered(x, self.q_tokens, absent)

    def keys(self, x: Tensor) -> Tensor:
        """[B, H, Nkv, ...] in the order of the view."""
        return x if self.plain else _gathered(x, self.kv_tokens, 0.0)

    def queries_back(self, x: Tensor, like: Tensor, absent: float = 0.0) -> Tensor:
        """The reverse of :meth:`queries`, fp32."""
        return x.float() if self.plain else _put_back(x, self.q_tokens, like.shape[2], absent)

    def keys_back(self, x: Tensor, like: Tensor) -> Tensor:
        """The reverse of :meth:`keys`, fp32."""
        return x.float() if self.plain else _put_back(x, self.kv_tokens, like.shape[2], 0.0)


@functools.lru_cache(maxsize=64)
def _tokens(order: Order, n: int) -> Tensor:
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten()


@functools.lru_cache(maxsize=256)
def _of_tokens(mask: MaskExpr, n_q: int, n_kv: int) -> MaskExpr:
    """The predicate at the tokens that two further tables name; false where there is none."""
    q, kv = _named_tokens(len(mask.tables))
    at = _at_tokens(mask.predicate, len(mask.tables), n_q, n_kv)
    exists = (q < n_q) & (kv < n_kv)
    return MaskExpr(sympy.And(at, exists), (*mask.tables, "int64", "int64"), mask.n_sizes)


@functools.lru_cache(maxsize=256)
def _score_of_tokens(score: ScoreProgram, tables: int, n_q: int, n_kv: int) -> ScoreProgram:
    """The same of a score program."""
    return ScoreProgram(_at_tokens(score.value, tables, n_q, n_kv))


def _named_tokens(tables: int) -> tuple[sympy.Expr, sympy.Expr]:
    return table(tables)(Q), table(tables + 1)(KV)


def _at_tokens(expr: sympy.Basic, tables: int, n_q: int, n_kv: int) -> sympy.Basic:
    q, kv = _named_tokens(tables)
    # Lengths stay those of the tokens, not of the gathered problem.
    lengths = {N_Q: sympy.Integer(n_q), N_KV: sympy.Integer(n_kv)}
    return expr.xreplace({Q: q, KV: kv}).xreplace(lengths)


def _gathered(x: Tensor, tokens: Tensor, absent: float) -> Tensor:
    n = x.shape[2]
    taken = x.index_select(2, tokens.clamp(max=max(n - 1, 0)))
    missing = (tokens >= n).view(1, 1, -1, *[1] * (x.dim() - 3))
    return taken.masked_fill(missing, absent) if bool(missing.any()) else taken


def _put_back(x: Tensor, tokens: Tensor, n: int, absent: float) -> Tensor:
    shape = (*x.shape[:2], n + 1, *x.shape[3:])
    result = x.new_full(shape, absent, dtype=torch.float32)
    return result.index_copy_(2, tokens, x.float())[:, :, :n]
