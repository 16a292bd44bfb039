"""Why a mask that reads run-time data along queries and keys together is left alone, in words."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from sparse_compile.passes.lift_mask.tables import DenseData


def dense_reason(dense: DenseData, traced: GraphModule, leaves: Sequence[Node]) -> tuple[str, str]:
    """Reason and hint for a :class:`Rejection`."""
    holders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    sources = [leaves[holders.index(node)] for node in _inputs_of(dense.node)]
    wide = [source for source in sources if _is_matrix(source)]
    if not sources:
        return (
            "its mask is a constant without a simple structure",
            "build it from comparisons of torch.arange",
        )
    if not wide:
        op = str(dense.node.target).removeprefix("aten.").split(".")[0]
        return f"its mask combines queries and keys through {op}: {dense.why}", ""
    source = max(wide, key=_dimensions)
    shape = tuple(source.meta["example_value"].shape)
    if source.op == "placeholder":
        return (
            f"the mask is a dense tensor, {source.target} of shape {shape}: its pattern is only "
            "known at run time",
            "build the mask inside the model from comparisons of torch.arange",
        )
    while source.target is operator.getitem and isinstance(source.args[0], Node):
        source = source.args[0]
    name = getattr(source.target, "__name__", source.target)
    return f"the mask depends on the data: it is computed from the result of {name}", ""


def _inputs_of(node: Node) -> list[Node]:
    seen, stack, found = {node}, [node], []
    while stack:
        current = stack.pop()
        if current.op == "placeholder" and isinstance(current.meta["val"], torch.Tensor):
            found.append(current)
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return found


def _is_matrix(node: Node) -> bool:
    return _dimensions(node) >= 2


def _dimensions(node: Node) -> int:
    value = node.meta["example_value"]
    return sum(not (isinstance(size, int) and size == 1) for size in value.shape)
