"""How what selects keys lies along batch, heads and queries; an index, taken apart from a mask."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node

from sparse_compile.expr import KV, B, FloorDiv, H, Q
from sparse_compile.ops.selection import CANONICAL_SELECTION
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.expose import is_named
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import Lengths
from sparse_compile.passes.lift.value import is_data, size_expr

aten = torch.ops.aten


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
    axes = {axis: name for name, axis in zip("bhqk", (*rows.axes, rows.dim), strict=True)}
    node = emitter.with_axes(node, [axes.get(axis, "1") for axis in range(rank)], "bhqk")
    if rows.axes[0] is None and emitter.lengths[B] != 1:
        sizes = [emitter.size(emitter.lengths[B]), -1, -1, -1]
        node = emitter.graph.call_function(aten.expand.default, (node, sizes))
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


@dataclass(frozen=True)
class Chosen(Listed):
    """The keys that an index, its node, names; the entries lie along ``rows.dim``.

    Attributes:
        among: further masks of the shape of what the index names: keys count where all hold.
    """

    among: tuple[BoolRead, ...] = ()

    @property
    def most(self) -> sympy.Expr:
        """How many entries a list has."""
        return self.size(self.rows.dim)


@dataclass(frozen=True)
class BoolRead:
    """A condition that is an element of a bool tensor.

    Attributes:
        lookup: the element.
        node: the node of the traced graph that holds the tensor.
        negated: whether the condition is that the element is False.
    """

    lookup: sympy.Basic
    node: Node
    negated: bool


def bool_read(condition: sympy.Basic, lifter: Lifter) -> BoolRead | None:
    """The condition as one element of a run-time bool tensor, if that is what it is."""
    if not isinstance(condition, (sympy.Ne, sympy.Eq)) or not is_data(condition.args[0]):
        return None
    lookup, number = condition.args
    node = lifter.node_of(lookup)
    if number != 0 or node is None or node.meta["val"].dtype != torch.bool:
        return None
    return BoolRead(lookup, node, isinstance(condition, sympy.Eq))


def split_selection(
    predicate: sympy.Basic, lifter: Lifter, lengths: Lengths
) -> tuple[sympy.Basic, Chosen | None]:
    """The predicate without the keys that an index names, and these.

    Raises:
        NotSelected: an index takes part, in a way that lists of keys cannot say.
    """
    lookups = predicate.atoms(sympy.core.function.AppliedUndef)
    named = {lookup for lookup in lookups if any(map(is_named, lifter.nodes_of([lookup])))}
    if not named:
        return predicate, None
    if len(named) > 1:
        raise NotSelected("it combines several selections")
    (lookup,) = named
    parts = sympy.And.make_args(predicate)
    if [part for part in parts if part.has(lookup)] != [sympy.Ne(lookup, 0)]:
        raise NotSelected("it does not just narrow the mask to the keys that its index selects")
    (named_node,) = lifter.nodes_of([lookup])
    rest = {part: bool_read(part, lifter) for part in parts if not part.has(lookup)}
    among = {part: read for part, read in rest.items() if read and _alike(read, lookup, named_node)}
    chosen = _read(lookup, named_node, lengths, tuple(among.values()))
    return sympy.And(*(part for part in rest if part not in among)), chosen


def _alike(read: BoolRead, lookup: sympy.Basic, named: Node) -> bool:
    """Whether a tensor is read where what an index names is, and has its shape."""
    sizes = [[size_expr(n) for n in node.meta["val"].shape] for node in (read.node, named)]
    return read.lookup.args == lookup.args and sizes[0] == sizes[1]


def _read(
    lookup: sympy.Basic, named: Node, lengths: Lengths, among: tuple[BoolRead, ...]
) -> Chosen:
    _, dim, index, _ = named.args
    assert isinstance(index, Node)
    assert isinstance(dim, int)
    sizes = [size_expr(size) for size in index.meta["val"].shape]
    dim = dim % len(sizes)
    if among:
        return Chosen(index, rows_of(lookup.args, dim, sizes, lengths), among)
    index = uncast(index, along=dim)
    own = [size_expr(size) for size in index.meta["val"].shape]
    repeated = [axis for axis, size in enumerate(own) if size == 1 != sizes[axis]]
    return _squeezed(Chosen(index, rows_of(lookup.args, dim, sizes, lengths, repeated)))


def _squeezed(chosen: Chosen) -> Chosen:
    """The same with an index before axes were added to it, so that layers share what they can."""
    index, rows = uncast(chosen.node), chosen.rows
    if index.target is not aten.unsqueeze.default:
        return chosen
    source, at = index.args
    assert isinstance(source, Node)
    assert isinstance(at, int)
    added = at % index.meta["val"].dim()
    if added == rows.dim or added in rows.axes:
        return chosen
    dim, *axes = (
        None if axis is None else axis - (axis > added) for axis in (rows.dim, *rows.axes)
    )
    assert dim is not None
    moved = replace(rows, dim=dim, axes=(axes[0], axes[1], axes[2]))
    return _squeezed(Chosen(source, moved))


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


def emit_selection(chosen: Chosen, emitter: Emitter) -> list[Node]:
    """The lists of a selection as nodes of the program: index and count."""
    index = chosen.node if chosen.among else uncast(chosen.node)
    node = emitter.copy(index)
    for read in chosen.among:
        node = _where(read, node, chosen.rows.dim, emitter)
    node = arranged(node, index.meta["val"].dim(), chosen.rows, emitter)
    n_kv, unit = emitter.lengths[KV], sympy.Integer(chosen.rows.unit_kv)
    units = emitter.size(FloorDiv(n_kv + unit - 1, unit))
    lists = emitter.graph.call_function(CANONICAL_SELECTION, (node, units))
    return [emitter.graph.call_function(operator.getitem, (lists, part)) for part in (0, 1)]


def _where(read: BoolRead, index: Node, dim: int, emitter: Emitter) -> Node:
    """An index without the entries that name what a mask of the same shape hides: -1 instead."""
    call = emitter.graph.call_function
    holds = call(
        aten.gather.default, (emitter.copy(read.node), dim, call(aten.clamp.default, (index, 0)))
    )
    if read.negated:
        holds = call(aten.bitwise_not.default, (holds,))
    return call(aten.where.ScalarOther, (holds, index, -1))


def uncast(index: Node, along: int | None = None) -> Node:
    """The index before it was made int64: the lists that several layers make of it are then one.

    With ``along``, also before it was repeated along other axes, of size one, as for heads that
    share lists.
    """
    through = [aten._to_copy.default] + [aten.expand.default] * (along is not None)
    while index.target in through:
        source = index.args[0]
        assert isinstance(source, Node)
        shape, own = (node.meta["val"].shape for node in (index, source))
        if source.meta["val"].dtype not in (torch.int32, torch.int64) or len(shape) != len(own):
            break
        if along is not None and size_expr(shape[along]) != size_expr(own[along]):
            break
        index = source
    return index
