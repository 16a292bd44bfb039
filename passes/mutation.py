"""Which nodes of a Dynamo graph share memory, and which write to it: FX edges show neither."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_DUNDERS = (
    "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem"
)
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in (*_DUNDERS.split(), "iconcat", "delitem")
)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in (*_DUNDERS.split(), "delitem"))


def written_inputs(node: Node) -> tuple[Node, ...]:
    """The input nodes whose memory a node may write to.

    In doubt a node writes: a module call, or a higher-order body that cannot be looked into, may
    write to everything it is given.
    """
    if node.op == "call_module":
        return tuple(node.all_input_nodes)
    written: list[Any] = _flat(node.kwargs.get("out"))
    if node.op == "call_method":
        name = str(node.target)
        if name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__")):
            written.append(node.args[0])
    elif node.op == "call_function":
        written += _written_by_function(node)
    return tuple(arg for arg in written if isinstance(arg, Node))


def _written_by_function(node: Node) -> Iterable[Any]:
    target = node.target
    if target in _IN_PLACE_OPERATORS:
        return node.args[:1]
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written_by_schema(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_bodies(node)
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
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if len(node.args) < 2:
        return False
    names = _parameters(node.target)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


@functools.lru_cache(maxsize=1024)
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def bodies(node: Node) -> list[tuple[GraphModule, tuple[object, ...]]]:
    """The GraphModules that a node is called with, each with the arguments that follow it."""
    found: list[tuple[GraphModule, tuple[object, ...]]] = []
    for index, argument in enumerate(node.args):
        if isinstance(argument, Node) and argument.op == "get_attr":
            body = _attribute(argument)
            if isinstance(body, GraphModule):
                rest = [a for a in node.args[index + 1 :] if not isinstance(a, str)]
                found.append((body, tuple(rest)))
    return found


def _attribute(node: Node) -> object:
    owner: object = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    return owner


def _written_by_bodies(node: Node) -> Iterable[Any]:
    """The inputs that the bodies of a higher-order call write to."""
    written: list[Any] = []
    for body, inputs in bodies(node):
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        memory = Memory(body)
        touched = {memory.of(t) for n in body.graph.nodes for t in written_inputs(n)}
        hit = [memory.of(placeholder) in touched for placeholder in placeholders]
        if len(placeholders) == len(inputs):
            written += [arg for arg, is_hit in zip(inputs, hit, strict=True) if is_hit]
        elif any(hit):
            return node.all_input_nodes
    return written


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
