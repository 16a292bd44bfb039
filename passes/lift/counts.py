"""Which elements an index names, where a program counts the entries that name them.

``F.one_hot(index, n).sum(-2) > 0``, ``(index[..., None] == arange(n)).any(-2)`` and
``zeros.scatter_add(-1, index, ones) > 0`` ask how often each element occurs, and then only whether.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from sparse_compile.passes.lift.value import Unliftable, size_expr

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
_SAME = (
    *(aten.expand.default, aten.clone.default, aten.view.default, aten.detach.default),
    aten.lift_fresh_copy.default,
)


#: Dtypes in which a count of entries does not wrap around to zero.
_COUNTS = (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: What is asked about a count.
_QUESTIONS: dict[Any, Callable[..., bool]] = {
    aten._to_copy.default: operator.truth,
    aten.logical_not.default: operator.not_,
    aten.gt.Scalar: operator.gt,
    aten.ge.Scalar: operator.ge,
    aten.ne.Scalar: operator.ne,
    aten.eq.Scalar: operator.eq,
    aten.lt.Scalar: operator.lt,
    aten.le.Scalar: operator.le,
}


@dataclass(frozen=True)
class Names:
    """What an index names along a dimension.

    Attributes:
        index: its entries.
        dim: along which dimension of the result.
        entries: the dimension of ``index`` along which its entries lie, counted without ``spare``.
        spare: a dimension of size one that ``index`` and ``valid`` have besides; None for none.
        valid: which entries count; None for all.
        base: a tensor of the shape of the result, but for the dimension ``reduced``, if there is
            one, which the result does not have.
        negated: whether it is asked which elements no entry names.
    """

    index: Node
    dim: int
    base: Node
    entries: int
    spare: int | None = None
    reduced: int | None = None
    valid: Node | None = None
    negated: bool = False


def names_of(node: Node) -> Names | None:
    """What a bool tensor says of an index, if that is all that it says."""
    if node.target in (aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims):
        counted, axis = _reduction(node)
        differs = node.target in (aten.all.dim, aten.all.dims)
        found = _compared(_uncast(counted), axis, aten.ne.Tensor if differs else aten.eq.Tensor)
        return None if found is None else replace(found, negated=differs)
    asked = _whether_any(node)
    if asked is None:
        return None
    count, negated = asked
    found = _counted(count)
    return None if found is None else replace(found, negated=negated)


def _whether_any(node: Node) -> tuple[Node, bool] | None:
    """The count of which a node says that it is not zero; or, with True, that it is zero."""
    if node.target not in _QUESTIONS or node.meta["val"].dtype != torch.bool:
        return None
    count = _node(node.args[0])
    if count is None or count.meta["val"].dtype == torch.bool:
        return None
    if not all(isinstance(limit, (int, float)) for limit in node.args[1:]):
        return None
    # What is said of no, one and ever so many entries is said of any number of them.
    answers = [bool(_QUESTIONS[node.target](n, *node.args[1:])) for n in (0, 1, math.inf)]
    if answers not in ([False, True, True], [True, False, False]):
        return None
    return count, answers[0]


def _counted(count: Node) -> Names | None:
    """What is counted in a tensor of counts, of which only zeros matter."""
    count = _kept(count)
    if count.target in (aten.scatter_add.default, aten.scatter_reduce.two):
        return _scattered(count)
    if count.target is operator.getitem and count.args[1] == 0:
        count = _node(count.args[0]) or count
        if count.target is not aten.max.dim:
            return None
    elif count.target not in (aten.sum.dim_IntList, aten.amax.default):
        return None
    if count.kwargs.get("dtype") not in (None, torch.int64, torch.float32):
        return None
    counted, axis = _reduction(count)
    return _compared(_uncast(counted), axis, aten.eq.Tensor)


def _kept(count: Node) -> Node:
    """A count before it was clamped or cast, as long as no count becomes zero by that."""
    while True:
        source = _node(count.args[0]) if count.args else None
        if source is None:
            return count
        if count.target is aten._to_copy.default:
            if count.meta["val"].dtype not in _COUNTS:
                return count
        elif count.target in (aten.clamp.default, aten.clamp_max.default):
            limits = [*count.args[1:], None][:2]
            low, high = limits if count.target is aten.clamp.default else (None, limits[0])
            if not (low is None or low == 0) or not isinstance(high, (int, float)) or high < 1:
                return count
        else:
            return count
        count = source


def _reduction(node: Node) -> tuple[Node | None, int | None]:
    """What is reduced, and along which dimension; None if it is kept, or there are several."""
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    kept = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
    counted = _node(node.args[0])
    if counted is None or not dims or len(dims) != 1 or kept:
        return counted, None
    return counted, dims[0] % counted.meta["val"].dim()


def _uncast(node: Node | None) -> Node | None:
    """A bool tensor before it was made numbers, and back."""
    while node is not None and node.target is aten._to_copy.default:
        node = _node(node.args[0])
    return node


def _compared(node: Node | None, axis: int | None, how: Any) -> Names | None:
    """``index == arange(n)``, perhaps only where entries are valid, reduced along ``axis``."""
    if node is None or axis is None:
        return None
    valid = None
    if node.target in (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor):
        pair = [_uncast(_node(arg)) for arg in node.args[:2]]
        equal = [x for x in pair if x is not None and x.target is how]
        others = [x for x in pair if x is not None and x not in equal]
        if len(equal) != 1 or len(others) != 1 or how is not aten.eq.Tensor:
            return None
        node, (valid,) = equal[0], others
        if valid.meta["val"].dtype != torch.bool:
            return None
    if node.target is not how:
        return None
    for index, numbers in (node.args, node.args[::-1]):
        found = _numbered(node, _node(index), _node(numbers), axis)
        if found is not None:
            return found if valid is None else _where_valid(found, valid)
    return None


def _numbered(equal: Node, index: Node | None, numbers: Node | None, axis: int) -> Names | None:
    shape = equal.meta["val"].shape
    place = counted_axis(numbers, len(shape))
    if index is None or place is None or place == axis or not _is_integer(index):
        return None
    own = index.meta["val"].shape
    if len(own) != len(shape) or own[place] != 1:
        return None
    dim, entries = place - (place > axis), axis - (axis > place)
    return Names(index, dim, equal, entries, spare=place, reduced=axis)


def _where_valid(found: Names, valid: Node) -> Names | None:
    shape, rank = valid.meta["val"].shape, found.base.meta["val"].dim()
    if len(shape) != rank or found.spare is None or shape[found.spare] != 1:
        return None
    return replace(found, valid=valid)


def _scattered(count: Node) -> Names | None:
    """How often an index names each element, or an upper bound of zeros and ones."""
    base, dim, index, source, *rest = cast("tuple[Any, ...]", count.args)
    how = rest[0] if rest else "sum"
    if how not in ("sum", "amax") or count.kwargs.get("include_self", True) is not True:
        return None
    if len(rest) > 1 and rest[1] is not True:
        return None
    if number_in(base) != 0 or not _is_integer(index):
        return None
    valid = None
    if number_in(source) != 1:
        valid = _uncast(_node(source))
        if valid is None or valid.meta["val"].dtype != torch.bool:
            return None
    dim %= base.meta["val"].dim()
    if count.meta["val"].dtype not in _COUNTS or (valid and not same_shape(valid, index)):
        return None
    return Names(index, dim, base, dim, valid=valid)


def counted_axis(node: Node | None, rank: int) -> int | None:
    """The one axis along which a tensor holds 0, 1, 2, ..., after broadcasting to ``rank``."""
    if node is None:
        return None
    shape = node.meta["val"].shape
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    while node.target in (aten.unsqueeze.default, aten.view.default, aten._to_copy.default):
        source = _node(node.args[0])
        if source is None or node.meta["val"].dtype not in (torch.int32, torch.int64):
            return None
        node = source
    start = node.args[0] if node.target is aten.arange.start else 0
    if node.target not in (aten.arange.default, aten.arange.start) or start != 0:
        return None
    if len(axes) != 1 or node.meta["val"].dtype not in (torch.int32, torch.int64):
        return None
    return axes[0] + rank - len(shape)


def sizes_of(node: Node) -> list[sympy.Expr | None]:
    """The shape of a tensor; None for sizes that cannot be told. Comparing these adds no guard."""
    return [_size(size) for size in node.meta["val"].shape]


def _size(size: Any) -> sympy.Expr | None:
    try:
        return size_expr(size)
    except Unliftable:
        return None


def same_shape(a: Node, b: Node) -> bool:
    """Whether two tensors are known to have one shape."""
    sizes = sizes_of(a)
    return None not in sizes and sizes == sizes_of(b)


def _is_integer(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _node(value: object) -> Node | None:
    return value if isinstance(value, Node) else None


def number_in(value: Any) -> int | float | None:
    """The number that a tensor holds everywhere, None if it need not."""
    while isinstance(value, Node) and value.target in _SAME:
        value = value.args[0]
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Node) and value.op == "get_attr":
        return _constant(getattr(value.graph.owning_module, str(value.target), None))
    if not isinstance(value, Node) or value.target not in _FILLS:
        return None
    fill = _FILLS[value.target]
    number = value.args[fill[0]] if isinstance(fill, list) else fill
    return number if isinstance(number, (bool, int, float)) else None


def _constant(tensor: object) -> int | float | None:
    """The number of a tensor that tracing made of one."""
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or tensor.device.type != "cpu":
        return None
    number: int | float = tensor.item()
    return number


aten = torch.ops.aten
