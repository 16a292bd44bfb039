"""share_lists: what several attentions find out about one index or one mask tensor, found once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparse_compile.ops import LAYOUT
from sparse_compile.ops.selection import CANONICAL_SELECTION
from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.mutation import Memory

_LISTING = (CANONICAL_SELECTION, LAYOUT)


def share_lists(gm: GraphModule) -> None:
    """Keep one of the calls that list the same; changes ``gm`` in place.

    AOTAutograd would find them, too, but only where it partitions a graph for a backward.
    """
    for module in gm.modules():
        if isinstance(module, GraphModule):
            _share(module)


def _share(gm: GraphModule) -> None:
    calls = [node for node in gm.graph.nodes if node.target in _LISTING]
    if len(calls) < 2:
        return
    memory = Memory(gm.graph)
    made: dict[Hashable, Node] = {}
    for call in calls:
        sources = [_source(node) for node in call.all_input_nodes if _is_tensor(node)]
        if any(memory.is_written(source) for source in sources):
            continue  # they may hold something else by now
        first = made.setdefault((call.target, _key(call.args)), call)
        if first is not call:
            call.replace_all_uses_with(first)
            gm.graph.erase_node(call)


def _is_tensor(node: Node) -> bool:
    return isinstance(example_value(node), Tensor)


def _key(arg: Any) -> Hashable:
    """What an argument is: a tensor by its node, a size by its value, whichever node holds it."""
    if isinstance(arg, (tuple, list)):
        return tuple(map(_key, arg))
    if isinstance(arg, Node):
        if _is_tensor(arg):
            return _source(arg)
        arg = example_value(arg)
    return str(arg.node.expr) if isinstance(arg, torch.SymInt) else arg


def _source(index: Node) -> Node:
    """The tensor before calls that keep it as it is."""
    while index.op == "call_method" and index.target in ("detach", "to"):
        source = index.args[0]
        assert isinstance(source, Node)
        before, after = example_value(source), example_value(index)
        if (before.dtype, before.device) != (after.dtype, after.device):
            break
        index = source
    return index
