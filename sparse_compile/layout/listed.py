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
from sparse_compile.layout.block_layout import BlockLayout, BlockLists, Load
from sparse_compile.layout.intervals import Bound, Span
from sparse_compile.layout.places import places
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.table_bounds import BlockBounds


def packed_lists(
    problem: Problem, index: Tensor, count: Tensor, tables: Sequence[Tensor]
) -> Tensor:
    """The rows of a layout in one int32 vector, see :func:`unpacked_lists`.

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
    place = torch.where(partial, partial.cumsum(-1) - 1, index.shape[-1])
    place = torch.where(full, n_partial[..., None] + full.cumsum(-1) - 1, place)
    rows = index.new_zeros(*index.shape[:-1], index.shape[-1] + 1).scatter_(-1, place, index)
    counts = torch.stack([n_partial, n_full], -1).to(torch.int32)
    return torch.cat([counts.flatten(), rows[..., :-1].flatten()])


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
    b, h = number // problem.heads, number % problem.heads
    must, may = problem.verdict(
        problem.digits(r, c),
        Span(b, b, 0, problem.batches),
        Span(h, h, 0, problem.heads),
        functools.partial(BlockBounds(problem, tables).lookup, {Q: r, KV: c}),
    )
    whole = problem.whole(r, c) & _truth(must, device)
    full = used & whole
    return used & _truth(may, device) & ~full, full


def _truth(bound: Bound, device: torch.device) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.tensor(bool(bound), device=device)


def unpacked_lists(packed: Tensor, problem: Problem) -> BlockLayout:
    """The layout of a vector of :func:`packed_lists`; no copy, no synchronisation."""
    units, _ = problem.grid
    fixed = problem.classes * units * 2
    entries = (packed.numel() - fixed) // max(problem.classes, 1)
    counts, index = packed[:fixed], packed[fixed:]
    most = entries // max(units, 1)
    start = torch.arange(units + 1, dtype=torch.int32, device=packed.device) * most
    rows = BlockLists(
        start,
        counts.view(problem.classes, units, 2),
        index.view(problem.classes, entries),
        Load(units, (entries, most), torch.full([units], most)),
    )
    layout = problem.layout(rows, lambda: _transposed(rows, problem))
    return replace(layout, listed=True)


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
    # The host knows only how many entries there are: lines count as even.
    share = -(-units * most // max(columns, 1))
    load = Load(columns, (units * most, share), torch.full([columns], share))
    return BlockLists(start[:, ::2].contiguous(), counts.contiguous(), blocks, load)
