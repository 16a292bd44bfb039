"""Elements that are known in some cases only, and elsewhere are what the program computes.

``(1 - m) * min`` in half precision hides keys if m is 0 or 1; other integers need not be what they
were. A bias to which a mask is added is hidden where that absorbs it, and where not, it is a sum
that may have been rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._ops import OpOverload

from sparse_compile.passes.lift.scalars import absorbing, cast_value, run
from sparse_compile.passes.lift.value import (
    ABSORBING,
    Case,
    Cases,
    Element,
    Lifted,
    Unliftable,
    Value,
    combinations,
    merged,
)


def elementwise_partly(
    op: OpOverload,
    args: Sequence[Lifted | Value],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    own: Cases,
) -> Element:
    """The element of ``op(*args)`` where it follows from numbers.

    Args:
        op: the operator.
        args: its arguments; tensors are aligned to the result's dimensions.
        kwargs: its other arguments.
        dtype: of the result.
        own: the element as it is computed, which it is elsewhere.

    Raises:
        Unliftable: that is everywhere.
    """
    name = op._schema.name.split("::")[1]
    cases = [arg.cases if isinstance(arg, Lifted) else ((sympy.true, arg),) for arg in args]
    if not any(map(_is_mixed, cases)) and not any(map(_may_absorb, cases)):
        raise Unliftable("nothing is known of its element")
    dtypes = tuple(arg.dtype if isinstance(arg, Lifted) else None for arg in args)
    found: list[Case] = []
    for condition, values in combinations(cases):
        known: Value | None
        if any(isinstance(value, sympy.Basic) for value in values):
            known = absorbing(name, values, dtypes, kwargs, dtype)
        else:
            known = run(op, values, dtypes, kwargs)
        found.append((condition, own[0][1] if known is None else known))
    return _known(found)


def cast_partly(tensor: Lifted, dtype: torch.dtype, own: Cases) -> Element:
    """The element of ``tensor.to(dtype)`` where it is a number, or an integer that is 0 or 1.

    Raises:
        Unliftable: it is ``own`` everywhere.
    """
    found: list[Case] = []
    for condition, value in tensor.cases:
        if not isinstance(value, sympy.Basic):
            found.append((condition, cast_value(value, tensor.dtype, dtype)))
            continue
        bits = () if tensor.dtype.is_floating_point else (0, 1)
        for bit in bits:
            found.append((sympy.And(condition, sympy.Eq(value, bit)), float(bit)))
        rest = (sympy.Ne(value, bit) for bit in bits)
        found.append((sympy.And(condition, *rest), own[0][1]))
    return _known(found)


def _is_mixed(cases: Cases) -> bool:
    """Whether an element is known in some cases, and data in others."""
    return len({isinstance(value, sympy.Basic) for _, value in cases}) > 1


def _may_absorb(cases: Cases) -> bool:
    return any(not isinstance(value, sympy.Basic) and value <= ABSORBING for _, value in cases)


def _known(cases: Sequence[Case]) -> Element:
    if all(isinstance(value, sympy.Basic) for _, value in cases):
        raise Unliftable("nothing is known of its element")
    return merged(cases)
