"""The meaning of sparse attention, in fp64. Every kernel, layout and rewrite is tested against it.

    out = softmax(score(scale * Q K^T), where mask) V

with a sink as one more key, which takes weight and has no value.

A pair that the mask hides contributes nothing, forward and backward: NaN or infinity in a key or
value reaches exactly the queries that may attend to it.

This module imports torch only and makes the dense [n_q, n_kv] matrices that nothing else may make.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    empty_rows: str = "zero",
    score: Callable[[Tensor], Tensor] | None = None,
    sinks: Tensor | None = None,
    *,
    dropped: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention and its log-sum-exp, computed densely in fp64; differentiable.

    Args:
        q, k, v: [B, Hq, Nq, D], [B, Hkv, Nkv, D] and [B, Hkv, Nkv, Dv], any floating dtype; query
            head h reads key head ``h // (Hq // Hkv)``.
        mask: bool, broadcastable to [B, Hq, Nq, Nkv]; True may attend. None: all may.
        scale: factor on the scores; default 1 / sqrt(D).
        empty_rows: what a row without any True yields: ``"zero"``; ``"nan"``; ``"mean"`` of V, no
            gradient to the scores; ``"nan_added"``, ``"mean_added"``: the same with gradients.
        score: from scaled products [B, Hq, Nq, Nkv], fp64, to scores, before the mask.
        sinks: broadcastable to [B, Hq, Nq]: the score of one more key, whose value is 0. No row is
            empty then.
        dropped: what dropout makes of the weights [B, Hq, Nq, Nkv], fp64.

    Returns:
        fp64 out [B, Hq, Nq, Dv] and natural-log log-sum-exp [B, Hq, Nq] of the keys without the
        sink, -inf where there are none.

    >>> q = k = torch.zeros(1, 1, 2, 4); v = torch.arange(2.0).view(1, 1, 2, 1)
    >>> attention(q, k, v, torch.tensor([[True, True], [False, False]]))[0].flatten().tolist()
    [0.5, 0.0]
    >>> v[0, 0, 1] = math.nan
    >>> attention(q, k, v, torch.tensor([[True, False], [True, True]]))[0].flatten().tolist()
    [0.0, nan]
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), _per_query_head(k, group), _per_query_head(v, group)
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=q.device)
    mask = mask.expand(*q.shape[:3], k.shape[2])
    scores = _scores(q, k, mask) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if score is not None:
        scores = score(scores)
    empty = ~mask.any(-1, keepdim=True)
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    if sinks is not None:
        sink = sinks.double().expand(lse.shape).unsqueeze(-1)
        weights = torch.cat([scores.masked_fill(~mask, -math.inf), sink], -1).softmax(-1)
        kept = weights[..., :-1] if dropped is None else dropped(weights[..., :-1])
        return _mixed(kept, v, mask), lse.detach() if bool(empty.any()) else lse
    chosen = torch.where(empty, _of_empty_rows(scores, empty_rows), scores)
    kept = chosen.masked_fill(~mask & ~empty, -math.inf)
    seen = mask if empty_rows == "zero" else mask | empty
    weights = kept.softmax(-1).masked_fill(~seen & ~empty, 0.0)
    out = _mixed(weights if dropped is None else dropped(weights), v, seen)
    if empty_rows == "zero":
        out = out.masked_fill(empty, 0.0)
    return out, lse.detach() if bool(empty.any()) else lse


def _of_empty_rows(scores: Tensor, policy: str) -> Tensor:
    """What stands for the scores of a row that may attend to nothing."""
    absorbed = scores - scores.detach()
    fill = {"zero": scores * 0, "mean": torch.zeros_like(scores), "nan": scores.detach() * math.nan}
    fill["nan_added"] = absorbed + math.nan
    return fill.get(policy, absorbed)


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """``q @ k.mT``; 0 at hidden pairs if it matters, whose gradients do not meet 0 times NaN."""
    if bool(q.isfinite().all()) and bool(k.isfinite().all()):
        return q @ k.mT
    pairs = mask.unsqueeze(-1)
    return (q.unsqueeze(-2).where(pairs, 0) * k.unsqueeze(-3).where(pairs, 0)).sum(-1)


def _mixed(weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``weights @ v``, over the pairs of the mask."""
    if bool(v.isfinite().all()):
        return weights @ v
    return (weights.unsqueeze(-1) * v.unsqueeze(-3).where(mask.unsqueeze(-1), 0)).sum(-2)


def _per_query_head(x: Tensor, group: int) -> Tensor:
    return x.double().repeat_interleave(group, dim=1)
