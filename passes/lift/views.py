"""ATen operators that only move elements: the result reads its input at other indices.

Each handler takes a :class:`Step` and returns the lifted result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from sparse_compile.expr import FloorMod
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.value import (
    DIMS,
    Lifted,
    Shape,
    Unliftable,
    Value,
    align,
    combinations,
    mapped,
    merged,
    reindexed,
    substitute,
)


@dataclass(frozen=True)
class Step:
    """One call of an ATen operator, with its arguments lifted.

    Attributes:
        args: positional arguments in the order of the schema, defaults filled in: lifted tensors,
            symbolic sizes as sympy expressions, Python constants.
        shape, dtype: of the result.
        simplifier: for coordinates in ``shape``.
        target: the operator.
    """

    args: tuple[Any, ...]
    shape: Shape
    dtype: torch.dtype
    simplifier: Simplifier
    target: torch._ops.OpOverload

    @property
    def tensor(self) -> Lifted:
        """The first argument."""
        tensor = self.args[0]
        assert isinstance(tensor, Lifted)
        return tensor

    def reading(self, indices: Sequence[sympy.Expr]) -> Lifted:
        """The result where its elements are those of the first argument at ``indices``."""
        return reindexed(self.tensor, self.shape, indices)

    def moved(self, places: Mapping[int, sympy.Expr]) -> Lifted:
        """The same where only some dimensions are read at other places."""
        return self.reading([places.get(d, DIMS[d]) for d in range(len(self.shape))])


Handler = Callable[[Step], Lifted]


def dim_of(dim: int, rank: int) -> int:
    """A dimension number, counted from the front."""
    return dim + rank if dim < 0 else dim


def position(index: Any, size: sympy.Expr) -> sympy.Expr:
    """An index as Python means it: negative ones count from the end."""
    index = sympy.sympify(index)
    return index + size if index.is_negative else index


def same(step: Step) -> Lifted:
    """Clone, detach, alias, contiguous."""
    return step.tensor


def expand(step: Step) -> Lifted:
    """Broadcasting: dimensions of size one are read at 0, which is how they are stored."""
    return Lifted(step.shape, step.dtype, align(step.tensor, len(step.shape)).element)


def unsqueeze(step: Step) -> Lifted:
    """A new dimension of size one."""
    dim = dim_of(step.args[1], len(step.shape))
    return step.reading([DIMS[i] for i in range(len(step.shape)) if i != dim])


def squeeze(step: Step) -> Lifted:
    """Dimensions of size one removed: all of them, or those named."""
    shape = step.tensor.shape
    dims = step.args[1] if len(step.args) > 1 else range(len(shape))
    named = {dim_of(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    left = iter(DIMS)
    gone = [d in named and size == 1 for d, size in enumerate(shape)]
    return step.reading([sympy.S.Zero if is_gone else next(left) for is_gone in gone])


def permute(step: Step) -> Lifted:
    """Dimensions in another order."""
    return _permuted(step, [dim_of(d, len(step.shape)) for d in step.args[1]])


def transpose(step: Step) -> Lifted:
    """Two dimensions swapped."""
    order = list(range(len(step.shape)))
    a, b = (dim_of(d, len(order)) for d in step.args[1:3])
    order[a], order[b] = order[b], order[a]
    return _permuted(step, order)


def matrix_transpose(step: Step) -> Lifted:
    """``t``."""
    return _permuted(step, list(range(len(step.shape)))[::-1])


def _permuted(step: Step, order: Sequence[int]) -> Lifted:
    return step.reading([DIMS[order.index(d)] for d in range(len(order))])


def slice_(step: Step) -> Lifted:
    """``x[..., start:end:step, ...]``."""
    tensor, dim, start, _, stride = step.args
    dim = dim_of(dim, len(step.shape))
    return step.moved({dim: slice_start(start, tensor.shape[dim]) + stride * DIMS[dim]})


def slice_start(start: Any, size: sympy.Expr) -> sympy.Expr:
    """Where a slice begins; a start past either end means that end."""
    if start is None:
        return sympy.S.Zero
    first = position(start, size)
    return first if first == sympy.sympify(start) else sympy.Max(first, 0)


def select(step: Step) -> Lifted:
    """``x[..., index, ...]``, dropping the dimension."""
    tensor, dim, index = step.args
    dim = dim_of(dim, len(tensor.shape))
    indices: list[sympy.Expr] = list(DIMS[: len(step.shape)])
    indices.insert(dim, position(index, tensor.shape[dim]))
    return reindexed(tensor, step.shape, indices)


def flip(step: Step) -> Lifted:
    """Dimensions read backwards."""
    dims = [dim_of(d, len(step.shape)) for d in step.args[1]]
    return step.moved({dim: step.shape[dim] - 1 - DIMS[dim] for dim in dims})


def roll(step: Step) -> Lifted:
    """Dimensions rotated."""
    _, shifts, dims = (*step.args, ())[:3]
    if not dims:
        raise Unliftable("roll without dims")
    places: dict[int, sympy.Expr] = {}
    for shift, dim in zip(shifts, (dim_of(d, len(step.shape)) for d in dims), strict=True):
        places[dim] = step.simplifier.floormod(DIMS[dim] - shift, step.shape[dim])
    return step.moved(places)


def repeat(step: Step) -> Lifted:
    """Tiling."""
    tensor = align(step.tensor, len(step.shape))
    indices = [
        step.simplifier.floormod(DIMS[i], size) if size != 1 else sympy.S.Zero
        for i, size in enumerate(tensor.shape)
    ]
    return reindexed(tensor, step.shape, indices)


def view(step: Step) -> Lifted:
    """Reshaping: split the coordinates into groups that cover the same elements."""
    indices: dict[int, sympy.Expr] = {}
    for old, new in _groups(step.tensor.shape, step.shape):
        flat: sympy.Expr = sympy.S.Zero
        for dim in new:
            flat = flat * step.shape[dim] + (DIMS[dim] if step.shape[dim] != 1 else 0)
        for dim in reversed(old):
            size = step.tensor.shape[dim]
            if dim == old[0]:
                indices[dim] = flat
            else:
                indices[dim] = step.simplifier.floormod(flat, size)
                flat = step.simplifier.floordiv(flat, size)
    return step.reading([indices.get(d, sympy.S.Zero) for d in range(len(step.tensor.shape))])


def _groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of old and new dimensions with equal numbers of elements, in order."""
    left = [d for d, size in enumerate(old) if size != 1]
    right = [d for d, size in enumerate(new) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (sizes := (_count(old, a), _count(new, b)))[0] != sizes[1]:
            # Grow the side that is known to be smaller; when unsure, whichever still can.
            grow_left = bool((sizes[1] - sizes[0]).is_positive) or not right
            if not (left if grow_left else right):
                grow_left = not grow_left
            if not (left if grow_left else right):
                raise Unliftable(f"a view from {old} to {new}")
            (a if grow_left else b).append((left if grow_left else right).pop(0))
        groups.append((a, b))
    if left or right:
        raise Unliftable(f"a view from {old} to {new}")
    return groups


def _count(shape: Shape, dims: Sequence[int]) -> sympy.Expr:
    return sympy.expand(math.prod((shape[d] for d in dims), start=sympy.S.One))


def index(step: Step) -> Lifted:
    """``x[i, :, j]`` with index tensors, broadcast together."""
    tensor, indices = step.args[:2]
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in given.values()):
        raise Unliftable("it selects by a bool mask")
    rank = max(len(i.shape) for i in given.values())
    dims = sorted(given)
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    front = dims[0] if adjacent else 0
    rest = [d for d in range(len(tensor.shape)) if d not in given]
    plain = {d: (n if n < front else n + rank) for n, d in enumerate(rest)}
    where = {DIMS[i]: DIMS[front + i] for i in range(rank)}
    cases = [substitute(align(given[d], rank).cases, where) for d in dims]
    return _read_at(step, tensor, dims, cases, plain)


def gather(step: Step) -> Lifted:
    """``out[i, j] = x[index[i, j], j]``."""
    tensor, dim, indices = step.args[:3]
    dim = dim_of(dim, len(tensor.shape))
    plain = {d: d for d in range(len(tensor.shape)) if d != dim}
    return _read_at(step, tensor, [dim], [indices.cases], plain)


def index_select(step: Step) -> Lifted:
    """``x[..., indices, ...]`` along one dimension."""
    tensor, dim, indices = step.args
    where = [None] * dim_of(dim, len(tensor.shape)) + [align(indices, 1)]
    return index(replace(step, args=(tensor, where)))


def embedding(step: Step) -> Lifted:
    """``weight[indices]``, rows of a matrix."""
    weight, indices, padding = step.args[:3]
    if padding != -1:
        raise Unliftable("an embedding has a row without gradient")
    rank = len(indices.shape)
    return _read_at(step, weight, [0], [indices.cases], {1: rank})


def _read_at(
    step: Step,
    tensor: Lifted,
    dims: Sequence[int],
    cases: Sequence[tuple[tuple[sympy.Basic, Value], ...]],
    plain: dict[int, int],
) -> Lifted:
    """``tensor`` at computed indices along ``dims``, and at result dimension ``plain[d]`` else."""
    pieces: list[tuple[sympy.Basic, Lifted]] = []
    for condition, values in combinations(cases):
        indices: list[sympy.Expr] = [sympy.S.Zero] * len(tensor.shape)
        for d, target in plain.items():
            indices[d] = DIMS[target] if tensor.shape[d] != 1 else sympy.S.Zero
        for d, value in zip(dims, values, strict=True):
            indices[d] = _wrapped(step, sympy.sympify(value), tensor.shape[d])
        pieces.append((condition, reindexed(tensor, step.shape, indices)))
    if step.dtype == torch.bool:
        joined = sympy.Or(*(sympy.And(c, piece.condition) for c, piece in pieces))
        return Lifted(step.shape, step.dtype, joined)
    cases_out = merged((sympy.And(c, d), v) for c, piece in pieces for d, v in piece.cases)
    return Lifted(step.shape, step.dtype, cases_out)


def _wrapped(step: Step, value: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """An index in 0 .. size - 1; valid negative ones count from the end, as indexing does."""
    if size == 1:
        return sympy.S.Zero
    if value.is_Integer:
        return position(value, size)
    if step.simplifier.ranges.nonnegative(value):
        return value
    return FloorMod(value, size)


def cleaned(tensor: Lifted, simplifier: Simplifier) -> Lifted:
    """Size-one dimensions read at 0, and every expression simplified."""
    ones = {DIMS[d]: sympy.S.Zero for d, size in enumerate(tensor.shape) if size == 1}
    element = substitute(tensor.element, ones) if ones else tensor.element
    return Lifted(tensor.shape, tensor.dtype, mapped(element, simplifier))


VIEWS: dict[str, Handler] = {
    **dict.fromkeys(("clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "lift"), same),
    **dict.fromkeys(("view", "_unsafe_view", "view_copy", "_reshape_alias"), view),
    "expand": expand,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "permute": permute,
    "transpose": transpose,
    "t": matrix_transpose,
    "slice": slice_,
    "select": select,
    "flip": flip,
    "roll": roll,
    "repeat": repeat,
    "index": index,
    "_unsafe_index": index,
    "gather": gather,
    "index_select": index_select,
    "embedding": embedding,
}
