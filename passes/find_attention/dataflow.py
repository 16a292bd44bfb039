"""Who overwrites which tensor, and who sees it: FX edges alone do not show mutation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Graph, Node

from sparse_compile.passes.find_attention import values
from sparse_compile.passes.find_attention.canonical import (
    canonical,
    is_expand,
    is_reshape,
    op_name,
    permutation,
    source,
)
from sparse_compile.passes.find_attention.refusal import Refusal
from sparse_compile.passes.mutation import written_inputs
from sparse_compile.site import Scope


def dataflow_of(scope: Scope) -> Dataflow:
    """The data flow of a scope's graph, knowing which of its inputs share memory outside."""
    if scope.parent is None:
        return Dataflow(scope.gm.graph)
    inner = [node for node in scope.gm.graph.nodes if node.op == "placeholder"]
    pairs = dataflow_of(scope.parent).share_memory(scope.inputs)
    return Dataflow(scope.gm.graph, [(inner[a], inner[b]) for a, b in pairs])


class Dataflow:
    """Positions, aliases and mutations of one graph. The graph must not change meanwhile."""

    def __init__(self, graph: Graph, aliases: Iterable[tuple[Node, Node]] = ()) -> None:
        """Read the graph once. ``aliases``: nodes known from outside to share memory."""
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._root = _alias_roots(graph, aliases)
        self._mutations: dict[object, list[tuple[Node, Node]]] = {}
        for node in graph.nodes:
            for target in written_inputs(node):
                self._mutations.setdefault(self._root[target], []).append((node, target))

    def current(self, node: Node, reader: Node) -> Node:
        """The node whose value ``reader`` sees in ``node``: itself, or its last in-place update.

        Raises:
            Refusal: only a part or a view of the tensor was overwritten.
        """
        last = None
        for mutation, target in self._mutations.get(self._root[node], ()):
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

    def stays(self, node: Node, since: Node, until: Node) -> bool:
        """Whether nothing overwrites ``node`` after ``since`` ran and before ``until`` runs."""
        return not any(
            self.position[since] < self.position[mutation] < self.position[until]
            for mutation, _ in self._mutations.get(self._root[node], ())
        )

    def is_mutated(self, node: Node) -> bool:
        """Whether anything in the graph overwrites memory that ``node`` may share."""
        return self._root[node] in self._mutations

    def share_memory(self, nodes: tuple[Node, ...]) -> list[tuple[int, int]]:
        """The positions, in ``nodes``, of pairs that may share memory."""
        first: dict[object, int] = {}
        pairs = [(first.setdefault(self._root[node], i), i) for i, node in enumerate(nodes)]
        return [(a, b) for a, b in pairs if a != b]

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


def _alias_roots(graph: Graph, aliases: Iterable[tuple[Node, Node]] = ()) -> dict[Node, object]:
    """A label per node, equal for nodes that may share memory."""
    parent: dict[object, object] = {}

    def find(key: object) -> object:
        while (up := parent.get(key, key)) != key:
            parent[key] = parent.get(up, up)
            key = parent[key]
        return key

    def unite(a: object, b: object) -> None:
        a, b = find(a), find(b)
        if a != b:
            parent[a] = b

    for first, second in aliases:
        unite(first, second)
    for node in graph.nodes:
        storage = _storage(node)
        if storage is not None:
            unite(node, ("storage", storage))
        for start in _may_alias(node):
            unite(node, start)
    return {node: find(node) for node in graph.nodes}


def _storage(node: Node) -> int | None:
    """The address of a tensor's storage: the fake tensors of views share theirs."""
    example = values.tensor(node)
    try:
        return None if example is None else example.untyped_storage()._cdata
    except NotImplementedError:  # Tensors inside vmap have none.
        return None


def _may_alias(node: Node) -> Iterator[Node]:
    """Inputs whose memory the result may share although the fake tensors do not show it."""
    start = source(node) if node.op in ("call_function", "call_method") else None
    if start is None:
        return
    call = canonical(node)
    maybe = call is not None and call.op in ("cast", "copy", "dropout")
    if maybe or is_reshape(node) or is_expand(node) or permutation(node) is not None:
        yield start
    if op_name(node) in ("dropout", "detach", "select", "narrow", "getitem"):
        yield start
    yield from written_inputs(node)
