"""Orders of queries and keys in which a term may be blockwise dense.

The remainders that a term mentions make a grid: with periods 64 and 4096 a token is a cell of
planes of 64 x 64. Candidates are boxes along some of its axes; along one they hold a residue class,
along several they are tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from sparse_compile.expr import KV, Q
from sparse_compile.layout.views.terms import periods, window_of
from sparse_compile.spec.view import Order, natural

#: How the queries and the keys are put into blocks.
Orders = tuple[Order, Order]

#: On a grid of more axes, boxes are long along this many at most.
_LONG_AXES = 3
#: Grids have not more axes than this: two for each of three, with dilation.
_MOST_AXES = 6


@dataclass(frozen=True)
class Blocks:
    """What blocks are made of.

    Attributes:
        q, kv: tokens per block.
        n_q, n_kv: lengths of the sequences.
    """

    q: int
    kv: int
    n_q: int
    n_kv: int

    @property
    def plain(self) -> Orders:
        """Runs of tokens on both sides."""
        return natural(self.q), natural(self.kv)


def candidates(term: sympy.Basic, blocks: Blocks) -> Iterator[Orders]:
    """The orders worth trying for a term, the plain ones first."""
    yield blocks.plain
    longest = max(blocks.n_q, blocks.n_kv)
    found = sorted(period for period in periods(term) if period < longest)
    for period in found:
        yield from _windows(term, period, blocks)
    for radices in _grids(found, longest):
        yield from _boxes(radices, blocks)


def _windows(term: sympy.Basic, period: int, blocks: Blocks) -> Iterator[Orders]:
    """Only some queries or keys of every ``period``, where the term implies that."""
    plain_q, plain_kv = blocks.plain
    q = _windowed(blocks.q, period, window_of(term, Q, period))
    kv = _windowed(blocks.kv, period, window_of(term, KV, period))
    if kv:
        yield plain_q, kv
    if q:
        yield q, plain_kv
    if q and kv:
        yield q, kv


def _windowed(block: int, period: int, window: tuple[int, int]) -> Order | None:
    lo, hi = window
    if hi - lo == period:
        return None
    width = math.gcd(block, hi - lo)
    return Order((block // width, width), (period,), (0, 1), (window,))


def _grids(found: list[int], longest: int) -> Iterator[tuple[int, ...]]:
    """The radices of the grids that these periods make."""
    if not found:
        return
    chain: list[int] = []
    for period in found:
        if period % (chain[-1] if chain else 1) == 0 and len(chain) < _MOST_AXES - 1:
            chain.append(period)
    yield radices_of(chain)
    if len(chain) < len(found):
        common = math.lcm(*found)
        singles = {*found, common} - {chain[0] if len(chain) == 1 else 0}
        yield from ((single,) for single in sorted(singles) if single < longest)


def radices_of(chain: list[int]) -> tuple[int, ...]:
    """The sizes of the digits whose periods are given, each a multiple of the one before.

    >>> radices_of([64, 4096])
    (64, 64)
    """
    steps = zip(chain, [1, *chain], strict=False)
    return tuple(period // before for period, before in steps)[::-1]


def _boxes(radices: tuple[int, ...], blocks: Blocks) -> Iterator[Orders]:
    axes = range(len(radices) + 1)
    for count in range(1, min(len(axes), _LONG_AXES) + 1):
        for long in itertools.combinations(axes, count):
            q = box_along(long, blocks.q, radices, blocks.n_q)
            kv = box_along(long, blocks.kv, radices, blocks.n_kv)
            yield q, kv
            if blocks.n_q <= blocks.q:
                # One block of queries: no order makes it denser.
                yield natural(blocks.q), kv


def box_along(long: tuple[int, ...], block: int, radices: tuple[int, ...], n: int) -> Order:
    """Boxes of equal extents along the axes ``long``; along others only when these are full.

    >>> print(box_along((0, 1), 64, (256,), 65536))
    boxes of 8 x 8 over radix 256
    >>> print(box_along((0,), 64, (64, 64), 65536))
    boxes of 16 x 1 x 4 over radix 64, 64
    """
    extents = [1] * (len(radices) + 1)
    others = [axis for axis in reversed(range(len(extents))) if axis not in long]
    for factor in sorted(sympy.factorint(block, multiple=True), reverse=True):
        by_extent = sorted(long, key=lambda axis: extents[axis])
        room = (axis for axis in (*by_extent, *others) if _fits(extents, axis, factor, radices, n))
        extents[next(room, 0)] *= factor
    return Order(tuple(extents), radices, (*reversed(others), *long))


def _fits(extents: list[int], axis: int, factor: int, radices: tuple[int, ...], n: int) -> bool:
    """Whether a box may be ``factor`` times as long along ``axis``."""
    if axis:
        return radices[axis - 1] % (extents[axis] * factor) == 0
    # The first digit has no radix; a box is not to stick out by more than it has to.
    return extents[0] < -(-n // math.prod(radices))


def neighbours(orders: Orders, blocks: Blocks) -> Iterator[Orders]:
    """The same boxes on both sides, a little longer along one axis and shorter along another."""
    q, kv = orders
    if q != kv or q.is_natural or not q.is_complete:
        return
    for shorter, longer in itertools.permutations(range(len(q.box)), 2):
        extents = list(q.box)
        if extents[shorter] == 1:
            continue
        factor = min(sympy.primefactors(extents[shorter]))
        extents[shorter] //= factor
        if _fits(extents, longer, factor, q.radices, max(blocks.n_q, blocks.n_kv)):
            extents[longer] *= factor
            order = Order(tuple(extents), q.radices, q.nesting)
            yield order, order
