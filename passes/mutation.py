"""Which nodes of a Dynamo graph share memory, and which write to it: FX edges show neither.

The one analysis of finder and lifter. What is known is torch's operators, by their schemas, and its
functions and methods, by their names. What is not known (numpy, functions that the user let into
the graph) is run on fake tensors and watched; where that fails, it writes to all that it is given.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from networkx.utils import UnionFind
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from sparse_compile.passes.graph_edit import example_value, fake_mode_of
from sparse_compile.passes.watch import Unwatched, draws, storages, watch, written_arguments
from sparse_compile.sites.operands import Scope

#: Python's operators that write to their first operand.
IN_PLACE = (
    "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor".split()
)
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in (*IN_PLACE, "setitem", "iconcat", "delitem")
)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in (*IN_PLACE, "setitem", "delitem"))
#: Higher-order calls that read their inputs, whatever their bodies are.
_PURE_CALLS = frozenset(("flex_attention", "flex_attention_backward"))
#: Functions of torch.nn.functional that change one argument without saying so in their names.
_RENORMALISES = {"embedding": 1, "embedding_bag": 1}
#: Functions of torch.nn.functional that an operator of the same name does not describe.
_DROPOUTS = frozenset("dropout1d dropout2d dropout3d gumbel_softmax".split())


@dataclass(frozen=True)
class Effect:
    """What running a node does besides making its result.

    Attributes:
        written: the input nodes whose memory it may write to.
        known: whether that is all; else ``written`` is whatever it was given.
        random: whether it draws random numbers.
    """

    written: tuple[Node, ...] = ()
    known: bool = True
    random: bool = False


_NOTHING = Effect()
_WATCHED: WeakKeyDictionary[Node, tuple[object, Effect]] = WeakKeyDictionary()


def written_inputs(node: Node) -> tuple[Node, ...]:
    """The input nodes whose memory a node may write to."""
    return effect(node).written


def effect(node: Node) -> Effect:
    """What a node does besides making its result."""
    if node.op in ("placeholder", "output", "get_attr"):
        return _NOTHING
    if node.op == "call_module":
        return _unknown(node)
    if node.op == "call_method":
        return _of_method(node, str(node.target))
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _of_bodies(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _of_operator(node, target)
    if target in _IN_PLACE_OPERATORS:
        return _writes(node.args[:1])
    if getattr(torch.Tensor, _name(target), None) is target:
        return _of_method(node, _name(target))
    if _is_torch_function(target):
        return _of_function(node)
    return _watched(node)


def _unknown(node: Node) -> Effect:
    return Effect(tuple(node.all_input_nodes), known=False)


def _writes(given: Iterable[Any], random: bool = False) -> Effect:
    nodes = dict.fromkeys(tree_leaves(list(given)))
    return Effect(tuple(n for n in nodes if isinstance(n, Node)), random=random)


def _of_method(node: Node, name: str) -> Effect:
    if name in _IN_PLACE_METHODS:
        return _writes(node.args[:1])
    if not hasattr(torch.Tensor, name):
        return _unknown(node)
    return _named(node, name)


def _of_function(node: Node) -> Effect:
    name = _name(node.target)
    if _argument(node, "inplace"):  # As in F.relu(x, inplace=True).
        return _writes(node.args[:1] or list(node.kwargs.values())[:1], _random(node, name))
    if name in _RENORMALISES and _argument(node, "max_norm") is not None:
        return _writes([_argument(node, "weight")])
    return _named(node, name)


def _named(node: Node, name: str) -> Effect:
    """By the operator of the same name; without one, by torch's rule that ``_`` at the end writes.

    ``operator.and_`` only avoids a keyword.
    """
    written = [node.kwargs.get("out"), *_at(node, _positions(name))]
    if name.endswith("_") and not name.endswith("__") and not hasattr(operator, name):
        written += node.args[:1] or list(node.kwargs.values())[:1]
    return _writes(written, _random(node, name))


def _of_operator(node: Node, target: Any) -> Effect:
    overloads = (target,) if isinstance(target, torch._ops.OpOverload) else _overloads(target)
    written = [_at(node, written_arguments(overload)) for overload in overloads]
    random = any(draws(overload) for overload in overloads)
    return _writes((value for values in written for value in values), random)


def _overloads(packet: Any) -> tuple[torch._ops.OpOverload, ...]:
    return tuple(getattr(packet, name) for name in packet.overloads())


@functools.lru_cache(maxsize=4096)
def _named_operators(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """The operators of torch of which a function or a method has the name."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = _overloads(packet) if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return tuple(one for one in overloads if not _sorts_a_list(one))


@functools.lru_cache(maxsize=4096)
def _positions(name: str) -> Mapping[str, int]:
    found = [written_arguments(one) for one in _named_operators(name)]
    return {key: position for written in found for key, position in written.items()}


def _sorts_a_list(overload: torch._ops.OpOverload) -> bool:
    """TorchScript's methods of Python lists share their names with functions of tensors."""
    first = next(iter(overload._schema.arguments), None)
    return first is not None and first.name == "self" and isinstance(first.type, torch.ListType)


def _random(node: Node, name: str) -> bool:
    may_draw = name in _DROPOUTS or any(draws(one) for one in _named_operators(name))
    return may_draw and not ("dropout" in name and is_off(node))


def is_off(node: Node) -> bool:
    """Whether a dropout does nothing."""
    probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)
    return bool(probability == 0.0 or training is False)


def _at(node: Node, positions: Mapping[str, int]) -> list[Any]:
    """The arguments of a node at some positions, or by their names."""
    return [_argument(node, name, place) for name, place in positions.items()]


def _argument(node: Node, name: str, place: int = -1) -> Any:
    """An argument, which an operator has at ``place``; None if it is not given.

    Python functions may have another order than the operators that they call.
    """
    names = _parameters(node.target) if node.op == "call_function" else ()
    at = names.index(name) if name in names else place
    return node.kwargs.get(name, node.args[at] if 0 <= at < len(node.args) else None)


def _name(target: object) -> str:
    return str(getattr(target, "__name__", ""))


def _is_torch_function(target: Any) -> bool:
    """Functions that say what they write to: those of torch, and Python's own operators."""
    module = str(getattr(target, "__module__", None) or "")
    if module == "builtins":
        return target not in (builtins.setattr, builtins.delattr)
    root, _, rest = module.partition(".")
    told = not rest.startswith(("_dynamo", "distributed"))
    return root in ("torch", "_operator", "math") and told


@functools.lru_cache(maxsize=1024)
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _watched(node: Node) -> Effect:
    """What a function of which nothing is known was seen to do; in doubt, all that it could."""
    call: tuple[object, ...] = (node.target, node.args, tuple(node.kwargs.items()))
    if node not in _WATCHED or _WATCHED[node][0] != call:
        _WATCHED[node] = call, _watch(node)
    return _WATCHED[node][1]


def _watch(node: Node) -> Effect:
    assert callable(node.target)
    try:
        args, kwargs = map_arg((node.args, node.kwargs), example_value)
        mode = fake_mode_of((*node.all_input_nodes, node))
        storages_written, random = watch(node.target, args, kwargs, mode)
    except (Unwatched, LookupError):
        return _unknown(node)
    # What has no memory to show may be what was written to.
    touched = {None, *storages_written}
    written = (n for n in node.all_input_nodes if touched & {*storages(example_value(n))})
    return Effect(tuple(written), random=random)


def bodies(node: Node) -> list[tuple[GraphModule, tuple[object, ...]]]:
    """The GraphModules that a node is called with, each with the arguments that follow it."""
    found: list[tuple[GraphModule, tuple[object, ...]]] = []
    for index, argument in enumerate(node.args):
        if isinstance(argument, Node) and argument.op == "get_attr":
            body = operator.attrgetter(str(argument.target))(node.graph.owning_module)
            if isinstance(body, GraphModule):
                rest = [a for a in node.args[index + 1 :] if not isinstance(a, str)]
                found.append((body, tuple(rest)))
    return found


#: Higher-order calls that run their body once, on the arguments that follow it.
_ONE_BODY = frozenset(
    "tag_activation_checkpoint wrap wrap_activation_checkpoint wrap_with_set_grad_enabled "
    "wrap_with_autocast invoke_subgraph".split()
)


def scope_of_body(
    call: Node, body: GraphModule, inputs: tuple[object, ...], scope: Scope
) -> Scope | None:
    """The scope of a body that a higher-order call in ``scope`` runs once; None for other calls.

    Args:
        call, body, inputs: as in :func:`bodies`.
        scope: where the call stands.
    """
    placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    nodes = tuple(outer for outer in inputs if isinstance(outer, Node))
    if _name(call.target) in _ONE_BODY and len(nodes) == len(inputs) == len(placeholders):
        return Scope(body, scope, call, nodes)
    return None


def _of_bodies(node: Node) -> Effect:
    """The inputs that the bodies of a higher-order call write to."""
    if _name(node.target) in _PURE_CALLS:
        return _NOTHING
    found = bodies(node)
    if not found:
        return _unknown(node)
    written: list[Any] = []
    random = False
    for body, inputs in found:
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        memory = Memory(body.graph)
        random |= any(effect(n).random for n in body.graph.nodes)
        hit = [memory.is_written(placeholder) for placeholder in placeholders]
        if len(placeholders) == len(inputs):
            written += [arg for arg, is_hit in zip(inputs, hit, strict=True) if is_hit]
        elif any(hit):
            written += node.all_input_nodes
    return _writes(written, random)


class Memory:
    """A partition of a graph's nodes by the memory their tensors may live in, and the writes to it.

    The graph must not change meanwhile.
    """

    def __init__(self, graph: Graph, aliases: Iterable[tuple[Node, Node]] = ()) -> None:
        """Read the graph once. ``aliases``: nodes known from outside to share memory."""
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._shared = UnionFind()
        for first, second in aliases:
            self._shared.union(first, second)
        for node in graph.nodes:
            self._place(node)
        self.effects = {node: effect(node) for node in graph.nodes}
        self._writes: dict[object, list[tuple[Node, Node]]] = {}
        for node, done in self.effects.items():
            for target in done.written:
                self._writes.setdefault(self.of(target), []).append((node, target))

    def writes(self, node: Node) -> Sequence[tuple[Node, Node]]:
        """What writes to memory that ``node`` may share, in order, each with the input that it
        writes to."""
        return self._writes.get(self.of(node), ())

    def is_written(self, node: Node) -> bool:
        """Whether anything in the graph writes to memory that ``node`` may share."""
        return bool(self.writes(node))

    def stays(self, node: Node, since: Node, until: Node) -> bool:
        """Whether nothing overwrites ``node`` after ``since`` ran and before ``until`` runs."""
        first, last = self.position[since], self.position[until]
        return not any(first < self.position[writer] < last for writer, _ in self.writes(node))

    def shared(self, nodes: Sequence[Node]) -> list[tuple[int, int]]:
        """The positions, in ``nodes``, of pairs that may share memory."""
        first: dict[object, int] = {}
        pairs = [(first.setdefault(self.of(node), i), i) for i, node in enumerate(nodes)]
        return [(a, b) for a, b in pairs if a != b]

    def _place(self, node: Node) -> None:
        found = list(storages(node.meta.get("example_value")))
        if None in found:
            # What cannot be looked into is taken to share memory with all it was made from.
            for source in node.all_input_nodes:
                self._shared.union(node, source)
        for storage in found:
            if storage is not None:
                self._shared.union(node, ("storage", storage))

    def of(self, item: object) -> object:
        """A token that nodes which may share memory have in common."""
        token: object = self._shared[item]
        return token


def memory_of(scope: Scope, outer: Memory | None = None) -> Memory:
    """The memory of a scope's graph, knowing which of its inputs share memory outside.

    ``outer`` is the memory of the parent's, where that is known already.
    """
    if scope.parent is None:
        return Memory(scope.gm.graph)
    inner = list(scope.feeds)
    pairs = (outer or memory_of(scope.parent)).shared(scope.inputs)
    return Memory(scope.gm.graph, [(inner[a], inner[b]) for a, b in pairs])
