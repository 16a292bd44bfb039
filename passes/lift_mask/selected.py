"""The part of a mask that an index selects, taken apart from the rest of its predicate."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import GraphModule, Node

from sparse_compile.expr import KV, B, FloorDiv, H, Q
from sparse_compile.passes.lift_mask.emit import Emitter
from sparse_compile.passes.lift_mask.expose import is_named
from sparse_compile.passes.lift_mask.lift import Lifter
from sparse_compile.passes.lift_mask.sizes import size_expr
from sparse_compile.selected_ops import CANONICAL_SELECTION

aten = torch.ops.aten
Lengths = Mapping[sympy.Symbol, sympy.Expr]


class NotSelected(Exception):
    """Why a mask that reads an index is not attention over selected keys, for a user."""


@dataclass(frozen=True)
class Chosen:
    """The keys that an index names, in the coordinates of an attention.

    Attributes:
        index: the node of the traced graph that holds it.
        dim: the dimension of ``index`` along which its entries lie.
        axes: for each of b, h and q, the dimension of ``index``; None where it does not vary.
        unit_q, unit_kv: consecutive queries, and keys, that one entry stands for.
    """

    index: Node
    dim: int
    axes: tuple[int | None, int | None, int | None]
    unit_q: int
    unit_kv: int

    @property
    def lists(self) -> sympy.Expr:
        """How many heads have a list of their own."""
        return sympy.S.One if self.axes[1] is None else self._size(self.axes[1])

    @property
    def most(self) -> sympy.Expr:
        """How many entries a list has."""
        return self._size(self.dim)

    def _size(self, dim: int) -> sympy.Expr:
        return size_expr(self.index.meta["val"].shape[dim])


def split_selection(
    predicate: sympy.Basic, lifter: Lifter, lengths: Lengths
) -> tuple[sympy.Basic, Chosen | None]:
    """The predicate without the keys that an index names, and these.

    Raises:
        NotSelected: an index takes part, in a way that lists of keys cannot say.
    """
    lookups = predicate.atoms(sympy.core.function.AppliedUndef)
    named = {lookup for lookup in lookups if is_named(_node(lookup, lifter))}
    if not named:
        return predicate, None
    if len(named) > 1:
        raise NotSelected("it combines several selections")
    (lookup,) = named
    parts = predicate.args if isinstance(predicate, sympy.And) else (predicate,)
    if [part for part in parts if part.has(lookup)] != [sympy.Ne(lookup, 0)]:
        raise NotSelected("it does not just narrow the mask to the keys that its index selects")
    rest = sympy.And(*(part for part in parts if not part.has(lookup)))
    return rest, _read(lookup, _node(lookup, lifter), lengths)


def _node(lookup: sympy.Basic, lifter: Lifter) -> Node:
    return lifter.data[int(lookup.func.__name__[1:])]


def _read(lookup: sympy.Basic, named: Node, lengths: Lengths) -> Chosen:
    _, dim, index, _ = named.args
    assert isinstance(index, Node)
    assert isinstance(dim, int)
    sizes = [size_expr(size) for size in index.meta["val"].shape]
    dim = dim % len(sizes)
    unit_kv = _unit(lookup.args[dim], KV)
    if unit_kv is None:
        raise NotSelected(f"its selection is read at key {lookup.args[dim]}")
    axes: dict[sympy.Symbol, int] = {}
    units = {B: 1, H: 1, Q: 1}
    index = _unexpanded(index, dim)
    own = [size_expr(size) for size in index.meta["val"].shape]
    for axis, (at, size) in enumerate(zip(lookup.args, sizes, strict=True)):
        if axis == dim or (own[axis] == 1 and (at == 0 or size != 1)):
            continue
        coordinate = next((c for c in units if c not in axes and _unit(at, c)), None)
        if coordinate is None:
            raise NotSelected(f"its selection is read at {at}")
        axes[coordinate], units[coordinate] = axis, _unit(at, coordinate) or 1
        if not _covers(size, units[coordinate], lengths[coordinate], coordinate == Q):
            raise NotSelected(
                f"its index has {size} rows for {lengths[coordinate]} of {coordinate}"
            )
    if units[B] != 1 or Q not in axes:
        raise NotSelected("its selection is one for all queries or for several batch entries")
    order = axes.get(B), axes.get(H), axes[Q]
    return _squeezed(Chosen(index, dim, order, units[Q], unit_kv))


def _squeezed(chosen: Chosen) -> Chosen:
    """The same with an index before axes were added to it, so that layers share what they can."""
    index = uncast(chosen.index)
    if index.target is not aten.unsqueeze.default:
        return chosen
    source, at = index.args
    assert isinstance(source, Node)
    assert isinstance(at, int)
    added = at % index.meta["val"].dim()
    if added == chosen.dim or added in chosen.axes:
        return chosen
    dim, *axes = (
        None if axis is None else axis - (axis > added) for axis in (chosen.dim, *chosen.axes)
    )
    assert dim is not None
    order = axes[0], axes[1], axes[2]
    return _squeezed(replace(chosen, index=source, dim=dim, axes=order))


def _unexpanded(index: Node, dim: int) -> Node:
    """The index before it was repeated along axes of size one, as for heads that share lists."""
    while index.target in (aten.expand.default, aten._to_copy.default):
        source = index.args[0]
        assert isinstance(source, Node)
        shape, own = (node.meta["val"].shape for node in (index, source))
        integers = source.meta["val"].dtype in (torch.int32, torch.int64)
        if not integers or len(shape) != len(own) or size_expr(shape[dim]) != size_expr(own[dim]):
            break
        index = source
    return index


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


def check_heads(lists: sympy.Expr, key_heads: sympy.Expr) -> None:
    """Groups of query heads share a list and a key head, so one number must divide the other.

    Raises:
        NotSelected: it does not.
    """
    numbers = sorted((lists, key_heads), key=str)
    if all(n.is_Integer for n in numbers) and sympy.Max(*numbers) % sympy.Min(*numbers) == 0:
        return
    if sympy.S.One not in numbers:
        raise NotSelected(f"it selects keys for {lists} groups of heads, and has {key_heads} of k")


def emit_selection(chosen: Chosen, emitter: Emitter, lengths: Lengths) -> list[Node]:
    """The lists of a selection as nodes of the program: index and count."""
    graph, rank = emitter.graph, chosen.index.meta["val"].dim()
    node = emitter.copy(uncast(chosen.index))
    varying = [axis for axis in (*chosen.axes, chosen.dim) if axis is not None]
    ones = [axis for axis in range(rank) if axis not in varying]
    if ones:
        node = graph.call_function(aten.squeeze.dims, (node, ones))
    kept = sorted(varying)
    order = [kept.index(axis) for axis in varying]
    if order != sorted(order):
        node = graph.call_function(aten.permute.default, (node, order))
    for position, axis in enumerate(chosen.axes):
        if axis is None:
            node = graph.call_function(aten.unsqueeze.default, (node, position))
    if chosen.axes[0] is None and lengths[B] != 1:
        sizes = [emitter.size(lengths[B]), -1, -1, -1]
        node = graph.call_function(aten.expand.default, (node, sizes))
    unit = sympy.Integer(chosen.unit_kv)
    units = emitter.size(lengths[KV] if unit == 1 else FloorDiv(lengths[KV] + unit - 1, unit))
    lists = graph.call_function(CANONICAL_SELECTION, (node, units))
    return [graph.call_function(operator.getitem, (lists, number)) for number in (0, 1)]


def uncast(index: Node) -> Node:
    """The index before it was made int64: the lists that several layers make of it are then one."""
    while index.target is aten._to_copy.default:
        source = index.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].dtype not in (torch.int32, torch.int64):
            break
        index = source
    return index


def is_threshold(traced: GraphModule, ranked: Collection[Node]) -> bool:
    """Whether a mask compares scores with one of them, such as the k-th best.

    Args:
        traced: what computes the mask.
        ranked: its inputs that are results of a top-k or a sort.
    """
    for node in traced.graph.nodes:
        if node.target in (aten.ge.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor):
            sides = [arg for arg in node.args if isinstance(arg, Node)]
            floats = all(side.meta["val"].dtype.is_floating_point for side in sides)
            hits = [any(n in ranked for n in made_of(side)) for side in sides]
            if floats and hits.count(True) == 1:
                return True
    return False


def made_of(node: Node) -> list[Node]:
    """A node and all that it is computed from."""
    found = {node: None}
    front = [node]
    while front:
        new = [n for n in front.pop().all_input_nodes if n not in found]
        found |= dict.fromkeys(new)
        front += new
    return list(found)
