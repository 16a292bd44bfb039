"""expand: write attention that is hidden in one call out beside it, for the passes that follow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sparse_compile.passes.expand.ambient import Ambient
from sparse_compile.passes.expand.flex import flexible
from sparse_compile.passes.expand.inputs import Inputs
from sparse_compile.passes.expand.layers import module_attention, native_attention, native_layer
from sparse_compile.passes.expand.names import name_of
from sparse_compile.passes.expand.recipe import Recipe
from sparse_compile.passes.expand.record import record
from sparse_compile.passes.graph_edit import Inserter, example_value
from sparse_compile.passes.mutation import bodies
from sparse_compile.sites.shadow import Expanded, Shadow
from sparse_compile.sites.site import Refused

__all__ = ["expand"]

#: What writes a call out, by the name of what is called. It is told which of the results are read.
_RECIPES: dict[str, Callable[[Node, Collection[int], Inputs], Recipe]] = {
    "multi_head_attention_forward": module_attention,
    "_native_multi_head_attention": native_attention,
    "_transformer_encoder_layer_fwd": native_layer,
    "flex_attention": flexible,
}

_PLAIN = "pass plain tensors"
#: What reads a tensor without minding in which order it is in memory.
_ANY_ORDER = frozenset(
    "transpose swapaxes permute contiguous reshape flatten linear matmul mul add dropout".split()
)


def expand(gm: GraphModule, example_inputs: Sequence[Any]) -> Expanded:
    """Write every opaque call of a graph, and of the bodies in it, out beside the call.

    What is inserted computes what the call does, and nothing reads it.

    Args:
        gm: a graph captured by Dynamo.
        example_inputs: its inputs.
    """
    shadows: dict[Node, Shadow] = {}
    refusals: dict[Node, Refused] = {}
    for call, ambient, inputs in _calls(gm, Ambient(), Inputs.of(gm, example_inputs), set()):
        try:
            shadows[call] = _written_out(call, ambient, inputs)
        except Refused as refused:
            refusals[call] = refused
    return Expanded(shadows, refusals)


def _calls(
    gm: GraphModule, ambient: Ambient, inputs: Inputs, seen: set[int]
) -> Iterator[tuple[Node, Ambient, Inputs]]:
    """The opaque calls of a graph, and of the bodies in it, with what is switched on around."""
    seen.add(id(gm))
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        ambient = ambient.after(node)
        if name_of(node) in _RECIPES:
            yield node, ambient, inputs
            continue
        for body, given in bodies(node):
            if id(body) not in seen:
                yield from _calls(body, ambient, inputs.within(body, given), seen)


def _written_out(call: Node, ambient: Ambient, inputs: Inputs) -> Shadow:
    """The shadow of a call.

    Raises:
        Refused: it cannot be written out; the graph is as it was.
    """
    if ambient.transforms:
        raise Refused(
            "this attention is inside a torch.func transform such as vmap",
            "give q, k and v the batch axis themselves",
        )
    _check_plain(call)
    results = _results(call)
    write = _RECIPES[name_of(call)]
    gm, before = call.graph.owning_module, call.prev
    assert gm is not None
    insert = Inserter(gm, call)
    try:
        recipe = write(call, [index for index in results if index is not None], inputs)
        with ambient.restored():
            made = record(insert, recipe.function, recipe.args, dict(recipe.kwargs))
        outputs = tuple(
            (node, _like(insert, made if index is None else made[index], node))
            for index, nodes in results.items()
            for node in nodes
        )
    except Exception as error:  # It runs torch's own code, on shapes that are not known in advance.
        for node in reversed(_between(before, call)):
            node.graph.erase_node(node)
        if isinstance(error, Refused):
            raise
        said = str(error).partition("\n")[0]
        raise Refused(
            f"what `{name_of(call)}` computes could not be written out: {said}"
        ) from error
    return Shadow(call, _needed(_between(before, call), outputs), outputs)


def _check_plain(call: Node) -> None:
    """That a call reads plain tensors.

    Raises:
        Refused: one is nested, or a subclass that wraps others.
    """
    for node in call.all_input_nodes:
        for value in tree_leaves(node.meta.get("example_value")):
            kind = _special(value)
            if kind:
                raise Refused(f"`{node.name}` is a {kind}, not a plain tensor", _PLAIN)


def _special(value: Any) -> str:
    """What a tensor is that is not plain."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "nested tensor"
    return type(value).__name__ if is_traceable_wrapper_subclass(value) else ""


def _results(call: Node) -> dict[int | None, list[Node]]:
    """The nodes that hold each result of a call which is read; None: its only one.

    Raises:
        Refused: it is read as a whole, or not at all.
    """
    if isinstance(example_value(call), torch.Tensor):
        return {None: [call]}
    found: dict[int | None, list[Node]] = {}
    for user in call.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise Refused(f"`{user.name}` reads all of its results at once")
        if user.users:
            found.setdefault(user.args[1], []).append(user)
    if not found:
        raise Refused("its results are not used")
    return found


def _between(before: Node, call: Node) -> list[Node]:
    """The nodes after one and before another, in order."""
    nodes: list[Node] = []
    while (node := (nodes[-1] if nodes else before).next) is not call:
        nodes.append(node)
    return nodes


def _needed(nodes: Sequence[Node], outputs: Sequence[tuple[Node, Node]]) -> tuple[Node, ...]:
    """The nodes that outputs are computed from; erases the others, which would be readers, too."""
    kept = {new for _, new in outputs}
    for node in reversed(nodes):
        if not node.users and node not in kept:
            node.graph.erase_node(node)
        else:
            kept.add(node)
    return tuple(node for node in nodes if node in kept)


def _like(insert: Inserter, made: object, result: Node) -> Node:
    """A node that stands for a result of the call wherever that is read.

    Raises:
        Refused: it is of another shape or dtype.
    """
    if not isinstance(made, Node):
        raise Refused("one of its results is no tensor")
    new, old = example_value(made), example_value(result)
    if (new.dtype, new.device) != (old.dtype, old.device) or new.shape != old.shape:
        raise Refused(f"written out it is {new.dtype} {list(new.shape)}, not {old.dtype}")
    if new.stride() == old.stride() or all(name_of(user) in _ANY_ORDER for user in result.users):
        return made
    if not old.is_contiguous():
        raise Refused("its result is laid out in memory in a way that is not known")
    return insert.method("contiguous", made)
