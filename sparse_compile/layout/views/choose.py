"""From a mask to what the kernels are generated from: views, block shape, spec."""

from __future__ import annotations

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.views.split_views import Split, split_views
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.block_shape import GPU_SHAPES, BlockShape


def choose_views(
    mask: MaskExpr,
    *,
    n_q: int,
    n_kv: int,
    batch: int = 1,
    heads: int = 1,
    sizes: tuple[int, ...] = (),
    block: tuple[int, int] | None = None,
    shapes: tuple[BlockShape, ...] = GPU_SHAPES,
    empty_rows: EmptyRows = EmptyRows.ZERO,
    where: tuple[str, ...] = (),
) -> tuple[AttentionSpec, Split]:
    """The spec of a mask, in the views that cost least, and why.

    The choice is one of cost: the spec is right for any lengths and sizes. So they are rounded up
    to powers of two here, and a new length seldom means a new choice.

    Args:
        mask: the predicate.
        n_q, n_kv, batch, heads, sizes: the problem to choose for; heads counts query heads.
        block: queries and keys per block; None to choose.
        shapes: the block shapes to choose from, as a generator has kernels for them; the default
            is that of GPUs.
        empty_rows, where: as in :class:`AttentionSpec`.

    >>> from sparse_compile.expr import KV, Q
    >>> spec, split = choose_views(MaskExpr(KV <= Q), n_q=1000, n_kv=1000)
    >>> (spec.block_q, spec.block_kv), spec.views, split.texts
    ((64, 64), (), ('plain',))
    """
    split = split_views(
        mask,
        n_q=_rounded(n_q),
        n_kv=_rounded(n_kv),
        block=block,
        sizes=sizes,
        heads=heads,
        batch=batch,
        shapes=shapes,
    )
    first = split.views[0]
    views = () if split.is_plain else split.views
    return AttentionSpec(mask, empty_rows, first.q.block, first.kv.block, where, views), split


def _rounded(n: int) -> int:
    """The next power of two.

    >>> _rounded(1000), _rounded(1024), _rounded(0)
    (1024, 1024, 0)
    """
    return 1 << (n - 1).bit_length() if n > 0 else 0
