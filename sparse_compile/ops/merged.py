"""The operator of a mask that selects: attention to a static part and to selected keys, merged.

Both parts are disjoint. With their results out_i and log-sum-exps lse_i,

    lse = log(sum_i exp(lse_i)),    out = sum_i exp(lse_i - lse) out_i

and the gradients of q, k and v are the sums of those of the parts, each computed with the merged
out and lse: exp(score - lse) is then the weight of a key among all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import empty_rows, executor_for, selected_executor_for
from sparse_compile.codegen.call import SelectedCall
from sparse_compile.codegen.precision import full_precision
from sparse_compile.ops import attention_backward, check_operands, layout_of, no_gradient
from sparse_compile.ops.registered import operator
from sparse_compile.ops.selected import check_selection, selected_attention_backward
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.selected import SelectedSpec


@operator("merged_attention", tags=(torch.Tag.cudagraph_unsafe,), by_token=True)
def merged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    selected_tables: Sequence[Tensor],
    selected_sizes: Sequence[int],
    scale: float,
    spec: str,
    selected_spec: str,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of a static mask, and to selected keys.

    Args:
        q, k, v: as for :func:`sparse_compile.ops.attention`.
        index, count: int32, as in :class:`sparse_compile.selection.Selection`.
        tables, sizes, layout: of the static mask, as for :func:`sparse_compile.ops.attention`.
        selected_tables, selected_sizes: the tables and sizes of the mask of selected keys.
        scale: factor on the scores.
        spec: the text of the :class:`AttentionSpec` of the static part. Its ``empty_rows`` are
            those of both together.
        selected_spec: the text of the :class:`SelectedSpec`, whose mask must exclude the static
            one; its ``empty_rows`` are 0.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv]; and the natural log-sum-exp
        [B, Hq, Nq] in fp32, -inf where a query may attend to nothing.
    """
    static, selected = AttentionSpec.parse(spec), SelectedSpec.parse(selected_spec)
    check_selection(q, k, v, index, count, selected)
    blocks = layout_of(static, q, k, tables, sizes, layout)
    with full_precision(q.device.type):
        out, lse = executor_for(q.device).forward(q, k, v, tables, sizes, blocks, scale, static)
        call = SelectedCall(q, k, v, index, count, selected_tables, selected_sizes, scale, selected)
        more, more_lse = selected_executor_for(q.device).forward(call)
    out, lse = merge(out, lse, more, more_lse)
    return empty_rows.apply_forward(out, lse, v, static.empty_rows), lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of two disjoint parts, from that to each.

    >>> from math import inf, log
    >>> one, two = torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[4.0], [0.0], [0.0]])
    >>> lse, more_lse = torch.tensor([0, 0, -inf]), torch.tensor([log(2), -inf, -inf])
    >>> out, total = merge(one, lse, two, more_lse)
    >>> [round(value, 3) for value in out.flatten().tolist()], total.isinf().tolist()
    ([3.0, 1.0, 0.0], [False, False, True])
    """
    total = torch.logaddexp(lse, more_lse)
    # Rows without any key keep the 0 that both parts gave them.
    known = total.masked_fill(total.isneginf(), 0)
    weight, more_weight = ((part - known).exp().unsqueeze(-1) for part in (lse, more_lse))
    return (weight * out + more_weight * more).to(out.dtype), total


@merged_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    selected_tables: Sequence[Tensor],
    selected_sizes: Sequence[int],
    scale: float,
    spec: str,
    selected_spec: str,
) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty([batch, n_q, heads, v.shape[-1]]).transpose(1, 2)
    return out, q.new_empty([batch, heads, n_q], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, tables, sizes, layout, more_tables, more_sizes, scale, *specs = inputs
    ctx.save_for_backward(q, k, v, *output, index, count, *tables, *layout, *more_tables)
    ctx.lengths = len(tables), len(layout), len(more_tables)
    ctx.sizes, ctx.scale, ctx.specs = (sizes, more_sizes), scale, specs
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, index, count, *data = ctx.saved_tensors
    n_tables, n_layout, _ = ctx.lengths
    tables, layout, more_tables = (
        data[:n_tables],
        data[n_tables : n_tables + n_layout],
        data[n_tables + n_layout :],
    )
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    sizes, more_sizes = ctx.sizes
    spec, more_spec = ctx.specs
    static = attention_backward(
        *(grad_out, grad_lse, q, k, v, out, lse), tables, sizes, layout, ctx.scale, spec
    )
    # What rows without any key yield is the static part's; the selected one holds zeros there.
    kept_out, kept_grad = empty_rows.without(
        out, grad_out, lse, AttentionSpec.parse(spec).empty_rows
    )
    selected = selected_attention_backward(
        *(kept_grad, grad_lse, q, k, v, kept_out, lse, index, count),
        *(more_tables, more_sizes, ctx.scale, more_spec),
    )
    dq, dk, dv = (one + other for one, other in zip(static, selected, strict=True))
    kept, unused = ([None] * len(tables), no_gradient(sizes)), [None] * len(layout)
    more = [None] * len(more_tables), no_gradient(more_sizes)
    return (dq, dk, dv, None, None, *kept, unused, *more, None, None, None)


merged_attention.register_autograd(_backward, setup_context=_setup_context)

#: The operator as nodes of a graph call it.
MERGED_ATTENTION = torch.ops.sparse_compile.merged_attention.default
