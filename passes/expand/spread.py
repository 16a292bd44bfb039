"""A function of one score, or of one pair, applied to all of them at once.

``flex_attention`` holds its ``score_mod`` and ``mask_mod`` as graphs over numbers: a score and the
places ``b, h, q, kv``. What is pointwise, or a lookup by such numbers, says the same of tensors
that are broadcast against each other; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.passes.expand.names import name_of
from sparse_compile.sites.site import Refused

_OPERATORS = frozenset(
    "add sub mul truediv floordiv mod pow neg pos abs and or xor invert lshift rshift lt le gt ge "
    "eq ne radd rsub rmul rtruediv rfloordiv rpow rand ror rxor".split()
)
_CONSTANTS = frozenset(
    "new_ones new_zeros new_full new_tensor ones_like zeros_like full_like tensor full ones zeros "
    "scalar_tensor".split()
)
_CASTS = frozenset(
    "to type type_as float double half bfloat16 int long short bool clone detach contiguous "
    "_to_copy".split()
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Spread:
    """A graph over numbers, of which each node is pointwise or a lookup.

    Attributes:
        body: the graph: numbers first, then tensors that it reads.
        dtypes: what each node is for a number.
    """

    body: GraphModule
    dtypes: Mapping[Node, torch.dtype]

    @staticmethod
    def of(body: GraphModule, numbers: Sequence[Tensor], given: Sequence[Tensor]) -> Spread:
        """Look at a graph.

        Args:
            body: the graph.
            numbers: its first arguments, without axes.
            given: the others.

        Raises:
            Refused: it does something else.
        """
        found = _Numbers(body)
        found.run(*numbers, *given)
        return Spread(body, found.dtypes)

    @property
    def output(self) -> Node:
        """The node of the result."""
        (end,) = self.body.graph.find_nodes(op="output")
        (result,) = end.args
        (result,) = result if isinstance(result, (tuple, list)) else (result,)
        if not isinstance(result, Node):
            raise Refused("its score_mod or mask_mod returns no tensor")
        return result

    @property
    def is_identity(self) -> bool:
        """Whether it returns its first argument."""
        return self.output is next(iter(self.body.graph.nodes))

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Apply it to tensors that broadcast against each other, and to those that it reads.

        Raises:
            Refused: a dtype is another one than that of a number would be.
        """
        values: dict[Node, Any] = {}
        left = list(arguments)
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                values[node] = left.pop(0)
            elif node.op != "output":
                values[node] = self._value(node, values)
        result = values[self.output]
        assert isinstance(result, Tensor)
        return result

    def _value(self, node: Node, values: Mapping[Node, Any]) -> Any:
        arguments: Any = map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = arguments
        if _is_lookup(node):
            rows, index = args
            table, before = (rows.table, rows.index) if isinstance(rows, _Rows) else (rows, ())
            whole = (*before, *_indices(index))
            value = table[whole] if len(whole) == table.dim() else _Rows(table, whole)
        else:
            value = _run(node, args, kwargs)
        if isinstance(value, Tensor) and value.dtype != self.dtypes[node]:
            raise Refused(f"`{name_of(node)}` of single numbers has another dtype than of tensors")
        return value


@dataclass(frozen=True)
class _Rows:
    """A table with some of its indices, from the left."""

    table: Tensor
    index: tuple[Any, ...]


class _Numbers(torch.fx.Interpreter):
    """Runs a graph on numbers, and checks what its nodes are."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__(body)
        self.dtypes: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        """The value of a node."""
        if n.op not in ("placeholder", "output"):
            _check(n)
        if _is_lookup(n):
            (table, index), _ = self.fetch_args_kwargs_from_env(n)
            value = table.new_empty(table.shape[len(_indices(index)) :])
        else:
            value = super().run_node(n)
        if n.op not in ("placeholder", "output"):
            self._check_numbers(n, value)
        return value

    def _check_numbers(self, node: Node, value: Any) -> None:
        taken = [] if _is_lookup(node) else [self.env[source] for source in node.all_input_nodes]
        for one in (value, *taken):
            if isinstance(one, Tensor) and one.dim() and not (one is value and _is_lookup(node)):
                raise Refused(
                    f"`{name_of(node)}` in its score_mod or mask_mod is more than a number"
                )
        if isinstance(value, Tensor):
            self.dtypes[node] = value.dtype


def _check(node: Node) -> None:
    """That a node is pointwise, a constant, or a lookup.

    Raises:
        Refused: it is not known to be.
    """
    name = name_of(node)
    if node.op in ("call_function", "call_method"):
        if _is_lookup(node) or name in _CONSTANTS or name in _CASTS or _is_pointwise(node, name):
            return
    raise Refused(f"its score_mod or mask_mod calls `{name}`, which is not known to be pointwise")


def _is_lookup(node: Node) -> bool:
    return name_of(node) in ("getitem", "index") and len(node.args) == 2


def _indices(index: Any) -> tuple[Any, ...]:
    found = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    for one in found:
        if isinstance(one, Tensor) and one.dtype not in _INTEGERS:
            raise Refused("its score_mod or mask_mod looks up by something that is no index")
        if not isinstance(one, (Tensor, int)) or isinstance(one, bool):
            raise Refused("its score_mod or mask_mod takes a part of a tensor")
    return found


def _is_pointwise(node: Node, name: str) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _is_in_place(name):
        return False
    if getattr(node.target, "__module__", "") == "_operator" or name.startswith("__"):
        return name.strip("_") in _OPERATORS
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    tags = [getattr(packet, overload).tags for overload in overloads]
    drawn = any(torch.Tag.nondeterministic_seeded in known for known in tags)
    return not drawn and any(torch.Tag.pointwise in known for known in tags)


def _is_in_place(name: str) -> bool:
    operators = name in ("and_", "or_", "not_")
    return name.endswith("_") and not name.endswith("__") and not operators


def _run(node: Node, args: Any, kwargs: Any) -> Any:
    if any(isinstance(one, _Rows) for one in (*args, *kwargs.values())):
        raise Refused("its score_mod or mask_mod reads more than a number of a tensor")
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
