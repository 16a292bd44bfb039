"""Making selections visible in a traced mask: which elements an index names, as a bool tensor.

``full(-inf).scatter(-1, index, 0)`` and ``~ones.scatter(-1, index, False)`` hold one fact about the
index, in different clothes. Each such node becomes ``where(named, value, base)`` over one kind of
tensor, ``named = zeros(bool).scatter(-1, index, True)``, which the rest of the lifting takes for
run-time data. Nothing changes in what the graph computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

#: Operators that fill a tensor with a number: the number, or a list of the position where it is.
_FILLS: dict[Any, int | list[int]] = {
    aten.full.default: [1],
    aten.full_like.default: [1],
    aten.new_full.default: [2],
    aten.scalar_tensor.default: [0],
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0),
}
_SAME = (aten.expand.default, aten.clone.default, aten.view.default)
_NAMED = "sparse_compile_named"


def expose(traced: GraphModule) -> None:
    """Write every selection of a traced graph as ``named``; see the module's docstring."""
    for node in list(traced.graph.nodes):
        if node.target in (aten.scatter.value, aten.scatter.src):
            _scattered(node)
        elif node.target in (aten.any.dim, aten.gt.Scalar, aten.ne.Scalar, aten._to_copy.default):
            _compared(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def is_named(node: Node) -> bool:
    """Whether a node holds which elements an index names, as :func:`expose` writes it.

    Its arguments are a tensor of False, the dimension, the index and True.
    """
    return _NAMED in node.meta


def _scattered(node: Node) -> None:
    """``base.scatter(dim, index, value)`` as ``where(named, value, base)``."""
    base, dim, index, source = node.args[:4]
    number = _number(source)
    if number is None:
        return
    assert isinstance(base, Node)
    value = base.meta["val"]
    named = _named(node, base, dim, index)
    if not (value.dtype == torch.bool and number and _number(base) == 0):
        options = {"dtype": value.dtype, "device": value.device}
        filled = _before(node, aten.full.default, [], number, **options)
        named = _before(node, aten.where.self, named, filled, base)
    node.replace_all_uses_with(named)


def _compared(node: Node) -> None:
    """``(index.unsqueeze(-1) == arange(n)).any(-2)`` and ``one_hot(index, n).sum(-2) > 0``."""
    equal = _any_of(node)
    if equal is None or equal.target is not aten.eq.Tensor:
        return
    wide, numbers = map(_node, equal.args)
    rank = equal.meta["val"].dim()
    if numbers is None or numbers.target is not aten.arange.default:
        return
    if wide is None or wide.target is not aten.unsqueeze.default:
        return
    index, axis = wide.args
    assert isinstance(axis, int)
    if axis % rank != rank - 1 or _summed(node, equal) != rank - 2:
        return
    like = _before(node, aten.select.int, equal, rank - 2, 0)
    node.replace_all_uses_with(_named(node, like, rank - 2, index))


def _any_of(node: Node) -> Node | None:
    """The comparison of which a node says where any along an axis holds."""
    if node.target is aten.any.dim:
        return _node(node.args[0])
    if node.target is aten._to_copy.default:
        positive = node.meta["val"].dtype == torch.bool
    else:
        positive = node.args[1] == 0
    if not positive:
        return None
    count = _node(node.args[0])
    if count is None or count.target is not aten.sum.dim_IntList:
        return None
    ones = _node(count.args[0])
    return (
        _node(ones.args[0]) if ones is not None and ones.target is aten._to_copy.default else ones
    )


def _summed(node: Node, equal: Node) -> int | None:
    """The axis of ``equal`` that is reduced; None if it is kept, or there are several."""
    reduction = node if node.target is aten.any.dim else _node(node.args[0])
    assert reduction is not None
    dims: Any = reduction.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    kept = len(reduction.args) > 2 and reduction.args[2]
    return dims[0] % equal.meta["val"].dim() if len(dims) == 1 and not kept else None


def _named(node: Node, like: Any, dim: Any, index: Any) -> Node:
    """The bool tensor, before ``node``; takes memory only where something reads it."""
    empty = _before(node, aten.zeros_like.default, like, dtype=torch.bool)
    if index.meta["val"].dtype != torch.int64:
        index = _before(node, aten._to_copy.default, index, dtype=torch.int64)
    named = _before(node, aten.scatter.value, empty, dim, index, True)
    named.meta[_NAMED] = True
    return named


def _before(node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    given, options = map_arg((args, kwargs), lambda arg: arg.meta["val"])
    with node.meta["val"].fake_mode, torch.no_grad():
        new.meta["val"] = target(*given, **options)
    return new


def _number(value: Any) -> int | float | None:
    """The number that a tensor holds everywhere, None if it need not."""
    while isinstance(value, Node) and value.target in _SAME:
        value = value.args[0]
    if isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, Node) or value.target not in _FILLS:
        return None
    fill = _FILLS[value.target]
    number = value.args[fill[0]] if isinstance(fill, list) else fill
    return number if isinstance(number, (bool, int, float)) else None


def _node(value: object) -> Node | None:
    return value if isinstance(value, Node) else None
