"""BlockMask: what torch's is to its users, without blocks until somebody asks for them.

It holds a ``mask_mod``, lengths and where it is used. Attention reads the function; lists of
blocks in torch's form, which take memory in the square of the length, are made on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import noop_mask

from sparse_compile.errors import BadPattern
from sparse_compile.flex.blocks import (
    Lists,
    Visited,
    kinds_of,
    lists_of,
    picture,
    visited_blocks,
    visited_in,
)
from sparse_compile.flex.record import record
from sparse_compile.flex.signatures import like_torch

MaskMod = Callable[[Any, Any, Any, Any], Any]
DEFAULT_BLOCK = 128


def _sliced(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> NoReturn:
    """In the place of the function of a mask that was sliced: which queries these are is lost."""
    raise RuntimeError(
        "sparse_compile: this BlockMask is a part of another one, and has no mask_mod, since its "
        "queries are counted anew. Set one from that of the whole mask:\n"
        "    part = block_mask[:, :, block]\n"
        "    part.mask_mod = lambda b, h, q, kv: block_mask.mask_mod(b, h, q + offset, kv)"
    )


class BlockMask(TorchBlockMask):
    """Who may attend to whom. Made by :func:`create_block_mask` or :meth:`from_kv_blocks`.

    A mask that is made of lists of blocks means what torch's kernels compute: a pair attends if
    its block is listed as full, or listed and ``mask_mod`` allows it.

    Attributes:
        seq_lengths: number of queries and of keys.
        BLOCK_SIZE: queries and keys of a block in the lists; kernels here choose their own.
        mask_mod: the function ``(b, h, q_idx, kv_idx)``.
        device: where it is used.
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, q_num_blocks, q_indices,
            full_q_num_blocks, full_q_indices: lists of blocks as torch has them, made when they are
            first read.
    """

    device: torch.device
    _lists: Lists | None
    _part: tuple[BlockMask, tuple[Any, ...]] | None
    _said: bool

    @like_torch
    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None,
        full_kv_indices: Tensor | None,
        q_num_blocks: Tensor | None,
        q_indices: Tensor | None,
        full_q_num_blocks: Tensor | None,
        full_q_indices: Tensor | None,
        BLOCK_SIZE: tuple[int, int] = (DEFAULT_BLOCK, DEFAULT_BLOCK),
        mask_mod: MaskMod = noop_mask,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Tensor | None = None,
        dq_kv_order_spt: bool | None = None,
    ) -> None:
        own = Lists(
            *(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices),
            *(q_num_blocks, q_indices, full_q_num_blocks, full_q_indices),
        )
        own.check()
        sizes = tuple(kv_indices.shape[:-2])
        self._set(mask_mod, sizes, seq_lengths, BLOCK_SIZE, kv_num_blocks.device)
        self._lists, self._said = own, True
        self.dq_write_order, self.dq_write_order_full = dq_write_order, dq_write_order_full
        self.dq_kv_order, self.dq_kv_order_spt = dq_kv_order, dq_kv_order_spt

    @classmethod
    def _of(
        cls,
        mask_mod: MaskMod,
        sizes: tuple[int, ...],
        seq_lengths: tuple[int, int],
        block: tuple[int, int],
        device: torch.device,
    ) -> BlockMask:
        """One that a function says, for ``sizes`` of batch and heads."""
        made = cls.__new__(cls)
        made._set(mask_mod, sizes, seq_lengths, block, device)
        return made

    def _set(
        self,
        mask_mod: MaskMod,
        sizes: tuple[int, ...],
        seq_lengths: tuple[int, int],
        block: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.mask_mod, self.seq_lengths, self.BLOCK_SIZE = mask_mod, seq_lengths, block
        self.device, self._sizes, self._separate = device, sizes, True
        # Whether the lists say more than the function does; and of what they are a part.
        self._lists, self._said, self._part = None, False, None
        self.dq_write_order = self.dq_write_order_full = None
        self.dq_kv_order = self.dq_kv_order_spt = None

    # What torch's has -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Batch, heads, queries and keys; 1 where all share a mask."""
        return (*self._sizes, *self.seq_lengths)

    def __getitem__(self, index: Any) -> BlockMask:
        """A part, by batch, head and block of queries; it needs a ``mask_mod`` to be used."""
        index = index if isinstance(index, tuple) else (index,)
        sizes = (*self._sizes, -(-self.seq_lengths[0] // self.BLOCK_SIZE[0]))
        if len(index) > len(sizes):
            raise IndexError(
                f"sparse_compile: a BlockMask of shape {self.shape} has {len(sizes)} axes to "
                f"index, of batch, heads and blocks of queries, and got {len(index)} indices."
            )
        padded = (*index, *[slice(None)] * (len(sizes) - len(index)))
        kept = tuple([_kept(at, size) for at, size in zip(padded, sizes, strict=True)])
        shape = torch.empty((), device=self.device).expand(sizes)[kept].shape
        part = self._of(_sliced, tuple(shape[:-1]), self.seq_lengths, self.BLOCK_SIZE, self.device)
        part._part, part._said, part._separate = (self, kept), self._said, self._separate
        return part

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The same for other lengths, whose upper left corner it is."""
        made = self._of(
            self.mask_mod, self._sizes, (new_q_len, new_kv_len), self.BLOCK_SIZE, self.device
        )
        made._separate, made._said = self._separate, self._said
        if self._said:
            block_q, block_kv = self.BLOCK_SIZE
            grid = -(-new_q_len // block_q), -(-new_kv_len // block_kv)
            made._lists = self.lists.cropped(grid)
        return made

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device. What ``mask_mod`` reads is moved where it is read."""
        where = torch.empty(0, device=device).device
        made = self._of(self.mask_mod, self._sizes, self.seq_lengths, self.BLOCK_SIZE, where)
        made._separate, made._said, made._part = self._separate, self._said, self._part
        made._lists = None if self._lists is None else self._lists.to(where)
        return made

    def sparsity(self) -> float:
        """How many percent of the blocks are not visited, as torch counts them."""
        block_q, block_kv = self.BLOCK_SIZE
        computed = int(self._visited.q.numel()) * block_q * block_kv
        return 100 * (1 - computed / self.numel())

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture: which blocks are visited, those of ``limit`` heads at most."""
        return picture(self._visited, self._sizes, self._grid, grid_size, limit)

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", self.mask_mod)
        lists = ", of lists of blocks" if self._said else ""
        return (
            f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, mask_mod={name}, "
            f"device={str(self.device)!r}{lists})"
        )

    # Lists of blocks ------------------------------------------------------------------------------

    @property
    def lists(self) -> Lists:
        """The lists in torch's form, made now if they were not."""
        if self._lists is None:
            if self._part is not None:
                whole, index = self._part
                self._lists = whole.lists.part(index).to(self.device)
            else:
                self._lists = lists_of(self._visited, self._sizes, self._grid, self._separate)
        return self._lists

    @property
    def _grid(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        if self._lists is not None or self._part is not None:
            rows, columns = self.lists.kv_indices.shape[-2:]
            return rows, columns
        (n_q, n_kv), (block_q, block_kv) = self.seq_lengths, self.BLOCK_SIZE
        return -(-n_q // block_q), -(-n_kv // block_kv)

    @property
    def _visited(self) -> Visited:
        if self._lists is not None or self._part is not None:
            return visited_in(self.lists)
        recorded = record(self.mask_mod, None, self.device)
        return visited_blocks(recorded, self._sizes, self.seq_lengths, self.BLOCK_SIZE, self.device)


def _list(name: str) -> property:
    def read(self: BlockMask) -> Tensor | None:
        found: Tensor | None = getattr(self.lists, name)
        return found

    def write(self: BlockMask, value: Tensor | None) -> None:
        others = self.lists._asdict() | {name: value}
        self._lists, self._said = Lists(**others), True

    return property(read, write, doc=f"As torch has it: {name}.")


for _name in Lists._fields:
    setattr(BlockMask, _name, _list(_name))


def _kept(at: Any, size: int) -> Any:
    """An index that keeps its axis."""
    if isinstance(at, int) and -size <= at < size:
        at = at % size
        return slice(at, at + 1)
    return at


def meaning_of(mask: TorchBlockMask | None) -> MaskMod | None:
    """The function that says what a block mask lets attend; None for everything.

    Raises:
        RuntimeError: it is a part of another one, and got no function.
    """
    if mask is None:
        return None
    function: MaskMod = mask.mask_mod
    if function is _sliced:
        _sliced(None, None, None, None)
    if isinstance(mask, BlockMask):
        if not mask._said:
            return function
        lists = mask.lists
    else:
        lists = Lists.of(mask)
    kinds = kinds_of(lists)
    block_q, block_kv = mask.BLOCK_SIZE
    batches, heads = kinds.shape[0], kinds.shape[1]

    def listed(b: Any, h: Any, q: Any, kv: Any) -> Any:
        place = (b % batches if batches > 1 else 0), (h % heads if heads > 1 else 0)
        kind = kinds[(*place, q // block_q, kv // block_kv)]
        return (kind == 2) | ((kind == 1) & function(b, h, q, kv))

    return listed


def check_block(block: Any) -> tuple[int, int]:
    """Queries and keys of a block, from one number or two.

    Raises:
        BadPattern: it is neither.
    """
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or not all([isinstance(n, int) and n > 0 for n in pair]):
        raise BadPattern(
            f"sparse_compile: BLOCK_SIZE={block!r}. Write how many tokens a block has, 128, or "
            "(queries, keys)."
        )
    return pair[0], pair[1]
