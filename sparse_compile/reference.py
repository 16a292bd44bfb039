"""The meaning of sparse attention, in fp64. Every kernel, layout and rewrite is tested against it.

    out = softmax(scale * Q K^T, where mask) V

This module imports torch only and makes the dense [n_q, n_kv] matrices that nothing else may make.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    empty_rows: str = "zero",
) -> tuple[Tensor, Tensor]:
    """Masked attention and its log-sum-exp, computed densely in fp64; differentiable.

    Args:
        q: [B, Hq, Nq, D], any floating dtype.
        k: [B, Hkv, Nkv, D]; query head h reads key head ``h // (Hq // Hkv)``.
        v: [B, Hkv, Nkv, Dv].
        mask: bool, broadcastable to [B, Hq, Nq, Nkv]; True may attend. None: all may.
        scale: factor on the scores; default 1 / sqrt(D).
        empty_rows: what a row without any True yields: ``"zero"``; ``"nan"``; ``"mean"`` of V over
            all keys, no gradient to the scores; ``"nan_added"`` or ``"mean_added"``: the same
            values, with the softmax gradient flowing to the scores.

    Returns:
        fp64 out [B, Hq, Nq, Dv] and natural-log log-sum-exp [B, Hq, Nq], -inf on empty rows.

    >>> q = k = torch.zeros(1, 1, 2, 4); v = torch.arange(2.0).view(1, 1, 2, 1)
    >>> attention(q, k, v, torch.tensor([[True, True], [False, False]]))[0].flatten().tolist()
    [0.5, 0.0]
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), _per_query_head(k, group), _per_query_head(v, group)
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=q.device)
    mask = mask.expand(scores.shape)
    empty = ~mask.any(-1, keepdim=True)
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    absorbed = scores - scores.detach()
    fill = {"zero": scores * 0, "mean": torch.zeros_like(scores), "nan": scores.detach() * math.nan}
    fill["nan_added"] = absorbed + math.nan
    chosen = torch.where(empty, fill.get(empty_rows, absorbed), scores)
    kept = chosen.masked_fill(~mask & ~empty, -math.inf)
    out = kept.softmax(-1) @ v
    if empty_rows == "zero":
        out = out.masked_fill(empty, 0.0)
    return out, lse.detach() if bool(empty.any()) else lse


def _per_query_head(x: Tensor, group: int) -> Tensor:
    return x.double().repeat_interleave(group, dim=1)
