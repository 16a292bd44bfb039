"""What a captured graph computes before an attention reads its masks, run on clones of its inputs.

This is what a lifted mask is checked against, and it owes nothing to the slice that was lifted: all
that may have an effect runs, whatever it is given. Left out is only what torch's own functions, of
which none writes anything, compute for others than the masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Interpreter, Node

from sparse_compile.passes.lift.normalize import functorch_levels_restored
from sparse_compile.passes.lift.slice import SOURCES, Order, Slice, Slicer, Wanted, call_name
from sparse_compile.passes.mutation import Effect
from sparse_compile.sites.operands import Scope

#: Bytes that may be computed while compiling beside a mask's own computation.
_MOST_BESIDE = 1 << 30
#: A number in the result of a product costs so many times what another one does.
_PRODUCT = 64
#: Calls whose results are sizes of what they are given.
_SIZES = frozenset("size dim numel stride storage_offset nelement".split())


class CannotRun(Exception):
    """What comes before a mask cannot be run while compiling; the message says why."""


@dataclass(frozen=True)
class _Part:
    """What one scope contributes.

    Attributes:
        scope: where the nodes are.
        run: the nodes to be run, in order.
        graph: copies of these, which return what the next scope, or the check, is given.
        inputs: the nodes that its placeholders stand for.
    """

    scope: Scope
    run: tuple[Node, ...]
    graph: Graph
    inputs: tuple[Node, ...]


@dataclass(frozen=True)
class Prefix:
    """What has to run, scope by scope, the captured graph's own first.

    Attributes:
        parts: of the scopes.
        beside: bytes that are computed beside the masks' own computation.
    """

    parts: tuple[_Part, ...]
    beside: int

    def run(self, values: Mapping[Node, Any]) -> list[Any]:
        """The masks as they are when they are read.

        Args:
            values: of the captured graph's inputs and of the leaves; they are not written to.
        """
        read = {node for part in self.parts for node in part.inputs}
        given = _clones({node: value for node, value in values.items() if node in read})
        results: list[Any] = []
        with torch.no_grad(), functorch_levels_restored():
            for part in self.parts:
                fed = iter(results)
                inputs = [given[node] if node in given else next(fed) for node in part.inputs]
                runner = Interpreter(part.scope.gm, graph=part.graph)
                runner.extra_traceback = False  # Errors are told to the user.
                results = runner.run(*inputs)
        return results


def prefix_of(
    scope: Scope,
    wanted: Sequence[Wanted],
    part: Slice,
    slicer: Slicer,
    size: Callable[[Any], int],
) -> Prefix:
    """What has to run before masks are read.

    Args:
        scope: where the masks are read.
        wanted: the masks, each with the first node that reads it.
        part: the slice; the values of its leaves are given, and its nodes are worth their cost.
        slicer: knows the graphs.
        size: the example value of a size.

    Raises:
        CannotRun: it takes too much, or something that must not run while compiling.
    """
    given, free = set(part.leaves), {*part.leaves, *part.nodes}
    parts: list[_Part] = []
    beside = 0
    while True:
        parts.insert(0, _part(scope, wanted, slicer.graph(scope), given, size))
        _check_made_up(parts[0], given, free)
        beside += sum(_cost(node, free, size) for node in parts[0].run)
        if beside > _MOST_BESIDE:
            raise CannotRun("the model computes too much before the mask is read")
        if scope.parent is None:
            return Prefix(tuple(parts), beside)
        assert scope.call is not None
        run = set(parts[0].run)
        wanted = [Wanted(outer, scope.call) for node, outer in scope.feeds.items() if node in run]
        scope = scope.parent


def _part(
    scope: Scope,
    wanted: Sequence[Wanted],
    graph: Order,
    given: set[Node],
    size: Callable[[Any], int],
) -> _Part:
    last = max((want.reader for want in wanted), key=graph.position.__getitem__, default=None)
    end = 0 if last is None else graph.position[last]
    around = {*graph.lazy_loads, *(node for pair in graph.brackets for node in pair)}
    needed, run = {want.node for want in wanted}, dict[Node, None]()
    for node in reversed(graph.nodes[:end]):
        done = graph.effects[node]
        if node in given or not (node in needed or node in around or _acts(node, done)):
            continue
        _check(node, done)
        run[node] = None
        if _number(node) is None:
            needed.update(node.all_input_nodes)
    opened = [pair for pair in graph.brackets if graph.position[pair[0]] < end]
    opened = [pair for pair in opened if graph.position[pair[1]] >= end]
    opened.sort(key=lambda pair: graph.position[pair[0]])
    closing = [last for _, last in reversed(opened)]
    read = {want.node for want in wanted} | {arg for node in run for arg in node.all_input_nodes}
    fed = (read & given) | {node for node in run if node.op == "placeholder"}
    inputs = [node for node in graph.nodes if node in fed]
    copied = _copied(graph.nodes[:end], run, inputs, closing, wanted, size)
    return _Part(scope, tuple(reversed(run)), copied, tuple(inputs))


def _copied(
    before: Sequence[Node],
    run: Collection[Node],
    inputs: Sequence[Node],
    closing: Sequence[Node],
    wanted: Sequence[Wanted],
    size: Callable[[Any], int],
) -> Graph:
    """A graph of the nodes to be run, ``before`` the last reader, that returns what is wanted."""
    copied = Graph()
    copies: dict[Node, Any] = {n: copied.placeholder(f"given{i}") for i, n in enumerate(inputs)}
    kept: dict[Node, Node] = {}
    for node in before:
        # Later writes must not reach what an earlier reader reads.
        for mask in [want.node for want in wanted if want.reader is node]:
            kept[mask] = copied.call_function(copy.deepcopy, (copies[mask],))
        if node in run and node not in copies:
            number = _number(node)
            if number is None:
                copies[node] = copied.node_copy(node, copies.__getitem__)
            else:
                copies[node] = size(number)
    for node in closing:
        copied.node_copy(node, copies.__getitem__)
    copied.output([kept.get(want.node, copies[want.node]) for want in wanted])
    return copied


def _check_made_up(part: _Part, given: set[Node], free: set[Node]) -> None:
    """Values that are made up for results of sources serve the mask; others may expect better."""
    for node in part.run:
        made_up = [arg for arg in node.all_input_nodes if arg in given and arg.op != "placeholder"]
        if made_up and node not in free:
            raise CannotRun(
                f"`{call_name(node)}` reads `{made_up[0].name}`, whose value is not known"
            )


def _acts(node: Node, done: Effect) -> bool:
    nothing = node.op.startswith("call") and node.meta.get("example_value") is None
    return bool(done.written) or not done.known or nothing


def _check(node: Node, done: Effect) -> None:
    name = call_name(node)
    if done.random:
        raise CannotRun(f"`{name}` draws random numbers before the mask is read")
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
        raise CannotRun(f"`{name}` comes before the mask")
    module = str(getattr(node.target, "__module__", ""))
    if "c10d" in str(node.target) or module.startswith("torch.distributed"):
        raise CannotRun(f"`{name}` communicates with other processes")


def _number(node: Node) -> Any:
    """A size that needs no computation; None for anything else."""
    value = node.meta.get("example_value")
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return value if whole and call_name(node) in _SIZES else None


def _cost(node: Node, free: set[Node], size: Callable[[Any], int]) -> int:
    value = node.meta.get("example_value")
    if node in free or not isinstance(value, Tensor):
        return 0
    return bytes_of(value, size) * (_PRODUCT if call_name(node) in SOURCES else 1)


def bytes_of(fake: Tensor, size: Callable[[Any], int]) -> int:
    """What a tensor takes, without what is repeated; ``size`` is the example value of a size."""
    count = fake.dtype.itemsize
    for length, stride in zip(fake.shape, fake.stride(), strict=True):
        count *= 1 if isinstance(stride, int) and stride == 0 else size(length)
    return count


def _clones(values: Mapping[Node, Any]) -> dict[Node, Any]:
    """Copies of tensors; those that share memory do so in the copies."""
    memo: dict[int, Any] = {}
    return {
        node: copy.deepcopy(value.detach(), memo) if isinstance(value, Tensor) else value
        for node, value in values.items()
    }
