"""From a mask to what the kernels are generated from: views, block shape, spec."""

from __future__ import annotations

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import Split, split_views
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.block_shape import GPU_SHAPES, BlockShape


def choose_views(
    mask: MaskExpr,
    shape: ProblemShape,
    block: tuple[int, int] | None = None,
    shapes: tuple[BlockShape, ...] = GPU_SHAPES,
) -> tuple[AttentionSpec, Split]:
    """The spec of a mask, in the views that cost least, and why.

    The choice is one of cost: the spec is right for any lengths and sizes. So they are rounded up
    to powers of two here, and a new length seldom means a new choice.

    Args:
        mask: the predicate.
        shape: the problem to choose for.
        block: queries and keys per block; None to choose.
        shapes: the block shapes to choose from, as a generator has kernels for them; the default
            is that of GPUs.

    >>> from sparse_compile.expr import KV, Q
    >>> spec, split = choose_views(MaskExpr(KV <= Q), ProblemShape(1, 1, 1000, 1000))
    >>> (spec.block_q, spec.block_kv), spec.views, split.texts
    ((64, 64), (), ('plain',))
    """
    shape = shape._replace(n_q=_rounded(shape.n_q), n_kv=_rounded(shape.n_kv))
    # Run-time integers are offsets and windows; which, only their values would tell.
    split = split_views(mask, shape, block=block, sizes=(0,) * mask.n_sizes, shapes=shapes)
    first = split.views[0]
    views = () if split.is_plain else split.views
    found = AttentionSpec(mask, block_q=first.q.block, block_kv=first.kv.block, coverage=views)
    return found, split


def _rounded(n: int) -> int:
    """The next power of two.

    >>> _rounded(1000), _rounded(1024), _rounded(0)
    (1024, 1024, 0)
    """
    return 1 << (n - 1).bit_length() if n > 0 else 0
