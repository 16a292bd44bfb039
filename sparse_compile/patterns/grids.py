"""Patterns of tokens that are the cells of a grid: Axial, Neighborhood, SlidingTile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, FloorMod, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import Flag, bad, flag, one_of, store, whole, whole_from


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
