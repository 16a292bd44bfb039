"""Rankings that masks read, and the part of a mask that keeps scores which reach one of a ranking.

``scores >= scores.topk(k).values[..., -1:]`` keeps k keys, and more where scores are equal. Lists
say it exactly, however many that makes; an index of k would not.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from sparse_compile.expr import KV, B, H, MaskExpr, Q
from sparse_compile.ops.kept import KEPT_SELECTION
from sparse_compile.passes.lift.emit import Emitter
from sparse_compile.passes.lift.lift import Lifter
from sparse_compile.passes.lift.masks import Lengths
from sparse_compile.passes.lift.selected import (
    BoolRead,
    Listed,
    NotSelected,
    Rows,
    arranged,
    bool_read,
    rows_of,
)
from sparse_compile.passes.lift.slice import call_name, made_of
from sparse_compile.passes.lift.value import DIMS, Unliftable, is_data, size_expr
from sparse_compile.sites.site import Reached


@dataclass(frozen=True)
class Bound:
    """A result of a ranking, for comparison with what was ranked.

    Attributes:
        reach: how many scores are at least as great as the last of it, but for equal ones; None if
            that is not known.
        within: how many are at most as great.
    """

    reach: sympy.Expr | None = None
    within: sympy.Expr | None = None


def ranking_of(node: Node) -> Node | None:
    """The top-k, sort or k-th value of which a node is the values or the indices."""
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, Node) and call_name(source) in ("topk", "sort", "kthvalue"):
        return source
    return None


def topk_of(node: Node) -> Node | None:
    """The top-k of which a node is the values or the indices."""
    source = ranking_of(node)
    return source if source is not None and call_name(source) == "topk" else None


def is_topk_index(node: Node) -> bool:
    """Whether a node is the indices of a top-k."""
    return topk_of(node) is not None and bool(node.args[1] == 1)


def topk_dim(index: Node) -> int:
    """The dimension along which the indices of a top-k are distinct."""
    topk = topk_of(index)
    assert topk is not None
    dim: int = arguments_of(topk).get("dim", -1)
    rank: int = index.meta["example_value"].dim()
    return dim % max(1, rank)


def arguments_of(ranking: Node) -> dict[str, Any]:
    """What a top-k or a k-th value is called with; of a sort what is named."""
    names = {"topk": ("input", "k", "dim", "largest"), "kthvalue": ("input", "k", "dim")}
    known = names.get(call_name(ranking), ())
    return {**dict(zip(known, ranking.args, strict=False)), **ranking.kwargs}


def bound_of(ranking: Node) -> Bound:
    """What a comparison with the last result of a top-k, a sort or a k-th value keeps."""
    given = arguments_of(ranking)
    if "k" not in given:
        return Bound()
    number, scores = (_example(given[key]) for key in ("k", "input"))
    try:
        most, size = size_expr(number), size_expr(scores.shape[given.get("dim", -1)])
    except Unliftable:
        return Bound()
    if call_name(ranking) == "topk":
        return Bound(reach=most) if given.get("largest", True) is True else Bound(within=most)
    return Bound(reach=size - most + 1, within=most)


def _example(value: Any) -> Any:
    return value.meta["example_value"] if isinstance(value, Node) else value


aten = torch.ops.aten
#: Comparisons, and what they are called with the sides exchanged.
_COMPARISONS = {
    aten.ge.Tensor: ("ge", "le"),
    aten.gt.Tensor: ("gt", "lt"),
    aten.le.Tensor: ("le", "ge"),
    aten.lt.Tensor: ("lt", "gt"),
}
#: Up to so many units, every list has room for all of them.
_FEW = 128


@dataclass(frozen=True)
class Kept(Listed):
    """The keys whose scores reach a threshold: a bool node says which.

    Attributes:
        negated: whether it says which are left out.
        most: how many units a list has, but for equal scores.
        fixed: whether every list has room for all units; else the device is asked for the longest.
        reached: for scores [B, Nq, Nkv], what they reach, if that is known.
    """

    negated: bool
    most: sympy.Expr
    fixed: bool
    reached: Reached | None = None


def split_kept(
    predicate: sympy.Basic, lifter: Lifter, lengths: Lengths
) -> tuple[sympy.Basic, Kept | None]:
    """The predicate without the keys whose scores reach a threshold, and these.

    Args:
        predicate: a mask.
        lifter: what it reads.
        lengths: of the coordinates.

    Raises:
        NotSelected: a threshold takes part, but lists would not say it well.
    """
    leaves = lifter.leaves.items()
    bounds = {node: bound_of(ranked) for node, leaf in leaves if (ranked := ranking_of(leaf))}
    read_nodes = lifter.nodes_of(predicate.atoms(AppliedUndef))
    if not any(_threshold(node, bounds) for read in read_nodes for node in made_of(read)):
        return predicate, None
    for part in sympy.And.make_args(predicate):
        read = bool_read(part, lifter)
        threshold = None if read is None else _threshold(read.node, bounds)
        if read is not None and threshold is not None:
            kept = _kept(read, threshold.most(bounds, read.negated), lengths)
            if _is_plain(kept, lengths):
                kept = replace(kept, reached=_reached(threshold, read.negated, lifter))
            return sympy.And(*(p for p in sympy.And.make_args(predicate) if p != part)), kept
    raise NotSelected("a threshold on scores takes part, but does not just narrow the mask")


@dataclass(frozen=True)
class _Threshold:
    """A comparison of scores with one of them.

    Attributes:
        name: of the comparison, with the scores on the left: ``ge``, ``gt``, ``le`` or ``lt``.
        side: the node that holds the bounds.
        sources: results of rankings that they are made of.
    """

    name: str
    side: Node
    sources: tuple[Node, ...]

    def most(self, bounds: Mapping[Node, Bound], negated: bool) -> sympy.Expr | None:
        """How many scores are kept, but for equal ones."""
        found = {bounds[node] for node in self.sources}
        # Such as the values and the indices of a top-k: all come from one ranking, or none.
        bound = found.pop() if len(found) == 1 else Bound()
        return bound.reach if (self.name in ("ge", "gt")) != negated else bound.within


def _threshold(node: Node, bounds: Mapping[Node, Bound]) -> _Threshold | None:
    """The comparison with a result of a ranking that a bool tensor is, if it is one."""
    if node.target not in _COMPARISONS:
        return None
    sides = [arg for arg in node.args if isinstance(arg, Node)]
    hits = [tuple(n for n in made_of(side) if n in bounds) for side in sides]
    floats = all(side.meta["val"].dtype.is_floating_point for side in sides)
    if not floats or sum(map(bool, hits)) != 1:
        return None
    name, mirrored = _COMPARISONS[node.target]
    return (
        _Threshold(name, sides[1], hits[1]) if hits[1] else _Threshold(mirrored, sides[0], hits[0])
    )


def _reached(threshold: _Threshold, negated: bool, lifter: Lifter) -> Reached | None:
    """What bounds [..., 1] are of values [..., k], if the last or the least of each row."""
    bounds = lifter.tensor(threshold.side)
    *rows, one = bounds.shape
    if one != 1 or len(bounds.cases) != 1:
        return None
    ((_, read),) = bounds.cases
    if not isinstance(read, sympy.Basic) or not is_data(read):
        return None
    node = lifter.node_of(read)
    if node is None:
        return None
    values = _least_of(node) or node
    if values not in threshold.sources or values.meta["val"].dim() != len(bounds.shape):
        return None
    row = [sympy.S.Zero if size == 1 else DIMS[dim] for dim, size in enumerate(rows)]
    last = (size_expr(values.meta["val"].shape[-1]) - 1,)
    wanted = [last] if values is node else [(), (sympy.S.Zero,)]
    if list(read.args[: len(rows)]) != row or read.args[len(rows) :] not in wanted:
        return None
    leaf = lifter.leaves[values]
    if topk_of(leaf) is None or leaf.args[1] != 0:
        return None
    return Reached(leaf, f"{'not ' * negated}{threshold.name}", values is not node)


def _is_plain(kept: Kept, lengths: Lengths) -> bool:
    """Whether scores are [B, Nq, Nkv] or [B, H, Nq, Nkv], as the attention's own are."""
    rank, axes = kept.node.meta["val"].dim(), kept.rows.axes
    batch = 0 if lengths[B] != 1 else axes[0]
    heads = None if rank == 3 else 1 if lengths[H] != 1 else axes[1]
    return rank in (3, 4) and kept.rows == Rows(rank - 1, (batch, heads, rank - 2), 1, 1)


def _least_of(node: Node) -> Node | None:
    """The tensor of which a node is the minimum over the last axis."""
    call = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
    if not isinstance(call, Node) or call.target not in (aten.min.dim, aten.amin.default):
        return None
    source, dims = (*call.args, None)[:2]
    assert isinstance(source, Node)
    last: int = source.meta["val"].dim() - 1
    return source if dims in (-1, last, [-1], [last]) else None


def _kept(read: BoolRead, most: sympy.Expr | None, lengths: Lengths) -> Kept:
    lookup, node = read.lookup, read.node
    sizes = [size_expr(size) for size in node.meta["val"].shape]
    along = [dim for dim, at in enumerate(lookup.args) if at.has(KV)]
    if len(along) != 1:
        raise NotSelected("its scores are not compared key by key")
    rows = rows_of(lookup.args, along[0], sizes, lengths)
    units = sizes[rows.dim]
    if most is None:
        raise NotSelected(
            "it keeps every key whose score reaches a threshold, and nothing says how many these "
            "are; take the threshold from topk(k).values"
        )
    return Kept(node, rows, read.negated, most, bool(units.is_Integer and units <= _FEW))


def emit_kept(
    kept: Kept,
    emitter: Emitter,
    mask: MaskExpr,
    tables: Sequence[Node],
    sizes: Sequence[Node],
) -> list[Node]:
    """The lists of a threshold as nodes of the program: index and count.

    Args:
        kept: the threshold.
        emitter: of the program.
        mask: what else the attention's mask says; what it hides is not listed.
        tables, sizes: what that reads, as nodes of the program.
    """
    graph, rows, node = emitter.graph, kept.rows, emitter.copy(kept.node)
    if kept.negated:
        node = graph.call_function(aten.bitwise_not.default, (node,))
    node = arranged(node, kept.node.meta["val"].dim(), rows, emitter)
    given = [emitter.size(emitter.lengths[coordinate]) for coordinate in (H, Q, KV)]
    units = [rows.unit_q, rows.unit_kv]
    args = node, kept.fixed, list(tables), list(sizes), given, units, mask.text
    lists = graph.call_function(KEPT_SELECTION, args)
    return [graph.call_function(operator.getitem, (lists, part)) for part in (0, 1)]
