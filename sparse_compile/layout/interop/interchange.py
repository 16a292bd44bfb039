"""BlockLayout to and from block lists, torch.sparse, FlexAttention's BlockMask and DeepSpeed."""

from __future__ import annotations

import warnings
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
from sparse_compile.layout.interop.coo import Block, from_coo, orders_of, to_coo

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


_FORMATS = ("coo", "csr", "bsr")


def to_torch_sparse(layout: BlockLayout, format: str = "coo", index: int | None = None) -> Tensor:
    """One class of a layout as a torch.sparse tensor of int8: 1 for PARTIAL, 2 for FULL.

    Args:
        layout: what to convert.
        format: ``"coo"`` or ``"csr"``: the grid [query blocks, key blocks], one value per block.
            ``"bsr"``: the whole mask [n_q, n_kv], one dense block of equal values per block; the
            lengths must be multiples of the block.
        index: the class. Needed when there is more than one.

    >>> layout = from_coo([0, 1], [0, 1], [PARTIAL, FULL], 32, 32, 16)
    >>> to_torch_sparse(layout, "csr").to_dense().tolist()
    [[1, 0], [0, 2]]
    """
    if format not in _FORMATS:
        raise BadPattern(f"sparse_compile: {format=} is unknown. Write one of {_FORMATS}.")
    visited = _one_class(layout, index)
    values = visited.kinds.to(torch.int8)
    rows, cols = layout.grid
    if format == "coo":
        where = torch.stack([visited.q_blocks, visited.kv_blocks])
        return torch.sparse_coo_tensor(
            where, values, (rows, cols), is_coalesced=True, check_invariants=True
        )
    counts = torch.bincount(visited.q_blocks, minlength=rows)
    places = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), visited.kv_blocks
    kind, size = torch.sparse_csr, (rows, cols)
    if format == "bsr":
        block_q, block_kv = natural_block(layout, "a BSR tensor")
        if layout.n_q % block_q or layout.n_kv % block_kv:
            raise BadPattern(
                f"sparse_compile: BSR has no ragged blocks, and [{layout.n_q}, {layout.n_kv}] is "
                f"no multiple of ({block_q}, {block_kv}). Write format='csr'."
            )
        values = values[:, None, None].expand(-1, block_q, block_kv).contiguous()
        kind, size = torch.sparse_bsr, (layout.n_q, layout.n_kv)
    # torch warns once that compressed sparse tensors are in beta; the caller asked for one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse (CSR|BSR).*beta", category=UserWarning)
        return torch.sparse_compressed_tensor(
            *places, values, size, layout=kind, check_invariants=True
        )


def from_torch_sparse(
    tensor: Tensor,
    n_q: int | None = None,
    n_kv: int | None = None,
    block: Block | None = None,
) -> BlockLayout:
    """The layout of a torch.sparse tensor, as :func:`to_torch_sparse` writes it; one class.

    An int8 tensor holds kinds: 1 for PARTIAL and 2 for FULL. In any other dtype a value that is
    not zero is a block, or a pair, that attends: a COO or CSR entry is FULL, a BSR block is FULL if
    all of its values attend and PARTIAL if some do. Explicit zeros are EMPTY.

    Args:
        tensor: COO or CSR [query blocks, key blocks], or BSR [n_q, n_kv].
        n_q: number of queries; a BSR tensor knows.
        n_kv: number of keys, likewise.
        block: tokens per block, or ``(block_q, block_kv)``, likewise.

    >>> eye = torch.eye(2).to_sparse()
    >>> from_torch_sparse(eye, 40, 40, 20).kinds().tolist()
    [[[2, 0], [0, 2]]]
    """
    if tensor.layout == torch.sparse_bsr and tensor.dim() == 2:
        return _from_bsr(tensor, n_q, n_kv, block)
    if tensor.layout not in (torch.sparse_coo, torch.sparse_csr) or tensor.dim() != 2:
        raise BadPattern(
            f"sparse_compile: cannot read a {tensor.dim()}-dimensional {tensor.layout} tensor. "
            "Write a 2-dimensional one in COO, CSR or BSR, such as dense.to_sparse_csr()."
        )
    if n_q is None or n_kv is None or block is None:
        raise BadPattern(
            "sparse_compile: a COO or CSR tensor of blocks does not say how large they are. "
            "Write from_torch_sparse(tensor, n_q, n_kv, block)."
        )
    coo = tensor.to_sparse().coalesce()
    q, kv = coo.indices().unbind(0)
    q_order, kv_order = orders_of(block)
    if tuple(tensor.shape) != (q_order.blocks(n_q), kv_order.blocks(n_kv)):
        raise BadPattern(
            f"sparse_compile: a grid of {tensor.shape[0]} x {tensor.shape[1]} blocks does not "
            f"cover [{n_q}, {n_kv}] in blocks of ({q_order.block}, {kv_order.block}). Write the "
            "lengths and the block that the tensor was made for."
        )
    kinds = _kinds_of_values(coo.values())
    visited = kinds != 0
    return from_coo(q[visited], kv[visited], kinds[visited], n_q, n_kv, block)


def natural_block(layout: BlockLayout, target: str) -> tuple[int, int]:
    """``(block_q, block_kv)`` of a layout whose blocks are runs of tokens, as ``target`` needs."""
    if not (layout.q.is_natural and layout.kv.is_natural):
        raise BadPattern(
            f"sparse_compile: {target} has blocks of consecutive tokens, and this layout has "
            f"{layout.q} and {layout.kv}. Convert it with to_coo."
        )
    return layout.block_q, layout.block_kv


def _from_bsr(
    tensor: Tensor, n_q: int | None, n_kv: int | None, block: Block | None
) -> BlockLayout:
    values = tensor.values()
    shape = (int(values.shape[-2]), int(values.shape[-1]))
    lengths = (tensor.shape[0], tensor.shape[1])
    asked = (n_q, n_kv), None if block is None else tuple(o.block for o in orders_of(block))
    if any(a not in (None, b) for a, b in zip(asked[0], lengths, strict=True)) or (
        asked[1] not in (None, shape)
    ):
        raise BadPattern(
            f"sparse_compile: the BSR tensor has lengths {lengths} and blocks of {shape}, not "
            f"{asked[0]} and {asked[1]}. Leave out n_q, n_kv and block: the tensor knows them."
        )
    q = torch.repeat_interleave(tensor.crow_indices().diff())
    kv = tensor.col_indices()
    values = values.flatten(1)
    if values.dtype == torch.int8:
        lowest, highest = _kinds_of_values(values).aminmax(dim=1)
        kinds = torch.where(lowest == FULL, FULL, highest.clamp(max=PARTIAL))
    else:
        attends = values != 0
        kinds = attends.any(1).long() + attends.all(1).long()
    visited = kinds != 0
    return from_coo(q[visited], kv[visited], kinds[visited], *lengths, shape)


def _kinds_of_values(values: Tensor) -> Tensor:
    """EMPTY, PARTIAL or FULL of each value, int64."""
    if values.dtype != torch.int8:
        return torch.where(values != 0, FULL, 0)
    wrong = values[(values < 0) | (values > FULL)]
    if wrong.numel():
        raise BadPattern(
            f"sparse_compile: an int8 tensor holds kinds, {PARTIAL} for PARTIAL and {FULL} for "
            f"FULL, and here is {int(wrong[0])}. If it is a mask, write tensor.bool()."
        )
    return values.long()


def _one_class(layout: BlockLayout, index: int | None) -> VisitedBlocks:
    if index is None and layout.classes != 1:
        raise BadPattern(
            f"sparse_compile: a torch.sparse tensor holds one class, and this layout has "
            f"{layout.classes}. Write index=(b % {layout.batches}) * {layout.heads} + "
            f"h % {layout.heads}."
        )
    visited = to_coo(layout)
    return visited.select(visited.classes == (index or 0))
