"""Recognising the structure of a constant tensor: one value, a progression, or few rectangles."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.passes.lift.value import DIMS, Element, Value, merged, single

_MOST_VALUES = 4
_MOST_RECTANGLES = 64


def recognise(tensor: Tensor) -> Element | None:
    """The element of a constant tensor as an expression in its coordinates, or None.

    >>> recognise(torch.tensor([3, 5, 7]))
    ((True, 2*d0 + 3),)
    >>> recognise(torch.eye(3, dtype=torch.bool))
    Eq(-d0 + d1, 0)
    """
    tensor = tensor.detach().cpu()
    if tensor.numel() == 0:
        return sympy.false if tensor.dtype == torch.bool else single(0)
    varying = [d for d in range(tensor.dim()) if _varies(tensor, d)]
    for dim in range(tensor.dim()):
        if dim not in varying:
            tensor = tensor.narrow(dim, 0, 1)
    if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and len(varying) == 1:
        value = _progression(tensor.flatten().tolist(), DIMS[varying[0]])
        if value is not None:
            return single(value)
    return _by_value(tensor, varying)


def _varies(tensor: Tensor, dim: int) -> bool:
    first = tensor.narrow(dim, 0, 1)
    same = (tensor == first) | ((tensor != tensor) & (first != first))
    return not bool(same.all())


def _progression(values: list[int], index: sympy.Symbol) -> sympy.Expr | None:
    """``a + b * (index // run)``, or the same repeated."""
    run = next(i for i, v in enumerate(values) if v != values[0])
    period = next((i for i in range(run, len(values)) if values[i:] == values[:-i]), len(values))
    step = values[run] - values[0]
    if all(v == values[0] + step * (i % period // run) for i, v in enumerate(values)):
        place = FloorMod(index, sympy.Integer(period)) if period < len(values) else index
        expr: sympy.Expr = values[0] + step * FloorDiv(place, sympy.Integer(run))
        return expr
    return None


def _by_value(tensor: Tensor, varying: list[int]) -> Element | None:
    values: list[Value] = torch.unique(tensor).tolist()
    if len(varying) > 2 or len(values) > _MOST_VALUES:
        return None
    if not varying:
        condition = sympy.true if values[0] else sympy.false
        return condition if tensor.dtype == torch.bool else single(values[0])
    rows = tensor.reshape([tensor.shape[dim] for dim in varying])
    if tensor.dtype == torch.bool:
        return _where_true(rows, varying)
    conditions = [_where_true(rows == value, varying) for value in values]
    if any(condition is None for condition in conditions):
        return None
    return merged(zip(conditions, values, strict=True))


def _where_true(mask: Tensor, dims: list[int]) -> sympy.Basic | None:
    """The coordinates at which a bool vector or matrix is True, as few rectangles."""
    symbols = [DIMS[d] for d in dims]
    if mask.dim() == 2:
        diagonals = _diagonals(mask, symbols)
        if diagonals is not None:
            return diagonals
    terms: list[sympy.Basic] = []
    for bounds in _rectangles(mask):
        if len(terms) == _MOST_RECTANGLES:
            return None
        sides = zip(symbols, bounds, mask.shape, strict=True)
        terms.append(sympy.And(*(_between(s, lo, hi, n) for s, (lo, hi), n in sides)))
    return sympy.Or(*terms)


def _diagonals(mask: Tensor, symbols: list[sympy.Symbol]) -> sympy.Basic | None:
    """A band ``low <= column - row <= high``, if the matrix is one."""
    rows, columns = mask.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return sympy.false
    offset = columns - rows
    low, high = int(offset.min()), int(offset.max())
    grid = torch.arange(mask.shape[1])[None] - torch.arange(mask.shape[0])[:, None]
    if not torch.equal(mask, (grid >= low) & (grid <= high)):
        return None
    if low == high:
        return sympy.Eq(symbols[1] - symbols[0], low)
    difference = symbols[1] - symbols[0]
    least = sympy.true if low == 1 - mask.shape[0] else sympy.Ge(difference, low)
    most = sympy.true if high == mask.shape[1] - 1 else sympy.Le(difference, high)
    return sympy.And(least, most)


def _between(symbol: sympy.Symbol, low: int, high: int, size: int) -> sympy.Basic:
    return sympy.And(
        sympy.true if low == 0 else symbol >= low, sympy.true if high == size else symbol < high
    )


def _rectangles(mask: Tensor) -> Iterator[list[tuple[int, int]]]:
    """Maximal runs; in a matrix, equal consecutive rows are taken together."""
    if mask.dim() == 1:
        for run in _runs(mask):
            yield [run]
        return
    start = 0
    for row in range(1, mask.shape[0] + 1):
        if row == mask.shape[0] or not torch.equal(mask[row], mask[start]):
            for run in _runs(mask[start]):
                yield [(start, row), run]
            start = row


def _runs(row: Tensor) -> Iterator[tuple[int, int]]:
    padded = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    starts, ends = (padded == 1).nonzero().flatten(), (padded == -1).nonzero().flatten()
    yield from zip(starts.tolist(), ends.tolist(), strict=True)
