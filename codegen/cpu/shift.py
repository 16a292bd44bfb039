"""Whether a mask looks the same from tile to tile: a proof, not a sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from sparse_compile.expr import MaskExpr, fold
from sparse_compile.expr.fold import COMPARISONS


@dataclass(frozen=True)
class _Growth:
    """What is known of an expression when ``q`` and ``kv`` advance by constant steps.

    Attributes:
        step: how much it grows at each step, the same everywhere; None: not known to be constant.
            For a Boolean, 0 says that its value stays as it is.
        value: the value of an integer constant.
    """

    step: int | None
    value: int | None = None


_STILL, _UNKNOWN = _Growth(0), _Growth(None)


class _Shift:
    """The algebra of growth."""

    def __init__(self, q_step: int, kv_step: int) -> None:
        self.steps = {"q": q_step, "kv": kv_step}

    def integer(self, value: int) -> _Growth:
        return _Growth(0, value)

    def boolean(self, value: bool) -> _Growth:
        return _STILL

    def symbol(self, name: str) -> _Growth:
        return _Growth(self.steps.get(name, 0))

    def table(self, index: int, args: Sequence[_Growth], exprs: Sequence[sympy.Expr]) -> _Growth:
        return _if_still(args)

    def operation(self, name: str, args: Sequence[_Growth], expr: sympy.Basic) -> _Growth:
        if name in ("min", "max"):
            return _if_together(args)
        if name == "where":
            return _if_together(args[1:]) if args[0].step == 0 else _UNKNOWN
        if name in COMPARISONS:
            return _UNKNOWN if _if_together(args) == _UNKNOWN else _STILL
        return _ARITHMETIC[name](args) if name in _ARITHMETIC else _if_still(args)


def _sum(args: Sequence[_Growth]) -> _Growth:
    known = [arg.step for arg in args if arg.step is not None]
    return _Growth(sum(known)) if len(known) == len(args) else _UNKNOWN


def _product(args: Sequence[_Growth]) -> _Growth:
    factor = math.prod(arg.value for arg in args if arg.value is not None)
    others = [arg for arg in args if arg.value is None]
    if len(others) == 1 and others[0].step is not None:
        return _Growth(factor * others[0].step)
    return _if_still(args)


def _quotient(args: Sequence[_Growth]) -> _Growth:
    a, b = args
    if _remainder(args) == _UNKNOWN or a.step is None:
        return _UNKNOWN
    return _Growth(a.step // b.value) if b.value else _STILL


def _remainder(args: Sequence[_Growth]) -> _Growth:
    a, b = args
    whole = b.value and a.step is not None and a.step % b.value == 0
    return _STILL if whole else _if_still(args)


_ARITHMETIC = {"+": _sum, "*": _product, "//": _quotient, "%": _remainder}


def _if_together(args: Sequence[_Growth]) -> _Growth:
    steps = {arg.step for arg in args}
    return _Growth(steps.pop()) if len(steps) == 1 else _UNKNOWN


def _if_still(args: Sequence[_Growth]) -> _Growth:
    return _STILL if all(arg.step == 0 for arg in args) else _UNKNOWN


@functools.lru_cache(maxsize=1024)
def is_shift_invariant(mask: MaskExpr, q_step: int, kv_step: int) -> bool:
    """Whether ``mask(q + q_step, kv + kv_step) == mask(q, kv)`` is certain everywhere.

    >>> from sparse_compile.expr import KV, Q, FloorMod, MaskExpr
    >>> causal, strided = MaskExpr(KV <= Q), MaskExpr(sympy.Eq(FloorMod(Q - KV, 4), 0))
    >>> [is_shift_invariant(causal, 32, step) for step in (32, 0)]
    [True, False]
    >>> [is_shift_invariant(strided, 32, step) for step in (8, 2)]
    [True, False]
    """
    return fold(mask.predicate, _Shift(q_step, kv_step)).step == 0
