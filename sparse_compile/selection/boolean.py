"""Shorter spellings of a predicate: Boolean algebra over its comparisons, taken as they are."""

from __future__ import annotations

import functools
import operator

import sympy
from sympy.logic.boolalg import simplify_logic, to_nnf

#: With more comparisons than this a predicate stays as it is: the search takes 2**n steps.
_MOST = 7
_CONNECTIVES = (sympy.And, sympy.Or, sympy.Not)


@functools.lru_cache(maxsize=256)
def simplified(predicate: sympy.Basic) -> sympy.Basic:
    """An equivalent predicate with as few comparisons, if there is a shorter one.

    >>> from sparse_compile.expr import KV, Q
    >>> near = Q - KV < 4
    >>> simplified(((KV <= Q) | (KV <= Q) & near) & ~((KV <= Q) & near))
    (kv <= q) & (-kv + q >= 4)
    """
    atoms: dict[sympy.Basic, sympy.Basic] = {}
    abstract = _abstract(predicate, atoms)
    names = {symbol: atom for atom, symbol in atoms.items() if isinstance(symbol, sympy.Symbol)}
    if not 1 < len(names) <= _MOST:
        return predicate
    forms = [simplify_logic(abstract, form) for form in ("cnf", "dnf")]
    spelled = operator.methodcaller("count", sympy.Symbol)
    best = min([abstract, *forms], key=spelled)
    return predicate if best is abstract else best.xreplace(names)


@functools.lru_cache(maxsize=256)
def difference(predicate: sympy.Basic, less: sympy.Basic) -> sympy.Basic:
    """Where ``predicate`` holds and ``less`` does not.

    >>> from sparse_compile.expr import KV, Q
    >>> difference((KV <= Q) & ((KV < 8) | (Q < 4)), (KV <= Q) & (KV < 8))
    (kv >= 8) & (kv <= q) & (q < 4)
    """
    if less == sympy.true:
        return sympy.false
    mine, other = sympy.And.make_args(predicate), sympy.And.make_args(less)
    if shared := [part for part in mine if part in other]:
        rest = (sympy.And(*(part for part in of if part not in shared)) for of in (mine, other))
        return sympy.And(*shared, difference(*rest))
    excluded = sympy.Or.make_args(less)
    left = sympy.Or(*(part for part in sympy.Or.make_args(predicate) if part not in excluded))
    return simplified(sympy.And(left, to_nnf(sympy.Not(less), simplify=False)))


def _abstract(predicate: sympy.Basic, atoms: dict[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    """The predicate with symbols for what is no And, Or or Not; opposites share one."""
    if isinstance(predicate, _CONNECTIVES):
        return predicate.func(*(_abstract(arg, atoms) for arg in predicate.args))
    if predicate in (sympy.true, sympy.false):
        return predicate
    if predicate not in atoms:
        symbol = sympy.Dummy(f"a{len(atoms)}")
        atoms[predicate], atoms[sympy.Not(predicate)] = symbol, sympy.Not(symbol)
    return atoms[predicate]
