"""Which nodes of a Dynamo graph share memory, and which write to it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
    ).split()
}
_IN_PLACE_METHODS = {
    f"__{name}__"
    for name in (
        "setitem iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
    ).split()
}


def written_inputs(node: Node, owner: GraphModule) -> tuple[Node, ...]:
    """The input nodes whose memory a node may write to.

    Args:
        node: a node of a Dynamo graph.
        owner: its graph module, to look into the bodies of higher-order calls.
    """
    if node.op == "call_module":
        return tuple(node.all_input_nodes)
    written: list[Any] = []
    if isinstance(node.kwargs.get("out"), (Node, list, tuple)):
        written += _flat(node.kwargs["out"])
    if node.op == "call_method":
        name = str(node.target)
        if name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__")):
            written.append(node.args[0])
    elif node.op == "call_function":
        written += _written_by_function(node, owner)
    return tuple(arg for arg in written if isinstance(arg, Node))


def _written_by_function(node: Node, owner: GraphModule) -> Iterable[Any]:
    target = node.target
    if target is operator.setitem or target in _IN_PLACE_OPERATORS:
        return node.args[:1]
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written_by_schema(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        writes = any(_body_writes(body) for body in _bodies(node, owner))
        return node.all_input_nodes if writes else ()
    name = getattr(target, "__name__", "")
    # torch.relu_ writes; operator.and_ only avoids a keyword.
    if name.endswith("_") and not name.endswith("__") and not hasattr(operator, name):
        return node.all_input_nodes[:1]
    return node.args[:1] if _asks_in_place(node) else ()


def _written_by_schema(node: Node) -> Iterable[Any]:
    target = node.target
    overloads = (
        [target]
        if isinstance(target, torch._ops.OpOverload)
        else [getattr(target, name) for name in target.overloads()]  # type: ignore[union-attr]
    )
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else None
            yield from _flat(node.kwargs.get(argument.name, given))


def _asks_in_place(node: Node) -> bool:
    """Whether a function such as ``F.relu`` is told ``inplace=True``."""
    if node.kwargs.get("inplace"):
        return True
    if len(node.args) < 2 or not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    if "inplace" not in names:
        return False
    position = names.index("inplace")
    return position < len(node.args) and bool(node.args[position])


def _bodies(node: Node, owner: GraphModule) -> Iterator[GraphModule]:
    for arg in node.all_input_nodes:
        if arg.op == "get_attr":
            body = getattr(owner, str(arg.target), None)
            if isinstance(body, GraphModule):
                yield body


def _body_writes(body: GraphModule) -> bool:
    """Whether a higher-order body may write to what it was given."""
    memory = Memory(body)
    given = {memory.of(node) for node in body.graph.nodes if node.op == "placeholder"}
    return any(
        memory.of(target) in given
        for node in body.graph.nodes
        for target in written_inputs(node, body)
    )


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Memory:
    """A partition of a graph's nodes by the memory their tensors may live in."""

    def __init__(self, gm: GraphModule) -> None:
        self._parent: dict[object, object] = {}
        for node in gm.graph.nodes:
            self._place(node)

    def of(self, node: Node) -> object:
        """A token that nodes which may share memory have in common."""
        return self._find(node)

    def _place(self, node: Node) -> None:
        storages = list(_storages(node.meta.get("example_value")))
        if None in storages:
            # What cannot be looked into is taken to share memory with all it was made from.
            for source in node.all_input_nodes:
                self._join(node, source)
        for storage in storages:
            if storage is not None:
                self._join(node, ("storage", storage))

    def _join(self, a: object, b: object) -> None:
        self._parent[self._find(a)] = self._find(b)

    def _find(self, item: object) -> object:
        path = []
        while self._parent.get(item, item) != item:
            path.append(item)
            item = self._parent[item]
        for seen in path:
            self._parent[seen] = item
        return item


def _storages(value: Any) -> Iterator[int | None]:
    """Identities of the storages of a value; None for a tensor that has none to show."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
    elif isinstance(value, torch.Tensor):
        try:
            # Two Python objects may stand for one storage; its address is what identifies it. Fake
            # tensors have no data address, so this is the address of the storage record.
            yield int(value.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            yield None
