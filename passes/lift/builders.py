"""ATen operators that create, combine, write into and reduce tensors of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.passes.lift.scalars import cast
from sparse_compile.passes.lift.value import (
    DIMS,
    Element,
    Lifted,
    Unliftable,
    Value,
    align,
    choose,
    merged,
    reindexed,
    single,
    truth,
)
from sparse_compile.passes.lift.views import Handler, Step, dim_of, position, slice_start

#: Which argument fills the result.
_VALUE_AT = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1, "copy": 1}


def filled(step: Step) -> Lifted:
    """``full`` and its like, and what overwrites a tensor: the old values do not matter."""
    return _operand(step, step.args[_VALUE_AT[step.target._schema.name.split("::")[1]]])


def scalar_element(value: Value, dtype: torch.dtype) -> Element:
    """The element of a tensor filled with ``value``, rounded to its dtype."""
    if dtype == torch.bool:
        return truth(value)
    if isinstance(value, sympy.Basic) and not value.is_number:
        return single(value)
    number = float(value) if dtype.is_floating_point else int(value)
    return single(torch.tensor(number).to(dtype).item())


def arange(step: Step) -> Lifted:
    """``arange`` in its three forms, with whole numbers."""
    numbers = step.args[: {"default": 1, "start": 2, "start_step": 3}[step.target._overloadname]]
    if any(isinstance(n, float) and not n.is_integer() for n in numbers):
        raise Unliftable("arange with fractions")
    if not step.dtype.is_floating_point and step.dtype.itemsize < 4:
        raise Unliftable(f"arange in {step.dtype}")
    if step.dtype in (torch.float16, torch.bfloat16):
        raise Unliftable(f"arange in {step.dtype}")
    start = 0 if len(numbers) == 1 else numbers[0]
    stride = numbers[2] if len(numbers) == 3 else 1
    first, by = (sympy.sympify(int(n) if isinstance(n, float) else n) for n in (start, stride))
    return Lifted(step.shape, step.dtype, single(first + by * DIMS[0]))


def eye(step: Step) -> Lifted:
    """The identity matrix."""
    return _chosen(step, sympy.Eq(DIMS[0], DIMS[1]), 1, 0)


def triangle(step: Step) -> Lifted:
    """``tril`` and ``triu``."""
    diagonal = step.args[1]
    row, column = DIMS[len(step.shape) - 2], DIMS[len(step.shape) - 1]
    lower = step.target._schema.name == "aten::tril"
    keep = column - row <= diagonal if lower else column - row >= diagonal
    return _chosen(step, keep, step.tensor, 0)


def where(step: Step) -> Lifted:
    """``where(condition, yes, no)``."""
    condition, yes, no = step.args
    return _chosen(step, _truth(step, condition), yes, no)


def masked_fill(step: Step) -> Lifted:
    """``masked_fill(x, mask, value)``."""
    old, mask, value = step.args
    return _chosen(step, _truth(step, mask), value, old)


def _truth(step: Step, tensor: Lifted) -> sympy.Basic:
    return cast(align(tensor, len(step.shape)), torch.bool)


def _operand(step: Step, arg: Any) -> Lifted:
    """A number or a tensor in the coordinates and the dtype of the result."""
    if not isinstance(arg, Lifted):
        return Lifted(step.shape, step.dtype, scalar_element(arg, step.dtype))
    return Lifted(step.shape, step.dtype, cast(align(arg, len(step.shape)), step.dtype))


def _chosen(step: Step, condition: sympy.Basic, yes: Any, no: Any) -> Lifted:
    """One of two operands."""
    yes, no = _operand(step, yes), _operand(step, no)
    return Lifted(step.shape, step.dtype, choose(condition, yes, no, step.dtype))


def cat(step: Step) -> Lifted:
    """Tensors one after the other along a dimension."""
    tensors, dim = step.args[0], dim_of(step.args[1], len(step.shape))
    tensors = [t for t in tensors if t.shape != (0,)]
    end: sympy.Expr = sum((t.shape[dim] for t in tensors), sympy.S.Zero)
    result: Lifted | None = None
    for tensor in reversed(tensors):
        end = end - tensor.shape[dim]
        indices: list[sympy.Expr] = list(DIMS[: len(step.shape)])
        indices[dim] = DIMS[dim] - end if tensor.shape[dim] != 1 else sympy.S.Zero
        piece = reindexed(tensor, step.shape, indices)
        before = DIMS[dim] < end + tensor.shape[dim]
        last = result is None
        result = _operand(step, piece) if last else _chosen(step, before, piece, result)
    if result is None:
        raise Unliftable("an empty cat")
    return result


def constant_pad(step: Step) -> Lifted:
    """A constant around a tensor, in its last dimensions."""
    tensor, around, value = step.args
    indices: list[sympy.Expr] = list(DIMS[: len(step.shape)])
    inside = []
    for number in range(len(around) // 2):
        before, dim = around[2 * number], len(step.shape) - 1 - number
        size = tensor.shape[dim]
        inside += [DIMS[dim] >= before, DIMS[dim] < before + size]
        indices[dim] = sympy.S.Zero if size == 1 else DIMS[dim] - before
    return _chosen(step, sympy.And(*inside), reindexed(tensor, step.shape, indices), value)


def stack(step: Step) -> Lifted:
    """Tensors one after the other along a new dimension."""
    tensors, dim = step.args[0], dim_of(step.args[1], len(step.shape))
    rest = [DIMS[d] for d in range(len(step.shape)) if d != dim]
    result = reindexed(tensors[-1], step.shape, rest)
    for number in range(len(tensors) - 2, -1, -1):
        piece = reindexed(tensors[number], step.shape, rest)
        result = _chosen(step, sympy.Eq(DIMS[dim], number), piece, result)
    return result


def slice_scatter(step: Step) -> Lifted:
    """``x[..., start:end:step, ...] = source``."""
    tensor, source, dim, start, end, stride = step.args
    dim = dim_of(dim, len(step.shape))
    size, index = step.shape[dim], DIMS[dim]
    first = slice_start(start, size)
    inside = [index >= first]
    if end is not None and not (sympy.sympify(end).is_Integer and int(end) >= 2**62):
        inside.append(index < position(end, size))
    if stride != 1:
        inside.append(sympy.Eq(FloorMod(index - first, sympy.sympify(stride)), 0))
    place = FloorDiv(index - first, sympy.sympify(stride))
    indices: list[sympy.Expr] = list(DIMS[: len(step.shape)])
    indices[dim] = sympy.S.Zero if source.shape[dim] == 1 else place
    return _chosen(step, sympy.And(*inside), reindexed(source, step.shape, indices), tensor)


def select_scatter(step: Step) -> Lifted:
    """``x[..., index, ...] = source``."""
    tensor, source, dim, index = step.args
    dim = dim_of(dim, len(step.shape))
    rest = [DIMS[d] for d in range(len(step.shape)) if d != dim]
    written = reindexed(source, step.shape, rest)
    here = sympy.Eq(DIMS[dim], position(index, step.shape[dim]))
    return _chosen(step, here, written, tensor)


def index_put(step: Step) -> Lifted:
    """``x[i, j] = value`` for indices that are constants, or bool masks, and one value."""
    tensor, indices, value = step.args[:3]
    if len(step.args) > 3 and step.args[3]:
        raise Unliftable("it accumulates")
    if any(size != 1 for size in value.shape):
        raise Unliftable("it writes several values at computed positions")
    conditions, dim = [], 0
    for index in indices:
        width = 1 if index is None or index.dtype != torch.bool else len(index.shape)
        if index is not None:
            conditions.append(_written_at(step, index, dim))
        dim += width
    many = [i for i in indices if i is not None and any(size != 1 for size in i.shape)]
    if len(many) > 1:
        raise Unliftable("it writes at pairs of computed positions")
    zero = [sympy.S.Zero] * len(value.shape)
    return _chosen(step, sympy.And(*conditions), reindexed(value, step.shape, zero), tensor)


def index_fill(step: Step) -> Lifted:
    """``x[..., index, ...] = value`` along one dimension."""
    tensor, dim, index, value = step.args
    scalar = Lifted((), step.dtype, _operand(step, value).element)
    indices = [None] * dim_of(dim, len(step.shape)) + [index]
    return index_put(replace(step, args=(tensor, indices, scalar)))


def _written_at(step: Step, index: Lifted, dim: int) -> sympy.Basic:
    here = DIMS[dim]
    if index.dtype == torch.bool:
        moved = {DIMS[i]: DIMS[dim + i] for i in range(len(index.shape))}
        return index.condition.xreplace(moved)
    if any(size != 1 for size in index.shape):
        return _in_range(step, index, dim)
    if len(index.cases) != 1:
        raise Unliftable("it writes at a computed position")
    return sympy.Eq(here, position(index.cases[0][1], step.shape[dim]))


def _in_range(step: Step, index: Lifted, dim: int) -> sympy.Basic:
    """Positions ``start + stride * d`` for d below the length of the index."""
    sizes = [size for size in index.shape if size != 1]
    if len(sizes) != 1:
        raise Unliftable("it writes at computed positions")
    (size,) = sizes
    counter = DIMS[next(i for i, s in enumerate(index.shape) if s != 1)]
    value = sympy.sympify(index.cases[0][1]) if len(index.cases) == 1 else None
    stride = sympy.S.Zero if value is None else sympy.expand(value).coeff(counter)
    if value is None or not (stride.is_Integer and stride > 0):
        raise Unliftable("it writes at computed positions")
    first = sympy.expand(value - stride * counter)
    if first.has(*DIMS) or not step.simplifier.ranges.nonnegative(first):
        raise Unliftable("it writes at computed positions")
    offset = DIMS[dim] - first
    inside = sympy.And(offset >= 0, offset <= stride * (size - 1))
    return sympy.And(inside, sympy.Eq(FloorMod(offset, stride), 0)) if stride != 1 else inside


def running_sum(step: Step) -> Lifted:
    """``cumsum`` along a dimension that the element does not depend on."""
    dim = dim_of(step.args[1], len(step.shape)) if step.shape else 0
    return _along(step, [dim], DIMS[dim] + 1)


def total(step: Step) -> Lifted:
    """``sum`` over dimensions that the element does not depend on."""
    dims = _reduced(step)
    count = sympy.Mul(*(step.tensor.shape[d] for d in dims))
    return _reduce(step, _along(step, dims, count), dims)


def unchanged(step: Step) -> Lifted:
    """``any``, ``all``, ``amax``, ``amin`` over dimensions the element does not depend on."""
    dims = _reduced(step)
    return _reduce(step, _along(step, dims, sympy.S.One), dims)


def _reduced(step: Step) -> list[int]:
    rank = len(step.tensor.shape)
    dims = step.args[1] if len(step.args) > 1 else None
    if dims is None or dims == []:
        return list(range(rank))
    return [dim_of(d, rank) for d in ([dims] if isinstance(dims, int) else dims)]


def _along(step: Step, dims: Sequence[int], factor: sympy.Expr) -> Lifted:
    tensor, symbols = step.tensor, [DIMS[d] for d in dims]
    parts = (p for case in tensor.cases for p in case if isinstance(p, sympy.Basic))
    if tensor.is_float_data or any(part.has(*symbols) for part in parts):
        raise Unliftable("it sums over run-time data or positions")
    if factor == 1:
        return Lifted(tensor.shape, step.dtype, cast(tensor, step.dtype))
    if any(isinstance(v, float) and not v.is_integer() for _, v in tensor.cases):
        raise Unliftable("it sums fractions")
    if step.dtype in (torch.float16, torch.bfloat16):
        raise Unliftable(f"it sums in {step.dtype}")
    whole = [(c, v if isinstance(v, sympy.Basic) else int(v)) for c, v in tensor.cases]
    return Lifted(tensor.shape, step.dtype, merged((c, v * factor) for c, v in whole))


def _reduce(step: Step, tensor: Lifted, dims: Sequence[int]) -> Lifted:
    keepdim = len(step.shape) == len(tensor.shape)
    left = iter([d for i, d in enumerate(DIMS) if not keepdim or i not in dims])
    indices = [sympy.S.Zero if d in dims else next(left) for d in range(len(tensor.shape))]
    return reindexed(tensor, step.shape, indices)


BUILDERS: dict[str, Handler] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda step: _operand(step, 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda step: _operand(step, 1)),
    **dict.fromkeys(_VALUE_AT, filled),
    "arange": arange,
    "eye": eye,
    "tril": triangle,
    "triu": triangle,
    "where": where,
    "masked_fill": masked_fill,
    "cat": cat,
    "constant_pad_nd": constant_pad,
    "stack": stack,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "index_put": index_put,
    "index_fill": index_fill,
    "cumsum": running_sum,
    "sum": total,
    **dict.fromkeys(("any", "all", "amax", "amin"), unchanged),
}
