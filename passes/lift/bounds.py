"""What coordinates can be: ranges of symbols, and symbolic bounds of integer expressions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeAlias

import sympy

from sparse_compile.expr import FloorDiv, FloorMod

Bound: TypeAlias = sympy.Expr | None
#: Lower and upper bound, both attained or not; None is unbounded.
Interval: TypeAlias = tuple[Bound, Bound]

_UNKNOWN: Interval = (None, None)


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
        low = self.interval(expr)[0]
        return low is not None and _sizes_nonnegative(low)

    def _bound(self, expr: sympy.Expr) -> Interval:
        if expr.is_Integer:
            return expr, expr
        if expr.is_Symbol:
            return (sympy.S.Zero, self.last[expr]) if expr in self.last else (expr, expr)
        if expr.is_Add:
            return functools.reduce(_add, map(self.interval, expr.args))
        if expr.is_Mul:
            return functools.reduce(_multiply, map(self.interval, expr.args))
        if isinstance(expr, sympy.Abs):
            return self._absolute(expr)
        if isinstance(expr, (FloorDiv, FloorMod)):
            return self._divide(expr)
        if isinstance(expr, (sympy.Min, sympy.Max)):
            return self._extreme(expr)
        if expr.func.__name__.startswith("m") and isinstance(
            expr, sympy.core.function.AppliedUndef
        ):
            return sympy.S.Zero, sympy.S.One
        return _UNKNOWN

    def _absolute(self, expr: sympy.Expr) -> Interval:
        low, high = self.interval(expr.args[0])
        if low is None or high is None:
            return sympy.S.Zero, None
        return sympy.S.Zero, sympy.Max(-low, high)

    def _divide(self, expr: sympy.Expr) -> Interval:
        value, divisor = expr.args
        if not divisor.is_positive:
            return _UNKNOWN
        low, high = self.interval(value)
        if isinstance(expr, FloorMod):
            return sympy.S.Zero, divisor - 1
        return (
            None if low is None else FloorDiv(low, divisor),
            None if high is None else FloorDiv(high, divisor),
        )

    def _extreme(self, expr: sympy.Expr) -> Interval:
        lows, highs = zip(*map(self.interval, expr.args), strict=True)
        # One known bound is enough on the side that the others can only tighten.
        strong, weak = (lows, highs) if isinstance(expr, sympy.Max) else (highs, lows)
        known = [bound for bound in strong if bound is not None]
        tight = expr.func(*known) if known else None
        loose = None if None in weak else expr.func(*weak)
        return (tight, loose) if isinstance(expr, sympy.Max) else (loose, tight)


def _sizes_nonnegative(expr: sympy.Expr) -> bool:
    # sympy proves n + m >= 0 far more readily than n >= 1: write every positive size as 1 + m.
    shifted = {
        symbol: 1 + sympy.Dummy(symbol.name, integer=True, nonnegative=True)
        for symbol in expr.free_symbols
        if symbol.is_positive
    }
    return bool(sympy.expand(expr.xreplace(shifted)).is_nonnegative)


def _add(a: Interval, b: Interval) -> Interval:
    low = None if a[0] is None or b[0] is None else a[0] + b[0]
    high = None if a[1] is None or b[1] is None else a[1] + b[1]
    return low, high


def _multiply(a: Interval, b: Interval) -> Interval:
    for left, right in ((a, b), (b, a)):
        factor = left[0]
        if factor is not None and factor == left[1] and factor.is_nonpositive:
            low, high = right
            return (
                None if high is None else factor * high,
                None if low is None else factor * low,
            )
    if a[0] is None or b[0] is None or not (_sizes_nonnegative(a[0]) and _sizes_nonnegative(b[0])):
        return _UNKNOWN
    return a[0] * b[0], None if a[1] is None or b[1] is None else a[1] * b[1]
