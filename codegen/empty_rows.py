"""Rows that may attend to no key: what the original program gave there, in O(n) tensor operations.

The executors leave 0 and lse = -inf on such rows and no gradient. Here the other policies of
:class:`sparse_compile.spec.EmptyRows` are put on top, on any device, without waiting for it.

With weights 1/n on an empty row i, for one query head and its key head::

    out_i = mean(V)                                 MEAN, MEAN_ADDED
    dV_j += dO_i / n                                MEAN, MEAN_ADDED
    dS_ij = (dO_i . V_j - delta_i) / n              MEAN_ADDED, delta_i = dO_i . mean(V)
    dQ_i = scale * sum_j dS_ij K_j                  MEAN_ADDED
    dK_j += scale * sum_i dS_ij Q_i                 MEAN_ADDED

whose sums over j and i are products with matrices [D, Dv], never [n, n].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.codegen.precision import full_precision
from sparse_compile.spec import EmptyRows


def apply_forward(out: Tensor, lse: Tensor, v: Tensor, policy: EmptyRows) -> Tensor:
    """``out`` with the policy's value on the empty rows.

    Args:
        out: [B, Hq, Nq, Dv].
        lse: [B, Hq, Nq], -inf on empty rows.
        v: [B, Hkv, Nkv, Dv].
        policy: what an empty row yields.

    >>> out, lse = torch.zeros(1, 1, 2, 1), torch.tensor([[[0.0, -math.inf]]])
    >>> v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    >>> apply_forward(out, lse, v, EmptyRows.MEAN).flatten().tolist()
    [0.0, 2.0]
    """
    if policy is EmptyRows.ZERO or not v.shape[2]:
        return out  # a sum over no keys is 0, whatever their weights are
    empty = lse.eq(-math.inf).unsqueeze(-1)
    if policy in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        return out.masked_fill(empty, math.nan)
    mean = v.mean(2, keepdim=True, dtype=_wide(v)).repeat_interleave(_group(out, v), dim=1)
    return torch.where(empty, mean.to(out.dtype), out)


def without(out: Tensor, grad_out: Tensor, lse: Tensor, policy: EmptyRows) -> tuple[Tensor, Tensor]:
    """``out`` and its gradient as an executor's backward takes them: empty rows are not its own.

    It must see neither their mean nor their NaN. With ZERO they hold nothing, and stay as they are.
    """
    if policy is EmptyRows.ZERO:
        return out, grad_out
    empty = lse.eq(-math.inf).unsqueeze(-1)
    return out.masked_fill(empty, 0), grad_out.masked_fill(empty, 0)


def apply_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    policy: EmptyRows,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with the share of the empty rows added.

    Args:
        grad_out: [B, Hq, Nq, Dv], also of the empty rows.
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        v: [B, Hkv, Nkv, Dv].
        lse: [B, Hq, Nq], -inf on empty rows.
        scale: factor on the scores.
        policy: what an empty row yields.
        dq, dk, dv: the gradients through the other rows, in the shapes of q, k, v.

    Returns:
        dq, dk and dv, in the dtypes given. With NAN, dv is NaN for every key head that has an empty
        row, as NaN weights make it; with NAN_ADDED also dk, and dq on the empty rows.
    """
    if policy is EmptyRows.ZERO or not v.shape[2]:
        return dq, dk, dv
    group = _group(q, k)
    empty = lse.eq(-math.inf).unsqueeze(-1)
    if policy in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        touched = _by_key_head(empty, group).any(2, keepdim=True)
        dv = dv.masked_fill(touched, math.nan)
        if policy is EmptyRows.NAN_ADDED:
            dq, dk = dq.masked_fill(empty, math.nan), dk.masked_fill(touched, math.nan)
        return dq, dk, dv
    with full_precision(q.device.type):
        wide, n_kv = _wide(v), k.shape[2]
        grads = _by_key_head(grad_out.to(wide).masked_fill(~empty, 0.0), group)
        dv = _add(dv, grads.sum(2, keepdim=True) / n_kv)
        if policy is EmptyRows.MEAN_ADDED:
            rows = _by_key_head(q.to(wide), group)
            dq_rows, dk_rows = _through_scores(grads, rows, k.to(wide), v.to(wide))
            dq = _add(dq, dq_rows.reshape(q.shape) * (scale / n_kv))
            dk = _add(dk, dk_rows * (scale / n_kv))
    return dq, dk, dv


def _through_scores(grads: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """dQ and dK through scores of weight 1, for grads and q [B, Hkv, rows, ...], 0 where kept."""
    delta = grads @ v.mean(2, keepdim=True).mT
    dq = grads @ (v.mT @ k) - delta * k.sum(2, keepdim=True)
    dk = v @ (grads.mT @ q) - (delta * q).sum(2, keepdim=True)
    return dq, dk


def _by_key_head(x: Tensor, group: int) -> Tensor:
    """[B, Hq, N, ...] as [B, Hkv, group * N, ...]."""
    batch, heads, n, width = x.shape
    return x.reshape(batch, heads // group, group * n, width)


def _group(per_query_head: Tensor, per_key_head: Tensor) -> int:
    return per_query_head.shape[1] // per_key_head.shape[1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add(grad: Tensor, more: Tensor) -> Tensor:
    return (grad.to(more.dtype) + more).to(grad.dtype)
