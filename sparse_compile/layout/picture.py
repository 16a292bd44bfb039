"""Pictures of layouts, for terminals."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.layout.block_layout import FULL, BlockLayout

_EMPTY, _PARTIAL, _FULL = "·▒█"


def picture(layout: BlockLayout, width: int = 48, index: int = 0) -> str:
    """A layout as text: ``█`` FULL, ``▒`` PARTIAL, ``·`` EMPTY; one line per row of blocks.

    A grid of more than ``width`` blocks across or down is drawn smaller: a cell is ``█`` or ``·``
    only if all its blocks are. The cost follows the visited blocks.

    Args:
        layout: what to draw.
        width: most characters across, and most lines.
        index: the class to draw.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> from sparse_compile.layout import Problem, ProblemShape, build_layout
    >>> problem = Problem.of(MaskExpr(KV <= Q), ProblemShape(1, 1, 64, 64), (16, 16))
    >>> print(picture(build_layout(problem)))
    ▒···
    █▒··
    ██▒·
    ███▒
    """
    rows, cols = layout.grid
    scale = max(1, -(-max(rows, cols) // width))
    high, wide = -(-rows // scale), -(-cols // scale)
    line, block, kind = (part.cpu() for part in layout.rows.entries(index))
    cell = (line // scale) * wide + block // scale
    visited = torch.bincount(cell, minlength=high * wide)
    full = torch.bincount(cell[kind == FULL], minlength=high * wide)
    area = (_extent(rows, scale, high)[:, None] * _extent(cols, scale, wide)).flatten()
    shades = ((visited > 0).long() + (full == area).long()).view(high, wide).tolist()
    return "\n".join("".join((_EMPTY, _PARTIAL, _FULL)[shade] for shade in row) for row in shades)


def _extent(count: int, scale: int, cells: int) -> Tensor:
    """How many of ``count`` blocks fall into each cell."""
    return (count - torch.arange(cells) * scale).clamp(max=scale)
