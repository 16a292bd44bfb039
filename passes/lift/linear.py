"""Comparisons of integers in one normal form, and how they read."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import gcd

import sympy


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
