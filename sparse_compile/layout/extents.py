"""Bounds of the digits of the tokens in runs of blocks."""

from __future__ import annotations

import math

from sparse_compile.layout.intervals import Bound, greatest, least, where
from sparse_compile.spec.view import Order

#: For each digit of one side, its least and greatest value in each run.
Side = tuple[tuple[Bound, Bound], ...]


def digits(order: Order, n: Bound, first: Bound, size: Bound = 1) -> Side:
    """Bounds of the digits in blocks ``first, ..., first + size - 1``, existing or not."""
    counts = order.counts(n)
    low, high = first, first + (size - 1)
    ends: dict[int, tuple[Bound, Bound]] = {}
    for position in reversed(range(1, len(order.nesting))):
        k = order.nesting[position]
        count = greatest(counts[k], 1)
        lower, upper, low, high = low % count, high % count, low // count, high // count
        # Blocks of several outer digits run through all of the inner one.
        one_turn = low == high
        ends[k] = where(one_turn, lower, 0), where(one_turn, upper, count - 1)
    ends[order.nesting[0]] = low, high
    starts = (0, *(lo for lo, _ in order.windows))
    return tuple(
        (start + ends[k][0] * extent, start + ends[k][1] * extent + (extent - 1))
        for k, (start, extent) in enumerate(zip(starts, order.box, strict=True))
    )


def cut(order: Order, n: Bound, side: Side) -> Side:
    """The same bounds without what lies beyond the length."""
    last = -(-n // order.strides[0]) - 1
    highest = (last, *(hi - 1 for _, hi in order.windows))
    return tuple((lo, least(hi, most)) for (lo, hi), most in zip(side, highest, strict=True))


def whole(order: Order, n: Bound, first: Bound, size: Bound = 1) -> Bound:
    """Whether these blocks, and all their tokens, exist."""
    last: Bound = 0
    for (_, hi), stride in zip(digits(order, n, first, size), order.strides, strict=True):
        last = last + hi * stride
    return (first + size <= blocks(order, n)) & (last < n)


def blocks(order: Order, n: Bound) -> Bound:
    """Number of blocks of a sequence of ``n`` tokens."""
    number: Bound = math.prod(order.counts(n))
    return number
