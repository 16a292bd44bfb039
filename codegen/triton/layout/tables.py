"""Bounds of table lookups over blocks and over spans of blocks, as arguments of kernels.

A lookup along one coordinate is read by a generated kernel, all of them in one launch. One that has
only points of ``b, h`` for indices needs no reading. The others are reduced by torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import table_values
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.layout.launch import Kernels
from sparse_compile.codegen.triton.layout.lookups import Lookup
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.expr import KV, Q
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.table_bounds import BlockBounds

#: Values of parameters by name.
Values = dict[str, Any]


def table_bounds(
    key: Key,
    kernels: Kernels,
    lengths: tuple[int, int],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> Values:
    """Values for the bounds of every lookup; reads the tables on their device.

    Args:
        key: of the kernels.
        kernels: of the key.
        lengths: number of queries and of keys, at least 1.
        tables: of the mask.
        sizes: of the mask, all of them.
    """
    found = _read(key, kernels, lengths, tables, sizes) if kernels.read else {}
    for lookup in kernels.lookups:
        if lookup.name not in found:
            found |= _reduced(key, lookup, lengths, tables, sizes)
    return found


def _read(
    key: Key,
    kernels: Kernels,
    lengths: tuple[int, int],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> Values:
    """Bounds of the lookups along one coordinate; starts one kernel."""
    assert kernels.read is not None
    found: Values = {}
    most_spans = most_rows = 1
    for lookup in kernels.read_lookups:
        table, is_q = tables[lookup.index], lookup.along == Q
        blocks = key.q.blocks(lengths[0]) if is_q else key.kv.blocks(lengths[1])
        spans = -(-blocks // key.span)
        others = [table.shape[d] for d in lookup.points]
        rows = math.prod(others)
        both = torch.empty(
            2 * rows * (blocks + spans),
            dtype=torch.int64 if table.dtype == torch.int64 else torch.int32,
            device=table.device,
        )
        half = both.numel() // 2
        strides = _row_major(lookup, others, blocks + spans)
        found |= _checked(lookup, [both, half, *strides, *others], 2 * half)
        most_spans, most_rows = max(most_spans, spans), max(most_rows, rows)
    values: Values = {"n_q": lengths[0], "n_kv": lengths[1]}
    values |= {f"s{i}": sizes[i] for i in kernels.free_sizes}
    for number in kernels.read_tables:
        values |= table_values(number, tables[number])
        _within_reach(
            max(itertools.chain(tables[number].stride(), tables[number].shape), default=0)
        )
    if most_rows > 65535:
        raise ValueError("a table has more rows than a grid")
    grid = most_spans, most_rows, len(kernels.read_lookups)
    kernels.read(grid, {**found, **values})
    return found


def _row_major(lookup: Lookup, others: Sequence[int], places: int) -> list[int]:
    """Strides of the axes of a lookup: rows of ``places``, the last of the other axes fastest."""
    outer: list[int] = []
    step = places
    for size in reversed(others):
        outer.insert(0, step)
        step *= size
    at = lookup.axes.index(lookup.along)
    return [*outer[:at], 1, *outer[at:]]


def _reduced(
    key: Key,
    lookup: Lookup,
    lengths: tuple[int, int],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> Values:
    table = lo = hi = tables[lookup.index]
    half = 0
    if not lookup.is_point:
        problem = Problem(*lengths, key.q, key.kv, 1, 1, key.text, tuple(sizes))
        lo, hi = BlockBounds(problem, tables).reduced(lookup.index, lookup.exprs)
        wanted = torch.int64 if table.dtype == torch.int64 else torch.int32
        lo, hi = lo.to(wanted), hi.to(wanted)
        for d, axis in enumerate(lookup.axes):
            if axis in (Q, KV):
                lo, hi = _with_spans(lo, hi, d, key.span)
        lo = torch.stack([lo, hi])[0]
        half = lo.numel()
    strides = [lo.stride(d) for d in lookup.kept]
    ends = zip(lo.shape, lo.stride(), strict=True)
    reach = half + sum((n - 1) * stride for n, stride in ends)
    return _checked(lookup, [lo, half, *strides, *(lo.shape[d] for d in lookup.points)], reach)


def _with_spans(lo: Tensor, hi: Tensor, d: int, span: int) -> tuple[Tensor, Tensor]:
    """The bounds with those of spans of ``span`` entries along ``d`` behind them."""
    n = lo.shape[d]
    # Entries that do not exist count as the last one.
    at = torch.arange(-(-n // span) * span, device=lo.device).clamp_(max=n - 1)
    split = (*lo.shape[:d], -1, span, *lo.shape[d + 1 :])
    lows = lo.index_select(d, at).reshape(split).amin(d + 1)
    highs = hi.index_select(d, at).reshape(split).amax(d + 1)
    return torch.cat([lo, lows], d), torch.cat([hi, highs], d)


def _checked(lookup: Lookup, values: list[Any], reach: int) -> Values:
    """The values of the parameters of a lookup."""
    _within_reach(reach)
    return dict(zip(lookup.parameters, values, strict=True))


def _within_reach(reach: int) -> None:
    if reach > INT32_MAX:
        raise ValueError("a table, or the bounds of one, is larger than int32 can address")
