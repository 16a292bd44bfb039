"""Rewrite a predicate so that interval analysis loses less; the meaning stays the same.

An interval forgets that two mentions of a coordinate are the same number, and that a remainder
wraps. So comparisons that mention a coordinate on both sides become one difference, and
comparisons of remainders become divisibility, where a wrap-around is harmless.
"""

from __future__ import annotations

import functools

import sympy
from sympy.core.relational import Eq, Ne, Relational

from sparse_compile.expr import COORDINATES, FloorMod, is_table
from sparse_compile.expr.digits import in_digits
from sparse_compile.spec.view import Order


def canonical_in(predicate: sympy.Basic, q: Order, kv: Order) -> sympy.Basic:
    """:func:`canonical`, over the digits of these orders."""
    plain = canonical(predicate)
    if q.is_natural and kv.is_natural:
        return plain
    return in_digits(plain, q.radices, kv.radices, q.windows, kv.windows)


@functools.lru_cache(maxsize=1024)
def canonical(predicate: sympy.Basic) -> sympy.Basic:
    """An equal predicate on which interval analysis is at least as exact.

    >>> from sparse_compile.expr import KV, Q
    >>> canonical(Eq(FloorMod(Q, 8), FloorMod(KV, 8)))
    Eq(FloorMod(-kv + q, 8), 0)
    >>> canonical(Eq(FloorMod(KV, 8), 3))
    Eq(FloorMod(kv - 3, 8), 0)
    >>> canonical(Q + KV < 2 * Q)
    kv - q < 0
    >>> canonical(sympy.Abs(Q - KV) <= 2)
    (kv - q >= -2) & (kv - q <= 2)
    """
    if isinstance(predicate, (Eq, Ne)):
        predicate = _divisibility(predicate)
    if isinstance(predicate, Relational):
        return _sides(_difference(predicate))
    if isinstance(predicate, sympy.logic.boolalg.BooleanFunction):
        return predicate.func(*(canonical(arg) for arg in predicate.args))
    return predicate


def _divisibility(relation: Relational) -> Relational:
    """``x % m == y % m`` and ``x % m == r`` as ``(x - y) % m == 0``; likewise ``!=``."""
    left, right = relation.args
    if not isinstance(left, FloorMod):
        left, right = right, left
    if not isinstance(left, FloorMod):
        return relation
    x, modulus = left.args
    if isinstance(right, FloorMod) and right.args[1] == modulus:
        x = sympy.expand(x - right.args[0])
    elif right.is_Integer and modulus.is_Integer and 0 <= right < modulus:
        x = x - right
    else:
        return relation
    return type(relation)(FloorMod(x, modulus), 0, evaluate=False)


def _difference(relation: Relational) -> sympy.Basic:
    left, right = relation.args
    if not _coordinates_outside_lookups(left) & _coordinates_outside_lookups(right):
        return relation
    return relation.func(sympy.expand(left - right), 0)


def _sides(relation: sympy.Basic) -> sympy.Basic:
    """``|x| <= c`` as ``-c <= x <= c``, and ``|x| >= c`` likewise: as exact, with less to compute.

    (Kernels for sm_90 that computed ``max(low, -high, 0)`` from the ends of a small ``x`` were
    seen to leave out ``-high``.)
    """
    if isinstance(relation, Relational) and isinstance(relation.rhs, sympy.Abs):
        relation = relation.reversed
    if not isinstance(relation, Relational) or not isinstance(relation.lhs, sympy.Abs):
        return relation
    (x,), c = relation.lhs.args, relation.rhs
    if isinstance(relation, (Eq, Ne)) or c.free_symbols & set(COORDINATES):
        return relation
    below, above = relation.func(x, c), relation.reversed.func(x, -c)
    inside = isinstance(relation, (sympy.Le, sympy.Lt))
    return sympy.And(below, above) if inside else sympy.Or(below, above)


def _coordinates_outside_lookups(expr: sympy.Basic) -> set[sympy.Symbol]:
    if is_table(expr):
        return set()
    if expr in COORDINATES:
        return {expr}
    parts = [_coordinates_outside_lookups(arg) for arg in expr.args]
    return set().union(*parts)
