"""Tensors of queries and keys that are functions of their distance, as vectors over distances.

T5 computes the bucket of every pair, though it depends on ``kv - q`` alone. What an operator makes
of such tensors is such a tensor, and running it on one number per distance gives all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._ops import OpOverload

from sparse_compile.passes.lift.value import DIMS, Element, Lifted, Shape, mapped

#: The distance, in elements of what is tabulated.
DISTANCE = sympy.Symbol("distance", integer=True)


@dataclass(frozen=True)
class Span:
    """An axis of a table: a symbol that takes the values ``first`` to ``first + length - 1``."""

    symbol: sympy.Symbol
    first: sympy.Expr
    length: sympy.Expr


@dataclass(frozen=True, eq=False)
class Tabulated:
    """What an operator makes of elements along some axes.

    Attributes:
        op: the operator, pointwise.
        args: its arguments: numbers, or tensors, of which the elements matter alone.
        kwargs: its other arguments.
        axes: of its result.
        dtype, device: of its result.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axes: tuple[Span, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ByDistance:
    """How elements along some dimensions of a tensor follow from a distance.

    Attributes:
        row, column: the two dimensions of which the distance ``column - row`` matters.
        axes: of a table that holds all of them; the last one is of the distance.
    """

    row: int
    column: int
    axes: tuple[Span, ...]

    @property
    def indices(self) -> list[sympy.Expr]:
        """Where an element of the tensor is found in the table."""
        distance = DIMS[self.column] - DIMS[self.row] - self.axes[-1].first
        return [*(axis.symbol for axis in self.axes[:-1]), distance]

    def moved(self, element: Element) -> Element:
        """An element over the axes."""
        place = {DIMS[self.column]: DISTANCE + DIMS[self.row]}
        return mapped(element, lambda expr: settled(expr.xreplace(place)))


def by_distance(elements: Sequence[Element], shape: Shape) -> ByDistance | None:
    """The distance that elements of tensors of one shape depend on, if that is all they do.

    They may depend on other dimensions, too.
    """
    used = set().union(*map(symbols_of, elements))
    dims = [d for d in range(len(shape)) if DIMS[d] in used]
    if len(dims) < 2:
        return None
    row, column = dims[-2:]
    others = tuple(Span(DIMS[d], sympy.S.Zero, shape[d]) for d in dims[:-2])
    span = Span(DISTANCE, 1 - shape[row], shape[row] + shape[column] - 1)
    found = ByDistance(row, column, (*others, span))
    moved = (symbols_of(found.moved(element)) for element in elements)
    return None if any(DIMS[row] in symbols for symbols in moved) else found


def symbols_of(element: Element) -> set[sympy.Symbol]:
    """The symbols that an element mentions."""
    parts = [element] if isinstance(element, sympy.Basic) else [p for case in element for p in case]
    return {s for part in parts if isinstance(part, sympy.Basic) for s in part.free_symbols}


def settled(expr: sympy.Basic) -> sympy.Basic:
    """With sums multiplied out, so that what cancels is gone."""
    if not expr.args:
        return expr
    if isinstance(expr, sympy.core.relational.Relational):
        difference = sympy.expand(expr.lhs - expr.rhs)
        return expr.func(settled_parts(difference), 0)
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        return settled_parts(sympy.expand(expr))
    return settled_parts(expr)


def settled_parts(expr: sympy.Basic) -> sympy.Basic:
    """The same for the parts of an expression."""
    return expr.func(*map(settled, expr.args)) if expr.args else expr


def elements_of(args: Sequence[Any]) -> list[Element]:
    """The elements of those arguments that are tensors."""
    return [arg.element for arg in args if isinstance(arg, Lifted)]
