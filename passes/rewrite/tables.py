"""realise_tables: the tables that a lifted mask reads, as nodes of the graph that reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.ops.fresh_size import unbound_sizes
from sparse_compile.passes.graph_edit import example_value, fake_mode_of
from sparse_compile.sites.operands import Scope
from sparse_compile.sites.site import Computed, LiftedMask


class RealisedTables:
    """What was already inserted into the graphs of one backend call."""

    def __init__(self) -> None:
        self.outputs: dict[GraphModule, tuple[Node, ...]] = {}
        self.inputs: dict[tuple[Node, GraphModule], Node] = {}
        self.calls: dict[tuple[Any, ...], Node] = {}
        self.inserted: set[Node] = set()


def realise(
    lifted: LiftedMask, scope: Scope, cache: RealisedTables
) -> tuple[list[Node], list[int | Node]]:
    """Insert the program of a lifted mask and hand its results down to ``scope``.

    The program stands right after the last of its leaves, once for all sites that share it; what
    programs have in common, such as the lists of an index that several layers use, is computed
    once. Each table is memory of its own, so later writes to a leaf do not change it; mask tensors
    are not.

    Args:
        lifted: the mask.
        scope: where the results are needed: the scope of the leaves or one inside it.
        cache: shared by the sites of one backend call.

    Returns:
        nodes of ``scope.gm``: the tables (for tables of bits, the mask tensors); and the sizes,
        then the index and count of a selection.
    """
    if lifted.program is None:
        return [], []
    assert lifted.scope is not None
    if lifted.program not in cache.outputs:
        leaves = tuple(hand_down(leaf, lifted.scope, cache) for leaf in lifted.leaves)
        cache.outputs[lifted.program] = _inline(lifted.program, leaves, lifted.scope.gm, cache)
    nodes = [hand_down(node, scope, cache) for node in cache.outputs[lifted.program]]
    count = lifted.n_lifted_tables
    return nodes[:count], list(nodes[count:])


def compute(learned: Computed | None, scope: Scope, cache: RealisedTables) -> list[Node]:
    """The tensors that scores read, as nodes of ``scope.gm``; further arguments as above."""
    if learned is None:
        return []
    if learned.program not in cache.outputs:
        leaves = tuple(hand_down(leaf, learned.scope, cache) for leaf in learned.leaves)
        found = _inline(learned.program, leaves, learned.scope.gm, cache)
        cache.outputs[learned.program] = found
    return [hand_down(node, scope, cache) for node in cache.outputs[learned.program]]


def _inline(
    program: GraphModule, leaves: tuple[Node, ...], gm: GraphModule, cache: RealisedTables
) -> tuple[Node, ...]:
    copies = dict(zip(program.graph.find_nodes(op="placeholder"), leaves, strict=True))
    fake_mode = fake_mode_of(gm.graph.nodes)
    place = place_for(gm.graph, leaves)
    # A fake mode does not let numbers out of a GPU.
    held = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    literals = {name: getattr(program, name).tolist() for name in held}
    while place in cache.inserted:  # Programs that stand here already may be of use.
        place = place.next
    with gm.graph.inserting_before(place), fake_mode, unbound_sizes(fake_mode):
        for node in program.graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                copies[node] = _literal(gm.graph, getattr(program, name), literals[name])
                copies[node].meta["example_value"] = _value(copies[node])
            elif node.op == "call_function":
                copies[node] = _called(node, copies, gm, place, cache)
    (output,) = program.graph.find_nodes(op="output")
    return tuple(copies[node] for node in output.args[0])


def _called(
    node: Node, copies: dict[Node, Node], gm: GraphModule, place: Node, cache: RealisedTables
) -> Node:
    """The call of a program in a graph: one that stands there already, or a new one.

    Programs are functional, and a leaf holds what it did where it was made.
    """
    args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
    key = gm, node.target, repr((args, kwargs))
    made = cache.calls.get(key)
    if made is None or not made < place:
        made = cache.calls[key] = gm.graph.node_copy(node, copies.__getitem__)
        made.meta.clear()
        made.meta["example_value"] = _value(made)
        cache.inserted.add(made)
    return made


def _literal(graph: Graph, value: torch.Tensor, numbers: Any) -> Node:
    """A constant as the call that makes it: torch.compile knows no other kind in this graph."""
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(torch.tensor, (numbers,), options)


def _value(node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), example_value)
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def place_for(graph: Graph, leaves: tuple[Node, ...]) -> Node:
    """The node before which the program goes: after all leaves, and after all placeholders."""
    before = (*graph.find_nodes(op="placeholder"), *leaves)
    node: Node = max(before).next if before else next(iter(graph.nodes))
    return node


def hand_down(node: Node, scope: Scope, cache: RealisedTables) -> Node:
    """The node of ``scope`` that holds ``node`` of it or an outer one, passed in at each call."""
    if scope.gm.graph is node.graph:
        return node
    assert scope.parent is not None
    outer = hand_down(node, scope.parent, cache)
    key = (outer, scope.gm)
    if key not in cache.inputs:
        stand_for_it = (inner for inner, given in scope.feeds.items() if given is outer)
        cache.inputs[key] = next(stand_for_it, None) or _passed_in(outer, scope)
    return cache.inputs[key]


def _passed_in(outer: Node, scope: Scope) -> Node:
    """A new placeholder for an outer node."""
    assert scope.call is not None
    graph = scope.gm.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        inner = graph.placeholder(f"outer_{outer.name}")
    inner.meta["example_value"] = example_value(outer)
    scope.call.args = (*scope.call.args, outer)
    return inner
