"""Query tiles and their segments: runs of adjacent key blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.codegen.cpu.batches import Strided
from sparse_compile.layout import BlockLayout

#: A stretch of FULL blocks of this many keys runs on its own, without a bias.
LONG_FULL = 512
#: Longest segment with a bias, in keys: bounds the memory of a bias.
LONG_PARTIAL = 2048
#: Cost of a call, in scores.
CALL = 1 << 13
#: Most query rows of a tile.
MAX_ROWS = 1024


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
