"""Neighborhood: the nearest cells of a grid, as NATTEN defines them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, Q
from sparse_compile.patterns.base import Tables
from sparse_compile.patterns.checks import bad, flag, whole_from
from sparse_compile.patterns.grids import (
    OnGrid,
    coordinates,
    per_axis,
    quotient,
    remainder,
    shifted_window,
)


@dataclass(frozen=True, repr=False)
class Neighborhood(OnGrid):
    """Neighborhood attention on a 1-D, 2-D or 3-D grid of tokens, row by row.

    Along each axis a query attends to ``window`` cells around it. At the border the window is
    shifted, not cut, so that every query has as many neighbours. Hassani et al. 2023,
    https://arxiv.org/abs/2204.07143, as implemented by NATTEN.

    Args:
        shape: the sizes of the grid, the last axis running fastest.
        window: how many cells along each axis, the query's own among them. Of an even window the
            larger half lies before the query.
        dilation: the distance of neighbours along each axis (https://arxiv.org/abs/2209.15001):
            only cells whose coordinate has the query's remainder count, and the window is shifted
            among those.
        causal: along such an axis the window ends at the query, and is cut at the start.

    Every parameter but the shape is one value for all axes or a tuple of one for each.

    >>> Neighborhood((5,), 3).dense(5, 5)[0, 0].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    >>> Neighborhood((4, 4), 2).dense(16, 16)[0, 0, 15].reshape(4, 4).int().tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    window: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = whole_from(1)
        windows, dilations = self.along("window", positive), self.along("dilation", positive)
        self.along("causal", flag)
        axes = zip(self.shape, windows, dilations, strict=True)
        for axis, (size, window, dilation) in enumerate(axes):
            if window * dilation > size:
                raise bad(
                    f"Neighborhood: a window of {window} with dilation {dilation} does not fit "
                    f"axis {axis} of {size} cells",
                    f"window * dilation can be {size} at most.",
                )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """Near along every axis."""
        axes = zip(
            coordinates(Q, self.shape),
            coordinates(KV, self.shape),
            self.shape,
            *(
                per_axis("Neighborhood", value, len(self.shape))
                for value in (self.window, self.dilation, self.causal)
            ),
            strict=True,
        )
        return sympy.And(*(_near(*axis) for axis in axes))


def _near(
    row: sympy.Expr, column: sympy.Expr, size: int, window: int, dilation: int, causal: bool
) -> sympy.Basic:
    """Neighbours along one axis; a remainder modulo ``dilation`` is an axis of its own."""
    group = remainder(row, dilation)
    together = sympy.Eq(remainder(column, dilation), group)
    i, j = quotient(row, dilation), quotient(column, dilation)
    if causal:
        return sympy.And(together, sympy.Le(j, i), sympy.Le(i - j, window - 1))
    cells = FloorDiv(size - 1 - group, dilation) + 1
    if size % dilation == 0:
        cells = sympy.Integer(size // dilation)
    return sympy.And(together, shifted_window(i, j, window, cells))
