"""Axial: attention along the axes of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, FloorMod, Q
from sparse_compile.patterns.base import Tables
from sparse_compile.patterns.checks import Flag, bad, store, whole
from sparse_compile.patterns.grids import OnGrid


@dataclass(frozen=True, repr=False)
class Axial(OnGrid):
    """Tokens on a grid, row by row; each attends to those that differ from it along one axis only.

    On a plane: to its row and its column. From the Axial Transformer (Ho et al. 2019,
    https://arxiv.org/abs/1912.12180).

    Args:
        shape: the sizes of a 2-D or 3-D grid, the last axis running fastest.
        axes: attend along these axes only; all unless given.
        causal: only tokens up to the query, row by row.

    >>> Axial((2, 3)).dense(6, 6)[0, 0, 1].reshape(2, 3).int().tolist()
    [[1, 1, 1], [0, 1, 0]]
    >>> Axial((2, 3), axes=(0,)).dense(6, 6)[0, 0, 1].reshape(2, 3).int().tolist()
    [[0, 1, 0], [0, 1, 0]]
    """

    axes: tuple[int, ...] | None = None
    causal: Flag = False
    dims = 2, 3

    def __post_init__(self) -> None:
        super().__post_init__()
        every = tuple(range(len(self.shape)))
        axes = every
        if self.axes is not None:
            axes = tuple(sorted({whole("Axial: an axis", axis, 0) for axis in self.axes}))
        if not axes or axes[-1] >= len(every):
            raise bad(
                f"Axial: axes {axes} of a grid of {len(every)} axes", f"Name some of {every}."
            )
        store(self, axes=axes)

    def implied(self) -> dict[str, Any]:
        """All axes."""
        return {"axes": tuple(range(len(self.shape)))}

    def predicate(self, tables: Tables) -> sympy.Basic:
        """For some axis, the coordinates along all others are equal."""
        assert self.axes is not None
        seen = sympy.Or(*(self._along(axis) for axis in self.axes))
        return sympy.And(seen, sympy.Le(KV, Q)) if self.causal else seen

    def _along(self, axis: int) -> sympy.Basic:
        """The coordinates before and after ``axis`` are equal; each side is one comparison."""
        stride = math.prod(self.shape[axis + 1 :])
        outer = sympy.true
        if axis:
            period = stride * self.shape[axis]
            outer = sympy.Eq(FloorDiv(KV, period), FloorDiv(Q, period))
        return sympy.And(outer, sympy.Eq(FloorMod(KV, stride), FloorMod(Q, stride)))
