"""The blocks that a mask visits, in the form of torch's BlockMask.

A block is listed if one of its pairs attends, and full if all do; blocks that stick out of the
lengths are not full. Where the analysis of intervals leaves that open, the pairs of the block are
looked at, and no others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.expr import MaskExpr, evaluate
from sparse_compile.flex.program import program_of
from sparse_compile.flex.record import Recorded, given
from sparse_compile.layout.block_layout import FULL, PARTIAL, place_in_group
from sparse_compile.layout.build import build_layout
from sparse_compile.layout.interop.coo import to_coo
from sparse_compile.layout.superset import Problem, ProblemShape

#: Pairs that are looked at in one go.
_PAIRS = 1 << 22
#: Places among the queries, and the keys, of a block that are looked at first.
_FEW = 9


class Lists(NamedTuple):
    """Lists of blocks as attributes of torch's BlockMask, see there."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None = None
    full_kv_indices: Tensor | None = None
    q_num_blocks: Tensor | None = None
    q_indices: Tensor | None = None
    full_q_num_blocks: Tensor | None = None
    full_q_indices: Tensor | None = None

    @staticmethod
    def of(mask: Any) -> Lists:
        """Those of a mask of torch."""
        return Lists(*(getattr(mask, name) for name in Lists._fields))

    def check(self) -> None:
        """Raise if they are incomplete."""
        pairs = (self.full_kv_num_blocks, self.full_kv_indices)
        pairs_q = (self.full_q_num_blocks, self.full_q_indices)
        if self.kv_num_blocks is None or self.kv_indices is None or self.kv_indices.dim() < 2:
            raise BadPattern(
                "sparse_compile: a BlockMask needs kv_num_blocks [..., rows] and kv_indices "
                "[..., rows, columns]."
            )
        if any((count is None) != (index is None) for count, index in (pairs, pairs_q)):
            raise BadPattern(
                "sparse_compile: a BlockMask got one of the counts and the indices of full blocks "
                "without the other. Pass both, or neither."
            )

    def to(self, device: torch.device) -> Lists:
        """The same on a device."""
        return Lists._make(None if one is None else one.to(device) for one in self)

    def part(self, index: tuple[Any, ...]) -> Lists:
        """Those of a part by batch, head and block of queries."""
        own = (None if one is None else one[index] for one in self[:4])
        return with_transposed(Lists._make([*own, *[None] * 4]))

    def cropped(self, grid: tuple[int, int]) -> Lists:
        """The upper left corner."""
        kinds = kinds_of(self)[..., : grid[0], : grid[1]]
        return from_kinds(kinds, self.full_kv_num_blocks is not None)


class Visited(NamedTuple):
    """Blocks that are visited, int64, by batch entry and head, row and column.

    Attributes:
        group: batch entry times heads, and head.
        q, kv: the block of queries, and of keys.
        full: bool, whether all pairs attend.
    """

    group: Tensor
    q: Tensor
    kv: Tensor
    full: Tensor


def visited_blocks(
    recorded: Recorded,
    sizes: tuple[int, ...],
    lengths: tuple[int, int],
    block: tuple[int, int],
    device: torch.device,
) -> Visited:
    """The blocks that a mask visits.

    Args:
        recorded: its function.
        sizes: batch and heads.
        lengths: number of queries and of keys.
        block: queries and keys of a block.
        device: where they are listed.
    """
    shape = ProblemShape(sizes[0], sizes[1], *lengths)
    program = program_of(recorded.text, tuple(shape))
    tables = [
        given(recorded.tensors[number], dtype, device).detach().contiguous()
        for number, dtype in zip(program.tables, program.mask.tables, strict=True)
    ]
    numbers = recorded.sizes[: program.mask.n_sizes]
    layout = build_layout(Problem.of(program.mask, shape, block, numbers), tables, device)
    found = to_coo(layout)
    b, h = found.classes // layout.heads, found.classes % layout.heads
    partial = found.kinds == PARTIAL
    at = [part[partial] for part in (b, h, found.q_blocks, found.kv_blocks)]
    some, every = _Pairs(program.mask, tables, numbers, block, lengths).kinds(at)
    kept, full = torch.ones_like(partial), found.kinds == FULL
    kept[partial], full[partial] = some, every
    b, h, q, kv, full = (x[kept] for x in (b, h, found.q_blocks, found.kv_blocks, full))
    return _spread(Visited(b * sizes[1] + h, q, kv, full), (layout.batches, layout.heads), sizes)


def _spread(one: Visited, classes: tuple[int, int], sizes: tuple[int, ...]) -> Visited:
    """Blocks that batch entries or heads share, once for each of them."""
    batches = sizes[0] if classes[0] == 1 else 1
    heads = sizes[1] if classes[1] == 1 else 1
    if batches * heads == 1:
        return one
    device = one.group.device
    more = torch.arange(batches, device=device)[:, None] * sizes[1]
    more = (more + torch.arange(heads, device=device)).flatten()[:, None]
    group = (one.group + more).flatten()
    q, kv, full = (x.repeat(batches * heads) for x in (one.q, one.kv, one.full))
    return Visited(group, q, kv, full)


@dataclass(frozen=True)
class _Pairs:
    """A mask, to be looked at pair by pair.

    Attributes:
        mask, tables, numbers: the predicate, and what it reads.
        block, lengths: of queries and of keys.
    """

    mask: MaskExpr
    tables: Sequence[Tensor]
    numbers: tuple[int, ...]
    block: tuple[int, int]
    lengths: tuple[int, int]

    def kinds(self, at: Sequence[Tensor]) -> Tensor:
        """Whether some pair of each block attends, and whether all do: bool [2, blocks].

        Args:
            at: int64, batch entry, head, block of queries and block of keys of each block.
        """
        # Few pairs tell of most blocks that they are neither empty nor full.
        found = self._look(at, [_few(size) for size in self.block])
        open_ = found[0] == found[1]
        device = at[0].device
        rest = [part[open_] for part in at]
        found[:, open_] = self._look(rest, [torch.arange(n, device=device) for n in self.block])
        return found

    def _look(self, at: Sequence[Tensor], inside: Sequence[Tensor]) -> Tensor:
        device, (n_q, n_kv) = at[0].device, self.lengths
        rows, columns = (part.to(device) for part in inside)
        at_once = max(1, _PAIRS // (len(rows) * len(columns)))
        found = [torch.zeros(2, 0, dtype=torch.bool, device=device)]
        for b, h, q, kv in zip(*(torch.split(part, at_once) for part in at), strict=True):
            if not len(q):
                continue
            at_q = q[:, None, None] * self.block[0] + rows[:, None]
            at_kv = kv[:, None, None] * self.block[1] + columns
            places = {"b": b[:, None, None], "h": h[:, None, None], "q": at_q, "kv": at_kv}
            allowed = evaluate(self.mask, places, n_q, n_kv, self.tables, self.numbers)
            allowed = (allowed & (at_q < n_q) & (at_kv < n_kv)).flatten(1)
            found.append(torch.stack([allowed.any(1), allowed.all(1)]))
        return torch.cat(found, 1)


def _few(size: int) -> Tensor:
    """Places in a block, its ends among them."""
    return torch.linspace(0, size - 1, min(size, _FEW)).long()


def visited_in(lists: Lists) -> Visited:
    """The blocks of lists."""
    kinds = kinds_of(lists)
    group, q, kv = kinds.flatten(0, -3).nonzero().unbind(1)
    return Visited(group, q, kv, kinds.flatten(0, -3)[group, q, kv] == FULL)


def kinds_of(lists: Lists) -> Tensor:
    """Of each block 0, PARTIAL or FULL: int32 [..., rows, columns]; at least 4 axes."""
    found = _dense(lists.kv_num_blocks, lists.kv_indices, PARTIAL)
    if lists.full_kv_num_blocks is not None and lists.full_kv_indices is not None:
        full = _dense(lists.full_kv_num_blocks, lists.full_kv_indices, FULL)
        found = torch.maximum(found, full)
    return found[(None,) * (4 - found.dim())] if found.dim() < 4 else found


def _dense(count: Tensor, index: Tensor, kind: int) -> Tensor:
    columns = index.shape[-1]
    live = torch.arange(columns, device=index.device) < count[..., None]
    # What stands behind the count is undefined; it goes to a column past the end.
    places = torch.where(live, index.long(), columns)
    empty = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.int32, device=index.device)
    return empty.scatter(-1, places, kind)[..., :columns]


def from_kinds(kinds: Tensor, separate: bool) -> Lists:
    """Lists from the kinds of all blocks."""
    partial = kinds == PARTIAL if separate else kinds != 0
    full = _ordered(kinds == FULL) if separate else (None, None)
    return with_transposed(Lists(*_ordered(partial), *full))


def _ordered(listed: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return listed.sum(-1, dtype=torch.int32), index.to(torch.int32)


def with_transposed(lists: Lists) -> Lists:
    """The same with the lists of blocks of queries for each block of keys."""
    q = _ordered(_dense(lists.kv_num_blocks, lists.kv_indices, 1).mT != 0)
    full: tuple[Tensor | None, Tensor | None] = None, None
    if lists.full_kv_num_blocks is not None and lists.full_kv_indices is not None:
        full = _ordered(_dense(lists.full_kv_num_blocks, lists.full_kv_indices, 1).mT != 0)
    return Lists(*lists[:4], *q, *full)


def lists_of(
    visited: Visited, sizes: tuple[int, ...], grid: tuple[int, int], separate: bool
) -> Lists:
    """Visited blocks as lists; with ``separate`` those of full blocks stand apart."""
    full = visited.full & separate
    sides = []
    for line, place, (lines, width) in (
        (visited.q, visited.kv, grid),
        (visited.kv, visited.q, grid[::-1]),
    ):
        line = visited.group * lines + line
        order = torch.argsort(line * width + place)
        pairs: list[Tensor | None] = []
        for chosen in (~full, full):
            if chosen is full and not separate:
                pairs += [None, None]
                continue
            mine = order[chosen[order]]
            at, what = line[mine], place[mine]
            counts, rank = place_in_group(at, math.prod(sizes) * lines)
            index = torch.zeros(
                math.prod(sizes) * lines, width, dtype=torch.int32, device=line.device
            )
            index[at, rank] = what.to(torch.int32)
            pairs += [
                counts.to(torch.int32).view(*sizes, lines),
                index.view(*sizes, lines, width),
            ]
        sides += pairs
    return Lists._make(sides)


def picture(
    visited: Visited,
    sizes: tuple[int, ...],
    grid: tuple[int, int],
    grid_size: int | tuple[int, int],
    limit: int,
) -> str:
    """Which blocks are visited, as torch draws it."""
    if isinstance(grid_size, int):
        most = grid if grid_size == -1 else (grid_size, grid_size)
    else:
        most = grid_size
    steps = [max(1, -(-n // m)) for n, m in zip(grid, most, strict=True)]
    rows, columns = (-(-n // step) for n, step in zip(grid, steps, strict=True))
    drawn = []
    for number, at in enumerate(itertools.product(*map(range, sizes))):
        if number == limit:
            drawn += ["...", "To print out more, set BlockMask.to_string(limit=N)"]
            drawn.append(
                "You can also index (BlockMask[batch, head]) to choose a specific batch or head"
            )
            break
        mine = visited.group == number
        cell = visited.q[mine] // steps[0] * columns + visited.kv[mine] // steps[1]
        counts = torch.bincount(cell, minlength=rows * columns).view(rows, columns).tolist()
        lines = []
        for r, line in enumerate(counts):
            height = min(steps[0], grid[0] - r * steps[0])
            widths = (min(steps[1], grid[1] - c * steps[1]) for c in range(columns))
            lines.append("".join(_cell(n, height * w) for n, w in zip(line, widths, strict=True)))
        drawn.append(f"{at}\n" + "\n".join(lines) + "\n")
    return "\n".join(drawn)


def _cell(count: int, blocks: int) -> str:
    return "██" if count == blocks else "  " if count == 0 else "░░"
