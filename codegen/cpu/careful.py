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
class CarefulCall:
    """A call of parts of blocks, computed by its whole mask."""

    call: AttentionCall

    def chunks(self, chosen: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
        """Some of the chosen queries, bool [B, Hq, Nq]: entry, head, key head and which they are.

        Always of one entry and head.
        """
        q, k = self.call.q, self.call.k
        group = q.shape[1] // k.shape[1]
        step = max(1, _AT_ONCE // max(1, k.shape[2]))
        for b, h in chosen.any(-1).nonzero().tolist():
            for rows in torch.split(chosen[b, h].nonzero().flatten(), step):
                yield b, h, h // group, rows

    def scores(
        self, b: int, h: int, head: int, rows: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scores [rows, Nkv] of some queries, -inf where hidden, and what is allowed; between them
        the derivative of a score by the scaled product, None for 1.
        """
        call, spec = self.call, self.call.spec
        q, k = call.q[b, h, rows].float(), call.k[b, head].float()
        where = {
            "b": torch.tensor(b),
            "h": torch.tensor(h),
            "q": rows[:, None],
            "kv": torch.arange(k.shape[0]),
        }
        data = *call.shape[2:], call.tables, call.sizes
        allowed = evaluate(spec.mask, where, *data).expand(len(rows), k.shape[0])
        if spec.parts[0].listed:
            allowed = (
                allowed & self._named(b, h)[rows // spec.block_q][:, where["kv"] // spec.block_kv]
            )
        scores, slope = q @ k.mT * call.scale, None
        if spec.score is not None:
            scores, slope = evaluate_slope(spec.score, scores, ScoreData(where, *data))
        return scores.masked_fill(~allowed, -math.inf), slope, allowed

    def _named(self, b: int, h: int) -> Tensor:
        """bool [query blocks, key blocks]: those that a selection names for a head."""
        (view,) = self.call.blocks.views
        row, column, _ = view.rows.entries(b * view.heads + h)
        return torch.zeros(view.grid, dtype=torch.bool).index_put_(
            (row, column), torch.tensor(True)
        )

    def mend(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """``out`` [B, Hq, Nq, Dv] and ``lse`` [B, Hq, Nq] with the rows computed again that hold
        something other than finite numbers.
        """
        out, lse = out.clone(), lse.clone()
        for b, h, head, rows in self.chunks(~out.isfinite().all(-1)):
            scores, _, allowed = self.scores(b, h, head, rows)
            total = scores.logsumexp(-1)
            weights = _weights(scores, total, allowed)
            out[b, h, rows] = mixed(weights, allowed, self.call.v[b, head].float()).to(out.dtype)
            lse[b, h, rows] = total
        return out, lse

    def gradients(self, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` in the dtypes of q, k and v."""
        call, grad_out, lse = self.call, result.grad_out, result.lse
        dq, dk, dv = (torch.zeros(t.shape) for t in (call.q, call.k, call.v))
        delta = (grad_out.float() * result.out.float()).sum(-1)
        delta = delta if result.grad_lse is None else delta - result.grad_lse
        for b, h, head, rows in self.chunks(lse != -math.inf):
            scores, slope, allowed = self.scores(b, h, head, rows)
            weights = _weights(scores, lse[b, h, rows], allowed)
            grad, v = grad_out[b, h, rows].float(), call.v[b, head].float()
            d_scores = weights * (grad @ v.mT - delta[b, h, rows, None]) * call.scale
            d_scores = d_scores if slope is None else d_scores * slope
            d_scores = d_scores.masked_fill(~allowed, 0.0)
            dq[b, h, rows] = mixed(d_scores, allowed, call.k[b, head].float())
            dk[b, head] += mixed(d_scores.mT, allowed.mT, call.q[b, h, rows].float())
            dv[b, head] += mixed(weights.mT, allowed.mT, grad)
        return dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)


def _weights(scores: Tensor, lse: Tensor, allowed: Tensor) -> Tensor:
    """The weights of some queries [rows, Nkv], 0 where hidden even in rows that are NaN."""
    known = lse.masked_fill(lse == -math.inf, 0.0)
    return (scores - known[:, None]).exp().masked_fill(~allowed, 0.0)
