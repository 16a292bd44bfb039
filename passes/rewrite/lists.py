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
from sparse_compile.sites.site import Scope
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
        for call in _layouts_of_numbers(scope.gm):
            key = repr(map_arg(call.args, _spelled))
            if key not in held:
                held[key] = [_buffer(gm, value) for value in _lists(call)]
            for item in list(call.users):
                made: Any = held[key]
                item.replace_all_uses_with(hand_down(made[item.args[1]], scope, cache))
                scope.gm.graph.erase_node(item)
            scope.gm.graph.erase_node(call)
        for call in filter(
            _is_fixed, scope.gm.graph.find_nodes(op="call_function", target=PATTERN_TABLE)
        ):
            key = _spelled(call)
            if call.users and key not in held:
                held[key] = [_buffer(gm, _table(call))]
            if call.users:
                call.replace_all_uses_with(hand_down(held[key][0], scope, cache))
            scope.gm.graph.erase_node(call)


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


def _layouts_of_numbers(gm: GraphModule) -> list[Node]:
    calls = gm.graph.find_nodes(op="call_function", target=LAYOUT)
    return [call for call in calls if all(map(_is_fixed, call.all_input_nodes)) and _is_split(call)]


def _is_split(call: Node) -> bool:
    return all(user.target is operator.getitem for user in call.users)


def _is_fixed(node: Node) -> bool:
    """Whether it makes a table that a pattern and known sizes say."""
    if node.target is not PATTERN_TABLE or node.all_input_nodes:
        return False
    key, index = node.args[:2]
    bound = bound_mask_named(str(key))
    return bound is not None and bound.fixed[operator.index(index)]


def _spelled(table: Node) -> str:
    return f"table{table.args!r}"


def _table(call: Node) -> Tensor:
    # A backward may save it.
    with torch.inference_mode(False):
        made: Tensor = pattern_table(*call.args)
    return made


def _lists(call: Node) -> Sequence[Tensor]:
    args: tuple[Any, ...] = call.args
    tables, _, sizes, *lengths, kv_heads, text, device, _ = args
    spec, shape = AttentionSpec.parse(text), ProblemShape(*lengths)
    if not tables:
        return static_lists(spec, shape, kv_heads, tuple(sizes), device)
    with torch.inference_mode(False):
        layout = build_views(spec, shape, [_table(made) for made in tables], sizes, device)
        return lists_of(layout, kv_heads, device)


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
