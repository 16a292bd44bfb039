"""Build the BlockLayout of a mask: the superset on the host, the rest on the device.

Which blocks a mask could visit at all follows from the predicate and the lengths; it is computed
once and cached. What the tables hold (documents, padding) and which batch entry and head is meant
is settled on the device, by tensor operations that never wait for a result: the room of every line
is known from the superset.

Where there are generated kernels these do it all; for one that torch's operations make they start
three kernels instead of a hundred. A layout with a wrong block gives wrong results
that look right. On an H200, kernels that computed ``max(low, -high, 0)`` for ``|x| <= 0`` listed
blocks as if ``-high`` were not there, though in Triton's interpreter the same kernels agree with
the CPU. That form is no longer generated (:mod:`sparse_compile.layout.canonical`), and all masks of
the tests are listed rightly there now; but why it went wrong is not known. So before the kernels of
a mask are trusted on a device, their lists are compared with those of the CPU, once and on a small
problem; where they differ, the CPU makes the layouts of that mask.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLayout, BlockLists, line_starts
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import (
    Digits,
    Problem,
    Rectangles,
    is_narrow,
    layout_of_rectangles,
    partial_and_full,
    rectangles,
    runs,
    static_layout,
)
from sparse_compile.layout.table_bounds import BlockBounds
from sparse_compile.spec.view import Order

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


@dataclass(frozen=True)
class Candidates:
    """The blocks that some class may visit, by rows and then by columns.

    With n candidates, R rows and C columns, lines ``0 .. R-1`` are rows and ``R .. R+C-1`` columns,
    and places ``0 .. n-1`` list the candidates by rows and ``n .. 2n-1`` by columns.

    Attributes:
        b, h: int64 [classes, 1]; the coordinates of each class.
        r, c: int64 [n]; the blocks, by rows.
        digits: bounds of the digits of the queries and keys of each block.
        whole: bool [n]; which blocks do not stick out.
        source: int64 [2n]; which candidate stands at each place.
        line: int64 [2n]; the line of each place.
        first: int64 [R+C+1]; the first place of each line.
        block: int32 [2n]; what a list holds at each place: c by rows, r by columns.
        row_start, col_start: int32 [R+1] and [C+1]; as in :class:`BlockLists`.
    """

    b: Tensor
    h: Tensor
    r: Tensor
    c: Tensor
    digits: Digits
    whole: Tensor
    source: Tensor
    line: Tensor
    first: Tensor
    block: Tensor
    row_start: Tensor
    col_start: Tensor

    @property
    def count(self) -> int:
        """n."""
        return self.r.numel()

    def to(self, device: torch.device) -> Candidates:
        """The same candidates on another device."""
        return Candidates(**{name: part.to(device) for name, part in vars(self).items()})


@functools.lru_cache(maxsize=64)
def candidates(problem: Problem, device: torch.device) -> Candidates:
    """The superset on ``device``; cached, so its tensors must not be changed."""
    if device.type != "cpu":
        return candidates(problem, torch.device("cpu")).to(device)
    rows, cols = problem.grid
    by_row = runs(rectangles(problem), cols, partial_first=False)
    r, c = torch.repeat_interleave(by_row.line, by_row.length), by_row.blocks().long()
    by_col = c.argsort(stable=True)
    row_start = line_starts(torch.bincount(r, minlength=rows))
    col_start = line_starts(torch.bincount(c, minlength=cols))
    number = torch.arange(problem.classes)[:, None]
    return Candidates(
        number // max(problem.heads, 1),
        number % max(problem.heads, 1),
        r,
        c,
        problem.digits(r, c),
        problem.whole(r, c),
        torch.cat([torch.arange(r.numel()), by_col]),
        torch.cat([r, c[by_col] + rows]),
        torch.cat([row_start[:-1], col_start + r.numel()]).long(),
        torch.cat([c, r[by_col]]).to(torch.int32),
        row_start,
        col_start,
    )


def counted_layout(problem: Problem, tables: Sequence[Tensor]) -> BlockLayout:
    """The layout of a problem, its tables on the CPU; each class is searched by itself."""
    bounds = BlockBounds(problem, tables)
    found = [_rectangles(problem, bounds, c) for c in range(problem.classes)]
    return layout_of_rectangles(problem, found)


def _rectangles(problem: Problem, bounds: BlockBounds, number: int) -> Rectangles:
    b, h = (point(value) for value in divmod(number, max(problem.heads, 1)))

    def classify(r: Tensor, c: Tensor, size: int) -> tuple[Tensor, Tensor]:
        lookup = functools.partial(bounds.of_squares(size).lookup, {Q: r // size, KV: c // size})
        return problem.classified(r, c, b, h, lookup, size)

    return rectangles(problem, classify)


#: Kernels are tried with at most so many blocks a side, the last one ragged (more than two spans of
#: them), and with so many batch entries and heads.
_BLOCKS, _MEMBERS = 300, 2

_TRUSTED: dict[tuple[Any, ...], bool] = {}
_Make = Callable[[Problem, Sequence[Tensor], torch.device], BlockLayout]


def device_layout(problem: Problem, tables: Sequence[Tensor], device: torch.device) -> BlockLayout:
    """The layout of a problem, by kernels on its device if they are right, else by the CPU.

    The host may wait for the number of blocks.
    """
    builder = BUILDERS.get(device)
    assert builder is not None, device
    return _checked(builder.layout, problem, tables, device)


def quick_layout(
    problem: Problem, tables: Sequence[Tensor], device: torch.device
) -> BlockLayout | None:
    """The layout of a problem by kernels that the host does not wait for, if that is possible.

    Nothing is known of how many blocks lines visit but what the predicate leaves possible.
    """
    builder = BUILDERS.get(device)
    # Kernels are compared with the CPU for each value of a size, and those may change in each call.
    if builder is None or problem.sizes or not builder.has_room(problem):
        return None
    try:
        return _checked(builder.packed, problem, tables, device)
    except ValueError:  # more entries than kernels can number
        return None


def _checked(
    make: _Make, problem: Problem, tables: Sequence[Tensor], device: torch.device
) -> BlockLayout:
    """What ``make`` makes by kernels if they are right, else what the CPU makes."""
    key = make, problem.text, problem.q, problem.kv, problem.sizes, device
    trusted = _TRUSTED.get(key)
    if trusted is None:
        trusted = _TRUSTED[key] = _agrees(make, problem, tables, device)
        if not trusted:
            warnings.warn(
                f"sparse_compile: on {device} the generated kernels do not list the blocks of "
                f"{problem.mask} rightly, so the CPU lists them. Report this as a bug.",
                stacklevel=3,
            )
    if trusted:
        return make(problem, tables, device)
    return _by_cpu(problem, tables).to(device)


def _agrees(make: _Make, problem: Problem, tables: Sequence[Tensor], device: torch.device) -> bool:
    small = replace(
        problem,
        n_q=_small(problem.q, problem.n_q),
        n_kv=_small(problem.kv, problem.n_kv),
        batches=min(problem.batches, _MEMBERS),
        heads=min(problem.heads, _MEMBERS),
    )
    found, wanted = make(small, tables, device), _by_cpu(small, tables)
    return all(
        torch.equal(mine.cpu(), its)
        for c in range(small.classes)
        for lists, expected in ((found.rows, wanted.rows), (found.cols, wanted.cols))
        for mine, its in zip(lists.entries(c), expected.entries(c), strict=True)
    )


def _small(order: Order, n: int) -> int:
    """A length of two and a half boxes along the first digit, or of _BLOCKS blocks if longer."""
    tokens = max(5 * order.box[0] * order.strides[0] // 2, _BLOCKS * order.block)
    return min(n, tokens - 3)


def _by_cpu(problem: Problem, tables: Sequence[Tensor]) -> BlockLayout:
    if problem.is_static:
        return static_layout(problem, torch.device("cpu"))
    return counted_layout(problem, [table.cpu() for table in tables])
