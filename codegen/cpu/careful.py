"""Attention where operands hold NaN or infinity: a hidden pair contributes nothing, whatever.

Fast paths multiply weights of 0 by what hidden keys hold, and 0 times NaN is NaN. That shows in
their results, so it is found afterwards, and what is not finite is computed again here, some
queries at a time. Finite operands pay for one sum of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import ScoreData, evaluate, evaluate_slope

#: Scores that exist at once.
_AT_ONCE = 1 << 22


def is_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a sum that overflows counts as infinite, too."""
    return all(math.isfinite(float(t.sum(dtype=torch.float64))) for t in tensors)


def mixed(weights: Tensor, allowed: Tensor, x: Tensor) -> Tensor:
    """``weights @ x``, to which pairs that are not allowed contribute nothing.

    Args:
        weights: [..., rows, n], 0 where not allowed.
        allowed: bool, broadcasts to the shape of ``weights``.
        x: [..., n, width].

    >>> x = torch.tensor([[1.0], [math.nan]])
    >>> allowed = torch.tensor([[True, False], [True, True]])
    >>> mixed(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), allowed, x).flatten().tolist()
    [1.0, nan]
    """
    strange = ~x.isfinite().all(-1)
    if not bool(strange.any()):
        return weights @ x
    result = weights @ x.masked_fill(strange.unsqueeze(-1), 0.0)
    (keys,) = strange.view(-1, strange.shape[-1]).any(0).nonzero(as_tuple=True)
    reached = (allowed.expand(weights.shape) & strange.unsqueeze(-2))[..., keys]
    (rows,) = reached.any(-1).view(-1, reached.shape[-2]).any(0).nonzero(as_tuple=True)
    for row in rows.tolist():
        own = x[..., keys, :].masked_fill(~reached[..., row, :, None], 0.0)
        result[..., row, :] += (weights[..., row, None, keys] @ own).squeeze(-2)
    return result


@dataclass(frozen=True, eq=False)
class Pairs:
    """Queries, keys, and the scores of their pairs.

    Attributes:
        query: fp32 [..., R, D].
        key: fp32 [..., L, D].
        score: fp32 [..., R, L], -inf where hidden.
        slope: the derivative of a score by the product of a query and a key; broadcasts to score.
        keep: bool [..., R, L], what is not hidden.
    """

    query: Tensor
    key: Tensor
    score: Tensor
    slope: Tensor
    keep: Tensor

    @staticmethod
    def of(
        call: AttentionCall, query: Tensor, key: Tensor, where: dict[str, Tensor], seen: Tensor
    ) -> Pairs:
        """The pairs at some coordinates, of which the mask, and ``seen``, hide some."""
        score, slope = query @ key.mT * call.scale, torch.tensor(call.scale)
        if call.spec.score is not None:
            data = ScoreData(where, *call.data)
            score, by_product = evaluate_slope(call.spec.score, score, data)
            slope = by_product * call.scale
        keep = (evaluate(call.spec.mask, where, *call.data) & seen).expand(score.shape)
        return Pairs(query, key, score.masked_fill(~keep, -math.inf), slope, keep)

    def weights(self, total: Tensor) -> Tensor:
        """0 where hidden even in rows that are NaN; ``total`` is the log-sum-exp [..., R, 1]."""
        weights = (self.score - total.masked_fill(total == -math.inf, 0.0)).exp()
        return weights.masked_fill(~self.keep, 0.0)

    def attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of values [..., L, Dv]: out [..., R, Dv], and the log-sum-exp [..., R, 1]."""
        total = self.score.logsumexp(-1, keepdim=True)
        return mixed(self.weights(total), self.keep, value), total

    def gradients(
        self, value: Tensor, grad: Tensor, delta: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of query, key and value.

        Args:
            value: [..., L, Dv].
            grad: of out, [..., R, Dv].
            delta: the product of each row of out and grad, less the gradient of ``total``;
                [..., R, 1].
            total: the log-sum-exp [..., R, 1], maybe of more keys than these.
        """
        weights, keep = self.weights(total), self.keep
        d_score = weights * (grad @ value.mT - delta) * self.slope
        d_score = d_score.masked_fill(~keep, 0.0)
        dq, dk = mixed(d_score, keep, self.key), mixed(d_score.mT, keep.mT, self.query)
        return dq, dk, mixed(weights.mT, keep.mT, grad)


def delta_of(result: AttentionResult) -> Tensor:
    """What :meth:`Pairs.gradients` takes, fp32 [B, Hq, Nq, 1]."""
    delta = (result.grad_out.float() * result.out.float()).sum(-1, keepdim=True)
    return delta if result.grad_lse is None else delta - result.grad_lse.float()[..., None]


def _chunks(call: AttentionCall, chosen: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Some of the chosen queries, bool [B, Hq, Nq]: entry, head, key head and which they are.

    Always of one entry and head.
    """
    group = call.q.shape[1] // call.k.shape[1]
    step = max(1, _AT_ONCE // max(1, call.k.shape[2]))
    for b, h in chosen.any(-1).nonzero().tolist():
        for rows in torch.split(chosen[b, h].nonzero().flatten(), step):
            yield b, h, h // group, rows


def _pairs(call: AttentionCall, b: int, h: int, head: int, rows: Tensor) -> Pairs:
    """Some queries and all keys, by the whole mask."""
    spec, q, k = call.spec, call.q[b, h, rows].float(), call.k[b, head].float()
    where = {"b": torch.tensor(b), "h": torch.tensor(h)}
    where |= {"q": rows[:, None], "kv": torch.arange(k.shape[0])}
    seen = torch.tensor(True)
    if spec.parts[0].listed:
        (view,) = call.blocks.views
        row, column, _ = view.rows.entries(b * view.heads + h)
        # The blocks that a selection names for a head.
        named = torch.zeros(view.grid, dtype=torch.bool).index_put_((row, column), seen)
        seen = named[rows // spec.block_q][:, where["kv"] // spec.block_kv]
    return Pairs.of(call, q, k, where, seen)


def mend(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` [B, Hq, Nq, Dv] and ``lse`` [B, Hq, Nq] of parts of blocks with the rows computed
    again that hold something other than finite numbers.
    """
    out, lse = out.clone(), lse.clone()
    for b, h, head, rows in _chunks(call, ~out.isfinite().all(-1)):
        mended, total = _pairs(call, b, h, head, rows).attend(call.v[b, head].float())
        out[b, h, rows], lse[b, h, rows] = mended.to(out.dtype), total.squeeze(-1)
    return out, lse


def gradients(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of a call of parts of blocks, in the dtypes of q, k and v."""
    lse, delta = result.lse, delta_of(result)
    dq, dk, dv = (torch.zeros(t.shape) for t in (call.q, call.k, call.v))
    for b, h, head, rows in _chunks(call, lse != -math.inf):
        of_rows = (t[b, h, rows].float() for t in (result.grad_out, delta, lse[..., None]))
        pairs = _pairs(call, b, h, head, rows)
        dq[b, h, rows], by_key, by_value = pairs.gradients(call.v[b, head].float(), *of_rows)
        dk[b, head] += by_key
        dv[b, head] += by_value
    return dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)
