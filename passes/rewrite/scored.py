"""write_out_scored: scored attention as the operators it is made of, before lists are shared.

For every backend such a node is composed of them (:mod:`sparse_compile.ops.composite`), each with a
layout of its own. Here layers can have one together.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.ops.scored import SCORED_ATTENTION, scored_specs
from sparse_compile.passes.graph_edit import Inserter, device_of, example_value


def write_out_scored(gm: GraphModule) -> bool:
    """Whether there was any; changes ``gm`` in place."""
    calls = [
        (module, node)
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=SCORED_ATTENTION)
        if all("example_value" in read.meta for read in (node, *node.all_input_nodes))
    ]
    for module, node in calls:
        _write_out(module, node)
    return bool(calls)


def _write_out(gm: GraphModule, node: Node) -> None:
    args: Any = node.args
    q, k, v, learned, tables, mask, score, scale = args
    device, insert = device_of(q), Inserter(gm, node)
    of_layout, of_attention = scored_specs(mask, score, device.type)
    lengths = [insert.size(q, dim) for dim in (0, 1, 2)] + [insert.size(k, dim) for dim in (2, 1)]
    made = insert.call(LAYOUT, tables, NO_READS, [], *lengths, of_layout, device, [])
    parts = range(len(example_value(made)))
    lists = [insert.call(operator.getitem, made, part) for part in parts]
    out = insert.call(ATTENTION, q, k, v, learned, tables, [], lists, scale, of_attention)
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
