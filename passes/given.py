"""The mask of a call of attention whose tables are given, as a lifted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from sparse_compile.passes.graph_edit import example_value
from sparse_compile.sites.site import AttentionSite, Called, Computed, LiftedMask

aten = torch.ops.aten


def given_mask(site: AttentionSite, called: Called) -> LiftedMask:
    """Its predicate and its score program, and the tensors that these read."""
    assert called.mask.static is not None
    mask = called.mask.static.mask
    count = len(mask.tables)
    tables, learned = called.given[:count], called.given[count:]
    program, computed = None, None
    if tables:
        program = _program(len(tables), copied=True)
    if learned:
        shown = tuple(f"tensor {list(example_value(node).shape)}" for node in learned)
        computed = Computed(_program(len(learned)), learned, site.scope, shown)
    scope = site.scope if tables else None
    return LiftedMask(
        mask, program=program, leaves=tables, scope=scope, score=site.score, learned=computed
    )


def _program(count: int, copied: bool = False) -> GraphModule:
    """A graph that returns what it is given, in contiguous memory of its own if it is copied."""
    graph = Graph()
    leaves: Sequence[Node] = [graph.placeholder(f"leaf{number}") for number in range(count)]
    if copied:
        like: dict[str, Any] = {"memory_format": torch.contiguous_format}
        leaves = [graph.call_function(aten.detach.default, (leaf,)) for leaf in leaves]
        leaves = [graph.call_function(aten.clone.default, (leaf,), like) for leaf in leaves]
    graph.output(tuple(leaves))
    return GraphModule({}, graph)
