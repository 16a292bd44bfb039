"""Lifted tensors: sizes, and the element at a coordinate as an expression in that coordinate.

``DIMS[i]`` stands for the index along dimension ``i``; a dimension of size one never appears. An
element of a bool tensor is a sympy Boolean. Any other element is a list of *cases*: disjoint
conditions that cover everything, each with a Python number or a symbolic integer. Tensor data that
is only known at run time appears as a lookup ``i7(d0, d1)``, element (d0, d1) of node number 7;
the letter is ``m`` for bool, ``i`` for integer and ``f`` for floating data.

Sizes keep torch's own symbols while lifting; which of them are the lengths of this attention is
decided per site, at the end, so that layers share the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.sites.site import Refused

DIMS: tuple[sympy.Symbol, ...] = tuple(
    sympy.Symbol(f"d{i}", integer=True, nonnegative=True) for i in range(16)
)

Number: TypeAlias = int | float | bool
Value: TypeAlias = int | float | bool | sympy.Expr
Case: TypeAlias = tuple[sympy.Basic, Value]
Cases: TypeAlias = tuple[Case, ...]
Element: TypeAlias = sympy.Basic | Cases
Shape: TypeAlias = tuple[sympy.Expr, ...]

_MOST_CASES = 64
#: What absorbs any score or bias that is added to it, in fp32 and bf16: their least numbers do, and
#: so does what a scale leaves of these.
ABSORBING = -1e30


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


class Unliftable(Refused):
    """An operation that has no symbolic meaning here; the message says which and why."""

    def __init__(self, what: str) -> None:
        super().__init__(f"its mask is not understood: {what}")


@dataclass(frozen=True)
class Lifted:
    """A tensor whose elements are expressions in ``DIMS``.

    Attributes:
        shape: sizes, symbolic under dynamic shapes.
        dtype: the tensor's dtype.
        element: sympy Boolean for a bool tensor, else the cases.
    """

    shape: Shape
    dtype: torch.dtype
    element: Element

    @property
    def condition(self) -> sympy.Basic:
        """The element of a bool tensor."""
        assert self.dtype == torch.bool
        return self.element

    @property
    def cases(self) -> Cases:
        """The element as cases; a Boolean has two."""
        if self.dtype != torch.bool:
            return self.element
        cases = ((self.element, True), (sympy.Not(self.element), False))
        return tuple(case for case in cases if case[0] != sympy.false)

    @property
    def is_float_data(self) -> bool:
        """Whether the element reads floating data, about which nothing symbolic is known."""
        return self.dtype != torch.bool and any(
            is_data(node) and node.func.__name__[0] == "f"
            for _, value in self.cases
            if isinstance(value, sympy.Basic)
            for node in sympy.preorder_traversal(value)
        )


def is_data(expr: sympy.Basic) -> bool:
    """Whether ``expr`` is a lookup of run-time data."""
    return isinstance(expr, sympy.core.function.AppliedUndef)


def reads_data(expr: sympy.Basic) -> bool:
    """Whether ``expr`` has a lookup of run-time data in it."""
    return bool(expr.atoms(sympy.core.function.AppliedUndef))


def single(value: Value) -> Cases:
    """An element that is the same expression everywhere."""
    return ((sympy.true, _plain(value)),)


def merged(cases: Iterable[Case]) -> Cases:
    """Cases with equal values joined and impossible ones dropped."""
    joined: dict[object, tuple[list[sympy.Basic], Value]] = {}
    for condition, value in cases:
        if condition == sympy.false:
            continue
        value = _plain(value)
        key = repr(value) if isinstance(value, float) and math.isnan(value) else value
        joined.setdefault(key, ([], value))[0].append(condition)
    if len(joined) > _MOST_CASES:
        raise Unliftable("it takes too many different values")
    return tuple((sympy.Or(*conditions), value) for conditions, value in joined.values())


def _plain(value: Value) -> Value:
    return int(value) if isinstance(value, sympy.Integer) else value


def either(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    """``yes`` where the condition holds, else ``no``, for Booleans."""
    if yes == no:
        return yes
    if yes == sympy.true:
        return sympy.Or(condition, no)
    if no == sympy.true:
        return sympy.Or(sympy.Not(condition), yes)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def choose(condition: sympy.Basic, yes: Lifted, no: Lifted, dtype: torch.dtype) -> Element:
    """The element of ``where(condition, yes, no)``; all in the same coordinates."""
    if dtype == torch.bool:
        return either(condition, yes.condition, no.condition)
    refuse = sympy.Not(condition)
    return merged(
        [(sympy.And(condition, c), v) for c, v in yes.cases]
        + [(sympy.And(refuse, c), v) for c, v in no.cases]
    )


def truth(value: Value) -> sympy.Basic:
    """Whether a value counts as True."""
    if isinstance(value, sympy.Basic):
        return sympy.Ne(value, 0)
    return sympy.true if bool(value) else sympy.false


def mapped(element: Element, change: Callable[[sympy.Basic], sympy.Basic]) -> Element:
    """The element with its expressions changed."""
    if isinstance(element, sympy.Basic):
        return change(element)
    return merged((change(c), change(v) if isinstance(v, sympy.Basic) else v) for c, v in element)


def substitute(element: Element, values: Mapping[sympy.Basic, sympy.Basic]) -> Element:
    """The element with symbols replaced, all at once."""
    return mapped(element, lambda expr: expr.xreplace(values))


def align(tensor: Lifted, rank: int) -> Lifted:
    """The same tensor with its dimensions counted in a broadcast result of ``rank``."""
    shift = rank - len(tensor.shape)
    if shift == 0:
        return tensor
    moved = {DIMS[i]: DIMS[i + shift] for i in range(len(tensor.shape))}
    ones: Shape = (sympy.S.One,) * shift
    return Lifted(ones + tensor.shape, tensor.dtype, substitute(tensor.element, moved))


def reindexed(tensor: Lifted, shape: Shape, indices: Sequence[sympy.Expr]) -> Lifted:
    """A tensor of ``shape`` whose element reads ``tensor`` at ``indices`` (one per dimension)."""
    values = dict(zip(DIMS, indices))  # noqa: B905  # DIMS is longer
    return Lifted(shape, tensor.dtype, substitute(tensor.element, values))


def combinations(elements: Sequence[Cases]) -> list[tuple[sympy.Basic, tuple[Value, ...]]]:
    """Every combination of cases that is possible."""
    start: list[tuple[sympy.Basic, tuple[Value, ...]]] = [(sympy.true, ())]

    def extend(
        so_far: list[tuple[sympy.Basic, tuple[Value, ...]]], cases: Cases
    ) -> list[tuple[sympy.Basic, tuple[Value, ...]]]:
        if len(so_far) * len(cases) > _MOST_CASES**2:
            raise Unliftable("it takes too many different values")
        pairs = [(sympy.And(c, d), (*vs, v)) for c, vs in so_far for d, v in cases]
        return [(c, vs) for c, vs in pairs if c != sympy.false]

    return functools.reduce(extend, elements, start)


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
