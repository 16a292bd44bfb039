"""All, And, Or, Not: everything, and how patterns combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.errors import PatternMisuse
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad, store


@dataclass(frozen=True, repr=False)
class All(Pattern):
    """Every query attends to every key.

    >>> All().dense(2, 3).int().tolist()
    [[[[1, 1, 1], [1, 1, 1]]]]
    """

    def predicate(self, tables: Tables) -> sympy.Basic:
        """Always true."""
        return sympy.true


@dataclass(frozen=True, repr=False, init=False)
class _Joined(Pattern):
    """Two patterns or more, joined by one operator; nested ones of the same kind are flattened."""

    parts: tuple[Pattern, ...]

    def __init__(self, *parts: Pattern) -> None:
        name = type(self).__name__
        if len(parts) < 2:
            raise bad(f"{name} of {len(parts)} patterns", f"Write {name}(one, other).")
        for part in parts:
            _checked(name, part)
        flat = [inner for part in parts for inner in _parts_of(part, type(self))]
        store(self, parts=tuple(flat))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Each part must fit."""
        for part in self.parts:
            part.check(n_q, n_kv, batch, heads)

    def _spelled(self, operator: str) -> str:
        return f"({f' {operator} '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False, init=False)
class And(_Joined):
    """Attention where all the parts allow it; what ``&`` makes.

    Args:
        parts: two patterns or more.

    >>> from sparse_compile import patterns as P
    >>> P.Causal() & P.SlidingWindow(128) & P.Global(4)
    (Causal() & SlidingWindow(128) & Global(4))
    """

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The conjunction of the parts."""
        return sympy.And(*(part.predicate(tables) for part in self.parts))

    def __repr__(self) -> str:
        return self._spelled("&")


@dataclass(frozen=True, repr=False, init=False)
class Or(_Joined):
    """Attention where one of the parts allows it; what ``|`` makes.

    Args:
        parts: two patterns or more.

    >>> from sparse_compile import patterns as P
    >>> P.SlidingWindow(128) | P.Global(4)
    (SlidingWindow(128) | Global(4))
    """

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The disjunction of the parts."""
        return sympy.Or(*(part.predicate(tables) for part in self.parts))

    def __repr__(self) -> str:
        return self._spelled("|")


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Attention where ``part`` forbids it; what ``~`` makes.

    >>> from sparse_compile import patterns as P
    >>> ~P.Causal(), ~~P.Causal()
    (~Causal(), Causal())
    """

    part: Pattern

    def __post_init__(self) -> None:
        _checked("Not", self.part)

    def predicate(self, tables: Tables) -> sympy.Basic:
        """The negation of the part."""
        return sympy.Not(self.part.predicate(tables))

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The part must fit."""
        self.part.check(n_q, n_kv, batch, heads)

    def __invert__(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"Not({self.part!r})" if isinstance(self.part, Not) else f"~{self.part!r}"


def _parts_of(part: Pattern, kind: type[_Joined]) -> tuple[Pattern, ...]:
    return part.parts if type(part) is kind else (part,)


def _checked(name: str, part: Any) -> None:
    if not isinstance(part, Pattern):
        raise PatternMisuse(
            f"sparse_compile: {name} of {part!r}, which is no pattern. "
            "Wrap a function of (b, h, q, kv) in Predicate(...)."
        )
