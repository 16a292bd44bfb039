"""Launch the generated kernels: forward and backward with the signature that executors share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import cache
from sparse_compile.codegen.triton.predicate import COORDINATE_BITS
from sparse_compile.codegen.triton.sections import (
    described_box,
    described_views,
    ordered_bases,
    sections_of,
)
from sparse_compile.codegen.triton.source import direct_lookups, kernel_source, table_ranks
from sparse_compile.codegen.triton.tiles import Tile, Tiles, padded, tiles_for
from sparse_compile.errors import BadShape, UnsupportedDtype
from sparse_compile.layout import Layout, Schedule
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.view import Order

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LIMIT = 1 << COORDINATE_BITS
#: As many programs as split lines are for, where there is no GPU to ask.
_WORKERS_WITHOUT_GPU = 8


@dataclass(frozen=True)
class Kernels:
    """The kernels of one spec, ready to launch."""

    module: ModuleType
    tiles: Tiles
    tables: tuple[int, ...]
    direct: tuple[tuple[int, int, str], ...]
    spec: KernelSpec
    complete: dict[str, bool]


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: KernelSpec) -> Kernels:
    """Generate, write and load the kernels of a spec, once."""
    module = cache.load_module(spec.name, kernel_source(spec))
    mask = spec.attention.mask
    direct = tuple(sorted(direct_lookups(mask)))
    complete = {
        axis: sections_of(spec.attention, axis)[0].order.is_complete for axis in ("q", "kv")
    }
    ranks = tuple(table_ranks(mask))
    return Kernels(module, tiles_for(spec), ranks, direct, spec, complete)


@functools.lru_cache(maxsize=4096)
def _kernels_for(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> Kernels:
    if dtype not in _DTYPES:
        raise UnsupportedDtype(dtype)
    arch = arch_of(device)
    return kernels_of(KernelSpec(spec, head_dim, value_dim, _DTYPES[dtype], arch, exact))


def is_exact(spec: AttentionSpec, n_q: int, n_kv: int) -> bool:
    """Whether the lengths are multiples of the radices of all views."""
    return all(
        n_q % view.q.strides[0] == 0 and n_kv % view.kv.strides[0] == 0 for view in spec.parts
    )


def arch_of(device: torch.device) -> str:
    """``"sm_90"`` and the like; ``"interpreter"`` for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Layout,
    scale: float,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16, any strides.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        layout: the blocks that each view of the mask visits.
        scale: factor on the scores.
        spec: the mask.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv], 0 on empty rows; and the
        natural log-sum-exp [B, Hq, Nq] in fp32, -inf on empty rows.
    """
    batch, q_heads, n_q, n_kv, group = _checked(q, k, v, layout)
    exact = is_exact(spec, n_q, n_kv)
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, exact)
    tile = kernels.tiles.forward
    out = q.new_empty(batch, n_q, q_heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, q_heads, n_q, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    if not kernels.complete["q"]:
        out.zero_(), lse.fill_(float("-inf"))
    sign, scale = _positive(scale)
    q, k, v = _operand(q if sign == 1 else q * sign, tile), _operand(k, tile), _operand(v, tile)
    shared = (
        *_lists(kernels, layout, "q"),
        *_descriptors(kernels, "kv", tile, (k, v)),
        *_mask_arguments(kernels, tables, sizes, n_q, n_kv),
    )
    strides = out.stride()[:3]
    works = layout.schedules("q", batch * q_heads, _workers(q.device), q.device)
    with _current(q.device):
        for section, work in enumerate(works):
            part_out, part_lse = (
                _parts(work, (batch, q_heads), tile.m, spec.block_q, width, lse)
                for width in (padded(v.shape[-1]), 1)
            )
            kernels.module.forward[_grid(work, tile.m, spec.block_q, batch * q_heads)](
                *(q, k, v, out, lse, part_out, part_lse),
                *_strides(q, k, v),
                *strides,
                *(work.items, work.items.shape[0], work.heavy, q_heads, batch, n_q, n_kv, scale),
                *shared,
                SECTION=section,
                GROUP=group,
                **_options(tile),
            )
            if work.slots:
                grid = _merge_grid(work, tile.m, spec.block_q, batch, q_heads)
                kernels.module.merge_forward[grid](
                    *(part_out, part_lse, out, lse, work.merges),
                    *(*strides, n_q, *_bases(kernels, layout)),
                    SECTION=section,
                )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    layout: Layout,
    scale: float,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``(dq, dk, dv)``, contiguous, in the dtype of q.

    Args:
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``, if anything read it.
        out: result of :func:`forward`.
        lse: result of :func:`forward`.
        q, k, v, tables, sizes, layout, scale, spec: as in :func:`forward`.
    """
    batch, q_heads, n_q, n_kv, group = _checked(q, k, v, layout)
    exact = is_exact(spec, n_q, n_kv)
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, exact)
    over_keys, over_queries = kernels.tiles.backward_query, kernels.tiles.backward_key_value
    dq = _gradient(q, kernels.complete["q"])
    dk, dv = (_gradient(t, kernels.complete["kv"]) for t in (k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign, scale = _positive(scale)
    q, k, v, grad_out = (
        _operand(t, over_keys, over_queries)
        for t in (q if sign == 1 else q * sign, k, v, grad_out.to(q.dtype))
    )
    out, lse = _operand(out), lse.contiguous()
    rows = (n_q // 128 + 1) * 128  # at least one that does not exist
    statistics = lse.new_empty(2, batch, q_heads, rows)
    mask_data = _mask_arguments(kernels, tables, sizes, n_q, n_kv)
    call = _Backward(kernels, layout, (q, k, v, grad_out, statistics), scale, group, mask_data)
    with _current(q.device):
        kernels.module.backward_prepare[(rows // 64, q_heads, batch)](
            *(out, grad_out, lse, _single(grad_lse, lse), statistics),
            *_strides(out, grad_out),
            *(n_q, rows),
            HAS_GRAD_LSE=grad_lse is not None,
        )
        by_query = layout.schedules("q", batch * q_heads, _workers(q.device), q.device)
        call.run("query", "q", q_heads, over_keys, by_query, (dq,))
        by_key = layout.schedules("kv", batch * k.shape[1], _workers(q.device), q.device)
        call.run("key_value", "kv", k.shape[1], over_queries, by_key, (dk, dv))
    return dq if sign == 1 else dq.mul_(sign), dk, dv


@dataclass(frozen=True)
class _Backward:
    """A backward call: what its two kernels share."""

    kernels: Kernels
    layout: Layout
    operands: tuple[Tensor, ...]
    scale: float
    group: int
    mask_data: list[Any]

    def run(
        self,
        what: str,
        axis: str,
        heads: int,
        tile: Tile,
        works: Sequence[Schedule],
        grads: tuple[Tensor, ...],
    ) -> None:
        """Launch ``backward_{what}``, lines being blocks of ``axis``, section after section."""
        q, k, v, grad_out, statistics = self.operands
        n_q, n_kv, batch, rows = q.shape[2], k.shape[2], q.shape[0], statistics.shape[3]
        shared = [*_lists(self.kernels, self.layout, axis), *self._loop(axis, tile)]
        extent = tile.m if axis == "q" else tile.n
        attention = self.kernels.spec.attention
        subtiles = (attention.block_q if axis == "q" else attention.block_kv) // extent
        kernel = getattr(self.kernels.module, f"backward_{what}")
        for section, work in enumerate(works):
            parts = [
                _parts(work, (batch, heads), extent, extent * subtiles, padded(g.shape[-1]), g)
                for g in grads
            ]
            kernel[_grid(work, 1, subtiles, batch * heads)](
                *(q, k, v, grad_out, statistics, *grads, *parts),
                *_strides(q, k, v, grad_out),
                *(work.items, work.items.shape[0], work.heavy, heads, batch),
                *(n_q, n_kv, rows, self.scale, *shared, *self.mask_data),
                SECTION=section,
                GROUP=self.group,
                **_options(tile),
            )
            if work.slots:
                for part, grad in zip(parts, grads, strict=True):
                    self._merge(what, work, subtiles, section, part, grad)

    def _loop(self, axis: str, tile: Tile) -> list[Any]:
        """What the loop reads: descriptors, and statistics in the order of each view."""
        q, k, v, grad_out, statistics = self.operands
        if axis == "q":
            return _descriptors(self.kernels, "kv", tile, (k, v))
        ordered = _statistics_in_order(self.kernels, statistics, q.shape[2])
        block = self.kernels.spec.attention.block_q
        described = _descriptors(self.kernels, "q", tile, (q, grad_out), ordered)
        return [*_ordered(self.kernels, ordered, block), *described]

    def _merge(
        self, what: str, work: Schedule, subtiles: int, section: int, part: Tensor, grad: Tensor
    ) -> None:
        batch, heads, n, width = grad.shape
        kernel = getattr(self.kernels.module, f"merge_{what}")
        kernel[_merge_grid(work, 1, subtiles, batch, heads)](
            *(part, grad, work.merges, n, *_bases(self.kernels, self.layout)),
            SECTION=section,
            DIM=width,
            PAD=padded(width),
        )


def _checked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[int, int, int, int, int]:
    """Batch, query heads, n_q, n_kv and query heads per key head."""
    batch, q_heads, n_q, _ = q.shape
    kv_heads, n_kv = k.shape[1], k.shape[2]
    if (n_q, n_kv) != (layout.n_q, layout.n_kv):
        found = (layout.n_q, layout.n_kv)
        raise BadShape(f"sparse_compile: a layout of {found} for lengths {(n_q, n_kv)}.")
    if kv_heads == 0 or q_heads % kv_heads:
        raise BadShape(f"sparse_compile: {q_heads} query heads for {kv_heads} key heads.")
    if max(n_q, n_kv) >= _LIMIT or max(batch, q_heads) > 65535:
        raise BadShape(
            f"sparse_compile: q {list(q.shape)} and k {list(k.shape)}: lengths must be below"
            f" {_LIMIT}, batch and heads at most 65535."
        )
    return batch, q_heads, n_q, n_kv, q_heads // kv_heads


def _positive(scale: float) -> tuple[float, float]:
    """``(sign, size)``, ``scale = sign * size``, size > 0: kernels compare scores unscaled."""
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def _operand(t: Tensor, *tiles: Tile) -> Tensor:
    """A tensor whose rows are contiguous, and aligned for descriptors where tiles use them."""
    unit = 16 // t.element_size()
    # Offsets within a tile are int32.
    usable = (t.stride(-1) == 1 or t.shape[-1] == 1) and 0 <= t.stride(2) < 1 << 22
    if usable and any(tile.descriptors for tile in tiles):
        usable = t.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in t.stride()[:3])
    return t if usable else t.clone(memory_format=torch.contiguous_format)


def _single(grad_lse: Tensor | None, unused: Tensor) -> Tensor:
    return unused if grad_lse is None else grad_lse.to(torch.float32).contiguous()


def _descriptors(
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
    descriptors: list[Any] = []
    extent = tile.m if across == "q" else tile.n
    for suffix, order in described_views(kernels.spec, across, tile):
        box = (extent,) if order.is_natural else described_box(order, extent)
        assert box is not None
        descriptors += [_described(t, order, box) for t in tensors]
        if statistics is not None:
            descriptors.append(_descriptor(statistics[suffix], [1, 1, 1, tile.m]))
    return descriptors


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


def _statistics_in_order(kernels: Kernels, statistics: Tensor, n_q: int) -> dict[str, Tensor]:
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
    base = order.base(torch.arange(order.blocks(n)), n)[:, None]
    return (base + torch.tensor(order.offsets())).clamp(max=n).flatten().to(device)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _lists(kernels: Kernels, layout: Layout, axis: str) -> list[Any]:
    """For each view start, counts, index, room, lines, batches and heads; then the bases."""
    arguments: list[Any] = []
    for view in layout.views:
        lists = view.rows if axis == "q" else view.cols
        lines = view.grid[0 if axis == "q" else 1]
        arguments += [*lists.tensors(), lists.index.shape[1], lines, view.batches, view.heads]
    return arguments + _bases(kernels, layout)


def _ordered(kernels: Kernels, statistics: dict[str, Tensor], block: int) -> list[Any]:
    """Arguments for :func:`statistic_parameters`."""
    arguments: list[Any] = []
    for number, view in enumerate(kernels.spec.attention.parts):
        if not view.q.is_natural:
            own = statistics[f"_{number}"]
            arguments += [own, own.shape[3] // block]
    return arguments


def _bases(kernels: Kernels, layout: Layout) -> list[Tensor]:
    """The first token of each block, for orders that are not natural."""
    device = layout.views[0].rows.start.device
    return [
        _base_table(order, layout.n_q if name.startswith("q_") else layout.n_kv, device)
        for name, order in ordered_bases(kernels.spec.attention)
    ]


@functools.lru_cache(maxsize=64)
def _base_table(order: Order, n: int, device: torch.device) -> Tensor:
    return order.base(torch.arange(order.blocks(n), device=device), n).to(torch.int32)


def _workers(device: torch.device) -> int:
    """Programs that run at a time: two to a multiprocessor."""
    return _WORKERS_WITHOUT_GPU if device.type == "cpu" else 2 * _multiprocessors(device)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _grid(work: Schedule, tile: int, block: int, members: int) -> tuple[int]:
    return (work.items.shape[0] * (block // tile) * members,)


def _merge_grid(
    work: Schedule, tile: int, block: int, batch: int, heads: int
) -> tuple[int, int, int]:
    return work.merges.shape[0] * (block // tile), heads, batch


def _parts(
    work: Schedule, members: tuple[int, int], tile: int, block: int, width: int, like: Tensor
) -> Tensor:
    """Room for the partial results of split lines, fp32."""
    slots = work.slots * (block // tile) * members[0] * members[1]
    if not slots:
        return like  # never touched
    return like.new_empty(slots, tile, width, dtype=torch.float32)


def _gradient(of: Tensor, complete: bool) -> Tensor:
    """Room for a gradient; zeros where no section reaches every row."""
    make = torch.empty if complete else torch.zeros
    return make(of.shape, dtype=of.dtype, device=of.device)


def _mask_arguments(
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


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _current(device: torch.device) -> Any:
    """Make ``device`` the current one, where it matters."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
