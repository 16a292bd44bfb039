"""Build the block lists of a mask on a GPU: count, look at the counts once, fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.block_layout import BlockLists
from sparse_compile.layout.device.key import LONGEST, Key
from sparse_compile.layout.device.launch import Kernels, current, kernels_of
from sparse_compile.layout.device.printed import INT32_MAX
from sparse_compile.layout.device.tables import table_bounds
from sparse_compile.view import Order

#: What a grid holds in its second dimension.
_MOST_CLASSES = 65535


@dataclass(frozen=True)
class Built:
    """One direction of a layout.

    Attributes:
        lists: on the device.
        counts: ``lists.counts`` on the CPU.
    """

    lists: BlockLists
    counts: Tensor


@dataclass(frozen=True)
class DeviceProblem:
    """A mask with its data on a device; ``rows`` and ``cols`` of its layout are built separately.

    Attributes:
        kernels: generated for the mask and the orders.
        q, kv: how the tokens of each side are put into blocks.
        n_q, n_kv: lengths, 0 or more.
        batches, heads: classes along each dimension; 1 if the mask ignores it.
        device: a CUDA device; the CPU where Triton interprets.
        arguments: of the kernels, after the lengths and heads.
    """

    kernels: Kernels
    q: Order
    kv: Order
    n_q: int
    n_kv: int
    batches: int
    heads: int
    device: torch.device
    arguments: tuple[Any, ...]

    @staticmethod
    def of(
        mask: MaskExpr,
        *,
        batch: int,
        heads: int,
        n_q: int,
        n_kv: int,
        q: Order,
        kv: Order,
        tables: Sequence[Tensor] = (),
        sizes: Sequence[int] = (),
        device: torch.device | str = "cuda",
        span: int | None = None,
    ) -> DeviceProblem:
        """The problem of a call; reads the tables, by one launch for most masks.

        Args:
            mask, batch, heads, n_q, n_kv, tables, sizes: as for :func:`build_layout`.
            q, kv: how the tokens of each side are put into blocks.
            device: where the tables are and the lists are made.
            span: blocks that are looked at together first.

        Raises:
            ValueError: for more classes, tokens or table entries than the kernels can number.
        """
        if max(n_q, n_kv, batch, heads) > LONGEST:
            raise ValueError(f"lengths, batch and heads over {LONGEST} are not supported")
        key = Key.of(mask, sizes, q, kv, span)
        kernels, device = kernels_of(key), _numbered(torch.device(device))
        batches, heads = batch if kernels.by_batch else 1, heads if kernels.by_head else 1
        if batches * heads > _MOST_CLASSES:
            raise ValueError(f"more than {_MOST_CLASSES} classes are not supported")
        arguments: tuple[Any, ...] = ()
        if kernels.lookups and n_q and n_kv and batches and heads:
            with current(device):
                arguments = table_bounds(key, kernels, (n_q, n_kv), tables, sizes)
        arguments += tuple(sizes[i] for i in kernels.free_sizes)
        return DeviceProblem(kernels, q, kv, n_q, n_kv, batches, heads, device, arguments)

    def rows(self) -> Built:
        """For each query block, its key blocks; waits for the device once."""
        return self._built(self.q.blocks(self.n_q), 0)

    def cols(self) -> Built:
        """For each key block, its query blocks; waits for the device once."""
        return self._built(self.kv.blocks(self.n_kv), 1)

    def _built(self, lines: int, side: int) -> Built:
        classes, device, kernels = self.batches * self.heads, self.device, self.kernels
        if not (self.n_q and self.n_kv and classes):
            known = torch.zeros(classes, lines, 2, dtype=torch.int32)
            return _assembled(known, known.to(device), None)
        shared = (self.n_q, self.n_kv, self.heads, *self.arguments)
        grid = (lines, classes, 1)
        counts = torch.empty(classes, lines, 2, dtype=torch.int32, device=device)

        def filled(index: Tensor, start: Tensor) -> None:
            kernels.fill[side](grid, device, (index, start, counts, index.shape[1], *shared))

        with current(device):
            kernels.count[side](grid, device, (counts, *shared))
            return _assembled(counts.cpu(), counts, filled)


def build_on_device(
    mask: MaskExpr, *, transposed: bool = False, **arguments: Any
) -> tuple[BlockLists, Tensor]:
    """One direction of the layout of a mask, and its counts on the CPU.

    Equal to that of :func:`build_layout` except for the room of lines, which is the most blocks
    that any class visits. Waits for the device once.

    Args:
        mask: the predicate.
        transposed: list columns instead of rows.
        arguments: as for :meth:`DeviceProblem.of`.
    """
    problem = DeviceProblem.of(mask, **arguments)
    built = problem.cols() if transposed else problem.rows()
    return built.lists, built.counts


def _assembled(
    known: Tensor, counts: Tensor, fill: Callable[[Tensor, Tensor], None] | None
) -> Built:
    """The lists with these counts, on the CPU and on the device."""
    classes, lines, _ = known.shape
    visited = known.sum(-1)
    room = visited[0] if classes == 1 else visited.amax(0) if classes else visited.sum(0)
    total = int(room.sum())
    if total > INT32_MAX:
        raise ValueError(f"{total} blocks are more than int32 can count")
    ends = torch.zeros(lines + 1, dtype=torch.int32)
    torch.cumsum(room, 0, dtype=torch.int32, out=ends[1:])
    start = ends.to(counts.device, non_blocking=True)
    # Room that a class does not use holds 0.
    make = torch.empty if classes == 1 else torch.zeros
    index = make((classes, total), dtype=torch.int32, device=counts.device)
    if fill is not None and total:
        fill(index, start)
    return Built(BlockLists(start, counts, index, room), known)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
