"""Who overwrites which tensor, and who sees it: FX edges alone do not show mutation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, op_name
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.passes.mutation import Memory, memory_of
from sparse_compile.sites.site import Scope


def dataflow_of(scope: Scope) -> Dataflow:
    """The data flow of a scope's graph, knowing which of its inputs share memory outside."""
    return Dataflow(memory_of(scope))


class Dataflow:
    """Who sees which value of a graph's tensors. The graph must not change meanwhile."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.position = memory, memory.position
        self.stays, self.is_mutated = memory.stays, memory.is_written

    def current(self, node: Node, reader: Node) -> Node:
        """The node whose value ``reader`` sees in ``node``: itself, or its last in-place update.

        Raises:
            Refusal: only a part or a view of the tensor was overwritten.
        """
        last = None
        for mutation, target in self.memory.writes(node):
            if self.position[node] < self.position[mutation] < self.position[reader]:
                last = mutation, target
        if last is None:
            return node
        mutation, target = last
        call = canonical(mutation)
        if call is None or not call.in_place or not _same_memory(node, target):
            raise Refusal(
                f"the attention scores or weights are overwritten in part ({op_name(mutation)})",
                "use torch.where or masked_fill on the scores, before the softmax",
            )
        return mutation

    def in_order(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The distinct nodes, in graph order."""
        return tuple(sorted(set(nodes), key=self.position.__getitem__))

    def between(self, first: Node, last: Node) -> Iterator[Node]:
        """The nodes strictly between two nodes."""
        node = first.next
        while node is not last:
            yield node
            node = node.next


def _same_memory(a: Node, b: Node) -> bool:
    x, y = values.tensor(a), values.tensor(b)
    if x is None or y is None or x.dtype != y.dtype:
        return False
    return all(
        values.same_shape(tuple(p), tuple(q))
        for p, q in ((x.shape, y.shape), (x.stride(), y.stride()))
    ) and values.same(x.storage_offset(), y.storage_offset())
