"""What goes through one call: some heads, and a batch of tiles.

Batches know which queries and keys they read and how their results are put back. Both kinds answer
the same questions of tensors ``x`` [heads, tokens, width] whose last stride is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.expr import H


@dataclass(frozen=True)
class Part:
    """Some heads of one batch entry, with the same mask.

    Attributes:
        batch: the batch entry.
        heads: the query heads.
        kv_heads: the key heads: as many as the query heads, or one that they share.
        layout_class: whose blocks they visit.
    """

    batch: int
    heads: range
    kv_heads: range
    layout_class: int

    def query_side(self, x: Tensor) -> Tensor:
        """x [B, Hq, ...] of these heads: a view."""
        heads = self.heads
        return x[self.batch, heads.start : heads.stop : heads.step]

    def key_side(self, x: Tensor) -> Tensor:
        """x [B, Hkv, ...] of these heads: a view."""
        return x[self.batch, self.kv_heads.start : self.kv_heads.stop]

    def per_head(self, keys: Tensor) -> Tensor:
        """Keys [tiles, kv_heads, ...] as [tiles, heads, ...], without a copy."""
        return keys.expand(-1, len(self.heads), -1, -1)

    def over_heads(self, grad: Tensor) -> Tensor:
        """The transpose of :meth:`per_head`."""
        shared = len(self.kv_heads) < len(self.heads)
        return grad.sum(1, keepdim=True) if shared else grad


def parts_of(call: AttentionCall) -> Iterator[Part]:
    """All heads, in as few parts as keep the mask the same within a part and copy no K or V."""
    (batch, heads, _, _), kv_heads, (layout,) = call.shape, call.k.shape[1], call.blocks.views
    group = heads // kv_heads
    for b in range(batch):
        first = b % layout.batches * layout.heads
        if layout.heads > 1 or call.spec.mask.depends_on(H):
            for h in range(heads):
                shared = range(h // group, h // group + 1)
                yield Part(b, range(h, h + 1), shared, first + h % layout.heads)
        elif group <= kv_heads:
            for g in range(group):
                yield Part(b, range(g, heads, group), range(kv_heads), first)
        else:
            for kv in range(kv_heads):
                sharing = range(kv * group, (kv + 1) * group)
                yield Part(b, sharing, range(kv, kv + 1), first)


@dataclass(frozen=True)
class Strided:
    """Tiles whose queries and keys advance by constant steps: everything is a view.

    Attributes:
        q_start, q_step: first query of the first tile, and of the next from there.
        kv_start, kv_step: first key of the first tile, and of the next from there; a step below
            ``length`` makes the tiles overlap.
        tiles: how many.
        rows: queries in a tile.
        length: keys in a tile.
        masked: whether the mask must be evaluated; else every query may see every key.
        merge: whether the tiles have a partial result already.
    """

    q_start: int
    q_step: int
    kv_start: int
    kv_step: int
    tiles: int
    rows: int
    length: int
    masked: bool
    merge: bool

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        return 200

    def part(self, low: int, high: int) -> Strided:
        """The tiles ``low`` to ``high``."""
        return replace(
            self,
            q_start=self.q_start + low * self.q_step,
            kv_start=self.kv_start + low * self.kv_step,
            tiles=high - low,
        )

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """int64 queries [tiles, rows, 1] and keys [tiles, 1, length]."""
        tile = torch.arange(self.tiles).view(-1, 1, 1)
        rows, keys = torch.arange(self.rows).view(-1, 1), torch.arange(self.length)
        return (
            self.q_start + tile * self.q_step + rows,
            self.kv_start + tile * self.kv_step + keys,
        )

    def rows_of(self, x: Tensor) -> Tensor:
        """The queries' part of x: [tiles, heads, rows, width]."""
        return _tiles(x, self.q_start, self.q_step, self.tiles, self.rows)

    def keys_of(self, x: Tensor) -> Tensor:
        """The keys' part of x: [tiles, heads, length, width]."""
        return _tiles(x, self.kv_start, self.kv_step, self.tiles, self.length)

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        """Write the queries' part of x."""
        self.rows_of(x).copy_(value)

    def add_rows(self, x: Tensor, value: Tensor) -> None:
        """Add to the queries' part of x."""
        self.rows_of(x).add_(value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add [tiles, heads, length, width] to the keys' part of x, where tiles may overlap."""
        if self.kv_step == 0 or self.tiles == 1:
            total = value[0] if self.tiles == 1 else value.sum(0, dtype=x.dtype)
            self.keys_of(x)[0].add_(total)
            return
        # In each slice of one step, the tiles are disjoint.
        for low in range(0, self.length, self.kv_step):
            high = min(low + self.kv_step, self.length)
            target = _tiles(x, self.kv_start + low, self.kv_step, self.tiles, high - low)
            target.add_(value[:, :, low:high])


@dataclass(frozen=True, eq=False)
class Gathered:
    """Tiles anywhere with key blocks anywhere: K and V are copied, block by block.

    For :meth:`keys_of` and :meth:`add_keys`, ``x`` is contiguous and its tokens are padded to whole
    blocks.

    Attributes:
        q_start: int64 [tiles], first query of each tile.
        rows: queries in a tile.
        tile_rows: the tiles start at multiples of this.
        blocks: int64 [tiles, width], key blocks.
        present: bool [tiles, width]; the others are padding.
        partial: bool [tiles, width], where the mask must be evaluated.
        block_kv: keys in a block.
        merge: whether the tiles have a partial result already.
    """

    q_start: Tensor
    rows: int
    tile_rows: int
    blocks: Tensor
    present: Tensor
    partial: Tensor
    block_kv: int
    merge: bool

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.q_start.numel()

    @property
    def length(self) -> int:
        """Keys in a tile, padding included."""
        return self.blocks.shape[1] * self.block_kv

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        return 200 + 8 * self.tiles + 10 * self.blocks.numel()

    def part(self, low: int, high: int) -> Gathered:
        """The tiles ``low`` to ``high``."""
        cut = ("q_start", "blocks", "present", "partial")
        return replace(self, **{name: getattr(self, name)[low:high] for name in cut})

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """int64 queries [tiles, rows, 1] and keys [tiles, 1, length], padding included."""
        queries = self.q_start.view(-1, 1, 1) + torch.arange(self.rows).view(-1, 1)
        keys = self.blocks[:, :, None] * self.block_kv + torch.arange(self.block_kv)
        return queries, keys.flatten(1).unsqueeze(1)

    def rows_of(self, x: Tensor) -> Tensor:
        """The queries' part of x: [tiles, heads, rows, width]."""
        view, index = self._tile_view(x)
        return view.index_select(0, index)

    def keys_of(self, x: Tensor) -> Tensor:
        """The keys' part of x: [tiles, heads, length, width]."""
        picked = self._lines(x).index_select(0, self._index(x))
        return picked.view(self.tiles, x.shape[0], self.length, x.shape[2])

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        """Write the queries' part of x."""
        view, index = self._tile_view(x)
        view.index_copy_(0, index, value.to(x.dtype))

    def add_rows(self, x: Tensor, value: Tensor) -> None:
        """Add to the queries' part of x."""
        view, index = self._tile_view(x)
        view.index_add_(0, index, value.to(x.dtype))

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add [tiles, heads, length, width] to the keys' part of x, where tiles may overlap."""
        lines = self._lines(x)
        lines.index_add_(0, self._index(x), value.reshape(-1, lines.shape[1]).to(x.dtype))

    def _lines(self, x: Tensor) -> Tensor:
        return x.view(-1, self.block_kv * x.shape[2])

    def _index(self, x: Tensor) -> Tensor:
        head = torch.arange(x.shape[0]).view(1, -1, 1)
        return (head * (x.shape[1] // self.block_kv) + self.blocks[:, None]).flatten()

    def _tile_view(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows < self.tile_rows:  # the last tile of a ragged length, alone in its batch
            return _tiles(x, int(self.q_start[0]), 0, 1, self.rows), torch.zeros(1).long()
        whole = x.shape[1] // self.tile_rows
        return _tiles(x, 0, self.tile_rows, whole, self.rows), self.q_start // self.tile_rows


Batch: TypeAlias = Strided | Gathered


def _tiles(x: Tensor, start: int, step: int, tiles: int, rows: int) -> Tensor:
    by_head, by_token, _ = x.stride()
    return x.as_strided(
        (tiles, x.shape[0], rows, x.shape[2]),
        (step * by_token, by_head, by_token, 1),
        x.storage_offset() + start * by_token,
    )


def cut(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in pieces of at most ``most`` tiles."""
    for low in range(0, batch.tiles, most):
        high = min(low + most, batch.tiles)
        yield batch if high - low == batch.tiles else batch.part(low, high)
