"""Inserting nodes into a Dynamo graph so that everything downstream still believes in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.ops.fresh_size import unbound_sizes
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.site import AttentionSite

T = TypeVar("T")

#: Stands for a size that is only known when the graph runs.
_UNKNOWN = 4096


def example_value(node: Node) -> Any:
    """The fake tensor or symbolic integer that Dynamo recorded for a node."""
    return node.meta["example_value"]


def fake_mode_of(nodes: Iterable[Node]) -> Any:
    """The fake mode of the values of nodes.

    Raises:
        LookupError: none of them is a tensor.
    """
    for node in nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            return mode
    raise LookupError("no tensor is in it")


def dimension(operand: Operand, axis: str) -> int | torch.SymInt:
    """The size of an operand along one of its axes, or two that are one; one where it has none."""
    shape = example_value(operand.node).shape
    if axis in "bh" and "bh" in operand.axes:
        merged: int | torch.SymInt = operand.split["bh".index(axis)]
        return merged
    size: int | torch.SymInt = 1
    for name in (axis, f"{axis}1", f"{axis}2"):
        size = size * shape[operand.axes.index(name)] if name in operand.axes else size
    return size


def expected(operand: Operand, axis: str) -> int:
    """:func:`dimension` of the example that is compiled with."""
    size = dimension(operand, axis)
    if isinstance(size, torch.SymInt):
        hint = size.node.hint  # what the graph was captured with; None if nothing is known
        return _UNKNOWN if hint is None else int(hint)
    return int(size)


#: The axes of operands, from the outermost.
CANONICAL = ("b", "b1", "b2", "h", "h1", "h2", "n", "d")


class Inserter:
    """Appends nodes before an anchor node, each with the ``example_value`` torch.compile expects.

    Values are computed under the fake mode of the anchor's own value, or of what it reads: any
    other mode would not mix with the graph's, and nodes without a value make AOTAutograd's cache
    refuse the graph.
    """

    def __init__(self, gm: GraphModule, anchor: Node) -> None:
        self.gm, self.anchor = gm, anchor
        self.fake_mode = fake_mode_of((anchor, *anchor.all_input_nodes))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A ``call_function`` node."""
        return self._insert("call_function", target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """A ``call_method`` node on ``args[0]``."""
        return self._insert("call_method", name, args, kwargs)

    def length(self, operand: Operand, axis: str) -> int | Node:
        """Size of an operand along an axis, as :func:`dimension`."""
        known = dimension(operand, axis)
        if isinstance(known, int):
            return known
        if axis == "b" and "bh" in operand.axes:
            both = self.size(operand.node, operand.axes.index("bh"))
            return self.call(operator.floordiv, both, operand.split[1])
        names = [n for n in (axis, f"{axis}1", f"{axis}2") if n in operand.axes]
        first, *rest = (self.size(operand.node, operand.axes.index(name)) for name in names)
        for size in rest:
            first = self.call(operator.mul, first, size)
        return first

    def size(self, node: Node, dim: int) -> int | Node:
        """Size of a tensor node along ``dim``: an int where it is static, else a node."""
        size = example_value(node).shape[dim]
        return int(size) if isinstance(size, int) else self.method("size", node, dim)

    def _insert(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        with self.gm.graph.inserting_before(self.anchor):
            node = self.gm.graph.create_node(op, target, args, kwargs)
        fake_args = map_arg(args, example_value)
        fake_kwargs = map_arg(kwargs, example_value)
        # Dynamo has finished binding sizes that are only known at run time, as a layout's length;
        # AOTAutograd traces the graph anew and binds its own.
        with self.fake_mode, unbound_sizes(self.fake_mode):
            if op == "call_method":
                value = getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
            else:
                value = target(*fake_args, **fake_kwargs)
        node.meta["example_value"] = value
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        return node


def device_of(node: Node) -> torch.device:
    """The device of a tensor node."""
    device: torch.device = example_value(node).device
    return device


def first_reader(site: AttentionSite, *nodes: Node) -> Node:
    """The first node of an attention that reads one of some tensors, such as its masks.

    Writes to them after this do not count.
    """
    readers = {user for node in nodes for user in node.users}
    return min(readers.intersection(site.region), default=site.output.node)


def with_axes(method: Callable[..., T], tensor: T, axes: Sequence[str], wanted: Sequence[str]) -> T:
    """A tensor with the axes that are wanted, in their order; those of size one come and go.

    Args:
        method: calls a method of a tensor: its name, the tensor, the other argument.
        tensor: a tensor, or a node that holds one.
        axes: the names of its axes; of those that are not wanted the size is one.
        wanted: the names of the axes of the result.

    >>> import torch
    >>> method = lambda name, tensor, arg: getattr(tensor, name)(arg)
    >>> with_axes(method, torch.empty(2, 1, 3), "b1n", "nbhd").shape
    torch.Size([3, 2, 1, 1])
    """
    for dim in reversed([dim for dim, axis in enumerate(axes) if axis not in wanted]):
        tensor = method("squeeze", tensor, dim)
    kept = [axis for axis in axes if axis in wanted]
    order = [kept.index(axis) for axis in wanted if axis in kept]
    if order != sorted(order):
        tensor = method("permute", tensor, order)
    for dim, axis in enumerate(wanted):
        if axis not in kept:
            tensor = method("unsqueeze", tensor, dim)
    return tensor
