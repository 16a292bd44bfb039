"""What the functions of torch mean on scores: real numbers that may be minus infinity.

A ``score_mod`` may hide a pair by giving it a score of -inf. So a score is an expression, and
whether it is finite; the latter joins the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.errors import Inexpressible
from sparse_compile.expr.score import number
from sparse_compile.patterns.symbolic_ops import integer, is_truth, truth

_LN2 = number(math.log(2.0))


@dataclass(frozen=True)
class Real:
    """A real number.

    Attributes:
        value: what it is where it is finite.
        finite: a sympy Boolean; it is -inf elsewhere.
    """

    value: sympy.Expr
    finite: sympy.Basic = sympy.true


#: A score that is -inf.
HIDDEN = Real(sympy.S.Zero, sympy.false)


def real(value: Any) -> Real:
    """An operand as a real number: of Python, a whole number, a truth value, or one already."""
    if isinstance(value, Real):
        return value
    if isinstance(value, sympy.Basic):
        return Real(integer(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no real number")
    if value == -math.inf:
        return HIDDEN
    if not math.isfinite(value):
        raise Inexpressible(
            f"sparse_compile: a score_mod computes with {value}. Write -inf where it hides a pair, "
            "and finite numbers elsewhere."
        )
    return Real(number(value))


def _finite(*operands: Any) -> list[sympy.Expr]:
    """The values of operands that cannot be -inf."""
    found = [real(operand) for operand in operands]
    if any(one.finite != sympy.true for one in found):
        raise Inexpressible(
            "sparse_compile: a score_mod computes with a score that may be -inf. Hide pairs in "
            "mask_mod, or at the end: torch.where(keep, score, -float('inf'))."
        )
    return [one.value for one in found]


def _of(function: Callable[..., sympy.Expr]) -> Callable[..., Real]:
    """A function of finite numbers."""
    return lambda *operands: Real(function(*_finite(*operands)))


def _add(a: Any, b: Any, alpha: Any = 1) -> Real:
    (factor,) = _finite(alpha)
    a, b = real(a), real(b)
    if factor.is_negative:
        _finite(b)
    return Real(a.value + factor * b.value, sympy.And(a.finite, b.finite))


def _sub(a: Any, b: Any, alpha: Any = 1) -> Real:
    (factor,) = _finite(alpha)
    return _add(a, b, -factor if isinstance(factor, int) else Real(-factor))


def _mul(a: Any, b: Any) -> Real:
    a, b = real(a), real(b)
    for one, other in ((a, b), (b, a)):
        if one.finite != sympy.true and not other.value.is_positive:
            _finite(one)
    return Real(a.value * b.value, sympy.And(a.finite, b.finite))


def _div(a: Any, b: Any, rounding_mode: Any = None) -> Real:
    if rounding_mode is not None:
        raise TypeError(f"division with {rounding_mode=} of real numbers")
    (divisor,) = _finite(b)
    return _mul(a, Real(1 / divisor))


def _pow(a: Any, b: Any) -> Real:
    base, exponent = _finite(a, b)
    if exponent.is_Integer or exponent == sympy.Rational(1, 2) or exponent == 0.5:
        return Real(base ** (exponent if exponent.is_Integer else sympy.S.Half))
    if base.is_positive and base.is_Number:
        return Real(sympy.exp(exponent * number(math.log(float(base)))))
    raise TypeError("a power that is neither whole nor of a positive constant")


def where(condition: Any, yes: Any, no: Any) -> Real:
    """One of two numbers; a branch of -inf hides what takes it."""
    condition, yes, no = truth(condition), real(yes), real(no)
    finite = sympy.Or(sympy.And(condition, yes.finite), sympy.And(sympy.Not(condition), no.finite))
    if no.finite == sympy.false:
        return Real(yes.value, finite)
    if yes.finite == sympy.false:
        return Real(no.value, finite)
    return Real(sympy.Piecewise((yes.value, condition), (no.value, True)), finite)


def _clamp(a: Any, min: Any = None, max: Any = None) -> Real:
    (value,) = _finite(a)
    value = value if min is None else sympy.Max(value, *_finite(min))
    return Real(value if max is None else sympy.Min(value, *_finite(max)))


def _cast(a: Any, *targets: Any, **options: Any) -> Real:
    return real(a)


def _filled(like: Any, *shape_and_value: Any, dtype: Any = None, device: Any = None) -> Real:
    return real(shape_and_value[-1])


def _constant(value: int) -> Callable[..., Real]:
    return lambda like, size=(), dtype=None, device=None: Real(sympy.Integer(value))


def _sigmoid(x: sympy.Expr) -> sympy.Expr:
    # As a tanh, whose derivative does not overflow.
    return (1 + sympy.tanh(x / 2)) / 2


_UNARY: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "neg": lambda x: -x,
    "abs": sympy.Abs,
    "exp": sympy.exp,
    "exp2": lambda x: sympy.exp(x * _LN2),
    "log": sympy.log,
    "log2": lambda x: sympy.log(x) / _LN2,
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x**2,
    "tanh": sympy.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: sympy.Max(x, 0),
}

#: By the name of the operator without underscores, or of the torch function.
OPERATIONS: dict[str, Callable[..., Real]] = {
    **{name: _of(function) for name, function in _UNARY.items()},
    "pos": _cast,
    "add": _add,
    "radd": _add,
    "sub": _sub,
    "rsub": lambda a, b: _sub(b, a),
    "mul": _mul,
    "rmul": _mul,
    "truediv": _div,
    "rtruediv": lambda a, b: _div(b, a),
    "div": _div,
    "pow": _pow,
    "rpow": lambda a, b: _pow(b, a),
    "where": where,
    "masked_fill": lambda a, condition, value: where(condition, value, a),
    "minimum": _of(sympy.Min),
    "maximum": _of(sympy.Max),
    "clamp": _clamp,
    "clamp_min": lambda a, min: _clamp(a, min),
    "clamp_max": lambda a, max: _clamp(a, None, max),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as"), _cast),
    **dict.fromkeys(("clone", "detach", "contiguous"), _cast),
    "new_ones": _constant(1),
    "new_zeros": _constant(0),
    "ones_like": _constant(1),
    "zeros_like": _constant(0),
    "new_full": _filled,
    "full_like": _filled,
}
OPERATIONS |= {
    alias: OPERATIONS[name]
    for alias, name in {
        "absolute": "abs",
        "clip": "clamp",
        "divide": "div",
        "max": "maximum",
        "min": "minimum",
        "multiply": "mul",
        "negative": "neg",
        "subtract": "sub",
        "true_divide": "div",
    }.items()
}

COMPARISONS: dict[str, Any] = {
    **{"lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge},
    **{"eq": sympy.Eq, "ne": sympy.Ne},
}


#: Fractions with larger denominators are not computed exactly in single precision.
_FINEST = 1 << 16


def compared(name: str, a: Any, b: Any) -> sympy.Basic:
    """A comparison of real numbers, as a sympy Boolean; one of fractions of whole numbers as one
    of whole numbers.
    """
    left, right = _finite(a, b)
    left, right = (_exact(side) for side in (left, right))
    scale = math.lcm(*(int(x.q) for x in (left - right).atoms(sympy.Rational)))
    if scale > 1 and (left - right).is_polynomial(*(left - right).free_symbols):
        left, right = sympy.expand(scale * left), sympy.expand(scale * right)
    return COMPARISONS[name](left, right)


def _exact(value: sympy.Expr) -> sympy.Expr:
    """With fractions in the place of floating numbers that are some."""
    fractions = {x: sympy.Rational(float(x)) for x in value.atoms(sympy.Float)}
    return value.xreplace({x: f for x, f in fractions.items() if f.q <= _FINEST})


def is_real(value: Any) -> bool:
    """Whether an operand is no whole number and no truth value."""
    whole = isinstance(value, (int, sympy.Integer)) or is_truth(value)
    return isinstance(value, (Real, float)) and not whole
