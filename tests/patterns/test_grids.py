"""Patterns of a grid mean what their definitions say, entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_compile import patterns as P
from tests.patterns.brute import Rule, assert_means


def cells(token: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(token, shape)))


@pytest.mark.parametrize("shape", [(4, 5), (1, 6), (6, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_axial(shape: tuple[int, ...], causal: bool) -> None:
    size = math.prod(shape)
    for axes in [None, *((axis,) for axis in range(len(shape))), (0, len(shape) - 1)]:
        allowed = range(len(shape)) if axes is None else axes

        def rule(b: int, h: int, q: int, kv: int, allowed=allowed) -> bool:
            if causal and kv > q:
                return False
            x, y = cells(q, shape), cells(kv, shape)
            differ = {axis for axis in range(len(shape)) if x[axis] != y[axis]}
            return any(differ <= {axis} for axis in allowed)

        assert_means(P.Axial(shape, axes, causal), rule, size, size)


def neighbours(row: int, size: int, window: int, dilation: int, causal: bool) -> list[int]:
    """The keys of one axis by sorting: the class of the query, a run of it around the query."""
    group = [x for x in range(size) if x % dilation == row % dilation]
    place = group.index(row)
    if causal:
        return [x for x in group if x <= row][-window:]
    # Of all runs of `window` members, the one that is most nearly centred on the query. An even
    # window is centred when it has one more member before the query.
    runs = [group[i : i + window] for i in range(len(group) - window + 1)]
    centre = [abs((i + window // 2) - place) for i in range(len(runs))]
    return runs[centre.index(min(centre))]


NEIGHBORHOODS = [
    ((9,), 3, 1, False),
    ((9,), 4, 1, False),
    ((9,), 9, 1, False),
    ((10,), 3, 2, False),
    ((11,), 3, 2, False),
    ((11,), 2, 3, False),
    ((11,), 3, 2, True),
    ((8,), 1, 3, False),
    ((4, 5), 3, 1, False),
    ((4, 5), (2, 3), 1, False),
    ((4, 7), (3, 2), (1, 3), False),
    ((5, 6), 2, 2, (True, False)),
    ((4, 4), 3, 1, True),
    ((3, 4, 3), (3, 3, 1), 1, False),
    ((3, 4, 3), (2, 2, 3), (1, 2, 1), (True, False, False)),
]


@pytest.mark.parametrize("shape, window, dilation, causal", NEIGHBORHOODS)
def test_neighborhood(shape, window, dilation, causal) -> None:
    each = [
        value if isinstance(value, tuple) else (value,) * len(shape)
        for value in (window, dilation, causal)
    ]

    def rule(b: int, h: int, q: int, kv: int) -> bool:
        axes = zip(cells(q, shape), cells(kv, shape), shape, *each, strict=True)
        return all(y in neighbours(x, *axis) for x, y, *axis in axes)

    size = math.prod(shape)
    pattern = P.Neighborhood(shape, window, dilation, causal)
    assert_means(pattern, rule, size, size)
    if causal is False:
        assert (pattern.dense(size, size).sum(-1) == math.prod(each[0])).all()


def test_neighborhood_by_hand() -> None:
    rows = P.Neighborhood((7,), 3, 2).dense(7, 7)[0, 0].int().tolist()
    assert rows == [
        [1, 0, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 1],
    ]


def tile_rule(shape, tile, window, place) -> Rule:
    """By the paper: the centre is clamped so that the window stays on the grid."""

    def rule(b: int, h: int, q: int, kv: int) -> bool:
        found = True
        for x, y, size, step, width in zip(place(q), place(kv), shape, tile, window, strict=True):
            count, half = size // step, width // 2
            if width < count:
                centre = min(max(x // step, half), count - 1 - half)
                found &= abs(centre - y // step) <= half
        return found

    return rule


TILES = [((12,), (2,), (3,)), ((6, 8), (2, 2), (1, 3)), ((6, 4), (3, 1), (2, 3))]
TILES += [((4, 6, 4), (2, 2, 2), (1, 3, 2)), ((3, 4, 6), (1, 2, 2), (3, 1, 3))]


@pytest.mark.parametrize("shape, tile, window", TILES)
def test_sliding_tile(shape, tile, window) -> None:
    size = math.prod(shape)
    pattern = P.SlidingTile(shape, tile, window)
    assert_means(pattern, tile_rule(shape, tile, window, lambda x: cells(x, shape)), size, size)


@pytest.mark.parametrize("shape, tile, window", TILES)
def test_sliding_tile_in_the_order_of_tiles(shape, tile, window) -> None:
    size = math.prod(shape)
    counts = tuple(x // y for x, y in zip(shape, tile, strict=True))

    def place(token: int) -> tuple[int, ...]:
        outer, inner = divmod(token, math.prod(tile))
        both = zip(cells(outer, counts), tile, cells(inner, tile), strict=True)
        return tuple(o * t + i for o, t, i in both)

    pattern = P.SlidingTile(shape, tile, window, order="tiles")
    assert_means(pattern, tile_rule(shape, tile, window, place), size, size)


def test_a_window_over_the_whole_axis_is_no_condition() -> None:
    import sympy

    assert P.SlidingTile((4, 4), 2, 2).bound().expr.predicate == sympy.true
    assert P.Neighborhood((4, 4), 4).bound().expr.predicate == sympy.true
