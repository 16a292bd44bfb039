"""Layouts of masks that read tensors, on the CPU: what the tables hold narrows the search.

Where tables are at hand, whole squares of blocks are classified with the least and greatest entry
that they read, so that documents of a long sequence are found without looking at every pair of
blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLayout, Load
from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import Problem, Rectangles, layout_of_rectangles, subdivided
from sparse_compile.layout.table_bounds import BlockBounds


def counted_layout(problem: Problem, tables: Sequence[Tensor]) -> BlockLayout:
    """The layout of a problem, its tables on the CPU; each class is searched by itself."""
    bounds = BlockBounds(problem, tables)
    found = [_rectangles(problem, bounds, c) for c in range(problem.classes)]
    made = layout_of_rectangles(problem, found)
    rows, cols = (
        replace(lists, load=Load.of(lists.start.long().diff())) for lists in (made.rows, made.cols)
    )
    return replace(made, rows=rows, columns=cols)


def _rectangles(problem: Problem, bounds: BlockBounds, number: int) -> Rectangles:
    b, h = (point(value) for value in divmod(number, max(problem.heads, 1)))

    def classify(r: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
        lookup = functools.partial(bounds.of_squares(size).lookup, {Q: r // size, KV: c // size})
        return problem.classified(r, c, b, h, lookup, size)

    found = subdivided(problem, classify)
    assert found is not None
    return found
