"""What a reader sees in a node: who overwrote it, which FX edges do not show, or a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, op_name, source
from sparse_compile.passes.mutation import Memory
from sparse_compile.sites.site import Refused

_FILLED = {"tensor": 0, "as_tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1}
"""Functions that make a tensor of one value, and the position of that value."""


class Dataflow:
    """Who sees which value of a graph's tensors. The graph must not change meanwhile."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.position = memory, memory.position
        self.stays, self.is_mutated = memory.stays, memory.is_written

    def current(self, node: Node, reader: Node) -> Node:
        """The node whose value ``reader`` sees in ``node``: itself, or its last in-place update.

        Raises:
            Refused: only a part or a view of the tensor was overwritten.
        """
        last = None
        for mutation, target in self.memory.writes(node):
            if node < mutation < reader:
                last = mutation, target
        if last is None:
            return node
        mutation, target = last
        call = canonical(mutation)
        if call is None or not call.in_place or not _same_memory(node, target):
            raise Refused(
                f"the attention scores or weights are overwritten in part ({op_name(mutation)})",
                "use torch.where or masked_fill on the scores, before the softmax",
            )
        return mutation


def breadth_first(
    start: Node, following: Callable[[Node], Iterable[Node]], hops: int | None = None
) -> Iterator[Node]:
    """A node and those that are found from it, nearest first, each once.

    Args:
        start: the node.
        following: those that are found from a node at once.
        hops: how far away they are less than, if that matters.
    """
    level = dict.fromkeys([start])
    seen = set(level)
    while level and hops != 0:
        yield from level
        level = {n: None for node in level for n in following(node) if n not in seen}
        seen.update(level)
        hops = None if hops is None else hops - 1


def _same_memory(a: Node, b: Node) -> bool:
    x, y = values.tensor(a), values.tensor(b)
    if x is None or y is None or x.dtype != y.dtype:
        return False
    return all(
        values.same_shape(tuple(p), tuple(q))
        for p, q in ((x.shape, y.shape), (x.stride(), y.stride()))
    ) and values.same(x.storage_offset(), y.storage_offset())


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
