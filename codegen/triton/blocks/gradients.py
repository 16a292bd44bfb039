"""Gradients of learned tensors, from the sums that a kernel left of each lookup.

Where a lookup names coordinates as they are, a kernel adds up the rest in one launch. Where it
computes indices, they are computed once more, and sums that belong to one number are added up in
the order in which they stand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from sparse_compile.codegen.added_up import added_up
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton.blocks.learned import Band, Looked, Sums
from sparse_compile.codegen.triton.calls import Running
from sparse_compile.expr import KV, B, FloorDiv, H, Q, indices_at, table_index

#: What the axes of sums are, [b, h, r, x]; None: tiles, or nothing.
_AXES: dict[Sums, tuple[sympy.Symbol | None, ...]] = {
    Sums.QUERIES: (B, H, None, Q),
    Sums.KEYS: (B, H, None, KV),
    Sums.APART: (B, H, None, KV),
    Sums.DISTANCES: (B, H, None, KV),
    Sums.PAIRS: (B, H, Q, KV),
}


def gradient_of(
    running: Running, number: int, looked: Sequence[Looked], left: Mapping[int, Tensor]
) -> Tensor:
    """The gradient of a learned tensor, in its dtype.

    Args:
        running: the call.
        number: of the tensor.
        looked: the lookups whose sums were asked for.
        left: what the kernel left of each, as :meth:`Looked.shape` says.
    """
    of = running.call.learned[number]
    own = [one for one in looked if table_index(one.lookup) == number]
    if not own:
        return of.new_zeros(of.shape)
    if len(own) == 1:
        return _total(running, own[0], left[own[0].number], of.dtype)
    parts = [_total(running, one, left[one.number], torch.float32) for one in own]
    return functools.reduce(torch.add, parts).to(of.dtype)


def _total(running: Running, one: Looked, left: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of what a lookup reads, from what the kernel left of it."""
    call = running.call
    sizes = tuple(call.learned[table_index(one.lookup)].shape)
    merge = Merge.of(call, one, left, sizes)
    if merge is None:
        return _scattered(call, one, left, sizes).to(dtype)
    if dtype == left.dtype and merge.is_all(left):
        return left.view(sizes)
    found = torch.empty(sizes, dtype=dtype, device=left.device)
    programs, values = merge.launch
    values |= {"ENDS": one.is_placed}
    running.start("merge_learned", (programs,), {"SUM": left, "GRAD": found}, **values)
    return found


@dataclass(frozen=True)
class Merge:
    """How sums [b, h, r, x] are added up by one launch.

    Attributes:
        extents: of the sums.
        steps: how far apart neighbours along each axis are in the tensor; 0 for those that are
            added up.
        group: so many neighbouring heads are added up.
        width: how far apart rows of sums are.
        first: where the first number of a row belongs.
    """

    extents: tuple[int, ...]
    steps: tuple[int, ...]
    group: int
    width: int
    first: int = 0

    @staticmethod
    def of(call: AttentionCall, one: Looked, left: Tensor, sizes: tuple[int, ...]) -> Merge | None:
        """For what is left of a lookup in a tensor of some sizes; None if it computes indices."""
        args, axes = list(one.lookup.args), _AXES[one.sums]
        n_x, falling = left.shape[-1], False
        if one.is_placed:
            band = one.band(call)
            if band.dim is None:
                return None
            n_x, falling, args[band.dim] = band.places, band.falling, KV
        extents = *left.shape[:2], left.shape[2] if left.dim() == 4 else 1, n_x
        found = _steps(args, axes, sizes, extents)
        if found is None or 0 in extents:
            return None
        (*steps, step_x), group = found
        first = (n_x - 1) * step_x if falling else 0
        last = -step_x if falling else step_x
        return Merge(extents, (*steps, last), group, left.shape[-1], first)

    def is_all(self, left: Tensor) -> bool:
        """Whether what is left is the gradient, as it stands."""
        steps = left.stride() if left.dim() == 4 else (*left.stride()[:2], 1, left.stride(2))
        axes = zip(self.extents, self.steps, steps, strict=True)
        return left.shape[-1] == self.extents[3] and all(n == 1 or a == b for n, a, b in axes)

    @property
    def launch(self) -> tuple[int, dict[str, int]]:
        """How many programs there are, and values of parameters."""
        extents, steps, width = self._with_long_rows()
        if not steps[3]:
            # All of a row is added up, which is one of queries: as if it were a column.
            extents, width = (*extents[:2], extents[3], 1), 1
        kept = [n if step else 1 for n, step in zip(extents[:3], steps[:3], strict=True)]
        kept[1] //= self.group
        added = [n // k for n, k in zip(extents[:3], kept, strict=True)]
        n_x, n_added = extents[3], math.prod(added)
        rows, columns = (2048, 1) if n_x == 1 else (64, 64) if n_added >= 64 else (1, 1024)
        blocks = -(-n_x // columns)
        values = {"blocks": blocks, "width": width, "n_x": n_x, "n_added": n_added}
        values |= {"kept_h": kept[1], "kept_r": kept[2], "added_h": added[1], "added_r": added[2]}
        values |= {f"step_{axis}": step for axis, step in zip("bhrx", steps, strict=True)}
        values |= {"step_0": self.first, "added_b": added[0], "ROWS": rows, "COLUMNS": columns}
        return blocks * math.prod(kept), values

    def _with_long_rows(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Extents, steps and width; rows that follow one another here and there are one."""
        (*outer, n_r, n_x), (*steps, step_r, step_x) = self.extents, self.steps
        if n_r == 1 or not step_x or step_r != n_x * step_x or self.width != n_x:
            return self.extents, self.steps, self.width
        return (*outer, 1, n_r * n_x), (*steps, 0, step_x), n_r * n_x


def _steps(
    args: Sequence[sympy.Basic],
    axes: Sequence[sympy.Symbol | None],
    sizes: Sequence[int],
    extents: Sequence[int],
) -> tuple[list[int], int] | None:
    """The steps and the group of a :class:`Merge`.

    None if the tensor is not indexed by axes as they are, or groups of heads, all of each.
    """
    steps, group = [0] * 4, 1
    for d, (arg, size) in enumerate(zip(args, sizes, strict=True)):
        if arg == 0 and size == 1:
            continue
        if isinstance(arg, FloorDiv) and arg.args[0] == H and arg.args[1].is_Integer:
            arg, group = H, int(arg.args[1])
        if arg not in axes or steps[at := axes.index(arg)]:
            return None
        if extents[at] != size * (group if arg == H else 1):
            return None
        steps[at] = math.prod(sizes[d + 1 :])
    return steps, group


def _scattered(call: AttentionCall, one: Looked, left: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The sums by the indices of a lookup, fp32."""
    if one.is_placed or one.sums is Sums.KEYS:
        left = left.sum(2)
    if one.is_placed:
        left = _with_ends(left, one.band(call))
    if B not in one.lookup.free_symbols and left.shape[0] > 1:
        left = left.sum(0, keepdim=True)
    rank, device = left.dim(), left.device
    places = [_leading(n, axis, rank, device) for axis, n in enumerate(left.shape)]
    where = {"b": places[0], "h": places[1], "q": places[2], "kv": places[-1]}
    if one.is_placed:
        where |= {"q": torch.zeros_like(places[2]), "kv": places[2] - one.band(call).offset}
    indices = indices_at(one.lookup.args, call.score_data(where))
    if one.is_placed and (dim := one.band(call).dim) is not None:
        indices[dim] = places[2]
    within = [at.clamp(0, n - 1) for at, n in zip(indices, sizes, strict=True)]
    return added_up(left, within, sizes)


def _with_ends(left: Tensor, band: Band) -> Tensor:
    """[..., places + 2] as [..., places], in the order of the tensor: ends get what is beyond."""
    found = left[..., : band.places]
    if band.places:
        found[..., 0] += left[..., -2]
        found[..., -1] += left[..., -1]
    return found.flip(-1) if band.falling else found


def _leading(n: int, axis: int, rank: int, device: torch.device) -> Tensor:
    """0 to n - 1 along an axis of tensors of some rank."""
    return torch.arange(n, device=device).view([-1 if d == axis else 1 for d in range(rank)])
