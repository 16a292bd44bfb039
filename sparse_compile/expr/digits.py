"""Predicates in digits: ``q = 128 * q_0 + q_1`` put into divisions and remainders by 128.

Interval analysis of ``(q - kv) % 128 == 0`` over a run of tokens proves nothing. Over digits it is
``q_1 == kv_1``, which a block of one residue class settles.
"""

from __future__ import annotations

import functools
import math

import sympy
from sympy.core.relational import Eq, Ne, Relational

from sparse_compile.expr.nodes import KV, FloorDiv, FloorMod, Q, is_table

Extent = tuple[int, int]


@functools.lru_cache(maxsize=4096)
def digit(axis: str, k: int) -> sympy.Symbol:
    """The ``k``-th digit of ``q`` or ``kv``, outermost first: ``q_0, q_1, ...``."""
    return sympy.Symbol(f"{axis}_{k}", integer=True, nonnegative=True)


def digit_names(axis: str, count: int) -> list[str]:
    """The names of the digits of one side; just ``q`` or ``kv`` where there is only one."""
    return [axis] if count == 1 else [digit(axis, k).name for k in range(count)]


@functools.lru_cache(maxsize=1024)
def in_digits(
    predicate: sympy.Basic,
    q_radices: tuple[int, ...],
    kv_radices: tuple[int, ...],
    q_windows: tuple[Extent, ...],
    kv_windows: tuple[Extent, ...],
) -> sympy.Basic:
    """An equal predicate over the digits of ``q`` and ``kv``; lookups keep their coordinates.

    Args:
        predicate: over tokens.
        q_radices, kv_radices: sizes of the digits but the first; none: the token itself.
        q_windows, kv_windows: for each of these digits, ``(lo, hi)`` with ``lo <= digit < hi``.

    >>> in_digits(Eq(FloorMod(Q - KV, 8), 0), (8,), (8,), ((0, 8),), ((0, 8),))
    Eq(-kv_1 + q_1, 0)
    >>> in_digits(FloorMod(KV, 8) >= 6, (), (8,), (), ((0, 8),))
    kv_1 >= 6
    """
    ranges: dict[sympy.Symbol, Extent] = {}
    tokens = {}
    for symbol, radices, windows in ((Q, q_radices, q_windows), (KV, kv_radices, kv_windows)):
        digits = [digit(symbol.name, k) for k in range(len(radices) + 1)] if radices else [symbol]
        strides = [math.prod(radices[k:]) for k in range(len(digits))]
        tokens[symbol] = sympy.Add(*(d * s for d, s in zip(digits, strides, strict=True)))
        ranges |= {d: (lo, hi - 1) for d, (lo, hi) in zip(digits[1:], windows, strict=True)}
    return _Rewriter(tokens, ranges)(predicate)


class _Rewriter:
    """Rewrites bottom-up; each node once."""

    def __init__(
        self, tokens: dict[sympy.Symbol, sympy.Expr], ranges: dict[sympy.Symbol, Extent]
    ) -> None:
        self.tokens, self.ranges = tokens, ranges
        self.memo: dict[sympy.Basic, sympy.Basic] = {}

    def __call__(self, node: sympy.Basic) -> sympy.Basic:
        if node not in self.memo:
            self.memo[node] = self._rewritten(node)
        return self.memo[node]

    def _rewritten(self, node: sympy.Basic) -> sympy.Basic:
        if is_table(node):
            return node
        if node in self.tokens:
            return self.tokens[node]
        if not node.args:
            return node
        args = [self(arg) for arg in node.args]
        if isinstance(node, (FloorDiv, FloorMod)):
            return divided(type(node), args[0], args[1], self.ranges)
        if isinstance(node, (Eq, Ne)):
            return divisible(node.func(*args, evaluate=False), self.ranges)
        if isinstance(node, Relational):
            return _collected(node.func(*args, evaluate=False))
        return node.func(*args)


def divided(
    kind: type, a: sympy.Expr, b: sympy.Expr, ranges: dict[sympy.Symbol, Extent]
) -> sympy.Expr:
    """``a // b`` or ``a % b`` with the multiples of ``b`` taken out of ``a``.

    >>> h, i, r = digit("q", 0), digit("q", 1), digit("q", 2)
    >>> ranges = {i: (0, 3), r: (0, 7)}
    >>> divided(FloorDiv, 8 * i + r, sympy.Integer(8), ranges)
    q_1
    >>> divided(FloorMod, 8 * i + r + 3, sympy.Integer(8), ranges)
    FloorMod(q_2 + 3, 8)

    Digits too small to change the quotient are left out of it:

    >>> divided(FloorDiv, 32 * h + 8 * i + r, sympy.Integer(96), ranges)
    FloorDiv(q_0, 3)
    >>> divided(FloorMod, 32 * h + 8 * i + r, sympy.Integer(96), ranges)
    8*q_1 + q_2 + 32*FloorMod(q_0, 3)
    """
    if not (b.is_Integer and b > 0):
        return kind(a, b)
    multiples, left = _multiples(sympy.expand(a), int(b))
    whole = multiples / b
    bounds = bounds_of(left, ranges)
    if bounds is not None and bounds[0] >= 0 and bounds[1] < b:
        return left if kind is FloorMod else whole
    for unit in _units(left, int(b)):
        coarse, fine = _multiples(left, unit)
        bounds = bounds_of(fine, ranges)
        if bounds is not None and bounds[0] >= 0 and bounds[1] < unit:
            inner = divided(kind, coarse / unit, b / unit, ranges)
            return unit * inner + fine if kind is FloorMod else whole + inner
    return FloorMod(left, b) if kind is FloorMod else whole + FloorDiv(left, b)


def divisible(relation: Relational, ranges: dict[sympy.Symbol, Extent]) -> sympy.Basic:
    """``x % m == 0`` or ``x == 0`` as equations of single digits; likewise ``!=``.

    >>> a, b = digit("q", 1), digit("kv", 1)
    >>> ranges = {a: (0, 7), b: (0, 7)}
    >>> divisible(Eq(FloorMod(a - b, 8), 0), ranges)
    Eq(-kv_1 + q_1, 0)
    >>> divisible(Eq(8 * digit("q", 0) + a, 8 * digit("kv", 0) + b), ranges)
    Eq(-kv_0 + q_0, 0) & Eq(-kv_1 + q_1, 0)
    """
    left, right = relation.args
    if isinstance(right, FloorMod):
        left, right = right, left
    if isinstance(left, FloorMod) and right == 0:
        x, modulus = left.args
        if not (modulus.is_Integer and modulus > 0):
            return relation.func(left, right)
        equal = _vanishing(sympy.expand(x), int(modulus), ranges)
    else:
        x = sympy.expand(left - right)
        equal = _vanishing(x, 0, ranges)
        if equal == Eq(x, 0):
            return _collected(relation)
    if isinstance(relation, Eq):
        return equal
    return sympy.Or(*(sympy.Not(part) for part in sympy.And.make_args(equal)))


def _vanishing(x: sympy.Expr, modulus: int, ranges: dict[sympy.Symbol, Extent]) -> sympy.Basic:
    """Whether ``x`` is a multiple of ``modulus``; of 0: whether it is 0.

    In ``x = g * high + low`` with ``g`` a divisor of the modulus, ``low`` must be a multiple of
    ``g``. Where its bounds leave only one, both parts are equations of their own.
    """
    bounds = bounds_of(x, ranges)
    if not modulus and bounds is not None and not bounds[0] <= 0 <= bounds[1]:
        return sympy.false
    for unit in [modulus, *_units(x, modulus)] if modulus else _units(x, 0):
        high, low = _multiples(x, unit)
        bounds = bounds_of(low, ranges)
        if bounds is None:
            continue
        first = -(-bounds[0] // unit)
        if first * unit > bounds[1]:
            return sympy.false
        if (first + 1) * unit > bounds[1]:
            rest = _vanishing(low - first * unit, 0, ranges)
            if unit == modulus:
                return rest
            return sympy.And(rest, _vanishing(high / unit + first, modulus // unit, ranges))
    return Eq(FloorMod(x, modulus) if modulus else x, 0)


def _multiples(x: sympy.Expr, unit: int) -> tuple[sympy.Expr, sympy.Expr]:
    """The terms of a sum that are multiples of ``unit``, and the others."""
    multiples: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(x):
        coefficient, _ = term.as_coeff_Mul()
        whole = coefficient.is_Integer and coefficient % unit == 0
        (multiples if whole else rest).append(term)
    return sympy.Add(*multiples), sympy.Add(*rest)


def _units(x: sympy.Expr, modulus: int) -> list[int]:
    """What the coefficients of a sum have in common with ``modulus``, without 1; largest first."""
    terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(x))
    found = {
        math.gcd(int(coefficient), modulus)
        for coefficient, rest in terms
        if rest != 1 and coefficient.is_Integer
    }
    return sorted(found - {1, modulus}, reverse=True)


def _collected(relation: Relational) -> sympy.Basic:
    """Both sides as one difference, so that no coordinate stands on both."""
    left, right = relation.args
    if right.is_Integer:
        return relation.func(sympy.expand(left), right)
    return relation.func(sympy.expand(left - right), 0)


def bounds_of(expr: sympy.Expr, ranges: dict[sympy.Symbol, Extent]) -> Extent | None:
    """Least and greatest value of a sum of digits; None where it is no such sum."""
    low = high = 0
    for term in sympy.Add.make_args(expr):
        coefficient, rest = term.as_coeff_Mul()
        if rest == 1 and coefficient.is_Integer:
            low, high = low + int(coefficient), high + int(coefficient)
        elif rest in ranges and coefficient.is_Integer:
            ends = [int(coefficient) * end for end in ranges[rest]]
            low, high = low + min(ends), high + max(ends)
        else:
            return None
    return low, high
