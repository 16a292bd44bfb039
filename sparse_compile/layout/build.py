"""Build the BlockLayout of a mask: the superset on the host, the rest on the device.

Which blocks a mask could visit at all follows from the predicate and the lengths; it is computed
once and cached. What the tables hold (documents, padding) and which batch entry and head is meant
is settled on the device, by tensor operations that never wait for a result: the room of every line
is known from the superset.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLayout, BlockLists
from sparse_compile.layout.counted import counted_layout
from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import Problem, is_narrow, partial_and_full, static_layout
from sparse_compile.layout.table_bounds import BlockBounds
from sparse_compile.layout.views.candidates import Candidates, candidates

#: Classes are classified together up to this many blocks, to bound the temporaries.
_BLOCKS_AT_ONCE = 1 << 22
#: On the CPU so many classes are searched one by one; more are classified together.
_FEW_CLASSES = 4


def build_layout(
    problem: Problem, tables: Sequence[Tensor] = (), device: torch.device | str = "cpu"
) -> BlockLayout:
    """The blocks that a mask visits.

    EMPTY blocks are proven empty and left out; FULL blocks are proven full and lie inside
    [0, n_q) x [0, n_kv); everything else is PARTIAL. Reading ``tables`` never synchronises with
    the device.

    Args:
        problem: the mask, its sizes, and how tokens are put into blocks.
        tables: the tensors ``t0, t1, ...`` on ``device``, bool or integer.
        device: where the lists are made.

    Returns:
        int32 lists. Those of a mask without tables, ``b`` and ``h`` come from a cache shared by
        all callers: do not change them in place.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> from sparse_compile.layout.superset import ProblemShape
    >>> problem = Problem.of(MaskExpr(KV <= Q), ProblemShape(2, 8, 64, 64), (16, 32))
    >>> build_layout(problem).kinds().tolist()
    [[[1, 0], [1, 0], [2, 1], [2, 1]]]
    """
    device = torch.device(device)
    if problem.is_static:
        return static_layout(problem, device)
    if device.type == "cpu" and (problem.classes <= _FEW_CLASSES or not is_narrow(problem)):
        return counted_layout(problem, tables)
    found = candidates(problem, device)
    return _partitioned(problem, found, _classified(problem, found, tables))


def _classified(problem: Problem, found: Candidates, tables: Sequence[Tensor]) -> Tensor:
    """bool [2, classes, n]: which candidates are PARTIAL, and which FULL."""
    if not found.count:
        return torch.zeros(2, problem.classes, 0, dtype=torch.bool, device=found.r.device)
    bounds = BlockBounds(problem, tables)
    at_once = max(1, _BLOCKS_AT_ONCE // found.count)
    classes = zip(torch.split(found.b, at_once), torch.split(found.h, at_once), strict=True)
    parts = [_kinds(problem, found, bounds, b, h) for b, h in classes]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _kinds(
    problem: Problem, found: Candidates, bounds: BlockBounds, b: Tensor, h: Tensor
) -> Tensor:
    """bool [2, k, n]: :func:`_classified` for the classes of the coordinates int64 [k, 1]."""
    verdict = problem.verdict(
        found.digits,
        point(b, problem.batches),
        point(h, problem.heads),
        functools.partial(bounds.lookup, {Q: found.r, KV: found.c}),
    )
    return torch.stack(partial_and_full(found.whole.expand(b.shape[0], -1), *verdict))


def _partitioned(problem: Problem, found: Candidates, kinds: Tensor) -> BlockLayout:
    """Sort every line into PARTIAL and FULL, stably: a counting sort over all lines at once."""
    chosen = kinds.index_select(-1, found.source)
    # Of each place: how many PARTIAL and FULL blocks stand before it, in this and earlier lines.
    before = torch.nn.functional.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
    at_start = before.index_select(-1, found.first)
    counts = at_start.diff(dim=-1)
    shift = found.first[:-1] - at_start[..., :-1]
    shift[1] += counts[0]
    target = before[..., :-1] + shift.index_select(-1, found.line)
    # EMPTY blocks go to one place past the end.
    nowhere = 2 * found.count
    where = torch.where(chosen[0], target[0], torch.where(chosen[1], target[1], nowhere))
    index = torch.zeros(problem.classes, nowhere + 1, dtype=torch.int32, device=chosen.device)
    index.scatter_(1, where, found.block.expand(where.shape))
    counts, (rows, _), room = counts.permute(1, 2, 0), problem.grid, found.count
    row_counts, col_counts = counts[:, :rows].contiguous(), counts[:, rows:].contiguous()
    row_index, col_index = index[:, :room].contiguous(), index[:, room:nowhere].contiguous()
    return problem.layout(
        BlockLists(found.row_start, row_counts, row_index),
        BlockLists(found.col_start, col_counts, col_index),
    )
