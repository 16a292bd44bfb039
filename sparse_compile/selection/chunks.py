"""Chunks: rows of a large problem, as many at a time as fit."""

from __future__ import annotations


def chunks(rows: int, each: int, most: int, tile: int = 1) -> list[tuple[int, int]]:
    """Rows in chunks of at most ``most`` numbers, but of one row at least.

    Args:
        rows: how many.
        each: numbers that a row has.
        most: see above.
        tile: chunks that have room for so many rows hold multiples of it.

    Returns:
        the first row and the end of each.

    >>> chunks(7, 10, 30), chunks(7, 10, 55, tile=4)
    ([(0, 3), (3, 6), (6, 7)], [(0, 4), (4, 7)])
    """
    step = max(1, most // max(1, each))
    step = step // tile * tile or step
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]
