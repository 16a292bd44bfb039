"""A BlockLayout from an explicit list of blocks, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.errors import BadPattern
from sparse_compile.layout.block_layout import (
    FULL,
    PARTIAL,
    BlockGrid,
    BlockLayout,
    VisitedBlocks,
    existing,
)
from sparse_compile.spec.view import Order, natural

#: Tokens per block, of queries and keys alike or of each; an Order says which tokens those are.
Block = int | Order | tuple[int | Order, int | Order]


def from_coo(
    q_blocks: Tensor | Sequence[int],
    kv_blocks: Tensor | Sequence[int],
    kinds: Tensor | Sequence[int] | None,
    n_q: int,
    n_kv: int,
    block: Block,
    *,
    batches: int = 1,
    heads: int = 1,
    classes: Tensor | Sequence[int] | None = None,
) -> BlockLayout:
    """The layout that visits exactly the listed blocks, given in any order.

    Args:
        q_blocks: query block of each entry; integers, as are all lists. The layout is made on the
            device of this one.
        kv_blocks: key block of each entry.
        kinds: PARTIAL or FULL of each entry. None means FULL. A block that sticks out of a ragged
            length is PARTIAL whatever was given: a kernel has to look at its edge.
        n_q: number of queries.
        n_kv: number of keys.
        block: tokens per block, for queries and keys or ``(block_q, block_kv)``; an Order in place
            of a number puts other tokens than runs into a block.
        batches: batch entries with lists of their own, 1 if all share them.
        heads: query heads with lists of their own, likewise.
        classes: ``b * heads + h`` of each entry. Needed when there is more than one class.

    Raises:
        BadPattern: a block twice in a class, outside the grid, or of no kind; lists that differ in
            length.

    >>> layout = from_coo([0, 1, 1], [0, 0, 1], [PARTIAL, FULL, PARTIAL], 32, 32, 16)
    >>> layout.kinds().tolist()
    [[[1, 0], [2, 1]]]
    """
    q_order, kv_order = orders_of(block)
    cut = BlockGrid(n_q, n_kv, q_order, kv_order, batches, heads)
    visited = _as_lists(q_blocks, kv_blocks, kinds, classes, cut.classes)
    _check(visited, cut.classes, cut.grid)
    whole_q = _is_whole(q_order, n_q, visited.q_blocks)
    whole = whole_q & _is_whole(kv_order, n_kv, visited.kv_blocks)
    visited = visited._replace(kinds=torch.where(whole, visited.kinds, PARTIAL))
    return cut.layout(*visited.lists(cut.classes, cut.grid))


def to_coo(layout: BlockLayout) -> VisitedBlocks:
    """The visited blocks by class, then query block, then key block (synchronises).

    >>> layout = from_coo([1, 0], [0, 0], None, 32, 16, 16)
    >>> to_coo(layout).q_blocks.tolist(), to_coo(layout).kinds.tolist()
    ([0, 1], [2, 2])
    """
    entries = [layout.rows.entries(c) for c in range(layout.classes)]
    q, kv, kinds = (torch.cat(part) for part in zip(*entries, strict=True))
    counts = torch.tensor([line.numel() for line, _, _ in entries], device=q.device)
    classes = torch.repeat_interleave(counts)
    rows, cols = layout.grid
    order = ((classes * rows + q) * cols + kv).argsort()
    return VisitedBlocks(classes, q, kv, kinds).select(order)


def orders_of(block: Block) -> tuple[Order, Order]:
    """The orders of queries and keys that a block stands for."""
    sides = block if isinstance(block, tuple) else (block, block)
    match [natural(side) if isinstance(side, int) and side > 0 else side for side in sides]:
        case [Order() as q, Order() as kv]:
            return q, kv
    raise BadPattern(
        f"sparse_compile: {block=} is no block shape. "
        "Write positive tokens per block: 128, or (block_q, block_kv)."
    )


def _is_whole(order: Order, n: int, blocks: Tensor) -> Tensor:
    """Which blocks hold no token beyond the length."""
    return (existing(order, n) == order.block).to(blocks.device)[blocks]


def _as_lists(
    q_blocks: Tensor | Sequence[int],
    kv_blocks: Tensor | Sequence[int],
    kinds: Tensor | Sequence[int] | None,
    classes: Tensor | Sequence[int] | None,
    n_classes: int,
) -> VisitedBlocks:
    q = torch.as_tensor(q_blocks, dtype=torch.int64)
    if classes is None and n_classes != 1:
        raise BadPattern(
            f"sparse_compile: a block list for {n_classes} (batch, head) classes must say which "
            "class each block belongs to. Pass classes=b * heads + h, one integer per block."
        )
    lists = {
        "classes": torch.zeros_like(q) if classes is None else classes,
        "q_blocks": q,
        "kv_blocks": kv_blocks,
        "kinds": torch.full_like(q, FULL) if kinds is None else kinds,
    }
    tensors = {
        name: torch.as_tensor(values, dtype=torch.int64, device=q.device)
        for name, values in lists.items()
    }
    for name, values in tensors.items():
        if values.dim() != 1 or values.shape != q.shape:
            raise BadPattern(
                f"sparse_compile: {name} has shape {tuple(values.shape)} and q_blocks "
                f"{tuple(q.shape)}. Write one integer per visited block in each list."
            )
    return VisitedBlocks(**tensors)


def _check(visited: VisitedBlocks, classes: int, grid: tuple[int, int]) -> None:
    ranges = {
        "classes": (0, classes),
        "q_blocks": (0, grid[0]),
        "kv_blocks": (0, grid[1]),
        "kinds": (PARTIAL, FULL + 1),
    }
    for name, (low, end) in ranges.items():
        values = getattr(visited, name)
        wrong = values[(values < low) | (values >= end)]
        if wrong.numel():
            raise BadPattern(
                f"sparse_compile: {name} holds {int(wrong[0])}, outside {low} to {end - 1}: the "
                f"grid has {grid[0]} x {grid[1]} blocks in {classes} class(es), and a kind is "
                f"PARTIAL ({PARTIAL}) or FULL ({FULL})."
            )
    rows, cols = grid
    place = (visited.classes * rows + visited.q_blocks) * cols + visited.kv_blocks
    place = place.sort().values
    twice = place[1:][place.diff() == 0]
    if twice.numel():
        where = int(twice[0])
        raise BadPattern(
            f"sparse_compile: block (q {where // cols % rows}, kv {where % cols}) of class "
            f"{where // (rows * cols)} is listed twice. List every visited block once."
        )
