"""One walk over a predicate, shared by everything that gives it a value.

Dense evaluation, interval analysis and the source printers differ only in what a node *means*; each
is an :class:`Algebra`, and :func:`fold` applies it bottom-up, visiting shared subterms once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from sparse_compile.expr.nodes import Bit, FloorDiv, FloorMod, is_learned, is_table, table_index

T = TypeVar("T")

#: Comparisons of two integers.
COMPARISONS: dict[str, Any] = {
    "<": sympy.Lt,
    "<=": sympy.Le,
    ">": sympy.Gt,
    ">=": sympy.Ge,
    "==": sympy.Eq,
    "!=": sympy.Ne,
}
#: Operators that take two or more operands, in any order.
JOINS: dict[str, Any] = {
    "+": sympy.Add,
    "*": sympy.Mul,
    "min": sympy.Min,
    "max": sympy.Max,
    "and": sympy.And,
    "or": sympy.Or,
}
#: The operators of predicates, by the name that algebras get. ``//`` and ``%`` round down, and
#: ``where``, which is not among them, takes a condition and two values.
OPERATORS: dict[str, Any] = {
    **COMPARISONS,
    **JOINS,
    "//": FloorDiv,
    "%": FloorMod,
    "bit": Bit,
    "abs": sympy.Abs,
    "not": sympy.Not,
}
NAMES = {kind: name for name, kind in OPERATORS.items()}
#: The functions of score programs, by the name that algebras get.
FUNCTIONS: dict[str, Any] = {
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
}
#: What ``1 / x`` is called.
RECIPROCAL = "reciprocal"


class Algebra(Protocol, Generic[T]):
    """What each kind of node means."""

    def integer(self, value: int) -> T:
        """An integer constant."""
        ...

    def boolean(self, value: bool) -> T:
        """A Boolean constant."""
        ...

    def symbol(self, name: str) -> T:
        """A coordinate or a size, by name."""
        ...

    def table(self, index: int, args: Sequence[T], exprs: Sequence[sympy.Expr]) -> T:
        """A lookup; ``exprs`` are the index expressions that ``args`` are the values of."""
        ...

    def operation(self, name: str, args: Sequence[T], expr: sympy.Basic) -> T:
        """One of :data:`OPERATORS`, or ``where``; ``expr`` is the node."""
        ...


class RealAlgebra(Algebra[T], Protocol):
    """One that knows score programs: its operations are :data:`FUNCTIONS` and 1 / x, too."""

    def real(self, value: sympy.Number) -> T:
        """A constant that is no integer."""
        ...

    def learned(self, index: int, args: Sequence[T], exprs: Sequence[sympy.Expr]) -> T:
        """A lookup of a real number; as for ``table``."""
        ...


class UnsupportedNode(TypeError):
    """A predicate holds a node that no algebra knows; says which."""


def joined(function: Callable[..., T], name: str, args: Sequence[T]) -> T:
    """A function at the operands of an operator; one of two values at all of those of a join."""
    return functools.reduce(function, args) if name in JOINS else function(*args)


def fold(expr: sympy.Basic, algebra: Algebra[T]) -> T:
    """The value of ``expr`` in ``algebra``; shared subterms are computed once.

    Raises:
        UnsupportedNode: for a node outside the vocabulary of :mod:`sparse_compile.expr.nodes`.
    """
    (found,) = _values(_value, algebra, [expr])
    return found


def fold_real(algebra: RealAlgebra[T], *exprs: sympy.Expr) -> list[T]:
    """The values of real expressions in ``algebra``; subterms that they share are computed once.

    Raises:
        UnsupportedNode: for a node outside the vocabulary of :mod:`sparse_compile.expr.score`.
    """
    return _values(_real_value, algebra, exprs)


def _values(
    meaning: Callable[..., T], algebra: Algebra[T], exprs: Sequence[sympy.Basic]
) -> list[T]:
    memo: dict[sympy.Basic, T] = {}

    def value(node: sympy.Basic) -> T:
        if node not in memo:
            memo[node] = meaning(node, algebra, value)
        return memo[node]

    return [value(expr) for expr in exprs]


def _real_value(node: sympy.Basic, algebra: RealAlgebra[T], value: Callable[[sympy.Basic], T]) -> T:
    if node.is_Number and not node.is_Integer and node.is_finite:
        return algebra.real(node)
    for name in ("tanh", "exp", "log"):
        if isinstance(node, FUNCTIONS[name]):
            return algebra.operation(name, [value(node.args[0])], node)
    if isinstance(node, sympy.Pow) and node.exp.is_negative:
        return algebra.operation(RECIPROCAL, [value(sympy.Pow(node.base, -node.exp))], node)
    if is_learned(node):
        return algebra.learned(table_index(node), [value(arg) for arg in node.args], node.args)
    if isinstance(node, sympy.Pow) and node.exp == sympy.S.Half:
        return algebra.operation("sqrt", [value(node.base)], node)
    return _value(node, algebra, value)


def _value(node: sympy.Basic, algebra: Algebra[T], value: Callable[[sympy.Basic], T]) -> T:
    if isinstance(node, (BooleanTrue, BooleanFalse)):
        return algebra.boolean(bool(node))
    if isinstance(node, sympy.Integer):
        return algebra.integer(int(node))
    if isinstance(node, sympy.Symbol):
        return algebra.symbol(node.name)
    if isinstance(node, sympy.Piecewise):
        return _piecewise(node, value, algebra)
    if isinstance(node, (sympy.Xor, sympy.ITE, sympy.Implies, sympy.Equivalent)):
        return value(node.to_nnf(simplify=False))
    if isinstance(node, sympy.Pow) and node.exp.is_Integer and node.exp > 0:
        return algebra.operation("*", [value(node.base)] * int(node.exp), node)
    args = [value(arg) for arg in node.args]
    if is_table(node):
        return algebra.table(table_index(node), args, node.args)
    if type(node) not in NAMES:
        raise UnsupportedNode(f"{type(node).__name__} in a mask predicate: {node}")
    return algebra.operation(NAMES[type(node)], args, node)


def _piecewise(node: sympy.Piecewise, value: Callable[[sympy.Basic], T], algebra: Algebra[T]) -> T:
    pieces = list(node.args)
    if pieces[-1][1] != sympy.true:
        raise UnsupportedNode(f"Piecewise without a default in a mask predicate: {node}")
    result = value(pieces[-1][0])
    for branch, condition in reversed(pieces[:-1]):
        args = [value(_integral(condition)), value(branch), result]
        result = algebra.operation("where", args, node)
    return result


def _integral(condition: sympy.Basic) -> sympy.Basic:
    """The same condition without fractions: Piecewise turns ``2*q < n`` into ``q < n/2``."""
    if all(number.is_Integer for number in condition.atoms(sympy.Rational)):
        return condition
    if isinstance(condition, sympy.core.relational.Relational):
        scale = sympy.ilcm(*(number.q for number in condition.atoms(sympy.Rational)), 1)
        return condition.func(*(sympy.expand(scale * arg) for arg in condition.args))
    return condition.func(*(_integral(arg) for arg in condition.args))
