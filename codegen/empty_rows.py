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
from dataclasses import replace

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.precision import full_precision
from sparse_compile.spec import EmptyRows


def apply_forward(call: AttentionCall, out: Tensor, lse: Tensor) -> Tensor:
    """``out`` with the policy's value on the empty rows.

    Args:
        call: says the policy.
        out: [B, Hq, Nq, Dv].
        lse: [B, Hq, Nq], -inf on empty rows.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> from sparse_compile.spec import AttentionSpec
    >>> spec = AttentionSpec(MaskExpr(KV < Q), EmptyRows.MEAN)
    >>> out, lse = torch.zeros(1, 1, 2, 1), torch.tensor([[[0.0, -math.inf]]])
    >>> v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    >>> call = AttentionCall(v, v, v, [], [], [], 1.0, spec)
    >>> apply_forward(call, out, lse).flatten().tolist()
    [0.0, 2.0]
    """
    v, policy = call.v, call.spec.empty_rows
    if policy is EmptyRows.ZERO or not v.shape[2]:
        return out  # a sum over no keys is 0, whatever their weights are
    empty = lse.eq(-math.inf).unsqueeze(-1)
    if policy in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        return out.masked_fill(empty, math.nan)
    mean = v.mean(2, keepdim=True, dtype=_wide(v)).repeat_interleave(_group(out, v), dim=1)
    return torch.where(empty, mean.to(out.dtype), out)


def without(call: AttentionCall, result: AttentionResult) -> AttentionResult:
    """A result as an executor's backward takes it: empty rows are not its own.

    It must see neither their mean nor their NaN. With ZERO they hold nothing, and stay as they are.
    """
    if call.spec.empty_rows is EmptyRows.ZERO:
        return result
    empty = result.lse.eq(-math.inf).unsqueeze(-1)
    out, grad_out = (x.masked_fill(empty, 0) for x in (result.out, result.grad_out))
    return replace(result, out=out, grad_out=grad_out)


def apply_backward(
    call: AttentionCall, result: AttentionResult, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients with the share of the empty rows added.

    Args:
        call: says the policy.
        result: with the gradient of the empty rows, too.
        grads: dq, dk and dv through the other rows, and those of learned tensors, which stay.

    Returns:
        the same, in the dtypes given. With NAN, dv is NaN for every key head that has an empty
        row, as NaN weights make it; with NAN_ADDED also dk, and dq on the empty rows.
    """
    policy, (dq, dk, dv, *others) = call.spec.empty_rows, grads
    if policy is EmptyRows.ZERO or not call.v.shape[2]:
        return grads
    q, k, v, scale = call.q, call.k, call.v, call.scale
    group = _group(q, k)
    empty = result.lse.eq(-math.inf).unsqueeze(-1)
    if policy in (EmptyRows.NAN, EmptyRows.NAN_ADDED):
        touched = _by_key_head(empty, group).any(2, keepdim=True)
        dv = dv.masked_fill(touched, math.nan)
        if policy is EmptyRows.NAN_ADDED:
            dq, dk = dq.masked_fill(empty, math.nan), dk.masked_fill(touched, math.nan)
        return dq, dk, dv, *others
    with full_precision(q.device.type):
        wide, n_kv = _wide(v), k.shape[2]
        rest = _by_key_head(result.grad_out.to(wide).masked_fill(~empty, 0.0), group)
        dv = _add(dv, rest.sum(2, keepdim=True) / n_kv)
        if policy is EmptyRows.MEAN_ADDED:
            rows = _by_key_head(q.to(wide), group)
            dq_rows, dk_rows = _through_scores(rest, rows, k.to(wide), v.to(wide))
            dq = _add(dq, dq_rows.reshape(q.shape) * (scale / n_kv))
            dk = _add(dk, dk_rows * (scale / n_kv))
    return dq, dk, dv, *others


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
