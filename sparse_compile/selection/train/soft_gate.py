"""Attention through a gate that language-model losses can train: exact gradients, slow.

It gathers the selected keys of every query, so memory grows with Nq * K * unit_kv * D. It is the
plain way to train a gate, and what faster ways are checked against; the operators compute attention
to the same selection, without the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import MaskExpr, evaluate, grid
from sparse_compile.patterns.base import Pattern
from sparse_compile.selection.selection import Selection, keys_of, rows_at
from sparse_compile.selection.train.distill import bound, check_heads


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    selection: Selection,
    *,
    mask: MaskExpr | Pattern | None = None,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    scale: float | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Attention to the selected keys, whose scores get the logarithm of their unit's gate added.

    ``out = softmax(scale * q . k + log_gate[unit of k], over the selected and allowed keys) v``,
    differentiable in q, k, v and the gate. Units that are not selected pass no gradient to their
    own gate. Take ``log_gate = gate_scores.log_softmax(-1)`` to reach them through the normaliser,
    or ``logsigmoid`` for gates that do not compete.

    Args:
        q: [B, Hq, Nq, D], floating.
        k: [B, Hkv, Nkv, D]; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv].
        log_gate: [B, Hs, Uq, Ukv], finite where selected.
        selection: lists [B, Hs, Uq, K]; Hs divides Hq.
        mask: who may attend to whom besides the selection; None: everyone to everyone.
        tables, sizes: what a :class:`MaskExpr` reads; a pattern brings its own.
        scale: factor on the scores; 1 / sqrt(D) unless given.
        straight_through: compute the attention without gates, as the operators do, and give the
            gate the gradient that it would have at a log of 0.

    Returns:
        [B, Hq, Nq, Dv] in q's dtype; 0 for a query that attends to nothing.

    Raises:
        BadShape: the operands, the gate and the selection do not fit together.
    """
    _check(q, k, v, log_gate, selection)
    kind = torch.promote_types(q.dtype, torch.float32)
    keys, keep = _selected_keys(q, k, selection, bound(mask, q, k, tables), sizes)
    units = torch.where(selection.used, selection.index, 0).long()
    bias = _by_query(log_gate.gather(-1, units), q, selection.unit_q)
    bias = bias.repeat_interleave(selection.unit_kv, -1).to(kind)
    if straight_through:
        bias = bias - bias.detach()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    score = torch.einsum("bhnd,bhnld->bhnl", q.to(kind), rows_at(k, keys).to(kind)) * factor
    # Where nothing is attended to, all weights are zero and so are the gradients.
    empty = ~keep.any(-1, keepdim=True)
    score = (score + bias.masked_fill(~keep, 0)).masked_fill(~(keep | empty), -math.inf)
    weight = score.softmax(-1).masked_fill(empty, 0)
    return torch.einsum("bhnl,bhnld->bhnd", weight, rows_at(v, keys).to(kind)).to(q.dtype)


def _selected_keys(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    mask: tuple[MaskExpr, Sequence[Tensor]],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Keys int64 [B, Hq, Nq, L] that each query gathers, and which of them it attends to."""
    index = _by_query(selection.index, q, selection.unit_q)
    count = _by_query(selection.count[..., None], q, selection.unit_q).squeeze(-1)
    keys, exist = keys_of(index, count, selection.unit_kv, k.shape[2])
    rows = dict(zip("bhq", map(range, q.shape), strict=False))
    where = {**grid(q.device, **rows, kv=range(1)), "kv": keys}
    return keys, exist & evaluate(mask[0], where, q.shape[2], k.shape[2], mask[1], sizes)


def _by_query(t: Tensor, q: Tensor, unit_q: int) -> Tensor:
    """[B, Hs, Uq, X] for lists as [B, Hq, Nq, X] for queries."""
    by_head = t.repeat_interleave(q.shape[1] // t.shape[1], 1)
    return by_head.repeat_interleave(unit_q, 2)[:, :, : q.shape[2]]


def _check(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, selection: Selection) -> None:
    check_heads("gated_attention", q, k)
    units = -(-q.shape[2] // selection.unit_q), -(-k.shape[2] // selection.unit_kv)
    index = selection.index
    fits = v.dim() == 4 and v.shape[:3] == k.shape[:3] and index.dim() == 4
    fits = fits and index.shape[0] == q.shape[0] and index.shape[2] == units[0]
    fits = fits and index.shape[1] > 0 and q.shape[1] % index.shape[1] == 0
    if not fits or log_gate.shape != (*index.shape[:2], *units):
        raise BadShape(
            f"sparse_compile: gated_attention got q {list(q.shape)}, k {list(k.shape)}, v "
            f"{list(v.shape)}, a selection of index {list(index.shape)} and log_gate "
            f"{list(log_gate.shape)}. Give index [B, Hs, ceil(Nq / unit_q), K] and log_gate "
            "[B, Hs, ceil(Nq / unit_q), ceil(Nkv / unit_kv)]; Hs divides the query heads."
        )
