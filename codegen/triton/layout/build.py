"""Build the block lists of a mask on a GPU.

One launch counts and lists. Only where its room may be too small does the host look at what it
counted, and if so a second one lists all blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import Launcher, current, launchers_of
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.lookups import Lookup, lookups_of
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.codegen.triton.layout.source import module_of
from sparse_compile.codegen.triton.layout.tables import TableBounds
from sparse_compile.layout.block_layout import BlockLists, Load
from sparse_compile.layout.superset import Problem

#: What a grid holds in its second dimension.
_MOST_CLASSES = 65535
#: Room of a line in the first launch if there is not room for all blocks, and of all lines: 4 MB.
_WIDTH, _MOST_PLACES = 128, 1 << 20


@dataclass(frozen=True)
class DeviceProblem:
    """A mask with its data on a device; ``rows`` and ``cols`` of its layout are built separately.

    Attributes:
        problem: what the host knows of it.
        kernels: generated for the mask and the orders, by name.
        device: a CUDA device; the CPU where Triton interprets.
        values: of the kernels' parameters, by name: bounds of lookups, and sizes.
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
        values = key.values(problem.sizes)
        if lookups and problem.n_q and problem.n_kv and problem.classes:
            with current(device):
                bounds = TableBounds(key, problem, tables).of(lookups, kernels.get("read_tables"))
            values |= bounds
        return DeviceProblem(problem, kernels, device, values)

    def rows(self) -> BlockLists:
        """For each query block, its key blocks."""
        return self._built("rows", *self.problem.grid)

    def cols(self) -> BlockLists:
        """For each key block, its query blocks."""
        return self._built("cols", *reversed(self.problem.grid))

    def _built(self, side: str, lines: int, across: int) -> BlockLists:
        """The lists of ``lines`` that may visit ``across`` blocks each; waits if that is many."""
        problem, classes, device = self.problem, self.problem.classes, self.device
        if not (lines and across and classes):
            none = torch.zeros(classes, lines, 2, dtype=torch.int32, device=device)
            return with_room(none, torch.zeros(lines, dtype=torch.int64))
        shared = {"n_q": problem.n_q, "n_kv": problem.n_kv, "heads": problem.heads, **self.values}
        grid, width = (lines, classes, 1), _width(classes * lines, across)
        places = classes * lines * width
        # Zeros in one launch: the room that is not used, and behind it two sums.
        zeros = torch.zeros(places + 4, dtype=torch.int32, device=device)
        index, totals = zeros[:places].view(classes, -1), zeros[places:].view(torch.int64)
        counts = torch.empty(classes, lines, 2, dtype=torch.int32, device=device)
        start = torch.empty(lines + 1, dtype=torch.int32, device=device)

        def bounds() -> tuple[int, int]:
            total, most = totals.tolist()
            return total // classes, most

        with current(device):
            made = {"counts": counts, "start": start, "index": zeros, "width": width}
            self.kernels[f"list_{side}"](grid, {**made, "totals": totals, **shared})
            load = Load(lines, bounds, lambda: visited(counts.cpu()))
            if width >= across or load.most <= width:
                return BlockLists(start, counts, index, load)
            lists = with_room(counts, load.lines)
            given = {"index": lists.index, "start": lists.start, "counts": counts}
            room = {"room": lists.index.shape[1]}
            self.kernels[f"fill_{side}"](grid, {**given, **room, **shared})
            return lists


@functools.lru_cache(maxsize=256)
def _loaded(key: Key) -> tuple[Mapping[str, Launcher], tuple[Lookup, ...]]:
    """The kernels of a key, and the lookups whose bounds they take; imports Triton."""
    return launchers_of(module_of(key)), lookups_of(key)


def _width(lines: int, across: int) -> int:
    """Blocks of each line that the first launch has room for: all, or few, or none; even."""
    for width in (across, _WIDTH):
        even = min(across, width) + 1 & ~1
        if lines * even <= _MOST_PLACES:
            return even
    return 0


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
