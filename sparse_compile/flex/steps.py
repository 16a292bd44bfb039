"""Whole numbers that a function makes of real ones, as steps.

T5's buckets are logarithms of distances, rounded down. What depends on one place, or on the
distance of two, is computed for all of them by torch itself; where it changes seldom, it is said by
the places where it does.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.expr import COORDINATES, KV, Q, is_lookup
from sparse_compile.ops.untraced import untraced

#: Steps, at most.
_MOST = 128


@untraced
def as_steps(
    name: str,
    steps: Mapping[str, ast.Call],
    source: sympy.Expr,
    lengths: tuple[int, int, int, int],
) -> sympy.Expr | None:
    """A whole number as steps; None where there are too many, or it depends on more.

    Args:
        name: of the step that computes it, as ``v7``.
        steps: all steps by their names; those of b, h, q and kv are not among them.
        source: the real number that it is made of.
        lengths: batch, heads, queries and keys.
    """
    if any(map(is_lookup, source.atoms(sympy.Function))):
        return None
    found = _argument(source, lengths)
    if found is None:
        return None
    argument, first, places = found
    values, real = (_Run(steps, places).value(one) for one in (name, _source(steps[name])))
    count = places[0].numel()
    values, real = values.long().expand(count), real.expand(count)
    # What is made of infinity or NaN means nothing: it may be what its neighbour is.
    meant = torch.where(real.isfinite(), torch.arange(count), -1).cummax(0).values
    meant = torch.where(meant < 0, int(real.isfinite().int().argmax()), meant)
    values = values[meant]
    jumps = values.diff().nonzero().flatten().tolist()
    if len(jumps) > _MOST:
        return None
    pieces = [(sympy.Integer(int(values[at])), sympy.Le(argument, first + at)) for at in jumps]
    return sympy.Piecewise(*pieces, (sympy.Integer(int(values[-1])), True))


def _argument(
    source: sympy.Expr, lengths: tuple[int, int, int, int]
) -> tuple[sympy.Expr, int, list[Tensor]] | None:
    """What a number depends on, the least value of that, and b, h, q and kv for all values."""
    read = [symbol for symbol in COORDINATES if source.has(symbol)]
    if source.free_symbols - {*COORDINATES} or not all(lengths):
        return None
    zero = torch.zeros(1, dtype=torch.int64)
    if len(read) == 1:
        axis = COORDINATES.index(read[0])
        places = [zero] * 4
        places[axis] = torch.arange(lengths[axis])
        return read[0], 0, [place.expand(lengths[axis]) for place in places]
    distance = sympy.Symbol("distance", integer=True)
    if source.xreplace({KV: Q + distance}).free_symbols != {distance}:
        return None
    first, count = 1 - lengths[2], lengths[2] + lengths[3] - 1
    at = torch.arange(first, first + count)
    return (
        KV - Q,
        first,
        [zero.expand(count), zero.expand(count), (-at).clamp(min=0), at.clamp(min=0)],
    )


def _source(step: ast.Call) -> str:
    (name,) = (arg.id for arg in step.args[:1] if isinstance(arg, ast.Name))
    return name


class _Run:
    """Computes steps as they were written down."""

    def __init__(self, steps: Mapping[str, ast.Call], places: list[Tensor]) -> None:
        self._steps = steps
        self._values: dict[str, Any] = {f"v{i}": place for i, place in enumerate(places)}

    def value(self, name: str) -> Any:
        """What a step computes."""
        if name not in self._values:
            call = self._steps[name]
            assert isinstance(call.func, ast.Name)
            args = [self._argument(arg) for arg in call.args]
            options = {str(one.arg): self._argument(one.value) for one in call.keywords}
            self._values[name] = _function(call.func.id.strip("_"))(*args, **options)
        return self._values[name]

    def _argument(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id="inf" | "nan" as number):
                return float(number)
            case ast.Name(id=name):
                return self.value(name)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._argument(inner)
            case ast.Tuple(elts=items):
                return tuple(map(self._argument, items))
            case ast.Constant(value=value):
                return value
            case ast.Attribute(attr=name):
                return getattr(torch, name)
        return torch.device("cpu")


def _function(name: str) -> Any:
    homes = (operator, torch, Tensor)
    found = [getattr(home, name) for home in homes if callable(getattr(home, name, None))]
    if found:
        return found[0]
    reflected = getattr(operator, name[1:])  # as in rsub
    return lambda a, b: reflected(b, a)
