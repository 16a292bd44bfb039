"""Making selections visible in a traced mask: which elements an index names, as a bool tensor.

``full(-inf).scatter(-1, index, 0)`` and ``~ones.scatter(-1, index, False)`` hold one fact about the
index, in different clothes. Each such node becomes ``where(named, value, base)`` over one kind of
tensor, ``named = zeros(bool).scatter(-1, index, True)``, which the rest of the lifting takes for
run-time data. Nothing changes in what the graph computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.passes.lift.counts import (
    Names,
    counted_axis,
    names_of,
    number_in,
    same_shape,
    sizes_of,
)

aten = torch.ops.aten
_NAMED = "sparse_compile_named"


def expose(traced: GraphModule, best: Mapping[Node, int]) -> None:
    """Write every selection of a traced graph as ``named``; see the module's docstring.

    Args:
        traced: the graph.
        best: its inputs that are the indices of a top-k, and along which dimension: these are not
            negative, and no two along it are equal.
    """
    for node in list(traced.graph.nodes):
        if node.target in (aten.scatter.value, aten.scatter.src):
            _scattered(node, best)
        elif node.target is aten.index_put.default:
            _put(node, best)
        elif (found := names_of(node)) is not None:
            _replace(node, found)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def is_named(node: Node) -> bool:
    """Whether a node holds which elements an index names, as :func:`expose` writes it.

    Its arguments are a tensor of False, the dimension, the index and True.
    """
    return _NAMED in node.meta


def _scattered(node: Node, best: Mapping[Node, int]) -> None:
    """``base.scatter(dim, index, value)`` as ``where(named, value, base)``."""
    base, dim, index, source = cast("tuple[Any, ...]", node.args[:4])
    number = number_in(source)
    if number is not None:
        _write(node, base, _named(node, base, dim, index), number)
        return
    dim %= node.meta["val"].dim()
    # Where entries are distinct, each element is written once, with its own value.
    if node.meta["val"].dtype == torch.bool and number_in(base) == 0 and best.get(index) == dim:
        if same_shape(source, index):
            _replace(node, Names(index, dim, base, dim, valid=source))


def _put(node: Node, best: Mapping[Node, int]) -> None:
    """``base[b, h, q, index] = value`` for counters b, h and q as ``where(named, value, base)``."""
    base, indices, source = cast("tuple[Any, ...]", node.args[:3])
    number, rank = number_in(source), base.meta["val"].dim()
    if len(node.args) > 3 or number is None or len(indices) != rank or None in indices:
        return
    *rows, index = indices
    shape = sizes_of(base)[:-1]
    whole = None not in shape and all(
        counted_axis(row, rank) == axis and shape[axis] in sizes_of(row)
        for axis, row in enumerate(rows)
        if shape[axis] != 1
    )
    if not whole or index.meta["val"].dtype != torch.int64 or sizes_of(index)[:-1] != shape:
        return
    if index not in best:  # Here, -1 is the last element.
        index = _before(node, aten.remainder.Scalar, index, _size(node, base, rank - 1))
    _write(node, base, _named(node, base, rank - 1, index), number)


def _write(node: Node, base: Node, named: Node, number: int | float) -> None:
    """``node`` as ``base`` with a number in the place of what is named."""
    value = node.meta["val"]
    if not (value.dtype == torch.bool and number and number_in(base) == 0):
        options = {"dtype": value.dtype, "device": value.device}
        filled = _before(node, aten.full.default, [], number, **options)
        named = _before(node, aten.where.self, named, filled, base)
    node.replace_all_uses_with(named)


def _replace(node: Node, found: Names) -> None:
    """``node`` as what an index names."""
    index, valid, base = found.index, found.valid, found.base
    if found.spare is not None:
        index = _without(node, index, found.spare)
        valid = None if valid is None else _without(node, valid, found.spare)
    if found.reduced is not None:
        base = _before(node, aten.select.int, base, found.reduced, 0)
    if valid is not None:
        named = _named_where_valid(node, base, found, index, valid)
    else:
        named = _named(node, base, found.dim, _moved(node, index, found.entries, found.dim))
    if found.negated:
        named = _before(node, aten.bitwise_not.default, named)
    node.replace_all_uses_with(named)


def _named_where_valid(node: Node, base: Node, found: Names, index: Node, valid: Node) -> Node:
    """What the valid entries name; the others name an element of their own, which is cut off."""
    rank, end = base.meta["val"].dim(), _size(node, base, found.dim)
    index = _before(node, aten.where.ScalarOther, valid, index, end)
    index = _moved(node, index, found.entries, found.dim)
    empty = _before(node, aten.zeros_like.default, base, dtype=torch.bool)
    around = [0, 0] * (rank - 1 - found.dim) + [0, 1]
    wide = _before(node, aten.constant_pad_nd.default, empty, around, False)
    named = _named(node, wide, found.dim, index)
    return _before(node, aten.slice.Tensor, named, found.dim, 0, end)


def _without(node: Node, x: Node, dim: int) -> Node:
    """``x`` without a dimension of size one."""
    if x.target is aten.unsqueeze.default:
        source, at = cast("tuple[Node, int]", x.args)
        if at % x.meta["val"].dim() == dim:
            return source
    return _before(node, aten.squeeze.dim, x, dim)


def _moved(node: Node, x: Node, start: int, end: int) -> Node:
    """``x`` with one dimension in another place."""
    if start == end:
        return x
    order = [dim for dim in range(x.meta["val"].dim()) if dim != start]
    return _before(node, aten.permute.default, x, [*order[:end], start, *order[end:]])


def _size(node: Node, x: Node, dim: int) -> Any:
    """A size of ``x``, as an argument."""
    size = x.meta["val"].shape[dim]
    return size if isinstance(size, int) else _before(node, aten.sym_size.int, x, dim)


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
