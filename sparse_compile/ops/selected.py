"""The operators of attention over selected keys: forward and backward.

What it means travels in one argument, the text of a :class:`SelectedSpec`; which keys are selected
is a graph value, so a new selection compiles nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import empty_rows, selected_executor_for
from sparse_compile.codegen.call import Result, SelectedCall
from sparse_compile.codegen.precision import full_precision
from sparse_compile.errors import BadShape
from sparse_compile.ops import check_operands, no_gradient
from sparse_compile.ops.registered import operator
from sparse_compile.selection import canonical, check_lists
from sparse_compile.spec.selected import SelectedSpec

#: Features of q and k, and of v: those of the latent keys of DeepSeek-V3, and some more.
WIDEST = (640, 512)


@operator("selected_attention", by_token=True)
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys that were selected for it.

    Its kernels take the lists as they are: only those of a :class:`Selection` are allowed, such as
    :func:`sparse_compile.select`, :data:`CANONICAL_SELECTION` and
    :func:`sparse_compile.selection.canonical` make of any indices. What else is in them is found on
    the CPU, and raises; on a GPU it may read beyond the keys, since looking would wait for the
    device: :func:`sparse_compile.selection.check_lists` does look.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        index, count: int32, as in :class:`sparse_compile.selection.Selection`.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        scale: factor on the scores.
        spec: the text of a :class:`SelectedSpec`.

    Raises:
        BadShape, UnsupportedDtype, BadPattern: what does not fit; on the CPU, wrong lists too.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv]; and the natural log-sum-exp
        [B, Hq, Nq] in fp32, -inf where a query may attend to nothing.
    """
    parsed = SelectedSpec.parse(spec)
    check_selection(q, k, v, index, count, parsed)
    call = SelectedCall(q, k, v, index, count, tables, sizes, scale, parsed)
    with full_precision(q.device.type):
        out, lse = selected_executor_for(q.device).forward(call)
    return empty_rows.apply_forward(out, lse, v, parsed.empty_rows), lse


@selected_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v, WIDEST)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty([batch, n_q, heads, v.shape[-1]]).transpose(1, 2)
    return out, q.new_empty([batch, heads, n_q], dtype=torch.float32)


@operator("selected_attention_backward")
def selected_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`selected_attention`: of q, k and v, in their dtypes, contiguous."""
    parsed = SelectedSpec.parse(spec)
    call = SelectedCall(q, k, v, index, count, tables, sizes, scale, parsed)
    kept_out, kept_grad = empty_rows.without(out, grad_out, lse, parsed.empty_rows)
    result = Result(kept_out, lse, kept_grad, grad_lse)
    with full_precision(q.device.type):
        grads = selected_executor_for(q.device).backward(call, result)
    return empty_rows.apply_backward(grad_out, q, k, v, lse, scale, parsed.empty_rows, *grads)


@selected_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, tables, sizes, scale, spec = inputs
    ctx.save_for_backward(q, k, v, *output, index, count, *tables)
    ctx.sizes, ctx.scale, ctx.spec = sizes, scale, spec
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, index, count, *tables = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = selected_attention_backward(
        *(grad_out, grad_lse, q, k, v, out, lse, index, count, tables, ctx.sizes),
        *(ctx.scale, ctx.spec),
    )
    return (*grads, None, None, [None] * len(tables), no_gradient(ctx.sizes), None, None)


selected_attention.register_autograd(_backward, setup_context=_setup_context)

#: The operator as nodes of a graph call it.
SELECTED_ATTENTION = torch.ops.sparse_compile.selected_attention.default


@operator("canonical_selection")
def canonical_selection(index: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """:func:`sparse_compile.selection.canonical` as an operator: int32 index and count."""
    return canonical(index, units)


@canonical_selection.register_fake
def _(index: Tensor, units: int) -> tuple[Tensor, Tensor]:
    lists = index.new_empty(index.shape, dtype=torch.int32)
    return lists, index.new_empty(index.shape[:-1], dtype=torch.int32)


CANONICAL_SELECTION = torch.ops.sparse_compile.canonical_selection.default


def check_selection(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, spec: SelectedSpec
) -> None:
    """Raise before anything runs if the selection does not fit q, k and v.

    Raises:
        BadShape, UnsupportedDtype: what does not fit.
        BadPattern: on the CPU, what :func:`check_lists` finds.
    """
    check_operands(q, k, v, WIDEST)
    wanted = (q.shape[0], -(-q.shape[2] // spec.unit_q))
    fits = index.dim() == 4 and (index.shape[0], index.shape[2]) == wanted
    fits = fits and index.shape[1] > 0 and q.shape[1] % index.shape[1] == 0
    # A group of heads shares a key head and a selection, so one number must divide the other.
    fits = fits and max(index.shape[1], k.shape[1]) % min(index.shape[1], k.shape[1]) == 0
    if not fits or count.shape != index.shape[:3]:
        raise BadShape(
            f"sparse_compile: a selection of index {list(index.shape)} and count "
            f"{list(count.shape)} for q {list(q.shape)}, k {list(k.shape)} and units of "
            f"{spec.unit_q} queries. Give index [B, Hs, ceil(Nq / unit_q), K] and count without K; "
            "Hs divides the query heads, and divides the key heads or is a multiple of them."
        )
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise BadShape(
            f"sparse_compile: a selection of index {index.dtype} and count {count.dtype}. "
            "Make both int32, as selection.canonical does."
        )
    if index.device.type == "cpu":
        check_lists(index, count, -(-k.shape[2] // spec.unit_kv))
