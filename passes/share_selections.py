"""share_selections: the lists that several attentions make of one index, made once."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.fx import GraphModule, Node

from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.mutation import Memory
from sparse_compile.selected_ops import CANONICAL_SELECTION


def share_selections(gm: GraphModule) -> None:
    """Keep one of the calls that make lists of the same index; changes ``gm`` in place.

    AOTAutograd would find them, too, but only where it partitions a graph for a backward.
    """
    for module in gm.modules():
        if isinstance(module, GraphModule) and _share(module):
            module.graph.lint()
            module.recompile()


def _share(gm: GraphModule) -> bool:
    calls = [node for node in gm.graph.nodes if node.target is CANONICAL_SELECTION]
    if len(calls) < 2:
        return False
    memory = Memory(gm.graph)
    made: dict[Hashable, Node] = {}
    for call in calls:
        index, units = call.args
        assert isinstance(index, Node)
        source = _source(index)
        if memory.is_written(source):
            continue  # it may hold something else by now
        first = made.setdefault((source, _size(units)), call)
        if first is not call:
            call.replace_all_uses_with(first)
            gm.graph.erase_node(call)
    return True


def _source(index: Node) -> Node:
    """The index before calls that keep it as it is."""
    while index.op == "call_method" and index.target in ("detach", "to"):
        source = index.args[0]
        assert isinstance(source, Node)
        before, after = example_value(source), example_value(index)
        if (before.dtype, before.device) != (after.dtype, after.device):
            break
        index = source
    return index


def _size(units: object) -> Hashable:
    """A size by what it is, whichever node holds it."""
    value = example_value(units) if isinstance(units, Node) else units
    if isinstance(value, torch.SymInt):
        return str(value.node.expr)
    assert isinstance(value, int)
    return value
