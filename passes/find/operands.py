"""From the tensor a product reads to the operand worth keeping: repeat_kv and transposes undone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import (
    canonical,
    is_expand,
    is_reshape,
    permutation,
    source,
)
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.graph_edit import CANONICAL
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.site import Refused

MERGED = "bh"
"""The axis of a [B*H, N, D] tensor that holds batch and heads."""


@dataclass(frozen=True)
class Reading:
    """How one attention reads an operand.

    Attributes:
        flow: the graph.
        at: the node that reads it.
        output: where the rewritten attention will read it.
        split: batch and heads that a ``MERGED`` axis must be taken apart into.
        dtype: the dtype that casts are undone to, where the cast only widened.
        heads: whether repeated heads are undone.
    """

    flow: Dataflow
    at: Node
    output: Node
    split: tuple[Any, Any] | None = None
    dtype: torch.dtype | None = None
    heads: bool = True


@dataclass(frozen=True)
class Peeled:
    """An operand and the nodes between it and the one it stands for, which may become unused."""

    operand: Operand
    nodes: tuple[Node, ...] = field(default=())


def peel(operand: Operand, reading: Reading) -> Peeled:
    """The same tensor read further up, where that undoes something.

    Undone are: repeated key heads, a transpose that puts features last, a merge of batch and
    heads, a widening cast. Nothing is peeled through a tensor that is overwritten meanwhile.

    Raises:
        Refused: the tensor is overwritten before the output.
    """
    if not reading.flow.stays(operand.node, reading.at, reading.output):
        raise Refused(
            f"`{operand.node.name}` is changed in place between the scores and the output",
            "make the change before the attention, or on a copy",
        )
    best = Peeled(operand)
    nodes: tuple[Node, ...] = ()
    step, gains = _step(operand.node, operand.axes, reading)
    while step is not None and _unchanged(step, reading):
        nodes = (*nodes, *step.nodes)
        if gains:
            best = Peeled(step.operand, nodes)
        step, gains = _step(step.operand.node, step.operand.axes, reading)
    if MERGED in best.operand.axes and reading.split is not None:
        if not isinstance(reading.split[1], int):
            raise Refused("the number of merged heads is known only at run time")
        return replace(best, operand=replace(best.operand, split=reading.split))
    return best


def _order(axes: tuple[str, ...]) -> int:
    """How convenient an order of axes is: features last, better still [B, H, N, D]."""
    return (axes[-1] == "d") + (axes == tuple(a for a in CANONICAL if a in axes))


def _unchanged(step: Peeled, reading: Reading) -> bool:
    """Whether the nodes of a step hold what it made them, and its source is not overwritten."""
    made = all(reading.flow.stays(node, node, reading.at) for node in step.nodes)
    return made and reading.flow.stays(step.operand.node, step.nodes[-1], reading.output)


def _step(node: Node, axes: tuple[str, ...], reading: Reading) -> tuple[Peeled | None, bool]:
    """A tensor read one step further up, if it can be, and whether that undoes something."""
    order, start, call = permutation(node), source(node), canonical(node)
    if start is None:
        return None, False
    if order is not None:
        before = tuple(axes[order.index(i)] for i in range(len(order)))
        return Peeled(Operand(start, before), (node,)), _order(before) > _order(axes)
    if MERGED in axes and reading.split is not None and is_reshape(node):
        apart = taken_apart(axes, node, start, reading.split)
        return (None if apart is None else Peeled(Operand(start, apart), (node,))), True
    nodes = _repeat(node, axes.index("h")) if reading.heads and "h" in axes else ()
    base = source(nodes[-1]) if nodes else None
    if base is not None:
        return Peeled(Operand(base, axes), nodes), True
    same = is_reshape(node) and values.same_shape(values.shape(start), values.shape(node))
    copies = same or (call is not None and call.op == "copy")
    floats = values.is_float(start) and values.is_float(node)
    casts = call is not None and call.op == "cast" and floats and values.widens(start, node)
    further = Peeled(Operand(start, axes), (node,)) if copies or casts else None
    return further, casts and values.dtype(start) == reading.dtype


def taken_apart(
    axes: tuple[str, ...], merged: Node, apart: Node, sizes: tuple[Any, Any]
) -> tuple[str, ...] | None:
    """The axes of ``apart`` if it is ``merged`` with batch and heads, of these sizes, as two."""
    at, shape = axes.index(MERGED), values.shape(merged)
    expected = (*shape[:at], *sizes, *shape[at + 1 :])
    same = values.same_shape(expected, values.shape(apart))
    return (*axes[:at], "b", "h", *axes[at + 1 :]) if same else None


def _repeat(node: Node, h: int) -> tuple[Node, ...]:
    """The nodes by which head i became heads i*g..i*g+g-1, last first; () if it was not that."""
    if _is_interleave(node, h):
        return (node,)
    start = source(node)
    if start is None:
        return ()
    if is_expand(node):
        return (node,) if _expands_only(node, start, h) else ()
    copied = canonical(start)
    expanded = copied.args["input"] if copied is not None and copied.op == "copy" else start
    inserted = source(expanded) if is_reshape(node) and is_expand(expanded) else None
    if inserted is None or not _merges(node, expanded, h):
        return ()
    base = source(inserted) if is_reshape(inserted) else None
    if base is None or not _expands_only(expanded, inserted, h + 1):
        return ()
    sizes = values.shape(inserted)
    if not values.same_shape((*sizes[: h + 1], *sizes[h + 2 :]), values.shape(base)):
        return ()
    return (node, expanded, inserted) if expanded is start else (node, start, expanded, inserted)


def _is_interleave(node: Node, h: int) -> bool:
    call = canonical(node)
    if call is None or call.op != "repeat_interleave":
        return False
    dim = call.args["dim"]
    known = isinstance(call.args["repeats"], int) and isinstance(dim, int)
    return known and dim % len(values.shape(node)) == h


def _expands_only(node: Node, start: Node, axis: int) -> bool:
    """Whether the node only repeats ``axis``, whose size was one."""
    after, before = values.shape(node), values.shape(start)
    if len(after) != len(before) or not values.same(before[axis], 1):
        return False
    return values.same_shape(after[:axis], before[:axis]) and values.same_shape(
        after[axis + 1 :], before[axis + 1 :]
    )


def _merges(node: Node, start: Node, axis: int) -> bool:
    """Whether a reshape only merges ``axis`` and the one after it."""
    after, before = values.shape(node), values.shape(start)
    if len(before) != len(after) + 1:
        return False
    merged = (*before[:axis], before[axis] * before[axis + 1], *before[axis + 2 :])
    return values.same_shape(after, merged)


def dead_nodes(region: set[Node], operands: tuple[Peeled, ...]) -> tuple[Node, ...]:
    """The region and the peeled nodes that nothing else reads, in graph order."""
    dead = set(region)
    for peeled in operands:
        for node in peeled.nodes:
            if not set(node.users) <= dead:
                break
            dead.add(node)
    return tuple(sorted(dead))
