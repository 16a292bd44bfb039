"""Tensors of a traced graph that hold one number everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

#: Operators that fill a tensor with a number: the number, or a list of the position where it is.
_FILLS: dict[Any, int | list[int]] = {
    aten.full.default: [1],
    aten.full_like.default: [1],
    aten.new_full.default: [2],
    aten.scalar_tensor.default: [0],
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
}
_SAME = (
    *(aten.expand.default, aten.clone.default, aten.view.default, aten.detach.default),
    aten.lift_fresh_copy.default,
)


def number_in(value: Any) -> int | float | None:
    """The number that a tensor holds everywhere, None if it need not."""
    while isinstance(value, Node) and value.target in _SAME:
        value = value.args[0]
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Node) and value.op == "get_attr":
        return _constant(getattr(value.graph.owning_module, str(value.target), None))
    if not isinstance(value, Node) or value.target not in _FILLS:
        return None
    fill = _FILLS[value.target]
    number = value.args[fill[0]] if isinstance(fill, list) else fill
    return number if isinstance(number, (bool, int, float)) else None


def _constant(tensor: object) -> int | float | None:
    """The number of a tensor that tracing made of one."""
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or tensor.device.type != "cpu":
        return None
    number: int | float = tensor.item()
    return number
