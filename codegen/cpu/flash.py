"""PyTorch's fused CPU attention on batches of small tiles: the one place that calls it.

The two operators are not public API, so everything else goes through :func:`forward` and
:func:`backward`, ``tests/codegen/test_cpu_flash.py`` pins what is relied upon, and plain matrix
products stand in where the operators are missing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Bias:
    """What is added to the scores of a batch of tiles: 0 where a query may attend, else -inf.

    Attributes:
        values: [tiles or 1, 1, rows, keys] in the dtype of the queries.
        empty: bool [tiles or 1, 1, rows], the rows that may attend to no key of their tile;
            None where there are none.
    """

    values: Tensor
    empty: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        empty = 0 if self.empty is None else self.empty.numel()
        return empty + self.values.numel() * self.values.element_size()


@functools.lru_cache(maxsize=1)
def _operators() -> tuple[Any, Any] | None:
    try:
        return getattr(torch.ops.aten, _FORWARD), getattr(torch.ops.aten, _FORWARD + "_backward")
    except AttributeError:
        return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each tile of queries to its own keys.

    Args:
        q: [tiles, heads, rows, D]; any strides, the last one 1. So are ``k`` and ``v``, whose tiles
            and heads may overlap in memory.
        k: [tiles, heads, keys, D].
        v: [tiles, heads, keys, D].
        bias: who may attend; None: every query to every key.
        scale: factor on the scores.

    Returns:
        out [tiles, heads, rows, D] in q.dtype and the natural-log log-sum-exp [tiles, heads, rows],
        fp32 (fp64 for fp64 inputs): 0 and -inf on rows that attend to nothing.
    """
    operators = _operators()
    values = None if bias is None else bias.values
    if operators is None:
        return portable_forward(q, k, v, values, scale)
    out, lse = operators[0](q, k, v, 0.0, False, attn_mask=values, scale=scale)
    if bias is not None and bias.empty is not None:
        # The operator's own answer for these rows differs between versions of PyTorch.
        out = out.masked_fill(bias.empty[..., None], 0.0)
        lse = lse.masked_fill(bias.empty, -math.inf)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Bias | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these tiles in the gradients of q, k and v.

    ``out`` and ``lse`` [tiles, heads, rows] may be those of the whole rows, of which these keys are
    a part: weights are ``exp(score - lse)``. ``lse`` must be finite, also on empty rows.

    Returns:
        dq [tiles, heads, rows, D], dk and dv [tiles, heads, keys, D], in q.dtype.
    """
    operators = _operators()
    values = None if bias is None else bias.values
    if operators is None:
        return portable_backward(grad_out, q, k, v, out, lse, values, scale)
    grads = operators[1](grad_out, q, k, v, out, lse, 0.0, False, attn_mask=values, scale=scale)
    return cast(tuple[Tensor, Tensor, Tensor], grads)


def _scores(q: Tensor, k: Tensor, values: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT) * scale
    return scores if values is None else scores + values


def portable_forward(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`forward` by plain matrix products."""
    scores = _scores(q, k, values, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def portable_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    values: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` by plain matrix products."""
    weights = (_scores(q, k, values, scale) - lse[..., None]).exp()
    wide = weights.dtype
    grad, delta = grad_out.to(wide), (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    d_scores = weights * (grad @ v.to(wide).mT - delta) * scale
    grads = d_scores @ k.to(wide), d_scores.mT @ q.to(wide), weights.mT @ grad
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv
