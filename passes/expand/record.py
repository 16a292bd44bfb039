"""Writing a Python function down in a graph: each call of torch that it makes becomes a node.

The function runs once, on the example values of the nodes that it is given. What it asks about
shapes, dtypes and devices is answered at once; sizes that are known at run time only become nodes
when they are used.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sparse_compile.passes.graph_edit import Inserter, example_value
from sparse_compile.sites.site import Refused


def record(
    insert: Inserter, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """What a function returns for some arguments, as nodes that ``insert`` inserts.

    Args:
        insert: what inserts.
        function: it calls torch; Python decides by shapes, dtypes and numbers only.
        args, kwargs: its arguments; nodes stand for what they hold.

    Raises:
        Refused: it does something that has no node.
    """
    recorder = _Recorder(insert)
    for node in _nodes_in((args, kwargs)):
        recorder.know(node, example_value(node))
    given, named = map_arg((tuple(args), dict(kwargs)), example_value)
    with insert.fake_mode, recorder:
        result = function(*given, **named)
    return recorder.as_nodes(result)


def _nodes_in(values: Any) -> Iterator[Node]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Node))


class _Recorder(TorchFunctionMode):
    """Inserts a node for each function and method of torch that is called."""

    def __init__(self, insert: Inserter) -> None:
        super().__init__()
        self._insert = insert
        self._nodes: dict[int, Node] = {}
        self._kept: list[Any] = []  # so that no identity is used twice
        self._sizes: dict[sympy.Expr, Node] = {}

    def know(self, node: Node, value: Any) -> None:
        """A value is what a node holds."""
        self._kept.append(value)
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
        elif isinstance(value, (torch.SymInt, torch.SymFloat)):
            self._sizes.setdefault(value.node.expr, node)

    def as_nodes(self, values: Any) -> Any:
        """The same with nodes in the place of tensors and of sizes."""
        return map_aggregate(values, self._as_node)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__set__", "__setitem__", "__delitem__"):
            raise Refused("it writes to a part of a tensor")
        if name == "__get__":
            value = func(*args)
            if not _holds_tensor(value):
                return value
            func, args, kwargs = builtins.getattr, (args[0], func.__self__.__name__), {}
        node = self._called(func, self.as_nodes(args), self.as_nodes(kwargs))
        value = example_value(node)
        if not _holds_tensor(value):
            node.graph.erase_node(node)
            return value
        self._know_result(node, value)
        return value

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        name = getattr(func, "__name__", "")
        if getattr(torch.Tensor, name, None) is not func:
            return self._insert.call(func, *args, **kwargs)
        if name.startswith("__") and hasattr(operator, name):
            return self._insert.call(getattr(operator, name), *args, **kwargs)
        return self._insert.method(name, *args, **kwargs)

    def _know_result(self, node: Node, value: Any) -> None:
        self.know(node, value)
        if isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                if isinstance(item, Tensor):
                    self.know(self._insert.call(operator.getitem, node, index), item)

    def _as_node(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._nodes:
                raise Refused("it reads a tensor that is not among its arguments")
            return self._nodes[id(value)]
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self._number(value.node.expr)
        return value

    def _number(self, expr: sympy.Expr) -> Any:
        """A number that is known at run time only, made of sizes of tensors."""
        if expr.is_Integer:
            return int(expr)
        if expr in self._sizes:
            return self._sizes[expr]
        made = self._size(expr)
        if made is None and isinstance(expr, (sympy.Add, sympy.Mul)):
            call = operator.add if isinstance(expr, sympy.Add) else operator.mul
            made, *others = (self._number(part) for part in expr.args)
            for other in others:
                made = self._insert.call(call, made, other)
        if made is None:
            raise Refused(f"it computes the size {expr}, which is known only at run time")
        self._sizes[expr] = made
        return made

    def _size(self, expr: sympy.Expr) -> Node | None:
        for value in self._kept:
            sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    return self._insert.method("size", self._nodes[id(value)], dim)
        return None


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
