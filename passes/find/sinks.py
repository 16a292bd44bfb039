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
from sparse_compile.passes.find.canonical import Call, canonical, is_expand, op_name, source
from sparse_compile.passes.find.dataflow import Dataflow


@dataclass(frozen=True)
class Sunk:
    """Columns beside scores, as the softmax reads them.

    Attributes:
        sinks: the columns: axes of the scores, any of size one but the last.
        join: the node that puts the columns beside the scores.
        first: whether the columns come before the scores.
        keys: how many columns the scores have.
    """

    sinks: Node
    join: Node
    first: bool
    keys: Any

    @property
    def columns(self) -> int:
        """How many there are."""
        return int(values.shape(self.sinks)[-1])

    def drops(self, reader: Node, weights: Node) -> bool:
        """Whether ``reader`` takes all weights but those of the columns."""
        if reader.target is not operator.getitem or reader.args[0] is not weights:
            return False
        index = reader.args[1]
        if not isinstance(index, tuple) or len(index) < 2:
            return False
        *others, last = index
        keys, columns = self.keys, self.columns
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


def own_maximum(call: Call) -> list[Node]:
    """The nodes that compute what is subtracted, if it is the maximum over the last axis.

    Softmax is the same without it, and so are gradients: those of each row add up to 0.
    """
    scores, other = call.args["input"], call.args["other"]
    nodes: list[Node] = []
    while isinstance(other, Node) and op_name(other) in ("values", "getitem", "detach"):
        if op_name(other) == "getitem" and other.args[1] != 0:
            return []
        nodes.append(other)
        other = other.args[0]
    maximum = canonical(other)
    if maximum is None or maximum.op not in ("max", "amax") or maximum.args["input"] is not scores:
        return []
    is_last = maximum.args["dim"] in (-1, len(values.shape(scores)) - 1)
    once = values.number(call.args["alpha"]) == 1.0
    return [*nodes, other] if is_last and once and maximum.args["keepdim"] is True else []


def unexpanded(sinks: Node, flow: Dataflow) -> Node:
    """What the columns are expanded from, so that their gradients add up in full precision."""
    start = source(sinks) if is_expand(sinks) else None
    if start is None or flow.is_mutated(start):
        return sinks
    before, after = values.shape(start), values.shape(sinks)
    same = len(before) == len(after) and values.same(before[-1], after[-1])
    once = all(values.same(a, b) or values.same(a, 1) for a, b in zip(before, after, strict=False))
    return unexpanded(start, flow) if same and once else sinks
