"""What the operators of Python and the functions of torch mean on symbolic integers and bools."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, Xnor

from sparse_compile.expr.nodes import FloorDiv, FloorMod
from sparse_compile.patterns.checks import bad


def is_truth(value: Any) -> bool:
    """Whether an expression is a truth value; symbols, which sympy takes for both, are not."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def integer(value: Any) -> Any:
    """A truth value as 0 or 1, an integer as it is."""
    if not isinstance(value, sympy.Basic):
        raise TypeError(f"{value!r} is no integer")
    if not is_truth(value):
        return value
    if value in (sympy.true, sympy.false):
        return sympy.Integer(int(bool(value)))
    return sympy.Piecewise((sympy.Integer(1), value), (sympy.Integer(0), True))


def truth(value: Any) -> Any:
    """An integer as whether it is not zero, a truth value as it is."""
    return value if is_truth(value) else sympy.Ne(integer(value), 0)


def _arithmetic(kind: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda a, b: kind(integer(a), integer(b))


def _reverse(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: operation(b, a)


def _of_both(logic: Callable[..., Any], kind: Callable[..., Any]) -> Callable[..., Any]:
    """``logic`` of two truth values, ``kind`` of anything else as integers."""

    def operation(a: Any, b: Any) -> Any:
        return logic(a, b) if is_truth(a) and is_truth(b) else kind(integer(a), integer(b))

    return operation


def _floordiv(a: Any, b: Any) -> Any:
    return FloorDiv(integer(a), _divisor(b))


def _mod(a: Any, b: Any) -> Any:
    return FloorMod(integer(a), _divisor(b))


def _divisor(b: Any) -> Any:
    if b == 0:
        raise bad("the mask function divides by zero", "Divide by another number.")
    return integer(b)


def _div(a: Any, b: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode != "floor":
        raise bad("the mask function divides with /", "Write // to stay with whole numbers.")
    return _floordiv(a, b)


def _and(a: Any, b: Any) -> Any:
    if is_truth(a) and is_truth(b):
        return sympy.And(a, b)
    a, b = (b, a) if integer(a).is_Integer else (a, b)
    mask = integer(b)
    if is_truth(a) or not mask.is_Integer or mask < 0 or int(mask) & (int(mask) + 1):
        raise bad("the mask function works on the bits of integers", "Write // and % instead.")
    return FloorMod(a, mask + 1)


def _of_truths(logic: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: logic(_bool_only(a), _bool_only(b))


def _bool_only(a: Any) -> Any:
    if not is_truth(a):
        raise bad(
            f"the mask function combines the integer {a} with | or ^",
            "Compare it first, as in != 0.",
        )
    return a


def _invert(a: Any) -> Any:
    return sympy.Not(a) if is_truth(a) else -integer(a) - 1


def _shift(a: Any, b: Any) -> Any:
    if not (isinstance(b, sympy.Integer) and b >= 0):
        raise bad("the mask function shifts bits by what is no constant", "Write // instead.")
    return sympy.Integer(2) ** b


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if is_truth(yes) and is_truth(no):
        return sympy.Or(
            sympy.And(truth(condition), yes), sympy.And(sympy.Not(truth(condition)), no)
        )
    return sympy.Piecewise((integer(yes), truth(condition)), (integer(no), True))


def _clamp(a: Any, min: Any = None, max: Any = None) -> Any:
    a = integer(a) if min is None else sympy.Max(integer(a), integer(min))
    return a if max is None else sympy.Min(a, integer(max))


def _logical(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: kind(*map(truth, args))


def _to(a: Any, *targets: Any, **options: Any) -> Any:
    for name in (str(target) for target in (*targets, *options.values())):
        if name == "torch.bool":
            return truth(a)
        if "float" in name or "complex" in name:
            raise bad(f"the mask function computes with {name}", "Use whole numbers only.")
        if name.startswith("torch.") and "int" in name:
            return integer(a)
    return a


def _constant(value: int) -> Callable[..., Any]:
    return lambda like, shape=(), dtype=None, device=None: _filled(value, shape, dtype)


def _full(like: Any, *shape_and_value: Any, dtype: Any = None, device: Any = None) -> Any:
    *shape, value = shape_and_value
    return _filled(value, shape[0] if shape else (), dtype)


def _filled(value: Any, shape: Any, dtype: Any) -> Any:
    if len(shape):
        raise bad(f"the mask function makes a tensor of {tuple(shape)}", "Make it outside.")
    return _to(sympy.sympify(value), *([] if dtype is None else [dtype]))


_BINARY: dict[str, Callable[..., Any]] = {
    "add": _of_both(sympy.Or, operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _of_both(sympy.And, operator.mul),
    "floordiv": _floordiv,
    "mod": _mod,
    "and": _and,
    "or": _of_truths(sympy.Or),
    "xor": _of_truths(sympy.Xor),
    "truediv": _div,
}

#: By the name of the operator without underscores, or of the torch function.
OPERATIONS: dict[str, Callable[..., Any]] = {
    **_BINARY,
    **{f"r{name}": _reverse(operation) for name, operation in _BINARY.items()},
    "lt": _arithmetic(sympy.Lt),
    "le": _arithmetic(sympy.Le),
    "gt": _arithmetic(sympy.Gt),
    "ge": _arithmetic(sympy.Ge),
    "eq": _of_both(Xnor, sympy.Eq),
    "ne": _of_both(sympy.Xor, sympy.Ne),
    "neg": lambda a: -integer(a),
    "pos": lambda a: a,
    "abs": lambda a: sympy.Abs(integer(a)),
    "invert": _invert,
    "lshift": lambda a, b: integer(a) * _shift(a, b),
    "rshift": lambda a, b: FloorDiv(integer(a), _shift(a, b)),
    "div": _div,
    "where": _where,
    "minimum": _arithmetic(sympy.Min),
    "maximum": _arithmetic(sympy.Max),
    "clamp": _clamp,
    "clamp_min": lambda a, min: _clamp(a, min),
    "clamp_max": lambda a, max: _clamp(a, None, max),
    "logical_and": _logical(sympy.And),
    "logical_or": _logical(sympy.Or),
    "logical_xor": _logical(sympy.Xor),
    "logical_not": _logical(sympy.Not),
    "to": _to,
    "bool": truth,
    "int": integer,
    "long": integer,
    "new_ones": _constant(1),
    "new_zeros": _constant(0),
    "new_full": _full,
    "ones_like": lambda like, dtype=None, device=None: _filled(1, (), dtype),
    "zeros_like": lambda like, dtype=None, device=None: _filled(0, (), dtype),
    "full_like": _full,
}
OPERATIONS |= {
    alias: OPERATIONS[name]
    for alias, name in {
        "absolute": "abs",
        "bitwise_and": "and",
        "bitwise_or": "or",
        "bitwise_xor": "xor",
        "bitwise_not": "invert",
        "clip": "clamp",
        "divide": "div",
        "floor_divide": "floordiv",
        "greater": "gt",
        "greater_equal": "ge",
        "less": "lt",
        "less_equal": "le",
        "max": "maximum",
        "min": "minimum",
        "multiply": "mul",
        "negative": "neg",
        "not_equal": "ne",
        "remainder": "mod",
        "subtract": "sub",
    }.items()
}
