"""Lists of a rewritten graph that are made once: those that are equal, and those of known sizes.

:func:`share_lists` finds what several attentions list of one index or one mask tensor.
:func:`hold_layouts` makes layouts that follow from sizes and fixed patterns alone, which the graph
then holds. It is a fence around one fact that torch does not document: AOTAutograd lifts the
buffers of the graph that Dynamo captured to inputs that keep their place in memory, if it finds
their names among Dynamo's. ``tests/project/test_fences.py`` says what is relied upon.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.layout.from_dense import DenseRead
from sparse_compile.layout.layout import build_views
from sparse_compile.layout.lists import lists_of, static_lists
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.ops import LAYOUT
from sparse_compile.ops.pattern import PATTERN_TABLE, pattern_table
from sparse_compile.ops.selection import CANONICAL_SELECTION
from sparse_compile.passes.graph_edit import example_value, fake_mode_of
from sparse_compile.passes.mutation import Memory, bodies, scope_of_body
from sparse_compile.passes.rewrite.tables import RealisedTables, hand_down, place_for
from sparse_compile.sites.annotation import bound_mask_named
from sparse_compile.sites.operands import Scope
from sparse_compile.spec import AttentionSpec

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
    made: dict[tuple[Any, str], Node] = {}
    for call in calls:
        sources = [_source(node) for node in call.all_input_nodes if _is_tensor(node)]
        if any(memory.is_written(source) for source in sources):
            continue  # they may hold something else by now
        key = call.target, repr(map_arg(call.args, _told))
        first = made.setdefault(key, call)
        if first is not call:
            call.replace_all_uses_with(first)
            gm.graph.erase_node(call)


def _is_tensor(node: Node) -> bool:
    return isinstance(example_value(node), Tensor)


def _told(node: Node) -> Any:
    """What an argument is: a tensor by its node, a size by its value, whichever node holds it."""
    return _source(node) if _is_tensor(node) else example_value(node)


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


def hold_layouts(gm: GraphModule) -> None:
    """Replace calls that make layouts and tables of numbers only; changes ``gm`` in place.

    What they make becomes buffers of ``gm``, which bodies of higher-order calls get as operands:
    no call of the graph looks it up again, and CUDA graphs can be recorded over its attentions.
    """
    outermost, cache = Scope(gm), RealisedTables()
    held: dict[str, list[Node]] = {}
    for scope in list(_scopes(outermost)):
        # Layouts first: of what they alone read, nothing is left to hold.
        for target in (LAYOUT, PATTERN_TABLE):
            calls = scope.gm.graph.find_nodes(op="call_function", target=target)
            for call in filter(_is_of_numbers, calls):
                key = _spelled(call)
                if call.users and key not in held:
                    held[key] = [_buffer(gm, value) for value in _made_by(call)]
                _replace(call, [hand_down(node, scope, cache) for node in held.get(key, ())])


def _replace(call: Node, made: Sequence[Node]) -> None:
    for user in list(call.users) if call.target is LAYOUT else ():
        part: Any = user.args[1]
        user.replace_all_uses_with(made[part])
        call.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(made[0])
    call.graph.erase_node(call)


def remember_given(gm: GraphModule) -> None:
    """Let what is found out about mask tensors that are inputs of the graph be reused.

    Only where the user says that they are stable, and of those that nothing here writes to.
    """
    calls = gm.graph.find_nodes(op="call_function", target=LAYOUT)
    if not calls:
        return
    memory = Memory(gm.graph)
    for call in calls:
        tables, text, *rest = call.args
        reads = [
            replace(read, remember=given.op == "placeholder" and not memory.is_written(given))
            for read in DenseRead.parse(text)
            for given in [tables[read.table]]
        ]
        call.args = (tables, DenseRead.text(reads), *rest)


def _scopes(scope: Scope) -> Iterator[Scope]:
    """A scope, and those of the bodies in it that one call runs."""
    yield scope
    called = [(node, *found) for node in scope.gm.graph.nodes for found in bodies(node)]
    times = Counter(id(body) for _, body, _ in called)
    for node, body, inputs in called:
        inner = scope_of_body(node, body, inputs, scope)
        if inner is not None and times[id(body)] == 1:
            yield from _scopes(inner)


def _is_of_numbers(call: Node) -> bool:
    """Whether a layout, or a table of a pattern, follows from sizes that are known."""
    if call.target is LAYOUT:
        taken_apart = all(user.target is operator.getitem for user in call.users)
        return taken_apart and all(map(_is_of_numbers, call.all_input_nodes))
    args: tuple[Any, ...] = call.args
    bound = bound_mask_named(args[0]) if call.target is PATTERN_TABLE else None
    return bound is not None and not call.all_input_nodes and bound.fixed[args[1]]


def _spelled(call: Node) -> str:
    return f"{call.target}{map_arg(call.args, _spelled)}"


@torch.inference_mode(False)  # a backward may save it
def _made_by(call: Node) -> Sequence[Tensor]:
    args: tuple[Any, ...] = call.args
    if call.target is PATTERN_TABLE:
        return [pattern_table(*args)]
    tables, _, sizes, *lengths, kv_heads, text, device, _ = args
    spec, shape = AttentionSpec.parse(text), ProblemShape(*lengths)
    if not tables:
        return static_lists(spec, shape, kv_heads, tuple(sizes), device)
    values = [made for table in tables for made in _made_by(table)]
    return lists_of(build_views(spec, shape, values, sizes, device), kv_heads, device)


def _buffer(gm: GraphModule, value: Tensor) -> Node:
    """The node of a new buffer, at the beginning of the graph."""
    from torch._dynamo.source import ConstantSource

    name = f"sparse_layout_{sum(1 for _ in gm.buffers())}"
    gm.register_buffer(name, value, persistent=False)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(name)
    with gm.graph.inserting_before(place_for(gm.graph, ())):
        node = gm.graph.get_attr(name)
    node.meta["example_value"] = fake_mode_of(gm.graph.nodes).from_tensor(value, static_shapes=True)
    return node
