"""What launches of the generated kernels take: lists, descriptors, mask data, room for parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_compile.codegen.triton.sections import (
    described_box,
    described_views,
    ordered_bases,
)
from sparse_compile.codegen.triton.tiles import Tile, padded
from sparse_compile.layout import Layout, Schedule
from sparse_compile.view import Order

if TYPE_CHECKING:
    from sparse_compile.codegen.triton.executor import Kernels


def operand(t: Tensor, *tiles: Tile) -> Tensor:
    """A tensor whose rows are contiguous, and aligned for descriptors where tiles use them."""
    unit = 16 // t.element_size()
    # Offsets within a tile are int32.
    usable = (t.stride(-1) == 1 or t.shape[-1] == 1) and 0 <= t.stride(2) < 1 << 22
    if usable and any(tile.descriptors for tile in tiles):
        usable = t.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in t.stride()[:3])
    return t if usable else t.clone(memory_format=torch.contiguous_format)


def single(grad_lse: Tensor | None, unused: Tensor) -> Tensor:
    """The gradient of the log-sum-exp; anything where there is none."""
    return unused if grad_lse is None else grad_lse.to(torch.float32).contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """The strides of batch, heads and tokens of each tensor."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def lists(kernels: Kernels, layout: Layout, axis: str) -> list[Any]:
    """For each view start, counts, index, room, lines, batches and heads; then the bases."""
    arguments: list[Any] = []
    for view in layout.views:
        lists = view.rows if axis == "q" else view.cols
        lines = view.grid[0 if axis == "q" else 1]
        arguments += [*lists.tensors(), lists.index.shape[1], lines, view.batches, view.heads]
    return arguments + bases(kernels, layout)


def bases(kernels: Kernels, layout: Layout) -> list[Tensor]:
    """The first token of each block, for orders that are not natural."""
    device = layout.views[0].rows.start.device
    return [
        _base_table(order, layout.n_q if name.startswith("q_") else layout.n_kv, device)
        for name, order in ordered_bases(kernels.spec.attention)
    ]


@functools.lru_cache(maxsize=64)
def _base_table(order: Order, n: int, device: torch.device) -> Tensor:
    table: Tensor = order.base(torch.arange(order.blocks(n), device=device), n)
    return table.to(torch.int32)


def ordered(kernels: Kernels, statistics: dict[str, Tensor], block: int) -> list[Any]:
    """Arguments for :func:`statistic_parameters`."""
    arguments: list[Any] = []
    for number, view in enumerate(kernels.spec.attention.parts):
        if not view.q.is_natural:
            own = statistics[f"_{number}"]
            arguments += [own, own.shape[3] // block]
    return arguments


def statistics_in_order(kernels: Kernels, statistics: Tensor, n_q: int) -> dict[str, Tensor]:
    """The statistics of queries in plain order, and in the order of each view that has its own."""
    found = {"": statistics}
    for number, view in enumerate(kernels.spec.attention.parts):
        if not view.q.is_natural:
            places = _places(view.q, n_q, statistics.device)
            found[f"_{number}"] = statistics.index_select(3, places)
    return found


@functools.lru_cache(maxsize=64)
def _places(order: Order, n: int, device: torch.device) -> Tensor:
    """int64 [blocks * block]: the token at each place of an order, ``n`` where there is none."""
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten().to(device)


def descriptors(
    kernels: Kernels,
    across: str,
    tile: Tile,
    tensors: tuple[Tensor, Tensor],
    statistics: dict[str, Tensor] | None = None,
) -> list[Any]:
    """Descriptors of the tiles of each view, for kernels that load by them.

    Args:
        kernels: whose views.
        across: side that the kernel loops over.
        tile: of the kernel.
        tensors: what the loop reads, [B, H, N, D].
        statistics: the statistics of queries in the order of each view, if the loop reads them.
    """
    made: list[Any] = []
    extent = tile.m if across == "q" else tile.n
    for suffix, order in described_views(kernels.spec, across, tile):
        box = (extent,) if order.is_natural else described_box(order, extent)
        assert box is not None
        made += [_described(t, order, box) for t in tensors]
        if statistics is not None:
            made.append(_descriptor(statistics[suffix], [1, 1, 1, tile.m]))
    return made


def _described(t: Tensor, order: Order, box: tuple[int, ...]) -> Any:
    """A descriptor of boxes of tokens of [B, H, N, D], the token taken apart into its digits."""
    if not order.is_natural:
        sizes = [t.shape[2] // order.strides[0], *order.radices]
        t = t.as_strided(
            [*t.shape[:2], *sizes, t.shape[3]],
            [*t.stride()[:2], *(s * t.stride(2) for s in order.strides), t.stride(3)],
        )
    return _descriptor(t, [1, 1, *box, padded(t.shape[-1])])


def _descriptor(t: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def mask_arguments(
    kernels: Kernels, tables: Sequence[Tensor], sizes: Sequence[int], n_q: int, n_kv: int
) -> list[Any]:
    """Tables with their strides and sizes, then the sizes ``s0, s1, ...``."""
    tables = list(tables)
    for number, axis, coordinate in kernels.direct:
        n = n_q if coordinate == "q" else n_kv
        if tables[number].shape[axis] < n:
            tables[number] = _lengthened(tables[number], axis, n)
    arguments: list[Any] = []
    for number in kernels.tables:
        arguments += [tables[number], *tables[number].stride(), *tables[number].shape]
    return arguments + [int(size) for size in sizes]


def _lengthened(table: Tensor, axis: int, n: int) -> Tensor:
    """The table with its last entry along ``axis`` repeated up to length ``n``."""
    nearest = torch.arange(n, device=table.device).clamp_(max=table.shape[axis] - 1)
    return table.index_select(axis, nearest)


def parts(
    work: Schedule, subtiles: int, members: int, tile: int, width: int, unused: Tensor
) -> Tensor:
    """Room for the partial results of split lines, fp32; ``unused``, fp32, where there are none."""
    slots = work.slots * subtiles * members
    return unused.new_empty(slots, tile, width) if slots else unused


def gradient(of: Tensor, complete: bool) -> Tensor:
    """Room for a gradient; zeros where no section reaches every row."""
    make = torch.empty if complete else torch.zeros
    return make(of.shape, dtype=of.dtype, device=of.device)


def grid(work: Schedule, subtiles: int, members: int) -> tuple[int]:
    """Programs of a launch: one for each tile of each item, for all members."""
    return (work.items.shape[0] * subtiles * members,)


def merge_grid(work: Schedule, subtiles: int, batch: int, heads: int) -> tuple[int, int, int]:
    """Programs that merge the parts of split lines."""
    return work.merges.shape[0] * subtiles, heads, batch


def options(tile: Tile) -> dict[str, Any]:
    """How a kernel is compiled."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
