"""Build the block lists of a mask on a GPU.

First one launch bounds the lookups in tables (:mod:`bounds`). Then one launch for each direction
counts and lists. Where there is room for all blocks the host knows where everything stands, and the
kernels write into the one vector that a graph holds. Else it looks at what they counted, and if a
line had too little room another launch lists all blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import Launcher, current, launchers_of
from sparse_compile.codegen.triton.layout.bounds import TableBounds
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.lookups import Lookup, lookups_of
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.codegen.triton.layout.source import module_of
from sparse_compile.layout.block_layout import BlockLayout, BlockLists, Load
from sparse_compile.layout.superset import Problem

#: What a grid holds in its second dimension.
_MOST_CLASSES = 65535
#: Room of a line in the first launch if there is not room for all blocks, and of all lines: 4 MB.
_WIDTH, _MOST_PLACES = 128, 1 << 20


@dataclass(frozen=True)
class DeviceProblem:
    """A mask with its data on a device, whose layout is to be made there.

    Attributes:
        problem: what the host knows of it.
        kernels: generated for the mask and the orders, by name.
        device: a CUDA device; the CPU where Triton interprets.
        values: of the kernels' parameters, by name: lengths, sizes and bounds of lookups.
    """

    problem: Problem
    kernels: Mapping[str, Launcher]
    device: torch.device
    values: dict[str, Any]

    @staticmethod
    def of(
        problem: Problem,
        tables: Sequence[Tensor],
        device: torch.device,
        span: int | None = None,
    ) -> DeviceProblem:
        """The problem of a call; reads the tables, by one launch for most masks.

        Args:
            problem: what the host knows of it.
            tables: of the mask.
            device: where the tables are and the lists are made.
            span: blocks that are looked at together first.

        Raises:
            ValueError: for more classes, tokens or table entries than the kernels can number.
        """
        if max(problem.n_q, problem.n_kv) > LONGEST:
            raise ValueError(f"lengths over {LONGEST} are not supported")
        if problem.classes > _MOST_CLASSES:
            raise ValueError(f"more than {_MOST_CLASSES} classes are not supported")
        key = Key.of(problem.mask, problem.sizes, problem.q, problem.kv, span)
        (kernels, lookups), device = _loaded(key), _numbered(device)
        values = {"n_q": problem.n_q, "n_kv": problem.n_kv, "heads": problem.heads}
        values |= key.values(problem.sizes)
        if lookups and not _is_empty(problem):
            with current(device):
                values |= TableBounds(key, problem, tables).of(lookups, kernels.get("read_tables"))
        return DeviceProblem(problem, kernels, device, values)

    def rows(self) -> BlockLists:
        """For each query block, its key blocks; waits if there may not be room for all."""
        return self._counted("rows", *self.problem.grid)

    def cols(self) -> BlockLists:
        """For each key block, its query blocks; likewise."""
        return self._counted("cols", *reversed(self.problem.grid))

    def packed(self) -> BlockLayout:
        """Both in one vector, if :func:`has_room`; waits for nothing."""
        rows, cols = self.problem.grid
        made = self.problem.unfilled(rows * cols, self.device)
        if _is_empty(self.problem):
            made.pack().zero_()
            return made
        self._list("rows", made.rows, width=cols)
        self._list("cols", made.cols, width=rows)
        return made

    def _counted(self, side: str, lines: int, across: int) -> BlockLists:
        """Lists with a load, of ``lines`` that may visit ``across`` blocks each."""
        problem, classes, device = self.problem, self.problem.classes, self.device
        if _is_empty(problem):
            none = torch.zeros(classes, lines, 2, dtype=torch.int32, device=device)
            return with_room(none, torch.zeros(lines, dtype=torch.int64))
        width = _width(classes * lines, across)
        new = functools.partial(torch.empty, dtype=torch.int32, device=device)
        lists = BlockLists(new(lines + 1), new(classes, lines, 2), new(classes, lines * width))
        totals = torch.zeros(2, dtype=torch.int64, device=device)

        def bounds() -> tuple[int, int]:
            total, most = totals.tolist()
            return total // classes, most

        load = Load(lines, bounds, lambda: visited(lists.counts.cpu()))
        self._list(side, lists, width, totals)
        if width >= across or load.most <= width:
            return replace(lists, load=load)
        return self._filled(side, lists.counts, load)

    def _list(self, side: str, lists: BlockLists, width: int, totals: Tensor | None = None) -> None:
        """Count the blocks of each line, and list them where they are at most ``width``.

        Args:
            side: the direction, ``"rows"`` or ``"cols"``.
            lists: that are filled.
            width: how many blocks of a line there is room for.
            totals: int64 [2], zeros: how many blocks all lines have, and the most that any has.
        """
        classes, lines, _ = lists.counts.shape
        into = {"start": lists.start, "counts": lists.counts, "index": lists.index}
        room = {"room": lists.index.shape[1], "width": width, "totals": totals}
        with current(self.device):
            self.kernels[f"list_{side}"]((lines, classes, 1), {**into, **room, **self.values})

    def _filled(self, side: str, counts: Tensor, load: Load) -> BlockLists:
        """Lists of all blocks, which have been counted; waits for their number."""
        lists = with_room(counts, load.lines)
        classes, lines, _ = counts.shape
        into = {"start": lists.start, "counts": counts, "index": lists.index}
        room = {"room": lists.index.shape[1]}
        with current(self.device):
            self.kernels[f"fill_{side}"]((lines, classes, 1), {**into, **room, **self.values})
        return lists


@functools.lru_cache(maxsize=256)
def _loaded(key: Key) -> tuple[Mapping[str, Launcher], tuple[Lookup, ...]]:
    """The kernels of a key, and the lookups whose bounds they take; imports Triton."""
    return launchers_of(module_of(key)), lookups_of(key)


def _is_empty(problem: Problem) -> bool:
    """Whether there is nothing to start a kernel for."""
    return not (problem.n_q and problem.n_kv and problem.classes)


def has_room(problem: Problem) -> bool:
    """Whether the first launches have room for all blocks of a problem, by rows and by columns."""
    rows, cols = problem.grid
    return problem.classes * rows * cols <= _MOST_PLACES


def _width(lines: int, across: int) -> int:
    """Blocks of each line that the first launch has room for: all, or few, or none."""
    widths = (across, min(across, _WIDTH))
    return next((width for width in widths if lines * width <= _MOST_PLACES), 0)


def visited(counts: Tensor) -> Tensor:
    """int64 [lines]: the most blocks that a class visits in each line."""
    each = counts.sum(-1)
    return each[0] if len(each) == 1 else each.amax(0)


def with_room(counts: Tensor, lines: Tensor) -> BlockLists:
    """Lists to be filled.

    Args:
        counts: int32 [classes, lines, 2] on a device, of PARTIAL and FULL blocks.
        lines: int64 [lines] on the host, how many blocks each has room for.
    """
    load, classes, device = Load.of(lines), len(counts), counts.device
    if load.total > INT32_MAX:
        raise ValueError(f"{load.total} blocks are more than int32 can count")
    ends = torch.zeros(load.n + 1, dtype=torch.int32)
    torch.cumsum(lines, 0, dtype=torch.int32, out=ends[1:])
    # Room that a class does not use holds 0.
    make = torch.empty if classes == 1 else torch.zeros
    index = make((classes, load.total), dtype=torch.int32, device=device)
    return BlockLists(ends.to(device, non_blocking=True), counts, index, load)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
