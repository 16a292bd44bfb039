"""Attention where operands hold NaN or infinity: a hidden pair contributes nothing, whatever.

Fast paths multiply weights of 0 by what hidden keys hold, and 0 times NaN is NaN. That shows in
their results, so it is found afterwards, and what is not finite is computed again here, some
queries at a time. Finite operands pay for one sum of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import (
    Dropout,
    ScoreData,
    ScoreProgram,
    add_learned_gradients,
    evaluate,
    evaluate_slope,
    keeps,
)

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
class LearnedSums:
    """Gradients of learned tensors, to which those of some pairs are added.

    Attributes:
        program: what reads them.
        sums: as in :meth:`AttentionCall.sums`.
    """

    program: ScoreProgram | None
    sums: Sequence[Tensor | None]

    @staticmethod
    def of(call: AttentionCall, result: AttentionResult) -> LearnedSums:
        """Zeros, for those that are wanted."""
        return LearnedSums(call.spec.score, call.sums(result.wanted))

    def add(self, pairs: Pairs, d_score: Tensor) -> None:
        """Add what pairs give, ``d_score`` being the gradient of their scores."""
        if self.program is not None and any(total is not None for total in self.sums):
            add_learned_gradients(self.program, pairs.product, d_score, pairs.data, self.sums)

    def results(self, call: AttentionCall) -> list[Tensor]:
        """Those that are wanted, in the dtypes of the tensors."""
        pairs = zip(self.sums, call.learned, strict=True)
        return [total.to(t.dtype) for total, t in pairs if total is not None]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Queries, keys, and the scores of their pairs.

    Attributes:
        query: fp32 [..., R, D].
        key: fp32 [..., L, D].
        score: fp32 [..., R, L], -inf where hidden.
        slope: the derivative of a score by the product of a query and a key; broadcasts to score.
        keep: bool [..., R, L], what is not hidden.
        product: the scaled products, fp32 [..., R, L].
        data: what the score program reads.
        dropout: of the weights.
    """

    query: Tensor
    key: Tensor
    score: Tensor
    slope: Tensor
    keep: Tensor
    product: Tensor
    data: ScoreData
    dropout: Dropout | None

    @staticmethod
    def of(
        call: AttentionCall, query: Tensor, key: Tensor, where: dict[str, Tensor], seen: Tensor
    ) -> Pairs:
        """The pairs at some coordinates, of which the mask, and ``seen``, hide some."""
        product = score = query @ key.mT * call.scale
        slope, data = torch.tensor(call.scale), call.score_data(where)
        if call.spec.score is not None:
            score, by_product = evaluate_slope(call.spec.score, score, data)
            slope = by_product * call.scale
        keep = (evaluate(call.spec.mask, where, *call.data) & seen).expand(score.shape)
        score = score.masked_fill(~keep, -math.inf)
        return Pairs(query, key, score, slope, keep, product, data, call.spec.dropout)

    def weights(self, total: Tensor) -> Tensor:
        """0 where hidden even in rows that are NaN; ``total`` is the log-sum-exp [..., R, 1]."""
        weights = (self.score - total.masked_fill(total == -math.inf, 0.0)).exp()
        return weights.masked_fill(~self.keep, 0.0)

    def dropped(self, values: Tensor) -> Tensor:
        """Weights, or what is done to weights, by dropout."""
        if self.dropout is None:
            return values
        kept = keeps(self.dropout, self.data.learned[self.dropout.seed], self.data)
        return values.masked_fill(~kept, 0.0) * self.dropout.factor

    def attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of values [..., L, Dv]: out [..., R, Dv], and the log-sum-exp [..., R, 1]."""
        total = self.score.logsumexp(-1, keepdim=True)
        return mixed(self.dropped(self.weights(total)), self.keep, value), total

    def gradients(
        self, value: Tensor, grad: Tensor, delta: Tensor, total: Tensor, learned: LearnedSums
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of query, key and value.

        Args:
            value: [..., L, Dv].
            grad: of out, [..., R, Dv].
            delta: the product of each row of out and grad, less the gradient of ``total``;
                [..., R, 1].
            total: the log-sum-exp [..., R, 1], maybe of more keys than these.
            learned: where those of learned tensors are added.
        """
        weights, keep = self.weights(total), self.keep
        d_score = (weights * (self.dropped(grad @ value.mT) - delta)).masked_fill(~keep, 0.0)
        learned.add(self, d_score)
        d_score = (d_score * self.slope).masked_fill(~keep, 0.0)
        dq, dk = mixed(d_score, keep, self.key), mixed(d_score.mT, keep.mT, self.query)
        return dq, dk, mixed(self.dropped(weights).mT, keep.mT, grad)


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


def gradients(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, ...]:
    """Those of a call of parts of blocks, as executors return them."""
    learned = LearnedSums.of(call, result)
    lse, delta = result.lse, delta_of(result)
    dq, dk, dv = (torch.zeros(t.shape) for t in (call.q, call.k, call.v))
    for b, h, head, rows in _chunks(call, lse != -math.inf):
        grad, own, total = (t[b, h, rows].float() for t in (result.grad_out, delta, lse[..., None]))
        pairs = _pairs(call, b, h, head, rows)
        values = call.v[b, head].float()
        dq[b, h, rows], by_key, by_value = pairs.gradients(values, grad, own, total, learned)
        dk[b, head] += by_key
        dv[b, head] += by_value
    grads = dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)
    return *grads, *learned.results(call)
