"""Numbers that a graph spells as constant tensors."""

from __future__ import annotations

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, op_name, source
from sparse_compile.passes.find.dataflow import Dataflow

_FILLED = {"tensor": 0, "as_tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1}
"""Functions that make a tensor of one value, and the position of that value."""


def constant(value: object, flow: Dataflow) -> float | None:
    """The number behind a Python number, a static symbol or a constant tensor in the graph.

    Constant tensors are ``torch.tensor(-1e9)``, ``torch.full([], x)``, ``torch.full_like(y, x)``,
    and casts and square roots of those, never changed in place. The number is rounded to the
    tensor's dtype. None if the value is known at run time only.
    """
    known = values.number(value)
    here = values.tensor(value)
    if known is not None or here is None or not isinstance(value, Node) or flow.is_mutated(value):
        return known
    position = _FILLED.get(op_name(value)) if value.op == "call_function" else None
    if position is None:
        known = _derived(value, flow)
    elif len(value.args) > position:
        known = values.number(value.args[position])
    else:
        known = values.number(value.kwargs.get("fill_value"))
    return None if known is None else float(torch.tensor(known, dtype=torch.float64).to(here.dtype))


def _derived(node: Node, flow: Dataflow) -> float | None:
    call, start = canonical(node), source(node)
    inner = None if start is None else constant(start, flow)
    if inner is None:
        return None
    if call is not None and call.op in ("cast", "copy"):
        return inner
    if op_name(node) == "sqrt" and inner >= 0:
        return float(inner**0.5)
    if op_name(node) == "rsqrt" and inner > 0:
        return float(inner**-0.5)
    return None
