"""The blocks that transformers' BigBird attends to, drawn as it draws them.

The same blocks are drawn in each training step, other ones for each layer and head. In evaluation
all of them are block 0, which every query attends to anyway.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

#: Lengths for which blocks are drawn as the authors of BigBird did.
_OF_THE_PAPER = (1024, 3072, 4096)


@dataclass(frozen=True)
class Draw:
    """What the random blocks of a layer depend on.

    Attributes:
        seed: of the layer.
        heads: how many.
        tokens: how many, in whole blocks.
        block: tokens per block.
        random: how many blocks are drawn for each row of blocks.
        longest: how many tokens the model can take.
        training: whether anything is random.
    """

    seed: int
    heads: int
    tokens: int
    block: int
    random: int
    longest: int
    training: bool


#: For each block that is drawn, the columns that it is drawn from, [heads or 1, rows]; and the
#: blocks that the columns behind the last one are copies of.
Columns = tuple[list[list[list[int]]], list[int]]


@functools.lru_cache(maxsize=64)
def columns_of(draw: Draw) -> Columns:
    """What each row draws, a block that it attends to anyway as a copy behind the last block.

    >>> drawn, copied = columns_of(Draw(0, 2, 6 * 16, 16, random=2, longest=512, training=False))
    >>> drawn, copied
    ([[[0, 6, 6, 6, 6, 0]], [[0, 7, 7, 7, 7, 0]]], [0, 0])
    """
    drawn = _drawn(draw)
    blocks = drawn.shape[1] + 2
    column_of = {(block, 0): block for block in range(blocks)}
    columns = [
        [_once_more(row, blocks, taken, column_of) for row, taken in enumerate(head, 1)]
        for head in drawn.tolist()
    ]
    columns = columns[:1] if all(head == columns[0] for head in columns) else columns
    # The first and the last row attend to every block, so they may name any.
    slots = [
        [[0, *(row[slot] for row in head), 0] for head in columns] for slot in range(draw.random)
    ]
    return slots, [block for block, times in column_of if times]


def _once_more(
    row: int, blocks: int, drawn: list[int], column_of: dict[tuple[int, int], int]
) -> list[int]:
    """The columns of the blocks that a row draws; adds those that are needed to ``column_of``."""
    times = Counter({*range(row - 1, row + 2), 0, blocks - 1})
    columns = []
    for block in drawn:
        key = block, times[block]
        columns.append(column_of.setdefault(key, len(column_of)))
        times[block] += 1
    return columns


def _drawn(draw: Draw) -> Any:
    """The random blocks, int [heads, blocks - 2, random]: the first and last row have none."""
    before = np.random.get_state()
    np.random.seed(draw.seed)
    try:
        return np.stack(_by_transformers(draw))
    finally:
        np.random.set_state(before)


def _by_transformers(draw: Draw) -> list[Any]:
    """What the methods of the class make of numpy's generator as it stands."""
    kind, block = BigBirdBlockSparseAttention, draw.block
    row = kind._get_single_block_row_attention
    layer = SimpleNamespace(training=draw.training, _get_single_block_row_attention=row)
    if draw.tokens in _OF_THE_PAPER:
        sizes = draw.longest, draw.longest, block, block, draw.random
        drawn = [kind._bigbird_block_rand_mask(layer, *sizes, 1024) for _ in range(draw.heads)]
        return [rows[: draw.tokens // block - 2] for rows in drawn]
    plan = kind._get_rand_attn_plan(draw.tokens, block, draw.random)
    sizes = draw.tokens, draw.tokens, block, block, draw.heads
    planned: list[Any] = kind._bigbird_block_rand_mask_with_head(layer, *sizes, *plan)
    return planned
