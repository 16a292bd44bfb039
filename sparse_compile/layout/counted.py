"""Layouts of masks that read tensors, on the CPU: what the tables hold narrows the search.

Where tables are at hand, whole squares of blocks are classified with the least and greatest entry
that they read, so that documents of a long sequence are found without looking at every pair of
blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLayout, BlockLists, Load
from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import (
    Problem,
    Rectangles,
    line_starts,
    runs,
    subdivided,
)
from sparse_compile.layout.table_bounds import BlockBounds, Pyramid


def counted_layout(problem: Problem, tables: Sequence[Tensor]) -> BlockLayout:
    """The layout of a problem, its tables on the CPU; each class is searched by itself."""
    pyramid = Pyramid(BlockBounds(problem, tables))
    found = [_rectangles(problem, pyramid, c) for c in range(problem.classes)]
    rows, cols = problem.grid
    return problem.layout(
        _lists(found, rows, cols),
        _lists([rects.transposed() for rects in found], cols, rows),
    )


def _rectangles(problem: Problem, pyramid: Pyramid, number: int) -> Rectangles:
    b, h = (point(value) for value in divmod(number, max(problem.heads, 1)))

    def classify(r: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
        bounds = pyramid.of_squares(size)
        blocks = {Q: r // size, KV: c // size}
        lookup = functools.partial(bounds.lookup, blocks)
        must, may = problem.verdict(problem.digits(r, c, size), b, h, lookup)
        full = problem.whole(r, c, size) & must
        return full, torch.ones_like(full) & may & ~full

    found = subdivided(problem, classify)
    assert found is not None
    return found


def _lists(found: Sequence[Rectangles], n_lines: int, n_across: int) -> BlockLists:
    """The lists of all classes, each line with the room that its largest class needs."""
    lines = [runs(rects, n_across, partial_first=True) for rects in found]
    counts = torch.zeros(len(found), n_lines * 2, dtype=torch.int64)
    for c, run in enumerate(lines):
        counts[c].index_add_(0, run.line * 2 + run.full, run.length)
    counts = counts.view(len(found), n_lines, 2)
    totals = counts.sum(2)
    room = totals.amax(0) if len(found) else torch.zeros(n_lines, dtype=torch.int64)
    start = line_starts(room)
    index = torch.zeros(len(found), int(room.sum()), dtype=torch.int32)
    for c, run in enumerate(lines):
        line = torch.repeat_interleave(run.line, run.length)
        before = totals[c].cumsum(0) - totals[c]
        place = torch.arange(line.numel()) - before[line] + start.long()[line]
        index[c, place] = run.blocks()
    return BlockLists(start, counts.to(torch.int32), index, Load.of(room))
