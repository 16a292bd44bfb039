"""Build the block lists of a mask on a GPU.

One launch counts and lists. Only where its room may be too small does the host look at what it
counted, and if so a second one lists all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import current
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.launch import Kernels, kernels_of
from sparse_compile.codegen.triton.layout.printed import INT32_MAX
from sparse_compile.codegen.triton.layout.tables import table_bounds
from sparse_compile.expr import MaskExpr
from sparse_compile.layout.block_layout import BlockLists, Load
from sparse_compile.spec.view import Order

#: What a grid holds in its second dimension.
_MOST_CLASSES = 65535
#: Room of a line in the first launch if there is not room for all blocks, and of all lines: 4 MB.
_WIDTH, _MOST_PLACES = 128, 1 << 20


@dataclass(frozen=True)
class DeviceProblem:
    """A mask with its data on a device; ``rows`` and ``cols`` of its layout are built separately.

    Attributes:
        kernels: generated for the mask and the orders.
        q, kv: how the tokens of each side are put into blocks.
        n_q, n_kv: lengths, 0 or more.
        batches, heads: classes along each dimension; 1 if the mask ignores it.
        device: a CUDA device; the CPU where Triton interprets.
        values: of the kernels' parameters, by name: bounds of lookups, and sizes.
    """

    kernels: Kernels
    q: Order
    kv: Order
    n_q: int
    n_kv: int
    batches: int
    heads: int
    device: torch.device
    values: dict[str, Any]

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
        values = {f"s{i}": sizes[i] for i in kernels.free_sizes}
        if kernels.lookups and n_q and n_kv and batches and heads:
            with current(device):
                values |= table_bounds(key, kernels, (n_q, n_kv), tables, sizes)
        return DeviceProblem(kernels, q, kv, n_q, n_kv, batches, heads, device, values)

    def rows(self) -> BlockLists:
        """For each query block, its key blocks."""
        return self._built(0, self.q.blocks(self.n_q), self.kv.blocks(self.n_kv))

    def cols(self) -> BlockLists:
        """For each key block, its query blocks."""
        return self._built(1, self.kv.blocks(self.n_kv), self.q.blocks(self.n_q))

    def _built(self, side: int, lines: int, across: int) -> BlockLists:
        """The lists of ``lines`` that may visit ``across`` blocks each; waits if that is many."""
        classes, device, kernels = self.batches * self.heads, self.device, self.kernels
        if not (lines and across and classes):
            return _without_blocks(classes, lines, device)
        shared = {"n_q": self.n_q, "n_kv": self.n_kv, "heads": self.heads, **self.values}
        grid, width = (lines, classes, 1), _width(classes * lines, across)
        places = classes * lines * width
        # Zeros in one launch: the room that is not used, and behind it two sums.
        zeros = torch.zeros(places + 4, dtype=torch.int32, device=device)
        index, totals = zeros[:places].view(classes, -1), zeros[places:].view(torch.int64)
        counts = torch.empty(classes, lines, 2, dtype=torch.int32, device=device)
        start = torch.empty(lines + 1, dtype=torch.int32, device=device)

        def bounds() -> tuple[int, int]:
            total, most = totals.tolist()
            return total // classes, most

        with current(device):
            made = {"counts": counts, "start": start, "index": zeros, "width": width}
            kernels.list[side](grid, {**made, "totals": totals, **shared})
            load = Load(lines, bounds, lambda: _visited(counts.cpu()))
            if width >= across or load.most <= width:
                return BlockLists(start, counts, index, load)
            start, index = _roomy(load.lines, classes, device)
            given = {"index": index, "start": start, "counts": counts, "room": index.shape[1]}
            kernels.fill[side](grid, {**given, **shared})
            return BlockLists(start, counts, index, Load.of(load.lines))


def _width(lines: int, across: int) -> int:
    """Blocks of each line that the first launch has room for: all, or few, or none; even."""
    for width in (across, _WIDTH):
        even = min(across, width) + 1 & ~1
        if lines * even <= _MOST_PLACES:
            return even
    return 0


def _visited(counts: Tensor) -> Tensor:
    """int64 [lines]: the most blocks that a class visits in each line."""
    visited = counts.sum(-1)
    return visited[0] if len(visited) == 1 else visited.amax(0)


def _roomy(room: Tensor, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``start`` for lines of so many blocks, and an ``index`` of their length."""
    total = int(room.sum())
    if total > INT32_MAX:
        raise ValueError(f"{total} blocks are more than int32 can count")
    ends = torch.zeros(len(room) + 1, dtype=torch.int32)
    torch.cumsum(room, 0, dtype=torch.int32, out=ends[1:])
    # Room that a class does not use holds 0.
    make = torch.empty if classes == 1 else torch.zeros
    index = make((classes, total), dtype=torch.int32, device=device)
    return ends.to(device, non_blocking=True), index


def _without_blocks(classes: int, lines: int, device: torch.device) -> BlockLists:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    load = Load.of(torch.zeros(lines, dtype=torch.int64))
    return BlockLists(zeros(lines + 1), zeros(classes, lines, 2), zeros(classes, 0), load)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
