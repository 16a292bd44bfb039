"""Heads: another pattern for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from sparse_compile.expr.nodes import H
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad, store, whole
from sparse_compile.patterns.global_ import runs


@dataclass(frozen=True, repr=False)
class Heads(Pattern):
    """Query head ``h`` uses ``patterns[h // per]``.

    Args:
        patterns: one for each head, or for each group of ``per`` heads.
        per: how many neighbouring heads share a pattern.

    >>> from sparse_compile import patterns as P
    >>> P.Heads((P.All(), P.Causal())).dense(2, 2, heads=2).int().tolist()
    [[[[1, 1], [1, 1]], [[1, 0], [1, 1]]]]
    """

    patterns: tuple[Pattern, ...]
    per: int = 1

    def __post_init__(self) -> None:
        patterns = self.patterns
        if isinstance(patterns, Pattern) or not isinstance(patterns, Sequence) or not patterns:
            raise bad(f"heads({patterns!r}) needs a list of patterns", "Write one for each head.")
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise bad(
                    f"heads: {pattern!r} is no pattern",
                    "Wrap a function of (b, h, q, kv) in Predicate(...).",
                )
        store(self, patterns=tuple(patterns), per=whole("heads: per", self.per, 1))

    def __repr__(self) -> str:
        per = f", per={self.per}" if self.per > 1 else ""
        return f"heads([{', '.join(map(repr, self.patterns))}]{per})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be a pattern for every head, and each must fit."""
        count = len(self.patterns)
        if count * self.per != heads:
            instead = f"Write {heads} patterns, one for each head."
            if heads % count == 0:
                instead = f"Write per={heads // count} to share each among {heads // count} heads."
            raise bad(
                f"heads: {count} patterns with per={self.per} are for {count * self.per} heads, "
                f"but there are {heads}",
                instead,
            )
        for pattern in dict.fromkeys(self.patterns):
            pattern.check(n_q, n_kv, batch, heads)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """For each different pattern: it holds, and the head is one of its own."""
        places: dict[Pattern, list[int]] = {}
        for place, pattern in enumerate(self.patterns):
            places.setdefault(pattern, []).append(place)
        terms = []
        for pattern, mine in places.items():
            of_mine = sympy.Or(*(self._in_run(first, last) for first, last in runs(mine)))
            terms.append(sympy.And(of_mine, pattern.predicate(tables)))
        return sympy.Or(*terms)

    def _in_run(self, first: int, last: int) -> sympy.Basic:
        """Whether ``h`` belongs to a run of places of the list."""
        start, stop = first * self.per, (last + 1) * self.per
        # Heads below 0 or beyond the list do not exist.
        after = sympy.Ge(H, start) if first else sympy.true
        before = sympy.Lt(H, stop) if last + 1 < len(self.patterns) else sympy.true
        if start + 1 == stop and first:
            return sympy.Eq(H, start)
        return sympy.And(after, before)


def heads(patterns: Sequence[Pattern], per: int = 1) -> Heads:
    """A pattern for each head, or for each group of ``per`` neighbouring heads.

    >>> from sparse_compile import patterns as P
    >>> P.heads([P.Strided(128), P.SlidingWindow(256)], per=4)
    heads([Strided(128), SlidingWindow(256)], per=4)
    """
    return Heads(tuple(patterns) if isinstance(patterns, Sequence) else patterns, per)
