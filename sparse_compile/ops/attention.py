"""The operators of attention, forward and backward, and of the layout of its mask.

Each is a ``torch.library`` operator with a fake, so torch.compile, export and opcheck know its
shapes; what it means travels in one argument, the text of an :class:`AttentionSpec`. Layouts that
depend on tensor values are graph values made by :func:`layout`, and so are selections; where sizes
alone decide, that operator looks them up in a cache, and a graph that knows its sizes holds them as
buffers instead. Attention itself builds, caches and waits for nothing: whatever it visits is in its
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import attend, empty_rows
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.repeated import Kind, copied
from sparse_compile.expr import WORD
from sparse_compile.layout import Layout, build_views
from sparse_compile.layout.from_dense import NO_READS, DenseCall, DenseRead
from sparse_compile.layout.lists import count_worklists, listed_views, lists_of, static_lists
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops.fresh_size import fresh_size
from sparse_compile.ops.operands import check_call, check_operands, widest
from sparse_compile.ops.registered import operator
from sparse_compile.spec import AttentionSpec


def _like_layout(reads: str, n_q: int, n_kv: int, spec: str, device: torch.device) -> list[Tensor]:
    made = []
    for read in DenseRead.parse(reads):
        rows, columns = (n_q if "q" in read.axes else 1), (n_kv if "kv" in read.axes else 1)
        # Where batch entries or heads turn out to share their mask, the table has size one.
        shape = (fresh_size(), fresh_size(), rows, -(-columns // WORD))
        made.append(torch.empty(shape, dtype=torch.int32, device=device))
    # How many blocks a mask touches is known when the lengths are, not when the graph is traced.
    parsed = AttentionSpec.parse(spec)
    shapes: list[list[Any]] = [[fresh_size()] for _ in parsed.parts]
    for _ in range(count_worklists(parsed, device)):
        shapes += [[fresh_size()], [fresh_size(), fresh_size(), fresh_size(), 0]]
    return made + [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]


def _kind_of_layout(
    tables: Sequence[Tensor],
    reads: str,
    sizes: Sequence[int],
    *rest: Any,
    apart: Tensor | None = None,
) -> Kind:
    numbers, lists = rest[:_LISTS], rest[_LISTS]
    if reads != NO_READS or lists:
        return [], [], ()  # mask tensors are counted, or looked up, and selections sorted
    return tables, [], (tuple([t.device for t in tables]), *sizes, numbers)


#: How many arguments of :func:`layout` stand between its sizes and its lists.
_LISTS = 7


# Layouts are cached across calls and their lengths are only known at run time: neither may live in
# the memory of a CUDA graph. Inductor records graphs around this operator, not over it.
@operator(_like_layout, recorded=False, kind=_kind_of_layout)
def layout(
    tables: Sequence[Tensor],
    reads: str,
    sizes: Sequence[int],
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    kv_heads: int,
    spec: str,
    device: torch.device,
    lists: Sequence[Tensor],
    apart: Tensor | None = None,
) -> list[Tensor]:
    """The data of a mask: tables of bits, and the lists of its blocks.

    Lists are built on ``device`` without synchronising where the predicate leaves few enough blocks
    possible (32768) to have room for all of them; otherwise the host waits once for their number,
    as it does for each mask tensor.

    Args:
        tables: the tensors ``t0, t1, ...`` of the mask; those of ``reads`` are mask tensors.
        reads: the text of some :class:`sparse_compile.layout.from_dense.DenseRead`.
        sizes: the integers ``s0, s1, ...`` of the mask.
        batch: batch size B.
        heads: number of query heads Hq.
        n_q: number of queries.
        n_kv: number of keys.
        kv_heads: number of key heads.
        spec: the text of an :class:`AttentionSpec`.
        device: where the layout will be used.
        lists: index and count of each part of blocks that a selection names.
        apart: what tells calls apart that are equal, see :func:`told_apart`; not read.

    Returns:
        for each of ``reads`` its table of bits; then the lists of the parts of blocks, see
        :mod:`sparse_compile.layout.lists`. All in new memory.
    """
    parsed, found, numbers = AttentionSpec.parse(spec), DenseRead.parse(reads), tuple(sizes)
    shape = ProblemShape(batch, heads, n_q, n_kv)
    words: list[Tensor] = []
    built: Layout | None
    if found:
        words, built = DenseCall(parsed, found, tuple(tables), numbers, shape, device).run()
    elif lists:
        built = listed_views(parsed, shape, tables, sizes, lists)
    elif not tables:
        # Somebody may write to the results, or reuse their memory.
        return [t.clone() for t in static_lists(parsed, shape, kv_heads, numbers, device)]
    else:
        built = build_views(parsed, shape, tables, sizes, device, counted=False)
    return words + ([] if built is None else lists_of(built, kv_heads, device, copied))


def _like_attention(q: Tensor, k: Tensor, v: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v, widest(AttentionSpec.parse(spec)))
    batch, heads, n_q, _ = q.shape
    out = q.new_empty([batch, n_q, heads, v.shape[-1]]).transpose(1, 2)
    return out, q.new_empty([batch, heads, n_q], dtype=torch.float32)


def _kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: Sequence[Tensor],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lists: Sequence[Tensor],
    *others: Any,
) -> Kind:
    read = [q, k, v, *learned, *tables]
    return read, lists, (len(learned), len(tables), *sizes, *others)


@operator(_like_attention, by_token=1, kind=_kind)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: Sequence[Tensor],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lists: Sequence[Tensor],
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys that a mask allows: those in the blocks of its layout, and selected.

    The kernels of selected units take their lists as they are: only those of a
    :class:`sparse_compile.selection.Selection` are allowed, such as :func:`sparse_compile.select`,
    :data:`sparse_compile.ops.kept.CANONICAL_SELECTION` and
    :func:`sparse_compile.selection.canonical` make of any indices. What else is in them is found on
    the CPU, and raises; on a GPU it may read beyond the keys, since looking would wait for the
    device: :func:`sparse_compile.selection.check_lists` does look.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        learned: the tensors ``w0, w1, ...`` of the score program, which may have gradients.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        lists: as in :class:`AttentionCall`: those of :func:`layout` for the parts of blocks; then
            index and count of each part of units.
        scale: factor on the scores.
        spec: the text of an :class:`AttentionSpec`.

    Raises:
        BadShape, UnsupportedDtype, BadPattern: what does not fit; on the CPU, wrong lists too.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv]; and the natural log-sum-exp
        [B, Hq, Nq] in fp32, contiguous, -inf where a query may attend to nothing.
    """
    call = AttentionCall(
        q, k, v, tables, sizes, lists, scale, AttentionSpec.parse(spec), tuple(learned)
    )
    check_call(call)
    out, lse = attend.forward(call)
    return empty_rows.apply_forward(call, out, lse), lse


def _like_gradients(
    q: Tensor, k: Tensor, v: Tensor, learned: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    by_token = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return [*by_token, *(learned[i].new_empty(learned[i].shape) for i in wanted)]


def _kind_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> Kind:
    wanted: tuple[int, ...] = tuple(rest[-1])
    read, lists, others = _kind(*rest[:-1])
    return [*read, grad_out, grad_lse, out, lse], lists, (others, wanted)


@operator(_like_gradients, by_token=3, kind=_kind_backward)
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: Sequence[Tensor],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lists: Sequence[Tensor],
    scale: float,
    spec: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of :func:`attention`: of q, k, v and ``wanted`` of the learned tensors.

    Those of q, k and v are stored as its result is, by token; the others are contiguous.

    Other arguments are those of :func:`attention`, its results and their gradients.
    """
    call = AttentionCall(
        q, k, v, tables, sizes, lists, scale, AttentionSpec.parse(spec), tuple(learned)
    )
    result = AttentionResult(out, lse, grad_out, grad_lse, tuple(wanted))
    grads = attend.backward(call, empty_rows.without(call, result))
    return list(empty_rows.apply_backward(call, result, grads))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, learned, tables, ctx.sizes, lists, ctx.scale, ctx.spec = inputs
    ctx.save_for_backward(*output, q, k, v, *learned, *tables, *lists)
    ctx.lengths = len(learned), len(tables), len(lists)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, *data = ctx.saved_tensors
    left = iter(data)
    learned, tables, lists = ([next(left) for _ in range(n)] for n in ctx.lengths)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3]) if needed]
    dq, dk, dv, *found = attention_backward(
        *(grad_out, grad_lse, out, lse, q, k, v, learned, tables),
        *(ctx.sizes, lists, ctx.scale, ctx.spec, wanted),
    )
    left = iter(found)
    others = [next(left) if i in wanted else None for i in range(len(learned))]
    # torch.library takes a list for one of tensors, unless something else is in it.
    no_sizes: Any = None if ctx.sizes else []
    nothing = [None] * len(tables), no_sizes, [None] * len(lists)
    return (dq, dk, dv, others, *nothing, None, None)


attention.register_autograd(_backward, setup_context=_setup_context)

#: The operators as nodes of a graph call them.
ATTENTION = torch.ops.sparse_compile.attention.default
LAYOUT = torch.ops.sparse_compile.layout.default
