"""Patterns on actual sizes: the dense mask, and the blocks to visit."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.expr import B, H, evaluate, grid
from sparse_compile.layout.layout import Layout, build_views
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.patterns.base import Pattern


def dense(
    pattern: Pattern,
    n_q: int,
    n_kv: int,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask of ``pattern`` as a tensor.

    Args:
        pattern: any pattern.
        n_q: number of queries.
        n_kv: number of keys.
        batch: batch size.
        heads: number of query heads.
        device: where the mask is made.

    Returns:
        bool [batch, heads, n_q, n_kv], True where attention is allowed; 1 in place of ``batch`` or
        ``heads`` where the mask does not depend on them.

    Raises:
        BadPattern: if the pattern does not fit these sizes.

    >>> from sparse_compile import patterns as P
    >>> dense(P.Causal(), 2, 3).int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]]]
    """
    pattern.check(n_q, n_kv, batch, heads)
    bound = pattern.bound()
    tables = bound.tables(device, n_q, n_kv, batch, heads)
    batches = batch if bound.expr.depends_on(B) else 1
    of_heads = heads if bound.expr.depends_on(H) else 1
    axes = {"b": range(batches), "h": range(of_heads), "q": range(n_q), "kv": range(n_kv)}
    mask = evaluate(bound.expr, grid(torch.device(device), **axes), n_q, n_kv, tables)
    return mask.expand(batches, of_heads, n_q, n_kv).contiguous()


def layout(
    pattern: Pattern,
    n_q: int,
    n_kv: int,
    block: tuple[int, int] | None,
    device: torch.device | str | None,
    batch: int,
    heads: int,
) -> Layout:
    """The blocks that a pattern visits, in the views that cost least; see :meth:`Pattern.layout`.

    Args:
        pattern: what may attend to what.
        n_q, n_kv: lengths.
        block: queries and keys per block; None to choose.
        device: where the lists are made; default the CPU.
        batch, heads: of the problem; heads counts query heads.

    Raises:
        BadPattern: the pattern does not fit these lengths, or a block is not 16, 32, 64 or 128.
    """
    pattern.check(n_q, n_kv, batch, heads)
    if block is not None and not (len(block) == 2 and all(b in (16, 32, 64, 128) for b in block)):
        raise BadPattern(
            f"sparse_compile: layout() got block={block!r}. Give two of 16, 32, 64 and 128, as in "
            "(64, 64), or None to let the library choose."
        )
    device = torch.device(device or "cpu")
    bound = pattern.bound()
    # Without a block, the one that the kernels would have: what is shown is what runs on a GPU.
    shape = ProblemShape(batch, heads, n_q, n_kv)
    spec, _ = choose_views(bound.expr, shape, block)
    tables = bound.tables(device, n_q, n_kv, batch, heads)
    return build_views(spec, shape, tables, device=device)
