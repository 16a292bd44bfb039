"""From torch's symbolic sizes to the integers of predicates.

Sizes keep torch's own symbols while lifting; which of them are the lengths of this attention is
decided per site, at the end, so that layers share the work.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.passes.lift.value import Unliftable

# Names of torch's sympy functions for sizes; they are not exported publicly, their names are what
# SymInt expressions print.
_FUNCTIONS: dict[str, Any] = {
    "FloorDiv": FloorDiv,
    "CleanDiv": FloorDiv,
    "Mod": FloorMod,
    "PythonMod": FloorMod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Abs": sympy.Abs,
}


def size_expr(size: Any) -> sympy.Expr:
    """An int, SymInt or node of one, as a sympy integer.

    Raises:
        Unliftable: for a size computed in a way that predicates do not know.
    """
    if isinstance(size, Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        return convert(size.node.expr)
    return sympy.Integer(size)


def convert(expr: sympy.Basic) -> sympy.Expr:
    """torch's size expression in the vocabulary of predicates."""
    if expr.is_Symbol or expr.is_Integer:
        return expr
    args = [convert(arg) for arg in expr.args]
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        return expr.func(*args)
    if isinstance(expr, sympy.Pow) and args[1].is_Integer and args[1] > 0:
        return expr.func(*args)
    function = _FUNCTIONS.get(type(expr).__name__)
    if function is None:
        raise Unliftable(f"the size {expr}")
    return function(*args)


def solve_for_symbol(
    expr: sympy.Expr, length: sympy.Expr
) -> tuple[sympy.Symbol, sympy.Expr] | None:
    """The symbol of ``expr`` in terms of the length that ``expr`` equals, if ``expr`` is s + c.

    >>> s = sympy.Symbol("s", integer=True, positive=True); n = sympy.Symbol("n")
    >>> solve_for_symbol(s + 1, n)
    (s, n - 1)
    """
    offset, terms = expr.as_coeff_Add()
    return (terms, length - offset) if terms.is_Symbol else None
