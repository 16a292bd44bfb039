"""Tokens as the cells of a grid: coordinates, and windows that are shifted at the border."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import FloorDiv, FloorMod
from sparse_compile.patterns.base import Pattern
from sparse_compile.patterns.checks import bad, store, whole


@dataclass(frozen=True, repr=False)
class OnGrid(Pattern):
    """Base of the patterns of tokens that are the cells of a grid.

    Attributes:
        shape: the sizes of the grid, the last axis running fastest.
        dims: how many axes it can have.
    """

    shape: tuple[int, ...]
    # Not annotated: it is no field.
    dims = tuple(range(1, 4))

    def __post_init__(self) -> None:
        name, shape = type(self).__name__, self.shape
        sizes = shape if isinstance(shape, Iterable) else (shape,)
        sizes = tuple(whole(f"{name}: a size of the grid", size, 1) for size in sizes)
        if len(sizes) not in self.dims:
            raise bad(
                f"{name}: a grid of {len(sizes)} axes, {sizes}",
                f"Write {' or '.join(map(str, self.dims))} sizes, such as {(64,) * self.dims[0]}.",
            )
        store(self, shape=sizes)
        super().__post_init__()

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The tokens must be the cells of the grid."""
        cells = math.prod(self.shape)
        if not n_q == n_kv == cells:
            raise bad(
                f"{type(self).__name__}: a grid of {' x '.join(map(str, self.shape))} has {cells} "
                f"cells, but there are {n_q} queries and {n_kv} keys",
                "Write a shape whose product is the number of tokens.",
            )

    def along(self, parameter: str, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
        """A parameter for each axis, as ``check`` returns it; where all are equal it is one."""
        where = f"{type(self).__name__}: {parameter}"
        values = per_axis(where, getattr(self, parameter), len(self.shape))
        values = tuple(check(where, value) for value in values)
        store(self, **{parameter: values[0] if len(set(values)) == 1 else values})
        return values


def per_axis(where: str, value: Any, axes: int) -> tuple[Any, ...]:
    """``value`` for each axis: one for all, or as many as there are axes.

    >>> per_axis("Neighborhood: window", 7, 2)
    (7, 7)
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * axes
    if len(value) != axes:
        raise bad(
            f"{where} has {len(value)} entries for {axes} axes", "Write one for all or one each."
        )
    return tuple(value)


def coordinates(token: sympy.Expr, shape: tuple[int, ...]) -> list[sympy.Expr]:
    """Where on the grid a token lies, the last axis running fastest.

    >>> from sparse_compile.expr import Q
    >>> coordinates(Q, (4, 8))
    [FloorDiv(q, 8), FloorMod(q, 8)]
    """
    found: list[sympy.Expr] = []
    for axis, size in enumerate(shape):
        outer = FloorDiv(token, math.prod(shape[axis + 1 :]))
        # The first axis needs no remainder: no token lies beyond the grid.
        found.append(FloorMod(outer, size) if axis else outer)
    return found


def quotient(value: sympy.Expr, divisor: int) -> sympy.Expr:
    """``value // divisor``, a quotient of a quotient as one.

    >>> from sparse_compile.expr import Q
    >>> quotient(FloorDiv(Q, 8), 4)
    FloorDiv(q, 32)
    """
    if isinstance(value, FloorDiv) and value.args[1].is_Integer and value.args[1] > 0:
        return FloorDiv(value.args[0], value.args[1] * divisor)
    return FloorDiv(value, divisor)


def remainder(value: sympy.Expr, divisor: int) -> sympy.Expr:
    """``value % divisor``, a remainder of a remainder as one where they divide.

    >>> from sparse_compile.expr import Q
    >>> remainder(FloorMod(Q, 8), 4), remainder(FloorMod(Q, 8), 3)
    (FloorMod(q, 4), FloorMod(FloorMod(q, 8), 3))
    """
    if isinstance(value, FloorMod) and value.args[1].is_Integer and value.args[1] % divisor == 0:
        return FloorMod(value.args[0], divisor)
    return FloorMod(value, divisor)


def shifted_window(
    row: sympy.Expr, column: sympy.Expr, window: int, size: sympy.Expr
) -> sympy.Basic:
    """``window`` columns around ``row``, shifted so that all lie in ``0 .. size - 1``.

    An even window has one more column before the row than after it.
    """
    if size == window:
        return sympy.true
    first = sympy.Max(0, sympy.Min(row - window // 2, size - window))
    return sympy.And(sympy.Le(first, column), sympy.Lt(column, first + window))
