"""From block lists to few large calls: runs of adjacent key blocks, batched over query tiles.

A *tile* is a few adjacent query blocks. The keys of a tile are cut into *segments*, runs of
adjacent key blocks. Segments that advance by a constant step from tile to tile form one
:class:`Strided` batch, which reads Q, K and V through overlapping views and copies nothing. What is
left over, the scattered short segments, is gathered: one :class:`Gathered` batch for the tiles with
about the same number of blocks. Partial results of a tile merge by log-sum-exp.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_compile.codegen.cpu.batches import Batch, Gathered, Strided
from sparse_compile.layout import BlockLayout

#: A batch of fewer scores than this, per head, does not repay a call of its own ...
SMALL_BATCH = 1 << 15
#: ... unless there are only a few of them.
FEW_SMALL_BATCHES = 16
#: Tiles with more segments than this merge too often: their short segments are gathered.
MANY_SEGMENTS = 6
SHORT_SEGMENT = 128
#: A stretch of FULL blocks of this many keys runs on its own, without a bias.
LONG_FULL = 512
#: Longest segment with a bias, in keys: bounds the memory of a bias.
LONG_PARTIAL = 2048
#: Cost of a call, in scores.
CALL = 1 << 13
#: Most query rows of a tile.
MAX_ROWS = 1024

_Shape = tuple[int, int, bool]


@dataclass(frozen=True)
class Plan:
    """The calls for one class of a layout, in order.

    Attributes:
        batches: what to run; those with ``merge`` come after the ones they merge into.
        complete: whether every query belongs to some batch.
    """

    batches: tuple[Batch, ...]
    complete: bool


def make_plan(layout: BlockLayout, index: int) -> Plan:
    """The plan of class ``index`` of a layout on the CPU."""
    tiles = choose_tiles(layout, index)
    segments = segments_of(tiles)
    stacked: list[Batch] = []
    runs = join(segments, tiles.rows)
    if not layout.listed:
        # A tile of several rows visits all of their blocks: the mask leaves out what is not theirs.
        stacked, runs = _stack(runs, segments)
    regular, small = _split(runs, len(segments), tiles)
    batches = stacked + _batches(tiles, regular, small)
    if sum(isinstance(batch, Gathered) for batch in batches) * 4 > len(small):
        # Hardly anything to batch: gathering does not pay.
        batches = stacked + _batches(tiles, runs, [])
    batches.sort(key=lambda batch: batch.merge)
    complete = len({segment.q_start for segment in segments}) == tiles.lines.numel()
    return Plan(tuple(batches), complete)


@dataclass(frozen=True)
class TileBlocks:
    """The key blocks of each tile of one class of a layout.

    Attributes:
        layout: whose blocks they are.
        rows: queries in a tile; the last tile may have fewer.
        tile: int64 [blocks], ascending.
        block: int64 [blocks], the key block; ascending within a tile.
        full: int64 [blocks], how many of the tile's query blocks may see all of the key block.
        lines: int64 [tiles], how many query blocks the tile has.
    """

    layout: BlockLayout
    rows: int
    tile: Tensor
    block: Tensor
    full: Tensor
    lines: Tensor

    def rows_of(self, tile: int) -> int:
        """Number of queries of a tile."""
        return min(self.rows, self.layout.n_q - tile * self.rows)

    def doubled(self) -> TileBlocks:
        """Tiles of twice the size."""
        width = self.layout.grid[1]
        key, order = (self.tile // 2 * width + self.block).sort(stable=True)
        unique, inverse = torch.unique_consecutive(key, return_inverse=True)
        full = torch.zeros_like(unique).index_add_(0, inverse, self.full[order])
        half = torch.nn.functional.pad(self.lines, (0, self.lines.numel() % 2))
        lines = half.view(-1, 2).sum(1)
        tile, block = unique // width, unique % width
        return replace(self, rows=self.rows * 2, tile=tile, block=block, full=full, lines=lines)

    def cost(self) -> float:
        """Estimated time: scores computed, weighed by how well tiles of this height run."""
        weight = 1.2 if self.rows < 192 else 1.0 if self.rows < 768 else 0.85
        scores = self.rows * self.block.numel() * self.layout.block_kv
        # Tiles with equally many blocks are likely to share a call.
        calls = int((self.tile.bincount().bincount() > 0).sum())
        return float(weight * scores + CALL * calls)


def choose_tiles(layout: BlockLayout, index: int) -> TileBlocks:
    """The cheapest height of tiles for class ``index``: taller ones read K and V less often."""
    best = tiles = _single_blocks(layout, index)
    if layout.listed:
        return best  # a taller tile visits blocks of one row in others, too
    while tiles.rows * 2 <= MAX_ROWS and tiles.rows < layout.n_q:
        tiles = tiles.doubled()
        if tiles.cost() < best.cost():
            best = tiles
    return best


def _single_blocks(layout: BlockLayout, index: int) -> TileBlocks:
    start, counts = layout.rows.start.long(), layout.rows.counts[index].long()
    per_line = counts.sum(1)
    line = torch.repeat_interleave(per_line)
    first = per_line.cumsum(0) - per_line
    offset = torch.arange(line.numel()) - first[line]
    block = layout.rows.index[index].long()[start[line] + offset]
    full = (offset >= counts[line, 0]).long()
    key, order = (line * layout.grid[1] + block).sort()
    tile, block = key // layout.grid[1], key % layout.grid[1]
    lines = torch.ones(layout.grid[0], dtype=torch.int64)
    return TileBlocks(layout, layout.block_q, tile, block, full[order], lines)


def segments_of(tiles: TileBlocks) -> list[Strided]:
    """Cut the keys of each tile into runs, long FULL stretches apart from the rest.

    Returns:
        each run as a batch of one tile, by tile and from the left; all of its keys exist.
    """
    tile, block = tiles.tile, tiles.block
    if not tile.numel():
        return []
    partial = tiles.full < tiles.lines[tile]
    adjacent = (tile[1:] == tile[:-1]) & (block[1:] == block[:-1] + 1)
    stretch = _number(adjacent & (partial[1:] == partial[:-1]))
    size = stretch.bincount()[stretch] * tiles.layout.block_kv
    alone = ~partial & (size >= LONG_FULL)
    run = _number(adjacent & (alone[1:] == alone[:-1]))
    # Cut long masked runs.
    position = _position(run)
    piece = position // max(1, LONG_PARTIAL // tiles.layout.block_kv)
    piece = piece.masked_fill(alone, 0)
    run = _number((run[1:] == run[:-1]) & (piece[1:] == piece[:-1]))
    heads = _position(run) == 0
    masked = torch.zeros(int(run[-1]) + 1, dtype=torch.int64).index_add_(0, run, partial.long())
    return _listed(tiles, tile[heads], block[heads], run.bincount(), masked > 0)


def _listed(
    tiles: TileBlocks, tile: Tensor, block: Tensor, count: Tensor, masked: Tensor
) -> list[Strided]:
    kv_start = block * tiles.layout.block_kv
    length = ((block + count) * tiles.layout.block_kv).clamp(max=tiles.layout.n_kv) - kv_start
    columns = (x.tolist() for x in (tile, kv_start, length, masked))
    return [
        Strided(t * tiles.rows, tiles.rows, start, 0, 1, tiles.rows_of(t), size, is_masked, False)
        for t, start, size, is_masked in zip(*columns, strict=True)
    ]


def _number(same: Tensor) -> Tensor:
    """Number of the run of each element, given whether each but the first continues a run."""
    first = torch.zeros(1, dtype=torch.int64)
    return torch.cat([first, (~same).long().cumsum(0)])


def _position(run: Tensor) -> Tensor:
    """Position of each element in its run of equal values."""
    here = torch.arange(run.numel())
    starts = torch.ones_like(run, dtype=torch.bool)
    starts[1:] = run[1:] != run[:-1]
    return here - torch.where(starts, here, 0).cummax(0).values


def _batches(tiles: TileBlocks, regular: list[Strided], small: list[Strided]) -> list[Batch]:
    batches: list[Batch] = []
    covered: set[int] = set()
    for run in sorted(regular, key=lambda run: -run.tiles):
        members = list(_members(run, tiles.rows))
        merges = [tile in covered for tile in members]
        # It is cut where it changes between tiles that have a partial result already and not.
        cuts = [0, *(i for i in range(1, len(merges)) if merges[i] != merges[i - 1]), len(merges)]
        for low, high in itertools.pairwise(cuts):
            batches.append(replace(run.part(low, high), merge=merges[low]))
        covered.update(members)
    return [*batches, *_gather(tiles, small, covered)]


@dataclass
class _Singles:
    """Runs of one tile so far, by shape and by where their keys start or their rank."""

    by_start: dict[tuple[_Shape, int], Strided] = field(default_factory=dict)
    by_rank: dict[tuple[_Shape, int], int] = field(default_factory=dict)

    def add(self, shape: _Shape, rank: int, run: Strided) -> None:
        self.by_start[shape, run.kv_start] = run
        self.by_rank[shape, rank] = run.kv_start

    def before(self, shape: _Shape, rank: int, segment: Strided) -> Strided | None:
        """The run that ``segment`` most likely continues: same keys, the diagonal, same rank."""
        likely = [segment.kv_start, segment.kv_start - segment.q_step]
        start = self.by_rank.get((shape, rank), -1)
        if 0 <= start <= segment.kv_start:
            likely.append(start)
        for start in likely:
            run = self.by_start.pop((shape, start), None)
            if run is not None:
                return run
        return None


def join(segments: list[Strided], tile_rows: int) -> list[Strided]:
    """Join segments of equal shape whose keys advance by a constant step from tile to tile."""
    done: list[Strided] = []
    expected: dict[tuple[_Shape, int, int], Strided] = {}
    above, here, tile, rank = _Singles(), _Singles(), -1, 0
    for segment in segments:
        at, rank = segment.q_start // tile_rows, rank + 1
        if at != tile:
            done += above.by_start.values()
            if at != tile + 1:
                done += here.by_start.values()
                here = _Singles()
            above, here, tile, rank = here, _Singles(), at, 0
        shape = (segment.rows, segment.length, segment.masked)
        run = expected.pop((shape, tile, segment.kv_start), None)
        if run is not None:
            run = replace(run, tiles=run.tiles + 1)
        elif (run := above.before(shape, rank, segment)) is not None:
            run = replace(run, tiles=2, kv_step=segment.kv_start - run.kv_start)
        else:
            here.add(shape, rank, segment)
            continue
        key = (shape, tile + 1, segment.kv_start + run.kv_step)
        if key in expected:
            done.append(expected[key])
        expected[key] = run
    return [*done, *above.by_start.values(), *here.by_start.values(), *expected.values()]


def _stack(runs: list[Strided], segments: list[Strided]) -> tuple[list[Batch], list[Strided]]:
    """Stack adjacent tiles of one small run each, such as the upper end of a window, into one.

    Returns:
        the stacks, each one masked tile over the union of the keys, and the other runs.
    """
    count = Counter(segment.q_start for segment in segments)
    alone = [run for run in runs if run.tiles == 1 and count[run.q_start] == 1]
    stacks: list[tuple[list[Strided], Strided]] = []
    for run in sorted(alone, key=lambda run: run.q_start):
        higher = [*stacks[-1][0], run] if stacks else []
        if stacks and (joined := _stacked(higher)) is not None:
            stacks[-1] = (higher, joined)
        else:
            stacks.append(([run], run))
    stacks = [stack for stack in stacks if len(stack[0]) > 1]
    taken = {id(run) for members, _ in stacks for run in members}
    return [joined for _, joined in stacks], [run for run in runs if id(run) not in taken]


def _stacked(runs: list[Strided]) -> Strided | None:
    """One tile in place of several; None if they are not adjacent or it does not pay."""
    q_start = runs[0].q_start
    rows = sum(run.rows for run in runs)
    start = min(run.kv_start for run in runs)
    length = max(run.kv_start + run.length for run in runs) - start
    adjacent = runs[-1].q_start + runs[-1].rows == q_start + rows
    apart = sum(run.rows * run.length + CALL for run in runs)
    if not adjacent or rows * length > min(apart, 2 * SMALL_BATCH):
        return None
    return Strided(q_start, rows, start, 0, 1, rows, length, masked=True, merge=False)


def _split(
    runs: list[Strided], n_segments: int, tiles: TileBlocks
) -> tuple[list[Strided], list[Strided]]:
    """Which runs are worth a call of their own, and which are not."""
    crowded = n_segments > MANY_SEGMENTS * tiles.lines.numel()
    regular: list[Strided] = []
    small: list[Strided] = []
    for run in runs:
        short = crowded and run.length <= SHORT_SEGMENT
        large = run.tiles * run.rows * run.length >= SMALL_BATCH
        (regular if large and not short else small).append(run)
    return (regular, small) if len(small) > FEW_SMALL_BATCHES else (runs, [])


def _members(run: Strided, tile_rows: int) -> range:
    first = run.q_start // tile_rows
    return range(first, first + run.tiles)


def _gather(tiles: TileBlocks, small: list[Strided], covered: set[int]) -> Iterator[Gathered]:
    block_kv, n_kv = tiles.layout.block_kv, tiles.layout.n_kv
    blocks: dict[int, list[tuple[int, bool]]] = {}
    for run in small:
        for i, tile in enumerate(_members(run, tiles.rows)):
            start = run.kv_start + i * run.kv_step
            for block in range(start // block_kv, -(-(start + run.length) // block_kv)):
                ragged = (block + 1) * block_kv > n_kv
                blocks.setdefault(tile, []).append((block, run.masked or ragged))
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for tile, listed in sorted(blocks.items()):
        key = (tiles.rows_of(tile), _padded(len(listed)), tile in covered)
        groups.setdefault(key, []).append(tile)
    for (rows, width, merge), members in groups.items():
        yield _gathered(tiles, {tile: blocks[tile] for tile in members}, rows, width, merge)


def _padded(count: int) -> int:
    """``count`` rounded up by at most a quarter, so that few widths occur.

    >>> [_padded(count) for count in (1, 7, 9, 33)]
    [1, 7, 10, 40]
    """
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def _gathered(
    tiles: TileBlocks,
    listed: dict[int, list[tuple[int, bool]]],
    rows: int,
    width: int,
    merge: bool,
) -> Gathered:
    blocks = torch.zeros(len(listed), width, dtype=torch.int64)
    present = torch.zeros(len(listed), width, dtype=torch.bool)
    partial = torch.zeros(len(listed), width, dtype=torch.bool)
    for i, line in enumerate(listed.values()):
        blocks[i, : len(line)] = torch.tensor([block for block, _ in line])
        partial[i, : len(line)] = torch.tensor([masked for _, masked in line])
        present[i, : len(line)] = True
    starts = torch.tensor(list(listed)) * tiles.rows
    return Gathered(
        starts, rows, tiles.rows, blocks, present, partial, tiles.layout.block_kv, merge
    )
