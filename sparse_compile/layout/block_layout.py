"""BlockLayout: which blocks of the score matrix are visited, by rows and by columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.spec.view import Order

#: How a block of the score matrix relates to the mask.
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Load:
    """How many blocks lines visit; of classes, the one that visits most. Known on the host.

    Attributes:
        n: number of lines.
        bounds: at most all blocks of all lines together, and at least the most that any visits; or
            what asks the device for these two.
        made: int64 [n] on the CPU, the blocks of each line; or what asks the device for it.
    """

    n: int
    bounds: tuple[int, int] | Callable[[], tuple[int, int]] = field(repr=False)
    made: Tensor | Callable[[], Tensor] = field(repr=False)

    @staticmethod
    def of(lines: Tensor) -> Load:
        """That of int64 [n] on the CPU."""
        most = int(lines.max()) if lines.numel() else 0
        return Load(lines.numel(), (int(lines.sum()), most), lines)

    @staticmethod
    def sum(loads: Sequence[Load]) -> Load:
        """Of lines that visit what those of every one of ``loads`` do."""
        if len(loads) == 1:
            return loads[0]

        def bounds() -> tuple[int, int]:
            return sum(load.total for load in loads), sum(load.most for load in loads)

        return Load(loads[0].n, bounds, lambda: torch.stack([load.lines for load in loads]).sum(0))

    @functools.cached_property
    def _bounds(self) -> tuple[int, int]:
        return self.bounds if isinstance(self.bounds, tuple) else self.bounds()

    @property
    def total(self) -> int:
        """Blocks of all lines together, or less (may synchronise with the device)."""
        return self._bounds[0]

    @property
    def most(self) -> int:
        """Blocks of the line that visits most, or more (may synchronise with the device)."""
        return self._bounds[1]

    @functools.cached_property
    def lines(self) -> Tensor:
        """int64 [n] on the CPU: blocks of each line (may synchronise with the device)."""
        return self.made if isinstance(self.made, Tensor) else self.made()


@dataclass(frozen=True)
class BlockLists:
    """One direction of a layout: for each line of blocks, the blocks to visit on the other side.

    A *line* is a row of blocks (all the key blocks of one query block) or, in the transpose, a
    column. Line ``r`` of class ``c`` visits::

        blocks = index[c, start[r] :][: counts[c, r].sum()]
        partial, full = blocks[: counts[c, r, 0]], blocks[counts[c, r, 0] :]

    Attributes:
        start: int32 [lines + 1]; the room reserved for each line, the same for every class. Or
            int32 [classes, lines + 1].
        counts: int32 [classes, lines, 2]; how many PARTIAL and how many FULL blocks.
        index: int32 [classes, start[-1]]; block numbers, each line's PARTIAL ones first, both kinds
            ascending. Room that a class does not use holds 0 and is never read.
        load: how many blocks lines visit, where the host knows.
    """

    start: Tensor
    counts: Tensor
    index: Tensor
    load: Load | None = field(default=None, repr=False, compare=False)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(start, counts, index)``."""
        return self.start, self.counts, self.index

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""
        start, counts, index = (t.to(device) for t in self.tensors())
        return BlockLists(start, counts, index, self.load)

    def entries(self, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(line, block, kind)`` of every visited block of class ``c``, int64 [visited] each.

        By line, PARTIAL before FULL (synchronises with the device).
        """
        start = (self.start if self.start.dim() == 1 else self.start[c]).long()
        line = torch.repeat_interleave(start.diff())
        partial, full = self.counts[c].long().unbind(-1)
        place = torch.arange(line.numel(), device=line.device) - start[line]
        used = place < (partial + full)[line]
        kind = torch.where(place < partial[line], PARTIAL, FULL)
        # A packed list may have more room than its lines.
        return line[used], self.index[c, : line.numel()].long()[used], kind[used]


@dataclass(frozen=True)
class BlockGrid:
    """How the score matrix [n_q, n_kv] is cut into blocks, for each class.

    A *class* is a (batch, head) pair with its own lists: ``batches`` is 1 when the mask does not
    depend on the batch entry, else the batch size; ``heads`` likewise for query heads. The class
    of (b, h) is ``(b % batches) * heads + h % heads``.

    Attributes:
        n_q, n_kv: length of the sequences, in tokens.
        q, kv: how the tokens of each side are put into blocks. Where the length does not fill
            them, blocks stick out.
        batches, heads: number of classes along each dimension.
    """

    n_q: int
    n_kv: int
    q: Order
    kv: Order
    batches: int
    heads: int

    @property
    def block_q(self) -> int:
        """Queries per block."""
        return self.q.block

    @property
    def block_kv(self) -> int:
        """Keys per block."""
        return self.kv.block

    @property
    def classes(self) -> int:
        """Number of (batch, head) classes."""
        return self.batches * self.heads

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Number of query blocks and of key blocks."""
        return self.q.blocks(self.n_q), self.kv.blocks(self.n_kv)

    def layout(
        self, rows: BlockLists, columns: BlockLists | Callable[[], BlockLists]
    ) -> BlockLayout:
        """The layout of these lists."""
        shape = self.n_q, self.n_kv, self.q, self.kv, self.batches, self.heads
        return BlockLayout(*shape, rows, columns)

    def unpacked(self, packed: Tensor) -> BlockLayout:
        """Views into a :meth:`BlockLayout.pack` vector of rows and columns; nothing is copied.

        It does not synchronise.
        """
        rows, cols = (
            functools.partial(unpacked_lists, packed, self.grid, self.classes, side)
            for side in (0, 1)
        )
        return self.layout(rows(), cols)

    def unfilled(self, room: int, device: torch.device) -> BlockLayout:
        """Lists that hold anything yet, as views of one vector that :meth:`BlockLayout.pack` gives.

        Args:
            room: for so many blocks of each class, in each direction.
            device: where they are.
        """
        fixed = sum(sum(_fixed(lines, self.classes)) for lines in self.grid)
        size = fixed + len(self.grid) * self.classes * _aligned(room)
        packed = torch.empty(size, dtype=torch.int32, device=device)
        rows, cols = (unpacked_lists(packed, self.grid, self.classes, side) for side in (0, 1))
        return replace(self.layout(rows, cols), packed=packed)


@dataclass(frozen=True)
class BlockLayout(BlockGrid):
    """The blocks of a grid that a mask visits; int32, proportional to the non-empty blocks.

    Attributes:
        rows: for each query block, its key blocks.
        columns: what :attr:`cols` holds, or what makes it: a forward needs the rows alone.
        listed: whether a selection names the blocks: others may hold pairs that the mask allows.
        packed: what :meth:`pack` gives, if the lists are views of one that nobody else has.
    """

    rows: BlockLists
    columns: BlockLists | Callable[[], BlockLists] = field(repr=False)
    listed: bool = False
    packed: Tensor | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def cols(self) -> BlockLists:
        """For each key block, its query blocks: the exact transpose of ``rows``."""
        return self.columns if isinstance(self.columns, BlockLists) else self.columns()

    def lines(self, axis: str) -> BlockLists:
        """The lists of the lines that are blocks of ``axis``, ``"q"`` or ``"kv"``."""
        return self.rows if axis == "q" else self.cols

    @property
    def nnz_blocks(self) -> int:
        """Visited blocks, summed over classes (synchronises with the device)."""
        return int(self.rows.counts.sum())

    @property
    def block_density(self) -> float:
        """Visited blocks over all blocks."""
        rows, cols = self.grid
        return self.nnz_blocks / (self.classes * rows * cols)

    @property
    def visited_pairs(self) -> int:
        """(q, kv) pairs inside visited blocks, counting only pairs that exist."""
        height, width = existing(self.q, self.n_q), existing(self.kv, self.n_kv)
        total = 0
        for c in range(self.classes):
            line, block, _ = (part.cpu() for part in self.rows.entries(c))
            total += int((height[line] * width[block]).sum())
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors."""
        tensors = (*self.rows.tensors(), *self.cols.tensors())
        return sum(t.numel() * t.element_size() for t in tensors)

    def kinds(self) -> Tensor:
        """int8 [classes, query blocks, key blocks] of EMPTY, PARTIAL, FULL; for tests and pictures.

        This is the only method that makes a rectangle.
        """
        dense = torch.zeros(self.classes, *self.grid, dtype=torch.int8)
        for c in range(self.classes):
            line, block, kind = (part.cpu() for part in self.rows.entries(c))
            dense[c, line, block] = kind.to(torch.int8)
        return dense

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        rows, cols = (lists.to(device) for lists in (self.rows, self.cols))
        return replace(self, rows=rows, columns=cols, packed=None)

    def pack(self) -> Tensor:
        """All lists in one int32 vector, so that a layout is one tensor in a graph.

        Layout of the vector: ``rows.start, rows.counts, cols.start, cols.counts, rows.index,
        cols.index``, the last two with the same room; so :meth:`unpacked` knows where each begins
        without reading anything from the device. Where a selection names the blocks, the columns
        are left out. Each begins at a multiple of 16 bytes, as kernels are compiled for; what is
        between them holds anything.
        """
        if self.packed is not None:
            return self.packed
        both = (self.rows,) if self.listed else (self.rows, self.cols)
        room = max(lists.index.shape[1] for lists in both)
        room = room if self.listed else _aligned(room)
        parts = [part for lists in both for part in (lists.start, lists.counts)]
        parts += [_with_room(lists.index, room) for lists in both]
        filler = self.rows.start.new_zeros(_ALIGNED - 1)
        flat = [piece for part in parts for piece in (part.flatten(), _filling(part, filler))]
        return torch.cat(flat[:-1])


#: int32 numbers in 16 bytes.
_ALIGNED = 4


def _aligned(n: int) -> int:
    return -(-n // _ALIGNED) * _ALIGNED


def _with_room(index: Tensor, room: int) -> Tensor:
    missing = room - index.shape[1]
    return torch.nn.functional.pad(index, (0, missing)) if missing else index


def _filling(part: Tensor, filler: Tensor) -> Tensor:
    return filler[: _aligned(part.numel()) - part.numel()]


def _fixed(lines: int, classes: int) -> tuple[int, int]:
    """Numbers that the start and the counts of one direction take in a packed vector."""
    return _aligned(lines + 1), _aligned(classes * lines * 2)


def unpacked_lists(packed: Tensor, lines: tuple[int, ...], classes: int, side: int) -> BlockLists:
    """One direction of the lists in a vector of :meth:`BlockLayout.pack`, as views of it.

    Args:
        packed: the vector.
        lines: for each direction that it holds, how many lines that has.
        classes: number of (batch, head) classes.
        side: the direction: 0 for rows, 1 for columns.
    """
    n = lines[side]
    fixed = [_fixed(n, classes) for n in lines]
    first, last = sum(map(sum, fixed[:side])), sum(map(sum, fixed))
    start = packed[first : first + n + 1]
    first += fixed[side][0]
    counts = packed[first : first + classes * n * 2].view(classes, n, 2)
    capacity = (packed.numel() - last) // len(lines)
    index = packed[last + side * capacity :][:capacity].view(classes, capacity // max(classes, 1))
    return BlockLists(start, counts, index)


def existing(order: Order, n: int) -> Tensor:
    """int64 [blocks]: how many tokens of each block exist in a sequence of ``n``."""
    if order.is_natural:
        return (n - torch.arange(order.blocks(n)) * order.block).clamp(max=order.block)
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)
    return (base[:, None] + torch.tensor(order.offsets()) < n).sum(1)


def line_starts(counts: Tensor) -> Tensor:
    """int32 [lines + 1]: the running total of int64 [lines]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class VisitedBlocks(NamedTuple):
    """The visited blocks of a layout as coordinates; int64 [visited] each.

    Attributes:
        classes: the (batch, head) class, ``(b % batches) * heads + h % heads``.
        q_blocks: the query block.
        kv_blocks: the key block.
        kinds: PARTIAL or FULL.
    """

    classes: Tensor
    q_blocks: Tensor
    kv_blocks: Tensor
    kinds: Tensor

    def select(self, chosen: Tensor) -> VisitedBlocks:
        """Those where bool [visited] ``chosen`` holds, or at these positions."""
        return VisitedBlocks(*(part[chosen] for part in self))

    def lists(self, classes: int, grid: tuple[int, int]) -> tuple[BlockLists, BlockLists]:
        """The lists of the rows and of the columns of a grid of blocks."""
        rows, cols = grid
        turned = self._replace(q_blocks=self.kv_blocks, kv_blocks=self.q_blocks)
        return self._rows(classes, rows), turned._rows(classes, cols)

    def _rows(self, classes: int, lines: int) -> BlockLists:
        """The lists of the rows, each with the room that its largest class needs."""
        line = self.classes * lines + self.q_blocks
        by_kind = line * 2 + (self.kinds == FULL)
        # By class, line and kind, ascending: sorting by block first keeps that order within a kind.
        order = self.kv_blocks.argsort()
        order = order[by_kind[order].argsort(stable=True)]
        counts = torch.bincount(by_kind, minlength=classes * lines * 2).view(classes, lines, 2)
        room = counts.sum(2).amax(0) if classes else counts.new_zeros(lines)
        start = line_starts(room)
        _, place = place_in_group(line[order], classes * lines)
        place += start.long()[self.q_blocks[order]]
        index = torch.zeros(classes, int(start[-1]), dtype=torch.int32, device=start.device)
        index[self.classes[order], place] = self.kv_blocks[order].to(torch.int32)
        return BlockLists(start, counts.to(torch.int32), index)


def place_in_group(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sizes int64 [groups], and where each entry stands in its group; ``group`` is sorted."""
    sizes = torch.bincount(group, minlength=groups)
    first = sizes.cumsum(0) - sizes
    return sizes, torch.arange(group.numel(), device=group.device) - first[group]


@functools.lru_cache(maxsize=64)
def places_of(order: Order, n: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [blocks * block]: the token at each place of an order, ``n`` where there is none."""
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten().to(device)
