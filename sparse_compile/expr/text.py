"""A stable spelling of predicates and score programs, as prefix s-expressions.

>>> from sparse_compile.expr.nodes import KV, Q
>>> to_text((KV <= Q) & (Q - KV < 8))
'(and (<= kv q) (< (+ (* -1 kv) q) 8))'
>>> from_text(to_text(KV <= Q)) == (KV <= Q)
True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy

from sparse_compile.expr.fold import FUNCTIONS, JOINS, OPERATORS, RECIPROCAL, fold, fold_real
from sparse_compile.expr.nodes import COORDINATES, N_KV, N_Q, SCORE, learned, size_symbol, table

_NAMED = {symbol.name: symbol for symbol in (*COORDINATES, N_Q, N_KV, SCORE)}
_BUILD: dict[str, Callable[..., Any]] = {
    **OPERATORS,
    "where": lambda c, a, b: sympy.Piecewise((a, c), (b, True)),
    RECIPROCAL: lambda a: 1 / a,
    **FUNCTIONS,
}


class _Spelling:
    """The algebra whose values are strings."""

    def integer(self, value: int) -> str:
        return str(value)

    def boolean(self, value: bool) -> str:
        return "true" if value else "false"

    def real(self, value: sympy.Number) -> str:
        return str(value) if value.is_Rational else repr(float(value))

    def symbol(self, name: str) -> str:
        return name

    def table(self, index: int, args: Sequence[str], exprs: Sequence[sympy.Expr]) -> str:
        return _join(f"t{index}", args)

    def learned(self, index: int, args: Sequence[str], exprs: Sequence[sympy.Expr]) -> str:
        return _join(f"w{index}", args)

    def operation(self, name: str, args: Sequence[str], expr: sympy.Basic) -> str:
        if name in JOINS:
            args = sorted(args, reverse=name in ("and", "or"))
        return _join(name, args)


def _join(head: str, args: Sequence[str]) -> str:
    return f"({head} {' '.join(args)})" if args else f"({head})"


def to_text(expr: sympy.Basic) -> str:
    """The s-expression of a predicate; equal predicates give equal text."""
    return fold(expr, _Spelling())


def real_to_text(expr: sympy.Expr) -> str:
    """The s-expression of a real expression; :func:`from_text` reads it back, to the last bit."""
    return fold_real(_Spelling(), expr)[0]


def from_text(text: str) -> sympy.Basic:
    """The predicate that :func:`to_text` spelled."""
    tokens = iter(re.findall(r"[()]|[^\s()]+", text))
    return _read(next(tokens), tokens)


def _read(token: str, tokens: Iterator[str]) -> sympy.Basic:
    """What begins with a token; the others are taken from ``tokens``."""
    if token != "(":
        return _atom(token)
    head = next(tokens)
    args = [_read(first, tokens) for first in iter(tokens.__next__, ")")]
    if re.fullmatch(r"[tw]\d+", head):
        return (table if head[0] == "t" else learned)(int(head[1:]))(*args)
    return _BUILD[head](*args)


def _atom(token: str) -> sympy.Basic:
    if token in ("true", "false"):
        return sympy.true if token == "true" else sympy.false
    if token in _NAMED:
        return _NAMED[token]
    if re.fullmatch(r"s\d+", token):
        return size_symbol(int(token[1:]))
    if "/" in token:
        return sympy.Rational(token)
    is_real = any(mark in token for mark in ".en")  # 0.5, 1e-06, nan
    return sympy.Float(float(token)) if is_real else sympy.Integer(int(token))
