"""Attention of transformers' models as it is defined, in parts: for truths in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

#: What models are asked for.
NAME = "in_parts"
#: Scores that exist at a time.
_MOST = 2**28


@dataclass(frozen=True)
class _Rule:
    """What is done to the products; ``first`` is the place of the first query if it is causal."""

    scale: float
    softcap: float | None
    first: int | None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """As transformers' eager attention, [B, N, H, D], with softcap, sinks and position biases."""
    group, n = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    step = max(1, _MOST // (query.shape[0] * query.shape[1] * key.shape[2]))
    causal = attention_mask is None and n > 1 and bool(getattr(module, "is_causal", False))
    if given.get("is_causal") is not None and attention_mask is None:
        causal = bool(given["is_causal"])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        added = [_of_rows(x, rows) for x in (attention_mask, given.get("position_bias"))]
        part = query[:, :, rows], key, value, *added, given.get("s_aux")
        rule = _Rule(scale, given.get("softcap"), first if causal else None)
        parts.append(checkpoint(_part, *part, rule, use_reentrant=False))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _of_rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return x if x is None or x.shape[-2] == 1 else x[..., rows, :]


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    rule: _Rule,
) -> Tensor:
    """Some queries' attention."""
    scores = q @ k.mT * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[..., : k.shape[2]]
    if rule.first is not None:
        places = torch.arange(rule.first, rule.first + q.shape[2], device=q.device)[:, None]
        hidden = torch.arange(k.shape[2], device=q.device) > places
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    weights: Tensor = scores.softmax(-1)[..., : k.shape[2]]
    return weights @ v


def register() -> None:
    """Make it known to transformers under :data:`NAME`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
