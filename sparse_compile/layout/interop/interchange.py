"""BlockLayout to and from block lists, torch.sparse, FlexAttention's BlockMask and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.layout.block_layout import (
    FULL,
    PARTIAL,
    BlockLayout,
    VisitedBlocks,
    place_in_group,
)
from sparse_compile.layout.interop.coo import from_coo, to_coo
from sparse_compile.layout.interop.torch_sparse import (
    from_torch_sparse,
    natural_block,
    to_torch_sparse,
)

__all__ = [
    "VisitedBlocks",
    "from_block_mask",
    "from_coo",
    "from_deepspeed",
    "from_torch_sparse",
    "to_block_mask",
    "to_coo",
    "to_torch_sparse",
]


def to_block_mask(layout: BlockLayout, mask_mod: Callable[..., Tensor]) -> Any:
    """FlexAttention's BlockMask that visits the same blocks.

    Args:
        layout: what to convert. One class stays one: its batch and head dimensions of size 1
            broadcast in FlexAttention, too.
        mask_mod: the predicate ``(b, h, q, kv) -> bool`` of the mask, which FlexAttention
            evaluates in PARTIAL blocks.

    Returns:
        ``torch.nn.attention.flex_attention.BlockMask``.

    >>> layout = from_coo([0, 1, 1], [0, 0, 1], [PARTIAL, FULL, PARTIAL], 32, 32, 16)
    >>> to_block_mask(layout, lambda b, h, q, kv: kv <= q).kv_num_blocks.tolist()
    [[[1, 1]]]
    """
    # Importing flex_attention takes a second; only this function needs it.
    from torch.nn.attention.flex_attention import BlockMask

    block = natural_block(layout, "a BlockMask")
    visited = to_coo(layout)
    partial = _padded_lists(layout, visited.select(visited.kinds == PARTIAL))
    full = _padded_lists(layout, visited.select(visited.kinds == FULL))
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(layout.n_q, layout.n_kv),
    )


def from_block_mask(block_mask: Any) -> BlockLayout:
    """The layout of FlexAttention's BlockMask; its ``mask_mod`` is not looked at.

    Batch and head dimensions of size 1 stay one class. A full block that sticks out of a ragged
    length becomes PARTIAL.

    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> causal = create_block_mask(
    ...     lambda b, h, q, kv: kv <= q, None, None, 48, 48, device="cpu", BLOCK_SIZE=16
    ... )
    >>> from_block_mask(causal).kinds().tolist()
    [[[1, 0, 0], [2, 1, 0], [2, 2, 1]]]
    """
    n_q, n_kv = map(int, block_mask.seq_lengths)
    block_q, block_kv = map(int, block_mask.BLOCK_SIZE)
    counts = block_mask.kv_num_blocks
    batches, heads, rows = (1, 1, 1, *counts.shape)[-3:]
    if counts.dim() > 3 or rows != -(-n_q // block_q):
        raise BadPattern(
            f"sparse_compile: a BlockMask with kv_num_blocks of shape {tuple(counts.shape)} does "
            f"not cover {n_q} queries in blocks of {block_q}. Build it with create_block_mask for "
            "these lengths."
        )
    parts = [_listed(counts, block_mask.kv_indices, PARTIAL)]
    if block_mask.full_kv_num_blocks is not None:
        parts.append(_listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, FULL))
    classes, q, kv, kinds = (torch.cat(part) for part in zip(*parts, strict=True))
    block = block_q, block_kv
    return from_coo(q, kv, kinds, n_q, n_kv, block, batches=batches, heads=heads, classes=classes)


def from_deepspeed(layout: Tensor, block: int) -> BlockLayout:
    """The layout of a DeepSpeed ``SparsityConfig``: every listed block is FULL.

    Args:
        layout: [heads, blocks, blocks] of 0 and 1, from ``SparsityConfig.make_layout``. If all
            heads are equal, as with ``different_layout_per_head=False``, they share one class.
        block: tokens per block, ``SparsityConfig.block``.

    >>> from_deepspeed(torch.eye(2, dtype=torch.int64).expand(8, 2, 2), 16).heads
    1
    """
    if layout.dim() != 3 or not 0 < layout.shape[0] or layout.shape[1] != layout.shape[2]:
        raise BadPattern(
            f"sparse_compile: a DeepSpeed layout is [heads, blocks, blocks], and this tensor has "
            f"shape {tuple(layout.shape)}. Pass what SparsityConfig.make_layout(seq_len) returns."
        )
    visited = layout != 0
    if torch.equal(visited, visited[:1].expand_as(visited)):
        visited = visited[:1]
    heads, blocks = int(visited.shape[0]), int(visited.shape[1])
    classes, q, kv = visited.nonzero().unbind(1)
    tokens = blocks * block
    return from_coo(q, kv, None, tokens, tokens, block, heads=heads, classes=classes)


def _padded_lists(layout: BlockLayout, visited: VisitedBlocks) -> tuple[Tensor, Tensor]:
    """Counts [batches, heads, rows] and indices [batches, heads, rows, cols], as flex wants them.

    FlexAttention takes the number of key blocks from the width of the indices.
    """
    rows, cols = layout.grid
    line = visited.classes * rows + visited.q_blocks
    counts, place = place_in_group(line, layout.classes * rows)
    index = torch.zeros(layout.classes * rows, cols, dtype=torch.int32, device=line.device)
    index[line, place] = visited.kv_blocks.to(torch.int32)
    shape = (layout.batches, layout.heads, rows)
    return counts.to(torch.int32).view(shape), index.view(*shape, cols)


def _listed(counts: Tensor, index: Tensor, kind: int) -> VisitedBlocks:
    rows, width = index.shape[-2:]
    index, counts = index.reshape(-1, rows, width), counts.reshape(-1, rows)
    # What stands behind the count is undefined.
    used = torch.arange(width, device=index.device) < counts[..., None]
    classes, q, _ = used.nonzero().unbind(1)
    return VisitedBlocks(classes, q, index[used].long(), torch.full_like(q, kind))
