"""The loss that teaches a gate what a model attends to (SeerAttention, arXiv:2410.13276)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.errors import BadShape


def distillation_loss(
    gate_scores: Tensor, pooled_map: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """How far softmax(gate scores) is from the pooled attention map, row by row.

    It is the Kullback-Leibler divergence from the map, every row divided by its sum, to the softmax
    of the gate's scores over the allowed units; 0 if and only if they are equal. Gradients reach
    the scores only. It does not synchronise.

    Args:
        gate_scores: [B, Hs, Uq, Ukv], floating; before the softmax.
        pooled_map: [B, Hs, Uq, Ukv], not negative, of
            :func:`sparse_compile.selection.pooled_attention` with the same lists, units and mask.
        allowed: bool, broadcasts to the scores; see :func:`sparse_compile.selection.allowed_units`.
            The other units take no part. None: all units whose score is not -inf.

    Returns:
        fp32 scalar: the mean over the rows that have any mass on allowed units, 0 if none has.

    Raises:
        BadShape: the scores and the map differ in shape, or ``allowed`` does not broadcast.

    >>> scores = torch.tensor([[[[0.0, 0.0, 9.0]]]])
    >>> seen = torch.tensor([True, True, False])
    >>> float(distillation_loss(scores, torch.tensor([[[[0.3, 0.3, 0.0]]]]), seen))
    0.0
    """
    _check(gate_scores, pooled_map, allowed)
    scores = gate_scores.float()
    allowed = scores.detach() != -math.inf if allowed is None else allowed.expand(scores.shape)
    mass = pooled_map.detach().float().masked_fill(~allowed, 0)
    total = mass.sum(-1, keepdim=True)
    counts = total > 0
    target = mass / total.where(counts, torch.ones_like(total))
    # Rows that do not count get harmless numbers, so that no NaN reaches the gradients.
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(~counts, 0)
    predicted = scores.log_softmax(-1).masked_fill(~allowed, 0)
    by_row = (torch.xlogy(target, target) - target * predicted).sum(-1)
    return by_row.sum() / counts.sum().clamp_min(1)


def _check(scores: Tensor, pooled_map: Tensor, allowed: Tensor | None) -> None:
    if scores.shape != pooled_map.shape:
        raise BadShape(
            f"sparse_compile: distillation_loss got gate scores {list(scores.shape)} and a pooled "
            f"map {list(pooled_map.shape)}. Make the map with the gate's unit_q and unit_kv, and "
            "with lists= the number of lists of the gate."
        )
    if allowed is None:
        return
    pairs = zip(reversed(allowed.shape), reversed(scores.shape), strict=False)
    fits = allowed.dim() <= scores.dim() and all(a in (1, s) for a, s in pairs)
    if not fits or allowed.dtype != torch.bool:
        raise BadShape(
            f"sparse_compile: distillation_loss got allowed {list(allowed.shape)} of "
            f"{allowed.dtype} for gate scores {list(scores.shape)}. Pass a bool tensor that "
            "broadcasts to the scores."
        )
