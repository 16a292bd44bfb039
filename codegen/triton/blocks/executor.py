"""Launch the generated kernels: forward and backward with the signature that executors share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.runtime import cache
from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, Launcher
from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.blocks.sections import (
    Described,
    described_views,
    sections_of,
)
from sparse_compile.codegen.triton.blocks.source import direct_lookups, kernel_source, table_ranks
from sparse_compile.codegen.triton.blocks.tiles import Tile, Tiles, padded, tiles_for
from sparse_compile.codegen.triton.layout.launch import current
from sparse_compile.codegen.triton.predicate import COORDINATE_BITS
from sparse_compile.errors import BadShape, UnsupportedDtype
from sparse_compile.layout import Layout, Schedule
from sparse_compile.spec import AttentionSpec, KernelSpec
from sparse_compile.spec.target import arch_of

_NAMES = (
    *("forward", "backward_query", "backward_key_value"),
    *("merge_forward", "merge_query", "merge_key_value"),
)
LIMIT = 1 << COORDINATE_BITS
#: As many programs as split lines are for, where there is no GPU to ask.
_WORKERS_WITHOUT_GPU = 8


@dataclass(frozen=True)
class Kernels:
    """The kernels of one spec, ready to launch."""

    launchers: dict[str, Launcher]
    tiles: Tiles
    tables: tuple[int, ...]
    direct: tuple[tuple[int, int, str], ...]
    spec: KernelSpec
    complete: dict[str, bool]
    described: dict[Tile, dict[str, tuple[Described, ...]]]


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
    tiles = tiles_for(spec)
    described = {
        tile: {axis: described_views(spec, axis, tile) for axis in ("q", "kv")}
        for tile in (tiles.forward, tiles.backward_query, tiles.backward_key_value)
    }
    launchers = {name: Launcher(getattr(module, name)) for name in _NAMES}
    return Kernels(launchers, tiles, ranks, direct, spec, complete, described)


@functools.lru_cache(maxsize=4096)
def _kernels_for(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> Kernels:
    if dtype not in DTYPE_NAMES:
        raise UnsupportedDtype(dtype)
    arch = arch_of(device)
    return kernels_of(KernelSpec(spec, head_dim, value_dim, DTYPE_NAMES[dtype], arch, exact))


@functools.lru_cache(maxsize=1024)
def is_exact(spec: AttentionSpec, n_q: int, n_kv: int) -> bool:
    """Whether the lengths are multiples of the radices of all views."""
    return all(
        n_q % view.q.strides[0] == 0 and n_kv % view.kv.strides[0] == 0 for view in spec.parts
    )


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv], 0 on empty rows; and the
        natural log-sum-exp [B, Hq, Nq] in fp32, -inf on empty rows.
    """
    q, k, v, layout, spec = call.q, call.k, call.v, call.blocks, call.spec
    batch, q_heads, n_q, n_kv, group = _checked(q, k, v, layout)
    exact = is_exact(spec, n_q, n_kv)
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, exact)
    tile = kernels.tiles.forward
    out = q.new_empty(batch, n_q, q_heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, q_heads, n_q, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    if not kernels.complete["q"]:
        out.zero_()
        lse.fill_(float("-inf"))
    sign, scale = positive(call.scale)
    q, k, v = (
        arguments.operand(q if sign == 1 else q * sign, tile),
        arguments.operand(k, tile),
        arguments.operand(v, tile),
    )
    mask_data = arguments.mask_arguments(kernels, call.tables, call.sizes, n_q, n_kv)
    launch = _Forward(kernels, layout, (q, k, v), (out, lse), scale, group, mask_data)
    with current(q.device):
        # The lists may be being made: what does not wait for them comes first.
        prepared = [launch.prepared(section) for section in range(len(spec.sections("q")))]
        works = layout.schedules("q", batch * q_heads, workers_of(q.device), q.device)
        for section, work in enumerate(works):
            launch.run(section, work, prepared[section])
    return out, lse


@dataclass(frozen=True)
class _Forward:
    """A forward call: what the launches of its sections share."""

    kernels: Kernels
    layout: Layout
    operands: tuple[Tensor, Tensor, Tensor]
    results: tuple[Tensor, Tensor]
    scale: float
    group: int
    mask_data: list[Any]

    def prepared(self, section: int) -> list[Any]:
        """What the launch of a section takes that its worklist does not matter for."""
        (_, k, v), kernels = self.operands, self.kernels
        own = kernels.spec.attention.sections("q")[section]
        described = kernels.described[kernels.tiles.forward]["kv"]
        return [
            *arguments.lists(kernels, self.layout, "q", section),
            *arguments.descriptors(described, own, (k, v)),
            *self.mask_data,
        ]

    def run(self, section: int, work: Schedule, prepared: list[Any]) -> None:
        """Launch one section, and merge the parts of its split lines."""
        (q, k, v), (out, lse), kernels = self.operands, self.results, self.kernels
        attention, tile = kernels.spec.attention, kernels.tiles.forward
        (batch, heads, n_q, _), n_kv = q.shape, k.shape[2]
        strides, subtiles, members = out.stride()[:3], attention.block_q // tile.m, batch * heads
        parts = [
            arguments.parts(work, subtiles, members, tile.m, width, lse)
            for width in (padded(v.shape[-1]), 1)
        ]
        kernels.launchers["forward"](
            arguments.grid(work, subtiles, members),
            [
                *(q, k, v, out, lse, *parts),
                *arguments.strides(q, k, v),
                *strides,
                *(work.items, work.items.shape[0], work.heavy, heads, batch, n_q, n_kv, self.scale),
                *prepared,
            ],
            (section, self.group),
            arguments.options(tile),
        )
        if work.slots:
            kernels.launchers["merge_forward"](
                arguments.merge_grid(work, subtiles, batch, heads),
                [*parts, out, lse, work.merges, *strides, n_q],
                (section,),
                {},
            )


def backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`: ``(dq, dk, dv)``, contiguous, in the dtype of q."""
    q, k, v, layout, spec = call.q, call.k, call.v, call.blocks, call.spec
    out, lse, grad_out, grad_lse = result.out, result.lse, result.grad_out, result.grad_lse
    batch, q_heads, n_q, n_kv, group = _checked(q, k, v, layout)
    exact = is_exact(spec, n_q, n_kv)
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, exact)
    over_keys, over_queries = kernels.tiles.backward_query, kernels.tiles.backward_key_value
    dq = arguments.gradient(q, kernels.complete["q"])
    dk, dv = (arguments.gradient(t, kernels.complete["kv"]) for t in (k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign, scale = positive(call.scale)
    q, k, v, grad_out = (
        arguments.operand(t, over_keys, over_queries)
        for t in (q if sign == 1 else q * sign, k, v, grad_out.to(q.dtype))
    )
    out, lse = arguments.operand(out), lse.contiguous()
    rows = (n_q // 128 + 1) * 128  # at least one that does not exist
    statistics = lse.new_empty(2, batch, q_heads, rows)
    mask_data = arguments.mask_arguments(kernels, call.tables, call.sizes, n_q, n_kv)
    if any(not view.q.is_natural for view in spec.parts):
        # What stands for a query that does not exist: places that fill up a block read it.
        statistics[0, ..., n_q:] = float("inf")
        statistics[1, ..., n_q:] = 0.0
    launch = _Backward(kernels, layout, (q, k, v, grad_out, statistics), scale, group, mask_data)
    with current(q.device):
        by_query = layout.schedules("q", batch * q_heads, workers_of(q.device), q.device)
        of_query = (out, grad_out, lse, arguments.single(grad_lse, lse), statistics)
        launch.run("query", over_keys, by_query, (dq,), of_query, (grad_lse is not None,))
        by_key = layout.schedules("kv", batch * k.shape[1], workers_of(q.device), q.device)
        launch.run("key_value", over_queries, by_key, (dk, dv), (grad_out, statistics), ())
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
        tile: Tile,
        works: Sequence[Schedule],
        grads: tuple[Tensor, ...],
        read: tuple[Tensor, ...],
        flags: tuple[bool, ...],
    ) -> None:
        """Launch ``backward_{what}``, section after section.

        Args:
            what: ``"query"`` or ``"key_value"``.
            tile: of the kernel.
            works: the worklist of each section.
            grads: what it writes.
            read: what it reads beside q, k and v.
            flags: constants of the kernel before those that all have.
        """
        q, k, v, _, statistics = self.operands
        axis = "q" if what == "query" else "kv"
        n_q, n_kv, batch, rows = q.shape[2], k.shape[2], q.shape[0], statistics.shape[3]
        heads = (q if axis == "q" else k).shape[1]
        strided = [t for t in read if t.dim() == 4 and t is not statistics]
        ordered = {}
        if axis == "kv":
            ordered = arguments.statistics_in_order(self.kernels, statistics, n_q)
        extent = tile.m if axis == "q" else tile.n
        attention = self.kernels.spec.attention
        subtiles = (attention.block_q if axis == "q" else attention.block_kv) // extent
        kernel = self.kernels.launchers[f"backward_{what}"]
        for section, work in enumerate(works):
            members = batch * heads
            parts = [
                arguments.parts(work, subtiles, members, extent, padded(g.shape[-1]), statistics)
                for g in grads
            ]
            kernel(
                arguments.grid(work, subtiles, members),
                [
                    *(q, k, v, *read, *grads, *parts),
                    *arguments.strides(q, k, v, *strided),
                    *(work.items, work.items.shape[0], work.heavy, heads, batch),
                    *(n_q, n_kv, rows, self.scale),
                    *arguments.lists(self.kernels, self.layout, axis, section),
                    *self._loop(axis, tile, section, ordered),
                    *self.mask_data,
                ],
                (*flags, section, self.group),
                arguments.options(tile),
            )
            if work.slots:
                for part, grad in zip(parts, grads, strict=True):
                    self._merge(what, work, subtiles, section, part, grad)

    def _loop(self, axis: str, tile: Tile, section: int, ordered: dict[int, Tensor]) -> list[Any]:
        """What the loop reads: descriptors, and statistics in the order of each view."""
        q, k, v, grad_out, _ = self.operands
        own = self.kernels.spec.attention.sections(axis)[section]
        described = self.kernels.described[tile]
        if axis == "q":
            return arguments.descriptors(described["kv"], own, (k, v))
        return [
            *arguments.ordered(self.kernels, ordered, own),
            *arguments.descriptors(described["q"], own, (q, grad_out), ordered),
        ]

    def _merge(
        self, what: str, work: Schedule, subtiles: int, section: int, part: Tensor, grad: Tensor
    ) -> None:
        batch, heads, n, width = grad.shape
        self.kernels.launchers[f"merge_{what}"](
            arguments.merge_grid(work, subtiles, batch, heads),
            [part, grad, work.merges, n],
            (section, width, padded(width)),
            {},
        )


def workers_of(device: torch.device) -> int:
    """Programs that run at a time: two to a multiprocessor."""
    return _WORKERS_WITHOUT_GPU if device.type == "cpu" else 2 * _multiprocessors(device)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _checked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[int, int, int, int, int]:
    """Batch, query heads, n_q, n_kv and query heads per key head."""
    batch, q_heads, n_q, _ = q.shape
    kv_heads, n_kv = k.shape[1], k.shape[2]
    if (n_q, n_kv) != (layout.n_q, layout.n_kv):
        found = (layout.n_q, layout.n_kv)
        raise BadShape(f"sparse_compile: a layout of {found} for lengths {(n_q, n_kv)}.")
    if kv_heads == 0 or q_heads % kv_heads:
        raise BadShape(f"sparse_compile: {q_heads} query heads for {kv_heads} key heads.")
    if max(n_q, n_kv) >= LIMIT or max(batch, q_heads) > 65535:
        raise BadShape(
            f"sparse_compile: q {list(q.shape)} and k {list(k.shape)}: lengths must be below"
            f" {LIMIT}, batch and heads at most 65535."
        )
    return batch, q_heads, n_q, n_kv, q_heads // kv_heads


def positive(scale: float) -> tuple[float, float]:
    """``(sign, size)``, ``scale = sign * size``, size > 0: kernels compare scores unscaled."""
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)
