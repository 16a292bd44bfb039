"""The vocabulary of mask predicates: coordinates, sizes, tables and integer division.

A predicate is a sympy Boolean over the four coordinates ``b, h, q, kv`` of one attention score.
Everything else it may mention is run-time data: sizes (integers known when the call is made) and
tables (integer tensors indexed by coordinates, whose *values* are never baked in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy


def _coordinate(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


#: Index of the batch entry, of the *query* head, of the query and of the key.
B, H, Q, KV = (_coordinate(name) for name in ("b", "h", "q", "kv"))
COORDINATES: tuple[sympy.Symbol, ...] = (B, H, Q, KV)

#: Number of queries and of keys. Every predicate may use them.
N_Q, N_KV = (sympy.Symbol(name, integer=True, positive=True) for name in ("n_q", "n_kv"))


#: What a score program starts from: the scaled product of a query and a key.
SCORE = sympy.Symbol("score", real=True)


def size_symbol(index: int) -> sympy.Symbol:
    """The ``index``-th run-time integer of a predicate, ``s0, s1, ...``; may be negative."""
    return sympy.Symbol(f"s{index}", integer=True)


def table(index: int) -> Any:
    """The ``index``-th table of a predicate, as a function of its coordinates.

    A bool table counts as 0 and 1.

    >>> table(0)(B, KV)
    t0(b, kv)
    """
    return sympy.Function(f"t{index}", integer=True)


def learned(index: int) -> Any:
    """The ``index``-th real-valued tensor of a score program, as a function of its coordinates.

    >>> learned(0)(H, KV - Q)
    w0(h, kv - q)
    """
    return sympy.Function(f"w{index}", real=True)


def is_lookup(expr: sympy.Basic) -> bool:
    """Whether ``expr`` reads a tensor: a table, or one of real numbers."""
    return isinstance(expr, sympy.core.function.AppliedUndef)


def is_learned(expr: sympy.Basic) -> bool:
    """Whether ``expr`` reads a tensor of real numbers, such as ``w0(h, kv)``."""
    return is_lookup(expr) and expr.func.__name__[0] == "w"


def is_table(expr: sympy.Basic) -> bool:
    """Whether ``expr`` is a table lookup such as ``t0(b, kv)``."""
    return is_lookup(expr) and expr.func.__name__[0] != "w"


def table_index(expr: sympy.Basic) -> int:
    """Which tensor a lookup reads: 3 for ``t3(b, q)``."""
    return int(expr.func.__name__[1:])


def renumbered(predicate: sympy.Basic, numbers: Mapping[int, int]) -> sympy.Basic:
    """The predicate with table ``numbers[i]`` in the place of each table ``i`` that it reads.

    >>> renumbered(table(0)(KV) > table(1)(Q), {0: 5, 1: 0})
    t5(kv) > t0(q)
    """

    def moved(lookup: sympy.Basic) -> sympy.Basic:
        return table(numbers[table_index(lookup)])(*lookup.args)

    return predicate.replace(is_table, moved)


class FloorDiv(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """Integer division rounding towards minus infinity, as in Python.

    >>> FloorDiv(Q, 8).subs(Q, 17), FloorDiv(-1, 8), FloorDiv(Q, 1)
    (2, -1, q)
    """

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """Fold constants and divisions by one."""
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        if b == 1 or a == 0:
            return a
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        a, b = self.args
        return True if a.is_nonnegative and b.is_positive else None


class FloorMod(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """Remainder with the sign of the divisor, as in Python.

    >>> FloorMod(Q, 8).subs(Q, 17), FloorMod(-1, 8)
    (1, 7)
    """

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """Fold constants and remainders by one."""
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) % int(b))
        if b == 1 or a == 0:
            return sympy.Integer(0)
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[1].is_positive else None


class Bit(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """Bit ``index`` of ``word``, 0 or 1: an int32 in two's complement, ``0 <= index < 32``.

    >>> Bit(6, 1), Bit(6, 0), Bit(-1, 31)
    (1, 0, 1)
    """

    nargs = 2
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, word: sympy.Expr, index: sympy.Expr) -> sympy.Expr | None:
        """Fold constants, and words whose bits are all the same."""
        if word.is_Integer and index.is_Integer:
            return sympy.Integer(int(word) >> int(index) & 1)
        if word in (0, -1):
            return -word
        return None


#: Keys per word of a table of bits.
WORD = 32


def dense_bit(index: int, axes: Sequence[str]) -> sympy.Expr:
    """Whether the pair attends, by a table of words over [b, h, q, kv // 32] made of a dense mask.

    Args:
        index: which table.
        axes: the coordinates that the mask depends on; along others the table has size one.

    >>> dense_bit(0, ["q", "kv"])
    Bit(t0(0, 0, q, FloorDiv(kv, 32)), FloorMod(kv, 32))
    """
    b, h, q, kv = (symbol if symbol.name in axes else sympy.S.Zero for symbol in COORDINATES)
    return Bit(table(index)(b, h, q, FloorDiv(kv, WORD)), FloorMod(kv, WORD))
