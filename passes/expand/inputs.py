"""Where what a call reads comes from: through the bodies that it stands in, and in the example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.mutation import written_inputs


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a graph, and of a body in it, stand for.

    Attributes:
        examples: what the outermost graph is compiled with.
        outer: for inputs of bodies the nodes that are handed in.
    """

    examples: Mapping[Node, Any]
    outer: Mapping[Node, Node] = field(default_factory=dict)

    @staticmethod
    def of(gm: GraphModule, example_inputs: Sequence[Any]) -> Inputs:
        """Of the outermost graph."""
        names = gm.graph.find_nodes(op="placeholder")
        return Inputs(dict(zip(names, example_inputs, strict=False)))

    def within(self, body: GraphModule, given: Sequence[object]) -> Inputs:
        """Of a body that is called with ``given``."""
        pairs = zip(body.graph.find_nodes(op="placeholder"), given, strict=False)
        handed = {inner: self.origin(one) for inner, one in pairs if isinstance(one, Node)}
        return replace(self, outer={**self.outer, **handed})

    def origin(self, node: Node) -> Node:
        """The node that a value was made by, or the input of the outermost graph that it is."""
        return self.outer.get(node, node)

    def example(self, node: Node) -> torch.Tensor | None:
        """The tensor that an input holds in the example; None for what is computed."""
        value = self.examples.get(self.origin(node))
        # Graphs may be compiled with fake tensors only, of which nothing can be read.
        real = isinstance(value, torch.Tensor) and not hasattr(value, "fake_mode")
        return value if real else None

    def reads_floats(self, nodes: Iterable[Node], beside: Iterable[Node]) -> bool:
        """Whether nodes are computed from a floating tensor that is not among those ``beside``."""
        allowed = {self.origin(node) for node in beside}
        front = [self.origin(node) for node in nodes]
        seen = set(front)
        while front:
            node = front.pop()
            if node in allowed:
                continue
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return True
            writers = [user for user in node.users if node in written_inputs(user)]
            sources = {self.origin(one) for n in (node, *writers) for one in n.all_input_nodes}
            front += sources - seen
            seen |= sources
        return False


def hint(size: int | torch.SymInt) -> int | None:
    """A size in the example; None if it is known only at run time."""
    found = size.node.hint if isinstance(size, torch.SymInt) else size
    return None if found is None else int(found)


def length(node: Node, dim: int) -> int | None:
    """A size of a tensor in the example."""
    return hint(example_value(node).shape[dim])
