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

    >>> i, r = digit("q", 0), digit("q", 1)
    >>> divided(FloorDiv, 8 * i + r, sympy.Integer(8), {r: (0, 7)})
    q_0
    >>> divided(FloorMod, 8 * i + r + 3, sympy.Integer(8), {r: (0, 7)})
    FloorMod(q_1 + 3, 8)
    """
    if not (b.is_Integer and b > 0):
        return kind(a, b)
    multiples, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(a)):
        coefficient, _ = term.as_coeff_Mul()
        whole = coefficient.is_Integer and coefficient % b == 0
        (multiples if whole else rest).append(term)
    left = sympy.Add(*rest)
    bounds = bounds_of(left, ranges)
    inside = bounds is not None and bounds[0] >= 0 and bounds[1] < b
    if kind is FloorMod:
        return left if inside else FloorMod(left, b)
    whole = sympy.Add(*(term / b for term in multiples))
    return whole if inside else whole + FloorDiv(left, b)


def divisible(relation: Relational, ranges: dict[sympy.Symbol, Extent]) -> sympy.Basic:
    """``x % m == 0`` as ``x == 0`` where ``|x| < m``; likewise ``!=``.

    >>> a, b = digit("q", 1), digit("kv", 1)
    >>> divisible(Eq(FloorMod(a - b, 8), 0), {a: (0, 7), b: (0, 7)})
    Eq(-kv_1 + q_1, 0)
    """
    left, right = relation.args
    if isinstance(right, FloorMod):
        left, right = right, left
    if isinstance(left, FloorMod) and right == 0:
        x, modulus = left.args
        bounds = bounds_of(x, ranges)
        if modulus.is_Integer and bounds is not None:
            if max(abs(bounds[0]), abs(bounds[1])) < modulus:
                return relation.func(x, 0)
        return relation.func(left, right)
    return _collected(relation)


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
