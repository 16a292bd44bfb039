"""Find every attention in a Dynamo graph, and say why the others are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator

from torch.fx import GraphModule, Node

from sparse_compile.ops.masked import MASKED_ATTENTION
from sparse_compile.ops.scored import SCORED_ATTENTION
from sparse_compile.passes.find.canonical import canonical, op_name, where
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.find.eager import match_eager
from sparse_compile.passes.find.indexer import find_indexer
from sparse_compile.passes.find.sdpa import match_called, match_sdpa
from sparse_compile.passes.mutation import bodies, memory_of, scope_of_body
from sparse_compile.sites.operands import Scope
from sparse_compile.sites.shadow import Expanded
from sparse_compile.sites.site import AttentionSite, Refused, Rejection

__all__ = ["find_attention", "find_indexer"]

_NESTING = {
    f"_{transform}_{step}_nesting": change
    for transform in ("vmap", "grad", "jvp")
    for step, change in (("increment", 1), ("decrement", -1))
}
"""How the graph marks the inside of a torch.func transform."""

#: Higher-order calls whose bodies are a part of one attention.
_WHOLE = ("flex_attention", "flex_attention_backward")
_NOTHING = Expanded()


def find_attention(
    gm: GraphModule, expanded: Expanded = _NOTHING
) -> tuple[AttentionSite | Rejection, ...]:
    """Every attention in a graph captured by Dynamo, in graph order.

    Bodies of higher-order calls, such as activation checkpoints, are searched too. Softmaxes that
    are not part of an attention (routers, classifiers) are in neither kind of result. The graph is
    not changed; a symbolic head dimension is specialised to its value.

    Args:
        gm: a graph of call_function and call_method nodes with ``example_value`` metas.
        expanded: what became of calls that hide their attention.

    Returns:
        an :class:`AttentionSite` for each attention that is proven closed, a :class:`Rejection`
        for each that only looks like one.
    """
    scope = Scope(gm)
    return tuple(_in_scope(scope, Dataflow(memory_of(scope)), expanded))


def _in_scope(
    scope: Scope, flow: Dataflow, expanded: Expanded
) -> Iterator[AttentionSite | Rejection]:
    calls = Counter(id(body) for node in scope.gm.graph.nodes for body, _ in _called(node))
    transforms, told = 0, set[Node]()
    for node in scope.gm.graph.nodes:
        transforms += _NESTING.get(op_name(node), 0)
        try:
            found = _match(node, flow, scope)
            _check_expanded(node, expanded, told)
            if found is not None and transforms:
                raise Refused(
                    "this attention is inside a torch.func transform such as vmap",
                    "give q, k and v the batch axis themselves",
                )
        except Refused as refused:
            told.add(node)
            yield refused.at(where(node), node)
        else:
            if found is not None:
                told.add(found.output.node)
                yield found
        for body, inputs in _called(node):
            shared = calls[id(body)] > 1
            yield from _in_body(node, body, inputs, (scope, flow, expanded), shared)


def _check_expanded(node: Node, expanded: Expanded, told: Container[Node]) -> None:
    """That of a call which hides its attention, that is found.

    Raises:
        Refused: it could not be written out, or no attention was seen in what was.
    """
    if node in expanded.refusals:
        raise expanded.refusals[node]
    shadow = expanded.shadows.get(node)
    if shadow is not None and not any(inner in told for inner in shadow.nodes):
        raise Refused(f"what `{op_name(node)}` computes is not known as attention")


def _called(node: Node) -> list[tuple[GraphModule, tuple[object, ...]]]:
    """The bodies of a higher-order call whose attention is the program's own."""
    if node.op != "call_function" or op_name(node) in _WHOLE:
        return []
    return bodies(node)


def _match(node: Node, flow: Dataflow, scope: Scope) -> AttentionSite | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name, call = op_name(node), canonical(node)
    if node.target is MASKED_ATTENTION:
        return match_called(node, scope)
    if node.target is SCORED_ATTENTION:
        raise Refused("it is this library's already, and runs on its blocks as it stands")
    if name == "scaled_dot_product_attention":
        return match_sdpa(node, flow, scope)
    return match_eager(node, flow, scope) if call is not None and call.op == "softmax" else None


def _in_body(
    call: Node,
    body: GraphModule,
    inputs: tuple[object, ...],
    outer: tuple[Scope, Dataflow, Expanded],
    shared: bool,
) -> Iterator[AttentionSite | Rejection]:
    scope, flow, expanded = outer
    name, inner = op_name(call), scope_of_body(call, body, inputs, scope)
    if inner is None:
        inner = Scope(body, scope, call)
        problem = f"this attention is inside a `{name}`, whose body is left as it is"
        hint = f"move the attention out of the `{name}`"
    else:
        problem = "this attention is in a region that is compiled once and called several times"
        problem, hint = problem if shared else "", "leave out nested_compile_region"
    for found in _in_scope(inner, Dataflow(memory_of(inner, flow.memory)), expanded):
        if problem and isinstance(found, AttentionSite):
            yield Rejection(problem, hint, found.where, found.output.node)
        else:
            yield found
