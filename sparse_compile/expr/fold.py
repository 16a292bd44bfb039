"""One walk over a predicate, shared by everything that gives it a value.

Dense evaluation, interval analysis and the source printers differ only in what a node *means*; each
is an :class:`Algebra`, and :func:`fold` applies it bottom-up, visiting shared subterms once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from sparse_compile.expr.nodes import Bit, FloorDiv, FloorMod, is_table, table_index

T = TypeVar("T")


class Algebra(Protocol, Generic[T]):
    """What each kind of node means. ``compare`` gets one of ``< <= > >= == !=``."""

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

    def add(self, args: Sequence[T]) -> T:
        """A sum of two or more terms."""
        ...

    def mul(self, args: Sequence[T]) -> T:
        """A product of two or more factors."""
        ...

    def floordiv(self, a: T, b: T, expr: sympy.Expr) -> T:
        """Division rounding down."""
        ...

    def mod(self, a: T, b: T, expr: sympy.Expr) -> T:
        """Remainder with the sign of the divisor."""
        ...

    def bit(self, word: T, index: T) -> T:
        """Bit ``index`` of an int32 word, 0 or 1."""
        ...

    def absolute(self, a: T) -> T:
        """Absolute value."""
        ...

    def minimum(self, args: Sequence[T]) -> T:
        """The least of two or more."""
        ...

    def maximum(self, args: Sequence[T]) -> T:
        """The greatest of two or more."""
        ...

    def select(self, condition: T, yes: T, no: T) -> T:
        """``yes`` where the condition holds, else ``no``."""
        ...

    def compare(self, op: str, a: T, b: T) -> T:
        """A comparison of two integers."""
        ...

    def conjunction(self, args: Sequence[T]) -> T:
        """Logical and."""
        ...

    def disjunction(self, args: Sequence[T]) -> T:
        """Logical or."""
        ...

    def negation(self, a: T) -> T:
        """Logical not."""
        ...


class RealAlgebra(Algebra[T], Protocol):
    """What the nodes of a score program mean besides those of a predicate."""

    def real(self, value: sympy.Number) -> T:
        """A constant that is no integer."""
        ...

    def call(self, name: str, a: T) -> T:
        """One of :data:`FUNCTIONS` of a real number."""
        ...


#: The functions of score programs, by the name that algebras get.
FUNCTIONS: dict[str, Any] = {
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
}
#: What ``1 / x`` is called.
RECIPROCAL = "reciprocal"


class UnsupportedNode(TypeError):
    """A predicate holds a node that no algebra knows; says which."""


def fold(expr: sympy.Basic, algebra: Algebra[T]) -> T:
    """The value of ``expr`` in ``algebra``; shared subterms are computed once.

    Raises:
        UnsupportedNode: for a node outside the vocabulary of :mod:`sparse_compile.expr.nodes`.
    """
    memo: dict[sympy.Basic, T] = {}

    def value(node: sympy.Basic) -> T:
        if node not in memo:
            memo[node] = _value(node, algebra, value)
        return memo[node]

    return value(expr)


def fold_real(algebra: RealAlgebra[T], *exprs: sympy.Expr) -> list[T]:
    """The values of real expressions in ``algebra``; subterms that they share are computed once.

    Raises:
        UnsupportedNode: for a node outside the vocabulary of :mod:`sparse_compile.expr.score`.
    """
    memo: dict[sympy.Basic, T] = {}

    def value(node: sympy.Basic) -> T:
        if node not in memo:
            memo[node] = _real_value(node, algebra, value)
        return memo[node]

    return [value(expr) for expr in exprs]


def _real_value(node: sympy.Basic, algebra: RealAlgebra[T], value: Callable[[sympy.Basic], T]) -> T:
    if node.is_Number and not node.is_Integer and node.is_finite:
        return algebra.real(node)
    for name in ("tanh", "exp", "log"):
        if isinstance(node, FUNCTIONS[name]):
            return algebra.call(name, value(node.args[0]))
    if isinstance(node, sympy.Pow) and node.exp.is_negative:
        return algebra.call(RECIPROCAL, value(sympy.Pow(node.base, -node.exp)))
    if isinstance(node, sympy.Pow) and node.exp == sympy.S.Half:
        return algebra.call("sqrt", value(node.base))
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
        return algebra.mul([value(node.base)] * int(node.exp))
    args = [value(arg) for arg in node.args]
    if is_table(node):
        return algebra.table(table_index(node), args, node.args)
    if isinstance(node, (FloorDiv, FloorMod)):
        method = algebra.floordiv if isinstance(node, FloorDiv) else algebra.mod
        return method(args[0], args[1], node)
    return _operator(node, args, algebra)


def _operator(node: sympy.Basic, args: list[T], algebra: Algebra[T]) -> T:
    if isinstance(node, sympy.core.relational.Relational):
        return algebra.compare(node.rel_op, args[0], args[1])
    if isinstance(node, sympy.Not):
        return algebra.negation(args[0])
    if isinstance(node, sympy.Abs):
        return algebra.absolute(args[0])
    if isinstance(node, Bit):
        return algebra.bit(args[0], args[1])
    for kind, method in (
        (sympy.Add, algebra.add),
        (sympy.Mul, algebra.mul),
        (sympy.Min, algebra.minimum),
        (sympy.Max, algebra.maximum),
        (sympy.And, algebra.conjunction),
        (sympy.Or, algebra.disjunction),
    ):
        if isinstance(node, kind):
            return method(args)
    raise UnsupportedNode(f"{type(node).__name__} in a mask predicate: {node}")


def _piecewise(node: sympy.Piecewise, value: Callable[[sympy.Basic], T], algebra: Algebra[T]) -> T:
    pieces = list(node.args)
    if pieces[-1][1] != sympy.true:
        raise UnsupportedNode(f"Piecewise without a default in a mask predicate: {node}")
    result = value(pieces[-1][0])
    for branch, condition in reversed(pieces[:-1]):
        result = algebra.select(value(_integral(condition)), value(branch), result)
    return result


def _integral(condition: sympy.Basic) -> sympy.Basic:
    """The same condition without fractions: Piecewise turns ``2*q < n`` into ``q < n/2``."""
    if all(number.is_Integer for number in condition.atoms(sympy.Rational)):
        return condition
    if isinstance(condition, sympy.core.relational.Relational):
        scale = sympy.ilcm(*(number.q for number in condition.atoms(sympy.Rational)), 1)
        return condition.func(*(sympy.expand(scale * arg) for arg in condition.args))
    return condition.func(*(_integral(arg) for arg in condition.args))
