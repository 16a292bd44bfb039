"""How a tensor that a mask is read from lies along batch, heads, queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, B, FloorDiv, H, Q
from sparse_compile.passes.graph_edit import with_axes
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.masks import Lengths
from sparse_compile.passes.lift.value import size_expr

aten = torch.ops.aten
_MOVES = {
    "squeeze": aten.squeeze.dim,
    "permute": aten.permute.default,
    "unsqueeze": aten.unsqueeze.default,
}


class NotSelected(Exception):
    """Why a mask that reads an index is not attention over selected keys, for a user."""


@dataclass(frozen=True)
class Rows:
    """The dimensions of a tensor, in the coordinates of an attention.

    Attributes:
        dim: the dimension along which keys, or entries that name keys, lie.
        axes: for each of b, h and q, the dimension; None where it does not vary.
        unit_q, unit_kv: consecutive queries, and keys, that one element stands for.
    """

    dim: int
    axes: tuple[int | None, int | None, int | None]
    unit_q: int
    unit_kv: int


@dataclass(frozen=True)
class Listed:
    """What selects keys for rows of queries.

    Attributes:
        node: the node of the traced graph that says which.
        rows: how it lies.
    """

    node: Node
    rows: Rows

    @property
    def lists(self) -> sympy.Expr:
        """How many heads have a list of their own."""
        axis = self.rows.axes[1]
        return sympy.S.One if axis is None else self.size(axis)

    def size(self, dim: int) -> sympy.Expr:
        """A size of the node's tensor."""
        return size_expr(self.node.meta["val"].shape[dim])


def rows_of(
    at: Sequence[sympy.Expr],
    dim: int,
    sizes: Sequence[sympy.Expr],
    lengths: Lengths,
    repeated: Collection[int] = (),
) -> Rows:
    """The rows of a tensor that a mask reads.

    Args:
        at: where it is read, one expression for each dimension.
        dim: the one along which keys lie.
        sizes: of the tensor.
        lengths: of the coordinates.
        repeated: dimensions along which all elements are the same.

    Raises:
        NotSelected: it is read in a way that lists of keys for rows cannot say.
    """
    unit_kv = _unit(at[dim], KV)
    if unit_kv is None:
        raise NotSelected(f"its selection is read at key {at[dim]}")
    axes: dict[sympy.Symbol, int] = {}
    units = {B: 1, H: 1, Q: 1}
    for axis, (place, size) in enumerate(zip(at, sizes, strict=True)):
        if axis == dim or axis in repeated or (size == 1 and place == 0):
            continue
        coordinate = next((c for c in units if c not in axes and _unit(place, c)), None)
        if coordinate is None:
            raise NotSelected(f"its selection is read at {place}")
        axes[coordinate], units[coordinate] = axis, _unit(place, coordinate) or 1
        if not _covers(size, units[coordinate], lengths[coordinate], coordinate == Q):
            raise NotSelected(
                f"its index has {size} rows for {lengths[coordinate]} of {coordinate}"
            )
    if units[B] != 1 or Q not in axes:
        raise NotSelected("its selection is one for all queries or for several batch entries")
    return Rows(dim, (axes.get(B), axes.get(H), axes[Q]), units[Q], unit_kv)


def arranged(node: Node, rank: int, rows: Rows, emitter: Emitter) -> Node:
    """A tensor of a program as [B, Hs, U, keys or entries], where ``rows`` says how it lies."""
    graph = emitter.graph

    def call(name: str, tensor: Node, arg: Any) -> Node:
        return graph.call_function(_MOVES[name], (tensor, arg))

    axes = {axis: name for name, axis in zip("bhqk", (*rows.axes, rows.dim), strict=True)}
    node = with_axes(call, node, [axes.get(axis, "1") for axis in range(rank)], "bhqk")
    if rows.axes[0] is None and emitter.lengths[B] != 1:
        sizes = [emitter.size(emitter.lengths[B]), -1, -1, -1]
        node = graph.call_function(aten.expand.default, (node, sizes))
    return node


def _unit(at: sympy.Expr, coordinate: sympy.Symbol) -> int | None:
    """How many consecutive values of a coordinate ``at`` is the same for; None if not constant."""
    if at == coordinate:
        return 1
    if isinstance(at, FloorDiv) and at.args[0] == coordinate and at.args[1].is_Integer:
        return int(at.args[1]) if at.args[1] > 0 else None
    return None


def _covers(size: sympy.Expr, unit: int, length: sympy.Expr, partly: bool) -> bool:
    """Whether ``size`` units are just enough for a length; the last one may be cut for queries."""
    if size * unit == length:
        return True
    return partly and size.is_Integer and length.is_Integer and size == -(-int(length) // unit)
