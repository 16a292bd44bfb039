"""Layouts whose blocks a selection names: lists of blocks from lists of units, on the device.

Nothing waits: every list has the room that its shape says. The rows are the lists themselves,
PARTIAL before FULL; the transpose is a counting sort of their entries, made where a backward asks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLayout, BlockLists, Load, unpacked_lists
from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.table_bounds import BlockBounds


def listed_layout(
    problem: Problem, index: Tensor, count: Tensor, tables: Sequence[Tensor]
) -> BlockLayout:
    """The layout of a view, all of whose blocks a selection names.

    Args:
        problem: units of queries and of keys are its blocks; it has a class for every batch entry
            and query head.
        index, count: int32 [B, Hs, U, K] and [B, Hs, U], as in
            :class:`sparse_compile.selection.Selection`.
        tables: what the mask reads.
    """
    group = problem.heads // index.shape[1]
    index, count = (part.repeat_interleave(group, 1).flatten(0, 1) for part in (index, count))
    partial, full = _kinds(problem, index, count, tables)
    n_partial, n_full = partial.sum(-1), full.sum(-1)
    # Both kinds stay in order; what is neither goes past the end.
    units, most = index.shape[1:]
    place = torch.where(partial, partial.cumsum(-1) - 1, most)
    place = torch.where(full, n_partial[..., None] + full.cumsum(-1) - 1, place)
    rows = index.new_zeros(*index.shape[:-1], most + 1).scatter_(-1, place, index)
    counts = torch.stack([n_partial, n_full], -1).to(torch.int32)
    start = torch.arange(units + 1, dtype=torch.int32, device=index.device) * most
    made = rows[..., :-1].reshape(problem.classes, units * most)
    return _layout_of(BlockLists(start, counts, made), problem)


def _kinds(
    problem: Problem, index: Tensor, count: Tensor, tables: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """bool [classes, U, K]: which entries are PARTIAL, and which FULL."""
    classes, units, most = index.shape
    device = index.device
    used = torch.arange(most, device=device) < count[..., None]
    c = torch.where(used, index, 0).long()
    r = torch.arange(units, device=device)[:, None].expand(c.shape)
    number = torch.arange(classes, device=device)[:, None, None]
    b = point(number // problem.heads, problem.batches)
    h = point(number % problem.heads, problem.heads)
    lookup = functools.partial(BlockBounds(problem, tables).lookup, {Q: r, KV: c})
    partial, full = problem.classified(r, c, b, h, lookup)
    return used & partial, used & full


def unpacked_listed(packed: Tensor, problem: Problem) -> BlockLayout:
    """The layout of a vector that :meth:`BlockLayout.pack` made of rows; no copy, no waiting."""
    units, _ = problem.grid
    return _layout_of(unpacked_lists(packed, (units,), problem.classes, 0), problem)


def listed_load(layout: BlockLayout, axis: str) -> Load:
    """How many blocks each line has room for, which the host knows without the lists.

    Of columns it knows only how many entries there are together: they count as even.
    """
    (units, columns), entries = layout.grid, layout.rows.index.shape[1]
    lines = units if axis == "q" else columns
    share = -(-entries // max(lines, 1))
    return Load(lines, (entries, share), torch.full([lines], share))


def _layout_of(rows: BlockLists, problem: Problem) -> BlockLayout:
    return replace(problem.layout(rows, lambda: _transposed(rows, problem)), listed=True)


def _transposed(rows: BlockLists, problem: Problem) -> BlockLists:
    """For each key block, its query blocks; every class has its own starts."""
    units, columns = problem.grid
    shape = problem.classes, units, -1
    index, n = rows.index.view(shape), rows.counts.sum(-1, dtype=torch.int32)
    # Twice as many lines as columns: of each, those that are PARTIAL there and those that are FULL.
    is_full = torch.arange(index.shape[-1], device=index.device) >= rows.counts[..., :1]
    start, order = places((index * 2 + is_full)[None], n[None], 2 * columns)
    start, most = start[0], index.shape[-1]
    counts = start.diff(dim=-1).view(problem.classes, columns, 2)
    blocks = (order[0] // most).to(torch.int32) if most else order[0]
    return BlockLists(start[:, ::2].contiguous(), counts.contiguous(), blocks)


def places(
    index: Tensor, count: Tensor, units: int, stretch: int | None = None
) -> tuple[Tensor, Tensor]:
    """The entries of all lists in the order of the units of keys that they name.

    Does not synchronise: those that no list has stand at the end.

    Args:
        index, count: as in :class:`sparse_compile.selection.Selection`.
        units: how many units of keys there are.
        stretch: so many units of queries come before the next ones, each stretch in the order of
            the units of keys; None: all at once. Who works through the entries in order finds the
            queries of a stretch in a cache.

    Returns:
        ``start`` int32 [B, Hs, n * units + 1] for n stretches and ``order`` int32 [B, Hs, Uq * K]:
        unit ``j`` is named in stretch ``s`` by the entries ``order[b, h, start[b, h, i] :
        start[b, h, i + 1]]``, ``i = s * units + j``, ascending, counted over the last two
        dimensions of ``index``.
    """
    batch, heads, rows, most = index.shape
    stretch = stretch or max(rows, 1)
    edges = -(-rows // stretch) * units
    used = torch.arange(most, device=index.device) < count[..., None]
    first = torch.arange(rows, device=index.device)[:, None] // stretch * units
    keys = torch.where(used, index + first, edges).to(torch.int32).view(batch, heads, rows * most)
    by_unit = keys.sort(dim=-1, stable=True)
    edge = torch.arange(edges + 1, dtype=torch.int32, device=index.device)
    edge = edge.expand(batch, heads, edges + 1).contiguous()
    start = torch.searchsorted(by_unit.values, edge, out_int32=True)
    return start, by_unit.indices.to(torch.int32)
