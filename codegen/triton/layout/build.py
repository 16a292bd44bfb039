"""Build the block lists of a mask on a GPU.

One launch counts and lists. Only where its room may be too small does the host look at what it
counted, and if so a second one lists all blocks.

Before that come the bounds of table lookups over blocks and over spans of blocks, as arguments of
these kernels. A lookup along one coordinate is read by a generated kernel, all of them in one
launch. One that has only points of ``b, h`` for indices needs no reading. The others are reduced by
torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import Launcher, current, launchers_of, table_values
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.lookups import Lookup, lookups_of, read_by_kernel
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.codegen.triton.layout.source import module_of
from sparse_compile.expr import KV, Q
from sparse_compile.layout.block_layout import BlockLists, Load
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.table_bounds import BlockBounds

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


def has_room(problem: Problem) -> bool:
    """Whether the first launches have room for all blocks of a problem, by rows and by columns."""
    rows, cols = problem.grid
    return all(
        _width(problem.classes * lines, across) >= across
        for lines, across in ((rows, cols), (cols, rows))
    )


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


@dataclass(frozen=True)
class TableBounds:
    """What bounds the lookups of a call: values of parameters by name.

    Attributes:
        key: of the kernels.
        problem: of the call; no length and no class is missing.
        tables: of the mask, on their device.
    """

    key: Key
    problem: Problem
    tables: Sequence[Tensor]

    def of(self, lookups: Sequence[Lookup], read: Launcher | None) -> dict[str, Any]:
        """The bounds of lookups, of which the kernel ``read`` reads some, if there is one."""
        found: dict[str, Any] = {}
        for lookup in lookups:
            if lookup.along is None:
                found |= self._reduced(lookup)
        return found if read is None else found | self._read(read_by_kernel(lookups), read)

    def _read(self, lookups: Sequence[Lookup], read: Launcher) -> dict[str, Any]:
        """Bounds of the lookups along one coordinate; starts one kernel."""
        found: dict[str, Any] = {}
        most_spans = most_rows = 1
        for lookup in lookups:
            table, blocks = self.tables[lookup.index], self.problem.grid[lookup.along != Q]
            spans = -(-blocks // self.key.span)
            others = [table.shape[d] for d in lookup.points]
            rows = math.prod(others)
            size = 2 * rows * (blocks + spans)
            both = torch.empty(size, dtype=_bounds_dtype(table), device=table.device)
            strides = _row_major(lookup, others, blocks + spans)
            found |= _checked(lookup, [both, size // 2, *strides, *others], size)
            most_spans, most_rows = max(most_spans, spans), max(most_rows, rows)
        values = self.key.values(self.problem.sizes)
        values |= {"n_q": self.problem.n_q, "n_kv": self.problem.n_kv}
        for number in {lookup.index for lookup in lookups}:
            table = self.tables[number]
            values |= table_values(f"t{number}", table)
            _within_reach(max((*table.stride(), *table.shape), default=0))
        if most_rows > 65535:
            raise ValueError("a table has more rows than a grid")
        read((most_spans, most_rows, len(lookups)), {**found, **values})
        return found

    def _reduced(self, lookup: Lookup) -> dict[str, Any]:
        table = lo = hi = self.tables[lookup.index]
        half = 0
        if not lookup.is_point:
            lo, hi = BlockBounds(self.problem, self.tables).reduced(lookup.index, lookup.exprs)
            lo, hi = lo.to(_bounds_dtype(table)), hi.to(_bounds_dtype(table))
            for d, axis in enumerate(lookup.axes):
                if axis in (Q, KV):
                    lo, hi = _with_spans(lo, hi, d, self.key.span)
            lo = torch.stack([lo, hi])[0]
            half = lo.numel()
        strides = [lo.stride(d) for d in lookup.kept]
        ends = zip(lo.shape, lo.stride(), strict=True)
        reach = half + sum((n - 1) * stride for n, stride in ends)
        return _checked(lookup, [lo, half, *strides, *(lo.shape[d] for d in lookup.points)], reach)


def _bounds_dtype(table: Tensor) -> torch.dtype:
    return torch.int64 if table.dtype == torch.int64 else torch.int32


def _row_major(lookup: Lookup, others: Sequence[int], places: int) -> list[int]:
    """Strides of the axes of a lookup: rows of ``places``, the last of the other axes fastest."""
    outer = [places * math.prod(others[d + 1 :]) for d in range(len(others))]
    at = lookup.axes.index(lookup.along)
    return [*outer[:at], 1, *outer[at:]]


def _with_spans(lo: Tensor, hi: Tensor, d: int, span: int) -> tuple[Tensor, Tensor]:
    """The bounds with those of spans of ``span`` entries along ``d`` behind them."""
    n = lo.shape[d]
    # Entries that do not exist count as the last one.
    at = torch.arange(-(-n // span) * span, device=lo.device).clamp_(max=n - 1)
    split = (*lo.shape[:d], -1, span, *lo.shape[d + 1 :])
    lows = lo.index_select(d, at).reshape(split).amin(d + 1)
    highs = hi.index_select(d, at).reshape(split).amax(d + 1)
    return torch.cat([lo, lows], d), torch.cat([hi, highs], d)


def _checked(lookup: Lookup, values: list[Any], reach: int) -> dict[str, Any]:
    """The values of the parameters of a lookup."""
    _within_reach(reach)
    return dict(zip(lookup.parameters, values, strict=True))


def _within_reach(reach: int) -> None:
    if reach > INT32_MAX:
        raise ValueError("a table, or the bounds of one, is larger than int32 can address")
