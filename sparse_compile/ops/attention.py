"""The operators that rewritten graphs call: layout, attention forward and backward.

Each is a ``torch.library`` operator with a fake, so torch.compile, export and opcheck know its
shapes; what it means travels in one argument, the text of an :class:`AttentionSpec`. Layouts that
depend on tensor values are graph values made by :func:`block_layout`; layouts that depend on sizes
alone are looked up in a cache, so that nothing is rebuilt and nothing is stored on a module.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import empty_rows, executor_for
from sparse_compile.errors import BadShape, UnsupportedDtype
from sparse_compile.expr import WORD
from sparse_compile.layout import Layout, build_views, static_layout, unpack
from sparse_compile.layout.dense_tables import DenseCall, DenseRead
from sparse_compile.layout.tensor_state import memory_of
from sparse_compile.ops.fresh_size import fresh_size
from sparse_compile.ops.registered import operator
from sparse_compile.spec import AttentionSpec

#: Features of q and k, and of v, that attention to blocks takes.
WIDEST = (256, 256)
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


#: Layouts are cached across calls and their lengths are only known at run time: neither may live in
#: the memory of a CUDA graph. Inductor records graphs around these operators, not over them.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@operator("block_layout", tags=_TAGS)
def block_layout(
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    spec: str,
    device: torch.device,
) -> list[Tensor]:
    """The layout of a mask that reads tensors: for each of its views, one packed int32 vector.

    Built on ``device`` without synchronising where the predicate leaves few enough blocks possible
    (32768) to have room for all of them; otherwise the host waits once for their number.

    Args:
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        batch: batch size B.
        heads: number of query heads Hq.
        n_q: number of queries.
        n_kv: number of keys.
        spec: the text of an :class:`AttentionSpec`.
        device: where the layout will be used.
    """
    layout = build_views(
        AttentionSpec.parse(spec),
        batch=batch,
        heads=heads,
        n_q=n_q,
        n_kv=n_kv,
        tables=tables,
        sizes=sizes,
        device=device,
        counted=False,
    )
    packed = [view.pack() for view in layout.views]
    # Operators that get these very tensors need not ask the device what is in them.
    known = _memory(packed, spec, (batch, heads, n_q, n_kv), sizes)
    if known is not None:
        known[0][known[1]] = replace(layout, tables=())
    return packed


@block_layout.register_fake
def _(
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    spec: str,
    device: torch.device,
) -> list[Tensor]:
    # How many blocks a mask touches is known when the lengths are, not when the graph is traced.
    return [
        torch.empty([fresh_size()], dtype=torch.int32, device=device)
        for _ in AttentionSpec.parse(spec).parts
    ]


@operator("dense_layout", tags=_TAGS)
def dense_layout(
    tables: Sequence[Tensor],
    reads: str,
    sizes: Sequence[int],
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    spec: str,
    device: torch.device,
) -> list[Tensor]:
    """Like :func:`block_layout`, for a mask that reads mask tensors as tables of bits.

    Waits for the device once for each mask tensor.

    Args:
        tables: the tensors ``t0, t1, ...`` of the mask; those of ``reads`` are mask tensors.
        reads: the text of some :class:`sparse_compile.layout.dense_tables.DenseRead`.
        sizes, batch, heads, n_q, n_kv, spec, device: as for :func:`block_layout`.

    Returns:
        for each of ``reads`` its table of bits; then the packed layouts.
    """
    call = DenseCall(
        AttentionSpec.parse(spec),
        DenseRead.parse(reads),
        tuple(tables),
        tuple(map(int, sizes)),
        batch,
        heads,
        n_q,
        n_kv,
        device,
    )
    words, packed = call.run()
    return words + packed


@dense_layout.register_fake
def _(
    tables: Sequence[Tensor],
    reads: str,
    sizes: Sequence[int],
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    spec: str,
    device: torch.device,
) -> list[Tensor]:
    made = []
    for read in DenseRead.parse(reads):
        rows, columns = (n_q if "q" in read.axes else 1), (n_kv if "kv" in read.axes else 1)
        # Where batch entries or heads turn out to share their mask, the table has size one.
        shape = (fresh_size(), fresh_size(), rows, -(-columns // WORD))
        made.append(torch.empty(shape, dtype=torch.int32, device=device))
    views = AttentionSpec.parse(spec).parts
    return made + [torch.empty([fresh_size()], dtype=torch.int32, device=device) for _ in views]


@operator("attention", tags=_TAGS, by_token=True)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        layout: result of :func:`block_layout`; empty for a mask that reads no tensors.
        scale: factor on the scores.
        spec: the text of an :class:`AttentionSpec`.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv]; and the natural log-sum-exp
        [B, Hq, Nq] in fp32, -inf where a query may attend to nothing.
    """
    check_operands(q, k, v)
    parsed = AttentionSpec.parse(spec)
    executor = executor_for(q.device)
    blocks = layout_of(parsed, q, k, tables, sizes, layout)
    out, lse = executor.forward(q, k, v, tables, sizes, blocks, scale, parsed)
    return empty_rows.apply_forward(out, lse, v, parsed.empty_rows), lse


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty([batch, n_q, heads, v.shape[-1]]).transpose(1, 2)
    return out, q.new_empty([batch, heads, n_q], dtype=torch.float32)


@operator("attention_backward", tags=_TAGS)
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention` with respect to q, k and v, in their dtypes, contiguous."""
    parsed = AttentionSpec.parse(spec)
    executor = executor_for(q.device)
    blocks = layout_of(parsed, q, k, tables, sizes, layout)
    kept_out, kept_grad = empty_rows.without(out, grad_out, lse, parsed.empty_rows)
    grads = executor.backward(
        kept_grad, grad_lse, q, k, v, kept_out, lse, tables, sizes, blocks, scale, parsed
    )
    return empty_rows.apply_backward(grad_out, q, k, v, lse, scale, parsed.empty_rows, *grads)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Sequence[Tensor],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, sizes, layout, scale, spec = inputs
    ctx.save_for_backward(q, k, v, *output, *layout, *tables)
    ctx.views, ctx.sizes, ctx.scale, ctx.spec = len(layout), sizes, scale, spec
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *data = ctx.saved_tensors
    layout, tables = data[: ctx.views], data[ctx.views :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, tables, ctx.sizes, layout, ctx.scale, ctx.spec
    )
    nothing = [None] * len(tables), no_gradient(ctx.sizes), [None] * len(layout)
    return (*grads, *nothing, None, None)


def no_gradient(sizes: Sequence[int]) -> list[None] | None:
    """What the backward of an operator returns for a list of integers."""
    # torch.library takes a list for one of tensors, unless something else is in it.
    return None if sizes else []


attention.register_autograd(_backward, setup_context=_setup_context)

#: The operators as nodes of a graph call them.
ATTENTION = torch.ops.sparse_compile.attention.default
BLOCK_LAYOUT = torch.ops.sparse_compile.block_layout.default
DENSE_LAYOUT = torch.ops.sparse_compile.dense_layout.default


def check_operands(q: Tensor, k: Tensor, v: Tensor, widest: tuple[int, int] = WIDEST) -> None:
    """Raise before anything runs if q, k and v do not fit together.

    Args:
        q, k, v: of a call.
        widest: features of q and k, and of v, at most.

    Raises:
        UnsupportedDtype: the dtype is not float32, float16 or bfloat16.
        BadShape: ranks, batch, head counts, lengths or feature sizes disagree.
    """
    if q.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedDtype(q.dtype)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise BadShape(f"sparse_compile: q, k and v must have one dtype, got {dtypes}. Cast them.")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise BadShape(
            f"sparse_compile: q, k and v must be [B, H, N, D], got {shapes}. "
            "Use unsqueeze to add the missing dimension."
        )
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        raise BadShape(
            f"sparse_compile: {q.shape[1]} query heads cannot share {k.shape[1]} key and "
            f"{v.shape[1]} value heads. The number of query heads must be a multiple of both."
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise BadShape(
            "sparse_compile: q [B, Hq, Nq, D], k [B, Hkv, Nkv, D] and v [B, Hkv, Nkv, Dv] must "
            f"agree in B, Hkv, Nkv and D, got {shapes}."
        )
    if not 1 <= q.shape[3] <= widest[0] or not 1 <= v.shape[3] <= widest[1]:
        either = " and ".join(map(str, dict.fromkeys(widest)))
        raise BadShape(f"sparse_compile: head dims must lie in 1 to {either}, got {shapes}.")


def _memory(
    packed: Sequence[Tensor], spec: str, shape: tuple[int, ...], sizes: Sequence[int]
) -> tuple[dict[Hashable, Any], Hashable] | None:
    """Where the layout that was packed is remembered, and under what; None if nowhere.

    The layout keeps its own tensors beside the packed ones, which must not be referred to.
    """
    if not packed:
        return None
    key = (
        "layout",
        spec,
        shape,
        tuple(map(int, sizes)),
        tuple((id(part), part.data_ptr()) for part in packed),
    )
    return memory_of(packed[0]), key


def layout_of(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    packed: Sequence[Tensor],
) -> Layout:
    """The layout of a call of :func:`attention`: unpacked, or for a static mask as it is cached."""
    shape = {"batch": q.shape[0], "heads": q.shape[1], "n_q": q.shape[2], "n_kv": k.shape[2]}
    if packed:
        known = _memory(packed, spec.text, tuple(shape.values()), sizes)
        found: Layout | None = known and known[0].get(known[1])
        return found or unpack(spec, packed, **shape, tables=tables, sizes=sizes)
    return static_layout(spec, sizes=tuple(map(int, sizes)), **shape, device=q.device)
