"""Entries: the visited blocks of a layout as coordinates, and the lists that they make."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.layout.block_layout import FULL, BlockLists
from sparse_compile.layout.superset import line_starts


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
