"""What launches of the generated kernels take: lists, descriptors, mask data, room for parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparse_compile.codegen.triton.blocks.sections import Described
from sparse_compile.codegen.triton.blocks.tiles import Tile, padded
from sparse_compile.layout import Layout, Schedule
from sparse_compile.spec.view import Order

if TYPE_CHECKING:
    from sparse_compile.codegen.triton.blocks.executor import Kernels


class Loads(Protocol):
    """How a kernel loads tiles."""

    @property
    def descriptors(self) -> bool:
        """Whether by tensor descriptors."""
        ...


def operand(t: Tensor, *tiles: Loads) -> Tensor:
    """A tensor whose rows are contiguous, and aligned for descriptors where tiles use them."""
    by_batch, by_head, by_token, by_dim = t.stride()
    # Offsets within a tile are int32.
    usable = (by_dim == 1 or t.shape[-1] == 1) and 0 <= by_token < 1 << 22
    if usable and any([tile.descriptors for tile in tiles]):
        unit = 16 // t.element_size()
        aligned = (by_batch | by_head | by_token) & unit - 1 == 0  # unit is a power of two
        usable = t.data_ptr() % 16 == 0 and aligned and min(by_batch, by_head, by_token) > 0
    return t if usable else t.clone(memory_format=torch.contiguous_format)


def single(grad_lse: Tensor | None, unused: Tensor) -> Tensor:
    """The gradient of the log-sum-exp; anything where there is none."""
    return unused if grad_lse is None else grad_lse.to(torch.float32).contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """The strides of batch, heads and tokens of each tensor."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def lists(kernels: Kernels, layout: Layout, axis: str, section: int) -> list[Any]:
    """For each view start, counts, index, room, lines, batches and heads.

    None for the views of other sections: every argument costs time at each launch.
    """
    own = kernels.spec.attention.sections(axis)[section]
    arguments: list[Any] = []
    for number, view in enumerate(layout.views):
        if number in own:
            side = view.rows if axis == "q" else view.cols
            lines = view.grid[0 if axis == "q" else 1]
            arguments += [*side.tensors(), side.index.shape[1], lines, view.batches, view.heads]
        else:
            arguments += [None] * 7
    return arguments


def ordered(kernels: Kernels, statistics: dict[int, Tensor], own: Sequence[int]) -> list[Any]:
    """Arguments for :func:`statistic_parameters`; None for other views than ``own``."""
    arguments: list[Any] = []
    for number, view in enumerate(kernels.spec.attention.parts):
        if not view.q.is_natural:
            theirs = statistics[number] if number in own else None
            lines = None if theirs is None else theirs.shape[3] // view.q.block
            arguments += [theirs, lines]
    return arguments


def statistics_in_order(kernels: Kernels, statistics: Tensor, n_q: int) -> dict[int, Tensor]:
    """For each view, the statistics of queries in its order."""
    found: dict[Order, Tensor] = {}
    for view in kernels.spec.attention.parts:
        if view.q not in found:
            natural = view.q.is_natural
            places = None if natural else _places(view.q, n_q, statistics.device)
            found[view.q] = statistics if places is None else statistics.index_select(3, places)
    return {n: found[view.q] for n, view in enumerate(kernels.spec.attention.parts)}


@functools.lru_cache(maxsize=64)
def _places(order: Order, n: int, device: torch.device) -> Tensor:
    """int64 [blocks * block]: the token at each place of an order, ``n`` where there is none."""
    base: Tensor = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten().to(device)


def descriptors(
    described: Sequence[Described],
    own: Sequence[int],
    tensors: tuple[Tensor, Tensor],
    statistics: dict[int, Tensor] | None = None,
) -> list[Any]:
    """Descriptors of the tiles of each view, for kernels that load by them.

    Args:
        described: what the kernel describes.
        own: the views of this launch; others get None.
        tensors: what the loop reads, [B, H, N, D].
        statistics: the statistics of queries in the order of each view, if the loop reads them.
    """
    made: list[Any] = []
    for one in described:
        number = next((number for number in one.views if number in own), None)
        if number is None:
            made += [None] * (2 if statistics is None else 3)
            continue
        made += [_of_boxes(t, one) for t in tensors]
        if statistics is not None:
            theirs = statistics[number]
            block = [1, 1, 1, one.extent]
            made.append(_descriptor(theirs, list(theirs.shape), list(theirs.stride()), block))
    return made


def of_tiles(t: Tensor, rows: int) -> Any:
    """A descriptor of tiles of so many tokens of [B, H, N, D], with all features."""
    return _descriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, padded(t.shape[3])])


def _of_boxes(t: Tensor, one: Described) -> Any:
    """A descriptor of boxes of tokens of [B, H, N, D], the token taken apart into its digits."""
    (batch, heads, n, dim), (by_batch, by_head, by_token, by_dim) = t.shape, t.stride()
    order = one.order
    sizes = [n // order.strides[0], *order.radices]
    strides = [stride * by_token for stride in order.strides]
    block = [1, 1, *one.box, padded(dim)]
    shape = [batch, heads, *sizes, dim]
    return _descriptor(t, shape, [by_batch, by_head, *strides, by_dim], block)


def _descriptor(t: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    return _descriptor_class()(t, shape, strides, block)


@functools.lru_cache(maxsize=1)
def _descriptor_class() -> Any:
    """Triton's host descriptor without its checks, which :func:`operand` makes for all of them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    class Unchecked(TensorDescriptor):  # type: ignore[misc]  # triton has no types
        def __post_init__(self) -> None:
            pass

    return Unchecked


class MaskKernels(Protocol):
    """Kernels that read the data of a mask.

    Attributes:
        tables: the tables that they read.
        direct: where tables are indexed by a plain ``q`` or ``kv``: table, dimension, coordinate.
    """

    @property
    def tables(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def direct(self) -> tuple[tuple[int, int, str], ...]: ...  # noqa: D102


def mask_arguments(
    kernels: MaskKernels, tables: Sequence[Tensor], sizes: Sequence[int], n_q: int, n_kv: int
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
