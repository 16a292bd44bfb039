"""What bounds table lookups over blocks and over spans of blocks, as arguments of kernels.

A lookup along one coordinate is read by a generated kernel, all of them in one launch. One that has
only points of ``b, h`` for indices needs no reading. The others are reduced by torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import Launcher, table_values
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.layout.lookups import Lookup, read_by_kernel
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.expr import KV, Q
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.table_bounds import BlockBounds


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
