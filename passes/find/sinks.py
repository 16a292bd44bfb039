"""Attention sinks: score columns that take weight and have no value, as GPT-OSS writes them.

``softmax(cat([scores, sinks], -1))[..., :-1] @ v`` is ``softmax(scores) @ v`` times the share of
weight that the keys get, ``sigmoid(logsumexp(scores) - sinks)``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import Call, canonical, is_expand, source
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.passes.find.scores import ScorePath, ScoreWalk, product_above


@dataclass(frozen=True)
class Sunk:
    """Scores with columns beside them, as the softmax reads them.

    Attributes:
        scores: the path to the scores alone.
        sinks: the columns: axes of the scores, any of size one but the last.
        join: the node that puts the columns beside the scores.
        first: whether the columns come before the scores.
        nodes: from ``join`` to the softmax, which is not among them.
    """

    scores: ScorePath
    sinks: Node
    join: Node
    first: bool
    nodes: tuple[Node, ...]

    @property
    def columns(self) -> int:
        """How many there are."""
        return int(values.shape(self.sinks)[-1])

    def drops(self, reader: Node, weights: Node) -> bool:
        """Whether ``reader`` takes all weights but those of the columns."""
        index = _index_of(reader, weights)
        if not index:
            return False
        *others, last = index
        keys, columns = values.shape(self.scores.nodes[-1])[-1], self.columns
        if any(other is not Ellipsis and other != slice(None) for other in others):
            return False
        if not isinstance(last, slice) or last.step not in (None, 1):
            return False
        begin, end = (columns, (None, columns + keys)) if self.first else (0, (-columns, keys))
        return _is(last.start, begin, 0) and any(_is(last.stop, at, None) for at in end)


def _is(bound: Any, wanted: Any, absent: Any) -> bool:
    """Whether a bound of a slice is ``wanted``; left out, it is ``absent``."""
    bound = absent if bound is None else bound
    if bound is None or wanted is None:
        return bound is wanted
    if isinstance(bound, Node):
        bound = bound.meta.get("example_value")
    return isinstance(bound, (int, torch.SymInt)) and values.same(bound, wanted)


def _index_of(reader: Node, node: Node) -> tuple[Any, ...]:
    """The index of ``node[..., a:b]`` and the like, () if ``reader`` is something else."""
    if reader.target is not operator.getitem or reader.args[0] is not node:
        return ()
    index = reader.args[1]
    return index if isinstance(index, tuple) and len(index) > 1 else ()


def find_sinks(softmax: Node, flow: Dataflow) -> Sunk | None:
    """The columns beside the scores that a softmax reads; None where there are none.

    Raises:
        Refusal: there are, and what they are beside is not understood.
    """
    node, reader, nodes = softmax.all_input_nodes[0], softmax, list[Node]()
    while True:
        node = flow.current(node, reader)
        call = canonical(node)
        if call is None or call.in_place:
            return None
        nodes.append(node)
        if call.op == "cat":
            return _joined(node, call, tuple(nodes), flow)
        if call.op == "sub":
            nodes += (shift := _own_maximum(call))
            if not shift:
                return None
        elif not (call.op == "copy" or (call.op == "cast" and _widens(node, call))):
            return None
        node, reader = call.args["input"], node
        if not isinstance(node, Node):
            return None


def _widens(node: Node, call: Call) -> bool:
    before, after = values.tensor(call.args["input"]), values.tensor(node)
    if before is None or after is None or before.device != after.device:
        return False
    return torch.promote_types(before.dtype, after.dtype) == after.dtype


def _own_maximum(call: Call) -> list[Node]:
    """The nodes that compute what is subtracted, if it is the maximum over the last axis.

    Softmax is the same without it, and so are gradients: those of each row add up to 0.
    """
    scores, other = call.args["input"], call.args["other"]
    nodes: list[Node] = []
    while isinstance(other, Node) and getattr(other.target, "__name__", other.target) in (
        "getattr",
        "getitem",
        "detach",
    ):
        nodes.append(other)
        if other.op == "call_function" and other.args[1] not in ("values", 0):
            return []
        other = other.args[0]
    if not isinstance(other, Node) or values.number(call.args.get("alpha", 1)) != 1.0:
        return []
    name = getattr(other.target, "__name__", other.target)
    given = dict(zip(("input", "dim", "keepdim"), other.args, strict=False)) | other.kwargs
    rank = len(values.shape(scores))
    is_last = given.get("dim") in (-1, rank - 1) and given.get("keepdim") is True
    is_own = name in ("max", "amax") and given.get("input") is scores
    return [*nodes, other] if is_last and is_own else []


def _joined(node: Node, call: Call, nodes: tuple[Node, ...], flow: Dataflow) -> Sunk:
    parts, rank = call.args["tensors"], len(values.shape(node))
    if call.args["dim"] not in (-1, rank - 1) or len(parts) != 2:
        raise Refusal("the scores are put together from several tensors", "compute them at once")
    walk, refusals = ScoreWalk(flow), list[tuple[Node, Refusal]]()
    for first, (sinks, scores) in ((False, parts[::-1]), (True, parts)):
        try:
            path = walk.back(scores, node)
        except Refusal as refusal:
            refusals.append((scores, refusal))
            continue
        if not isinstance(values.shape(sinks)[-1], int):
            raise Refusal("the number of columns beside the scores is known only at run time")
        sinks = _unexpanded(flow.current(sinks, node), flow)
        return Sunk(path, sinks, node, first, nodes)
    raise next((refusal for side, refusal in refusals if product_above(side)), refusals[0][1])


def _unexpanded(sinks: Node, flow: Dataflow) -> Node:
    """What the columns are expanded from, so that their gradients add up in full precision."""
    start = source(sinks) if is_expand(sinks) else None
    if start is None or flow.is_mutated(start):
        return sinks
    before, after = values.shape(start), values.shape(sinks)
    same = len(before) == len(after) and values.same(before[-1], after[-1])
    once = all(values.same(a, b) or values.same(a, 1) for a, b in zip(before, after, strict=False))
    return _unexpanded(start, flow) if same and once else sinks
