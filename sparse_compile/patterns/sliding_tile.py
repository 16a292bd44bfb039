"""SlidingTile: a window of tiles on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, Q
from sparse_compile.patterns.base import Tables
from sparse_compile.patterns.checks import bad, one_of, whole_from
from sparse_compile.patterns.grids import OnGrid, coordinates, per_axis, quotient, shifted_window


@dataclass(frozen=True, repr=False)
class SlidingTile(OnGrid):
    """Sliding tile attention: the grid is cut into tiles, and a tile attends to the tiles near it.

    At the border the window of tiles is shifted, not cut. Zhang et al. 2025,
    https://arxiv.org/abs/2502.04507.

    Args:
        shape: the sizes of a 1-D, 2-D or 3-D grid of tokens.
        tile: the sizes of a tile, which divide those of the grid.
        window: how many tiles along each axis, the query's own in the middle: odd, or all of them.
        order: ``"rows"`` when the tokens lie row by row, the last axis running fastest;
            ``"tiles"`` when they lie tile by tile, as the kernels of the paper want them.

    ``tile`` and ``window`` are one value for all axes or a tuple of one for each.

    >>> SlidingTile((8,), 2, 3).dense(8, 8)[0, 0, ::2].int().tolist()
    [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], \
[0, 0, 1, 1, 1, 1, 1, 1]]
    """

    tile: int | tuple[int, ...]
    window: int | tuple[int, ...]
    order: Annotated[str, one_of("rows", "tiles")] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        tiles, windows = self.along("tile", whole_from(1)), self.along("window", whole_from(1))
        for axis, sizes in enumerate(zip(self.shape, tiles, windows, strict=True)):
            _check_axis(axis, *sizes)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The tile of the key is in the window of that of the query, along every axis."""
        tile, window = (
            per_axis("SlidingTile", value, len(self.shape)) for value in (self.tile, self.window)
        )
        counts = tuple(size // step for size, step in zip(self.shape, tile, strict=True))
        axes = zip(
            self._tile_of(Q, tile, counts), self._tile_of(KV, tile, counts), window, counts,
            strict=True,
        )  # fmt: skip
        return sympy.And(*(shifted_window(*axis) for axis in axes))

    def _tile_of(
        self, token: sympy.Expr, tile: tuple[int, ...], counts: tuple[int, ...]
    ) -> list[sympy.Expr]:
        if self.order == "tiles":
            return coordinates(FloorDiv(token, math.prod(tile)), counts)
        cells = coordinates(token, self.shape)
        return [quotient(cell, step) for cell, step in zip(cells, tile, strict=True)]


def _check_axis(axis: int, size: int, tile: int, window: int) -> None:
    if size % tile:
        raise bad(
            f"SlidingTile: tiles of {tile} cells do not divide axis {axis} of {size} cells",
            f"Write a divisor of {size}.",
        )
    count = size // tile
    if window > count or (window % 2 == 0 and window != count):
        raise bad(
            f"SlidingTile: a window of {window} tiles along axis {axis} of {count} tiles",
            f"Write an odd number of tiles below {count}, or all {count}.",
        )
