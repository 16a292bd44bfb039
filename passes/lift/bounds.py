"""Integer expressions: their symbolic bounds, and comparisons of them in one normal form."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import TypeAlias

import sympy

from sparse_compile.expr import FloorDiv, FloorMod

#: Lower and upper bound, both attained or not; infinite is unbounded.
Interval: TypeAlias = tuple[sympy.Expr, sympy.Expr]

_UNKNOWN: Interval = (-sympy.oo, sympy.oo)


class Ranges:
    """The largest value of each coordinate; every coordinate starts at 0.

    >>> from sparse_compile.expr import KV, N_KV
    >>> Ranges({KV: N_KV - 1}).nonnegative(N_KV - KV - 1)
    True
    """

    def __init__(self, last: Mapping[sympy.Symbol, sympy.Expr]) -> None:
        self.last = dict(last)
        self._memo: dict[sympy.Expr, Interval] = {}

    def interval(self, expr: sympy.Expr) -> Interval:
        """Symbolic bounds of an integer expression, in terms of sizes."""
        expr = sympy.expand(expr) if expr.is_Add or expr.is_Mul else expr
        if expr not in self._memo:
            self._memo[expr] = self._bound(expr)
        return self._memo[expr]

    def nonnegative(self, expr: sympy.Expr) -> bool:
        """Whether the expression is proven to be at least 0 everywhere."""
        return _sizes_nonnegative(self.interval(expr)[0])

    def _bound(self, expr: sympy.Expr) -> Interval:
        if expr.is_Integer:
            return expr, expr
        if expr.is_Symbol:
            return (sympy.S.Zero, self.last[expr]) if expr in self.last else (expr, expr)
        if isinstance(expr, (sympy.Add, sympy.Min, sympy.Max)):
            # These only grow with each argument.
            lows, highs = zip(*map(self.interval, expr.args), strict=True)
            return expr.func(*lows), expr.func(*highs)
        if expr.is_Mul:
            return functools.reduce(_multiply, map(self.interval, expr.args))
        if isinstance(expr, sympy.Abs):
            low, high = self.interval(expr.args[0])
            return sympy.S.Zero, sympy.Max(-low, high)
        if isinstance(expr, (FloorDiv, FloorMod)):
            return self._divide(expr)
        if expr.func.__name__.startswith("m") and isinstance(
            expr, sympy.core.function.AppliedUndef
        ):
            return sympy.S.Zero, sympy.S.One
        return _UNKNOWN

    def _divide(self, expr: sympy.Expr) -> Interval:
        value, divisor = expr.args
        if not divisor.is_positive:
            return _UNKNOWN
        low, high = self.interval(value)
        if isinstance(expr, FloorMod):
            return sympy.S.Zero, divisor - 1
        low, high = (end if end.is_infinite else FloorDiv(end, divisor) for end in (low, high))
        return low, high


def _sizes_nonnegative(expr: sympy.Expr) -> bool:
    # sympy proves n + m >= 0 far more readily than n >= 1: write every positive size as 1 + m.
    shifted = {
        symbol: 1 + sympy.Dummy(symbol.name, integer=True, nonnegative=True)
        for symbol in expr.free_symbols
        if symbol.is_positive
    }
    return bool(sympy.expand(expr.xreplace(shifted)).is_nonnegative)


def _multiply(a: Interval, b: Interval) -> Interval:
    for (factor, same), (low, high) in ((a, b), (b, a)):
        if factor == same == 0:
            return sympy.S.Zero, sympy.S.Zero  # also of what is unbounded
        if factor == same and factor.is_nonpositive:
            return factor * high, factor * low
    if not (_sizes_nonnegative(a[0]) and _sizes_nonnegative(b[0])):
        return _UNKNOWN
    return a[0] * b[0], a[1] * b[1]


@dataclass(frozen=True)
class Linear:
    """``terms <= bound``, ``terms == bound`` or ``terms != bound``.

    Attributes:
        kind: ``"le"``, ``"eq"`` or ``"ne"``.
        terms: integer expression without a constant term; coefficients have no common factor.
        bound: integer.
    """

    kind: str
    terms: sympy.Expr
    bound: int

    @functools.cached_property
    def opposite(self) -> sympy.Expr:
        """``-terms``."""
        return -self.terms

    @functools.cached_property
    def spelled(self) -> sympy.Basic:
        """The comparison as a person would write it.

        >>> from sparse_compile.expr import KV, Q
        >>> Linear("le", KV - Q, 0).spelled, Linear("le", Q - KV, 7).spelled
        (kv <= q, -kv + q < 8)
        """
        terms, bound = self.terms, sympy.Integer(self.bound)
        if self.kind != "le":
            relation = sympy.Eq if self.kind == "eq" else sympy.Ne
            if _leading_negative(terms):
                terms, bound = -terms, -bound
            if bound == 0:
                return relation(*_sides(terms))
            return relation(terms, bound)
        positive, negative = _sides(terms)
        if bound == 0:
            return sympy.Ge(negative, 0) if positive == 0 else sympy.Le(positive, negative)
        if bound == -1 and positive != 0 and negative != 0:
            return sympy.Lt(positive, negative)
        return sympy.Lt(terms, bound + 1) if bound > 0 else sympy.Ge(-terms, -bound)


@functools.lru_cache(maxsize=1 << 14)
def linear(relation: sympy.Basic) -> Linear | bool:
    """The normal form of an integer comparison, or its value if it has no symbols; remembered.

    >>> from sparse_compile.expr import KV, Q
    >>> linear(KV > Q - 8)
    Linear(kind='le', terms=-kv + q, bound=7)
    """
    left, right = relation.args
    if isinstance(relation, (sympy.Gt, sympy.Ge)):
        left, right = right, left
    difference = sympy.expand(left - right)
    if isinstance(relation, (sympy.Lt, sympy.Gt)):
        difference = difference + 1
    constant, terms = difference.as_coeff_Add()
    kind = {sympy.Eq: "eq", sympy.Ne: "ne"}.get(type(relation), "le")
    bound = -int(constant)
    if terms == 0:
        return {"eq": bound == 0, "ne": bound != 0, "le": bound >= 0}[kind]
    factor = gcd(*(int(term.as_coeff_Mul()[0]) for term in sympy.Add.make_args(terms)))
    if kind != "le" and bound % factor:
        return kind == "ne"
    if kind != "le" and _leading_negative(terms):
        factor = -factor
    terms = sympy.Add(*(term / factor for term in sympy.Add.make_args(terms)))
    return Linear(kind, terms, bound // factor)


def _leading_negative(terms: sympy.Expr) -> bool:
    first = min(sympy.Add.make_args(terms), key=lambda term: str(term.as_coeff_Mul()[1]))
    return bool(first.as_coeff_Mul()[0] < 0)


def _sides(terms: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    parts = sympy.Add.make_args(terms)
    positive = [term for term in parts if term.as_coeff_Mul()[0] > 0]
    negative = [-term for term in parts if term.as_coeff_Mul()[0] < 0]
    return sympy.Add(*positive), sympy.Add(*negative)
