"""Top-k, sort and k-th value, of which masks read the results."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from sparse_compile.passes.lift.slice import call_name
from sparse_compile.passes.lift.value import Unliftable, size_expr


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
