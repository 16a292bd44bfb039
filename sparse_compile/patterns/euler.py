"""Trees of tokens by their parents: Euler tours and ancestors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_compile.patterns.checks import bad, whole
from sparse_compile.patterns.data import is_tensor


def euler_tour(where: str, parents: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """When a tour enters each node, and when it has entered the last of those below it.

    Args:
        where: whose tree it is, for errors.
        parents: of each node; -1 for a root.

    >>> euler_tour("PrefixTree", (-1, 0, 0, 1))
    ((0, 1, 3, 2), (4, 3, 4, 3))
    """
    children: list[list[int]] = [[] for _ in parents]
    waiting: list[int] = []
    for node, parent in enumerate(parents):
        _check_parent(where, node, parent, len(parents))
        (waiting if parent < 0 else children[parent]).append(node)
    waiting.reverse()
    order = []
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(children[order[-1]])
    if len(order) < len(parents):
        lost = min({*range(len(parents))} - {*order})
        raise bad(f"{where}: token {lost} is below itself", "Every token must lead to a root, -1.")
    tin, tout = [0] * len(order), [0] * len(order)
    for time, node in enumerate(order):
        tin[node] = time
    for node in reversed(order):
        tout[node] = max([tin[node] + 1, *(tout[child] for child in children[node])])
    return tuple(tin), tuple(tout)


def parents_of_segments(lengths: Sequence[int], parents: Sequence[int]) -> tuple[int, ...]:
    """The parent of each token of segments that stand one by one, and continue each other.

    >>> parents_of_segments((2, 1, 2), (-1, 0, 0))
    (-1, 0, 1, 1, 3)
    """
    where = "PrefixTree: a segment"
    if len(lengths) != len(parents):
        raise bad(
            f"PrefixTree: {len(lengths)} lengths and {len(parents)} parents of segments",
            "Write one of each for every segment.",
        )
    ends, end = [], 0
    for length in lengths:
        end += whole(f"{where} length", length, 1)
        ends.append(end)
    found = []
    for segment, (parent, end) in enumerate(zip(parents, ends, strict=True)):
        _check_parent(where, segment, parent, len(ends))
        first = end - lengths[segment]
        found += [ends[parent] - 1 if parent >= 0 else -1, *range(first, end - 1)]
    return tuple(found)


def ancestors(where: str, parents: Any) -> Any:
    """Who is an ancestor of whom, or the same, [..., nodes, nodes].

    Args:
        where: whose tree it is, for errors.
        parents: of each node, -1 for a root; [nodes] or [batch, nodes]: a tensor of parents that
            may stand anywhere, or tuples.

    >>> ancestors("DraftTree", (-1, 0, 0, 1))
    ((1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1))
    """
    if is_tensor(parents):
        return _ancestors_on_device(parents)
    if not isinstance(parents[0], int):
        return tuple(ancestors(where, row) for row in parents)
    tin, tout = euler_tour(where, parents)
    nodes = range(len(parents))
    return tuple(tuple(int(tin[a] <= tin[n] < tout[a]) for a in nodes) for n in nodes)


def _ancestors_on_device(parents: Any) -> Any:
    """Twice as far up in each step, without asking how deep the tree is."""
    import torch

    nodes = torch.arange(parents.shape[-1], device=parents.device)
    up = (parents[..., None] == nodes) | (nodes[:, None] == nodes)
    for _ in range((parents.shape[-1] - 1).bit_length()):
        # In floating point, since a GPU multiplies no integers; counts do not matter.
        up = (up.float() @ up.float()) > 0
    return up


def _check_parent(where: str, node: int, parent: int, count: int) -> None:
    if not -1 <= parent < count or parent == node:
        raise bad(
            f"{where}: the parent of {node} is {parent}", f"Write -1 for none, or below {count}."
        )
