"""arranged: a tensor with its axes in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def arranged(method: Callable[..., T], tensor: T, axes: Sequence[str], wanted: Sequence[str]) -> T:
    """A tensor with the axes that are wanted, in their order; those of size one come and go.

    Args:
        method: calls a method of a tensor: its name, the tensor, the other arguments.
        tensor: a tensor, or a node that holds one.
        axes: the names of its axes; of those that are not wanted the size is one.
        wanted: the names of the axes of the result.

    >>> import torch
    >>> method = lambda name, tensor, *args: getattr(tensor, name)(*args)
    >>> arranged(method, torch.empty(2, 1, 3), "b1n", "nbhd").shape
    torch.Size([3, 2, 1, 1])
    """
    for dim in reversed([dim for dim, axis in enumerate(axes) if axis not in wanted]):
        tensor = method("squeeze", tensor, dim)
    kept = [axis for axis in axes if axis in wanted]
    order = [kept.index(axis) for axis in wanted if axis in kept]
    if order != sorted(order):
        tensor = method("permute", tensor, *order)
    for dim, axis in enumerate(wanted):
        if axis not in kept:
            tensor = method("unsqueeze", tensor, dim)
    return tensor
