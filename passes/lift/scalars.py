"""What elementwise ATen operators mean for one element.

Constants are computed by running the operator itself on 0-dim tensors, so that rounding, overflow
and infinities are the program's own. Symbolic integers follow the rules below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._ops import OpOverload

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.passes.lift.value import (
    ABSORBING,
    Case,
    Element,
    Lifted,
    Number,
    Unliftable,
    Value,
    combinations,
    either,
    merged,
    truth,
)

#: Result of a rule: a value, or for comparisons a Boolean.
Result = Any
Rule = Callable[..., Result]

#: Dtypes whose arithmetic is exact for the integers that positions and sizes are.
_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


def elementwise(
    op: OpOverload, args: Sequence[Lifted | Value], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> Element:
    """The element of ``op(*args)``; tensor arguments are aligned to the result's dimensions."""
    name = op._schema.name.split("::")[1]
    if dtype == torch.bool and name in _LOGIC:
        conditions = (cast(a, torch.bool) if isinstance(a, Lifted) else truth(a) for a in args)
        return _LOGIC[name](*conditions)
    if any(isinstance(arg, Lifted) and arg.is_float_data for arg in args):
        if name != "add" or kwargs.get("alpha", 1) != 1:
            raise Unliftable("it computes with floating data")
        return _masked_data(op, args, dtype)
    cases = [arg.cases if isinstance(arg, Lifted) else ((sympy.true, arg),) for arg in args]
    dtypes = tuple(arg.dtype if isinstance(arg, Lifted) else None for arg in args)
    results = [
        (condition, _apply(op, name, values, dtypes, kwargs, dtype))
        for condition, values in combinations(cases)
    ]
    if dtype == torch.bool:
        return sympy.Or(*(sympy.And(c, _as_condition(v)) for c, v in results))
    return merged(results)


def _masked_data(op: OpOverload, args: Sequence[Lifted | Value], dtype: torch.dtype) -> Element:
    """Floating data to which a mask is added: 0, or what absorbs it."""
    data, mask = sorted(args, key=lambda a: not (isinstance(a, Lifted) and a.is_float_data))
    if not isinstance(data, Lifted) or not isinstance(mask, Lifted) or mask.is_float_data:
        raise Unliftable("it computes with floating data")
    if data.dtype != dtype:
        raise Unliftable("it converts floating data")
    results: list[Case] = []
    for condition, (number, value) in combinations([cast(mask, dtype), data.cases]):
        if isinstance(number, sympy.Basic) or not (number == 0 or number <= ABSORBING):
            raise Unliftable("it computes with floating data")
        if not isinstance(value, sympy.Basic):
            value = run(op, (value, number), (dtype, dtype), {})
        elif number != 0:
            value = number
        results.append((condition, value))
    return merged(results)


def cast(tensor: Lifted, dtype: torch.dtype) -> Element:
    """The element of ``tensor.to(dtype)``."""
    if dtype == tensor.dtype:
        return tensor.element
    if tensor.is_float_data:
        raise Unliftable("it converts floating data")
    if dtype == torch.bool:
        return sympy.Or(*(sympy.And(c, truth(v)) for c, v in tensor.cases))
    return merged((c, cast_value(v, tensor.dtype, dtype)) for c, v in tensor.cases)


def cast_value(value: Value, source: torch.dtype, target: torch.dtype) -> Value:
    """One value converted as ``to`` does."""
    if not isinstance(value, sympy.Basic):
        return torch.tensor(value, dtype=source).to(target).item()
    _require_exact(target)
    return value


def _as_condition(result: Result) -> sympy.Basic:
    if isinstance(result, (bool, int, float)):
        return sympy.true if result else sympy.false
    return result


def _apply(
    op: OpOverload,
    name: str,
    values: tuple[Value, ...],
    dtypes: tuple[torch.dtype | None, ...],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
) -> Result:
    constant = not any(isinstance(v, sympy.Basic) for v in (*values, *kwargs.values()))
    if constant:
        return run(op, values, dtypes, kwargs)
    number = absorbing(name, values, dtypes, kwargs, dtype)
    if number is not None:
        return number
    rule = RULES.get(name)
    if rule is None:
        raise Unliftable(f"{op} of positions has no rule")
    if dtype != torch.bool:
        _require_exact(dtype)
    if dtype == torch.float32 and name == "mul" and all(isinstance(v, sympy.Basic) for v in values):
        raise Unliftable("float32 does not hold products of positions exactly")
    return rule(*(_whole(value) for value in values), **kwargs)


def absorbing(
    name: str,
    values: Sequence[Value],
    dtypes: Sequence[torch.dtype | None],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
) -> Number | None:
    """The sum of two values of which one is a number that absorbs the other; None: it does not.

    Args:
        name: of the operator.
        values: its arguments.
        dtypes: of these.
        kwargs: its other arguments.
        dtype: that it computes in.
    """
    if name != "add" or kwargs.get("alpha", 1) != 1 or not dtype.is_floating_point:
        return None
    for (own, other), kind in ((values, dtypes[1]), (values[::-1], dtypes[0])):
        if isinstance(own, sympy.Basic) or not isinstance(other, sympy.Basic):
            continue
        number, most = torch.tensor(own, dtype=dtype), _largest(other, kind)
        absorbed = bool(number - most == number) and bool(number + most == number)
        if number <= ABSORBING and absorbed:
            known: Number = number.item()
            return known
    return None


def _largest(value: sympy.Basic, dtype: torch.dtype | None) -> float:
    """More than a value ever is; of floating data, which is scores, what is absorbed anyway."""
    most = 2.0**63
    if dtype is None or not dtype.is_floating_point:
        return most
    lookups = value.atoms(sympy.core.function.AppliedUndef)
    if any(str(lookup.func.__name__)[0] == "f" for lookup in lookups):
        return 0.0
    if value.has(sympy.Pow):
        return math.inf
    # Whole numbers in fp32, which do not overflow: each is a sum of products of one of int64.
    numbers = [float(min(abs(int(n)), 1 << 200)) for n in value.atoms(sympy.Integer) if n != 0]
    return most * len(list(sympy.preorder_traversal(value))) * math.prod(numbers)


def _require_exact(dtype: torch.dtype) -> None:
    if dtype not in _EXACT:
        raise Unliftable(f"{dtype} does not hold positions exactly")


def run(
    op: OpOverload,
    values: tuple[Number, ...],
    dtypes: tuple[torch.dtype | None, ...],
    kwargs: Mapping[str, Any],
) -> Number:
    """The result of an operator for numbers, which are of tensors where they have a dtype."""
    args = [
        value if dtype is None else torch.tensor(value, dtype=dtype)
        for value, dtype in zip(values, dtypes, strict=True)
    ]
    try:
        result: Number = op(*args, **kwargs).item()
    except RuntimeError as error:
        raise Unliftable(f"{op} of {values} fails: {error}") from error
    return result


def _whole(value: Value) -> Value:
    """A float that is a whole number as an int, so that integer rules apply."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, bool) else value


def _integers(*values: Value) -> None:
    for value in values:
        if isinstance(value, float):
            raise Unliftable(f"it mixes positions with the fraction {value}")


def _linear(rule: Rule) -> Rule:
    def checked(*values: Value, **kwargs: Any) -> Result:
        _integers(*values)
        return rule(*values, **kwargs)

    return checked


def _mul(a: Value, b: Value) -> Result:
    if 0 in (a, b):
        return 0
    _integers(a, b)
    return a * b


def _floor_division(a: Value, b: Value) -> Result:
    if b == 0:
        raise Unliftable("it divides by zero")
    return FloorDiv(sympy.sympify(a), sympy.sympify(b))


def _rounded_division(a: Value, b: Value, rounding_mode: str | None = None) -> Result:
    if rounding_mode == "floor" or (rounding_mode == "trunc" and _not_negative(a, b)):
        return _floor_division(a, b)
    if b in (1, -1):
        return a * b
    raise Unliftable("it divides positions with a fraction as the result")


def _not_negative(a: Value, b: Value) -> bool:
    return bool(sympy.sympify(a).is_nonnegative and sympy.sympify(b).is_positive)


def _truncated_remainder(a: Value, b: Value) -> Result:
    if not _not_negative(a, b):
        raise Unliftable("fmod of a possibly negative position")
    return FloorMod(sympy.sympify(a), sympy.sympify(b))


def _clamp(a: Value, low: Value | None = None, high: Value | None = None, **named: Value) -> Result:
    low, high = named.get("min", low), named.get("max", high)
    _integers(*(v for v in (a, low, high) if v is not None))
    result = a if low is None else sympy.Max(a, low)
    return result if high is None else sympy.Min(result, high)


def _power(a: Value, exponent: Value) -> Result:
    if exponent not in (0, 1, 2, 3):
        raise Unliftable("it raises positions to a power")
    return a**exponent


def _two_to(bits: Value) -> int:
    if not isinstance(bits, int) or not 0 <= bits < 63:
        raise Unliftable("it shifts by a position")
    return 1 << bits


def _shift_right(a: Value, bits: Value) -> Result:
    return FloorDiv(sympy.sympify(a), sympy.Integer(_two_to(bits)))


def _shift_left(a: Value, bits: Value) -> Result:
    return a * _two_to(bits)


def _low_bits(a: Value, b: Value) -> Result:
    number, pattern = (a, b) if isinstance(b, int) else (b, a)
    if not isinstance(pattern, int) or pattern < 0 or (pattern & (pattern + 1)):
        raise Unliftable("a bitwise operation on positions")
    return FloorMod(sympy.sympify(number), sympy.Integer(pattern + 1))


_COMPARE = {name: getattr(sympy, name.title()) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_MIRROR = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def _compare(name: str, a: Value, b: Value) -> sympy.Basic:
    if isinstance(a, float):
        return _compare(_MIRROR[name], b, a)
    if not isinstance(b, float):
        return _COMPARE[name](a, b)
    # An integer against a fraction or an infinity.
    if math.isnan(b) or name in ("eq", "ne"):
        return sympy.true if name == "ne" else sympy.false
    if math.isinf(b):
        return sympy.true if (b > 0) == (name in ("lt", "le")) else sympy.false
    if name in ("lt", "le"):
        return sympy.Le(a, math.floor(b))
    return sympy.Ge(a, math.ceil(b))


def _same(a: Value, **kwargs: Any) -> Result:
    return a


RULES: dict[str, Rule] = {
    "add": _linear(lambda a, b, alpha=1: a + alpha * b),
    "sub": _linear(lambda a, b, alpha=1: a - alpha * b),
    "rsub": _linear(lambda a, b, alpha=1: b - alpha * a),
    "mul": _mul,
    "neg": _linear(lambda a: -a),
    "abs": _linear(lambda a: sympy.Abs(a)),
    "minimum": _linear(lambda a, b: sympy.Min(a, b)),
    "maximum": _linear(lambda a, b: sympy.Max(a, b)),
    "clamp": _clamp,
    "clamp_min": _linear(lambda a, low: sympy.Max(a, low)),
    "clamp_max": _linear(lambda a, high: sympy.Min(a, high)),
    "relu": _linear(lambda a: sympy.Max(a, 0)),
    "floor_divide": _linear(_floor_division),
    "div": _linear(_rounded_division),
    "remainder": _linear(lambda a, b: FloorMod(sympy.sympify(a), sympy.sympify(b))),
    "fmod": _linear(_truncated_remainder),
    "pow": _linear(_power),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), _linear(_shift_right)),
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), _linear(_shift_left)),
    "bitwise_and": _linear(_low_bits),
    **dict.fromkeys(("floor", "ceil", "trunc", "round"), _same),
    **dict.fromkeys(("isnan", "isinf"), lambda a: sympy.false),
    **{name: functools.partial(_compare, name) for name in _COMPARE},
}

_JUNCTIONS: dict[str, Callable[..., sympy.Basic]] = {
    "and": sympy.And,
    "or": sympy.Or,
    "xor": lambda a, b: either(a, sympy.Not(b), b),
    "not": sympy.Not,
}
_LOGIC = {f"{kind}_{name}": f for kind in ("bitwise", "logical") for name, f in _JUNCTIONS.items()}
