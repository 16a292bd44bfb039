"""Launch the kernels for selected keys: forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen import cache
from sparse_compile.codegen.triton import arguments
from sparse_compile.codegen.triton.executor import arch_of
from sparse_compile.codegen.triton.launch import Launcher
from sparse_compile.codegen.triton.selected.source import SelectedKernelSpec, selected_source
from sparse_compile.codegen.triton.selected.tiles import Tile, Tiles, tiles_for
from sparse_compile.codegen.triton.source import direct_lookups, table_ranks
from sparse_compile.selected_spec import SelectedSpec
from sparse_compile.selection import places, worklist

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_NAMES = ("forward", "merge", "backward_query", "forward_by_key", "backward_key_value")
#: Entries of a unit of keys that one program handles at most.
_ENTRIES = 512
#: Keys are the outer loop of the forward for units of so many keys, selected by so many rows on
#: average, if the parts of a group take no more bytes. Measured on an H200.
_LONG, _OFTEN, _ROOM = 128, 1024, 8 << 30
#: Queries that the kernels by key, forward and backward, go through before the next: what they read
#: of a group's queries stays in the L2 cache.
_STRETCH = (8192, 16384)


@dataclass(frozen=True)
class Kernels:
    """The kernels of one spec, ready to launch."""

    launchers: dict[str, Launcher]
    tiles: Tiles
    tables: tuple[int, ...]
    direct: tuple[tuple[int, int, str], ...]
    spec: SelectedKernelSpec


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: SelectedKernelSpec) -> Kernels:
    """Generate, write and load the kernels of a spec, once."""
    module = cache.load_module(spec.name, selected_source(spec))
    mask = spec.selected.mask
    launchers = {name: Launcher(getattr(module, name)) for name in _NAMES if hasattr(module, name)}
    direct = tuple(sorted(direct_lookups(mask)))
    return Kernels(launchers, tiles_for(spec), tuple(table_ranks(mask)), direct, spec)


@dataclass(frozen=True)
class _Call:
    """A call: its operands, and how its heads are grouped."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    count: Tensor
    scale: float
    kernels: Kernels
    mask_data: list[Any]

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        count: Tensor,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        scale: float,
        spec: SelectedSpec,
    ) -> _Call:
        groups = math.lcm(k.shape[1], index.shape[1])
        key = SelectedKernelSpec(
            *(spec, q.shape[3], v.shape[3], _DTYPES[q.dtype]),
            *(arch_of(q.device), q.shape[1] // groups),
        )
        kernels = kernels_of(key)
        mask_data = arguments.mask_arguments(kernels, tables, sizes, q.shape[2], k.shape[2])
        q, k, v = (arguments.operand(t) for t in (q, k, v))
        return _Call(q, k, v, index.contiguous(), count.contiguous(), scale, kernels, mask_data)

    @property
    def spec(self) -> SelectedKernelSpec:
        return self.kernels.spec

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.spec.members

    @property
    def shared(self) -> tuple[int, int]:
        """Groups per list and per key head."""
        return self.groups // self.index.shape[1], self.groups // self.k.shape[1]

    @property
    def lists(self) -> tuple[int, int, int]:
        """Lists of a batch entry, units of queries, capacity of a list."""
        _, lists, units, most = self.index.shape
        return lists, units, most

    def launch(self, name: str, tile: Tile, grid: tuple[int, ...], *given: Any) -> None:
        """Launch a kernel; ``given`` are its arguments, then a tuple of its constants."""
        *values, constants = given
        self.kernels.launchers[name](grid, values, constants, tile.options)

    def by_query(self, tile: Tile, parts: int) -> tuple[int, int, int]:
        """The grid of a kernel by query."""
        subtiles = -(-self.spec.rows // tile.m)
        return self.index.shape[2] * subtiles * parts, self.groups, self.q.shape[0]

    def work(self, stretch: int) -> tuple[Tensor, Tensor]:
        """Who handles which entries, and these by stretch of queries and by unit of keys."""
        units = -(-self.k.shape[2] // self.spec.selected.unit_kv)
        rows = max(1, stretch // self.spec.selected.unit_q)
        start, order = places(self.index, self.count, units, rows)
        each = max(1, _ENTRIES // self.spec.selected.unit_q)
        return worklist(start, order.shape[-1], each), order


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: SelectedSpec,
) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.selected.forward`."""
    call = _Call.of(q, k, v, index, count, tables, sizes, scale, spec)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty(batch, n_q, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32)
    if not out.numel() or not k.numel() or not index.shape[3]:
        return out.zero_(), lse.fill_(-math.inf)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        if is_by_key(call):
            _by_key_forward(call, out, lse)
        else:
            _by_query(call, out, lse, parts_of(call))
    return out, lse


def is_by_key(call: _Call) -> bool:
    """Whether keys are the outer loop of the forward: each unit is read once for all its queries.

    That costs writing and reading a result for every entry, and pays where a unit is long and many
    queries select it: by the capacity of the lists, as their contents are on the device.
    """
    _, units, most = call.lists
    unit = call.spec.selected.unit_kv
    entries, key_units = units * most, -(-call.k.shape[2] // unit)
    room = call.q.shape[0] * entries * call.spec.rows * call.v.shape[3] * call.v.element_size()
    often = entries * call.spec.rows >= _OFTEN * key_units
    return unit >= _LONG and call.q.element_size() == 2 and often and room <= _ROOM


def parts_of(call: _Call) -> int:
    """Into how many parts the keys of a query are cut, so that few queries keep a GPU busy."""
    if not call.q.is_cuda:
        return 1
    programs = math.prod(call.by_query(call.kernels.tiles.forward, 1))
    wanted = 4 * torch.cuda.get_device_properties(call.q.device).multi_processor_count
    keys = call.index.shape[3] * call.spec.selected.unit_kv
    return max(1, min(wanted // programs, keys // (2 * call.kernels.tiles.forward.n)))


def _by_query(call: _Call, out: Tensor, lse: Tensor, parts: int) -> None:
    tile, (batch, heads, n_q, _) = call.kernels.tiles.forward, call.q.shape
    strides = arguments.strides(call.q, call.k, call.v)
    to, to_lse = out, lse
    if parts > 1:
        shape = (batch, call.groups, call.index.shape[2], parts, call.spec.rows)
        to = lse.new_empty(*shape, out.shape[3])
        to_lse = lse.new_empty(shape)
    call.launch(
        *("forward", tile, call.by_query(tile, parts)),
        *(call.q, call.k, call.v, call.index, call.count, to, to_lse, *strides),
        *(*out.stride()[:3], *call.lists, parts, heads, n_q, call.k.shape[2], call.scale),
        *call.mask_data,
        (*call.shared, parts > 1),
    )
    if parts > 1:
        _merge(call, (to, to_lse), (out, lse), (0, call.groups), parts, counted=False)


def _merge(
    call: _Call,
    found: tuple[Tensor, Tensor],
    to: tuple[Tensor, Tensor],
    groups: tuple[int, int],
    parts: int,
    counted: bool,
) -> None:
    """Merge the parts of some groups, from the first of ``groups`` up to the second."""
    tile, (batch, heads, n_q, _) = call.kernels.tiles.forward, call.q.shape
    lists, units, _ = call.lists
    subtiles = -(-call.spec.rows // tile.m)
    call.launch(
        *("merge", Tile(tile.m, 1, 4, 1), (units * subtiles, groups[1] - groups[0], batch)),
        *(*found, call.count, *to, *to[0].stride()[:3]),
        *(lists, units, parts, groups[0], heads, n_q),
        (call.shared[0], counted),
    )


def _by_key_forward(call: _Call, out: Tensor, lse: Tensor) -> None:
    """The forward with keys outermost; group after group, so that the parts take less room."""
    (lists, units, most), tile = call.lists, call.kernels.tiles.forward_by_key
    batch, n_q, n_kv = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    work, order = call.work(_STRETCH[0])
    strides = arguments.strides(call.q, call.k, call.v)
    for first in range(call.groups):
        shape = (batch, 1, units * most, call.spec.rows)
        part = call.q.new_empty(*shape, call.v.shape[3]), lse.new_empty(shape)
        call.launch(
            *("forward_by_key", tile, (work.shape[2], 1, batch)),
            *(call.q, call.k, call.v, work, order, *part, *strides),
            *(lists, units, most, work.shape[2], first, 1, n_q, n_kv, call.scale),
            *call.mask_data,
            call.shared,
        )
        _merge(call, part, (out, lse), (first, first + 1), most, counted=True)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    spec: SelectedSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.selected.backward`."""
    call = _Call.of(q, k, v, index, count, tables, sizes, scale, spec)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (k, v))
    if not q.numel() or not k.numel() or not index.shape[3]:
        return dq.zero_(), dk.to(k.dtype), dv.to(v.dtype)
    out, grad_out = arguments.operand(out), arguments.operand(grad_out.to(q.dtype))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    strides = arguments.strides(call.q, call.k, call.v, out, grad_out)
    sizes_of = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], scale)
    tile = call.kernels.tiles.backward_query
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        call.launch(
            *("backward_query", tile, call.by_query(tile, 1)),
            *(call.q, call.k, call.v, call.index, call.count, out, grad_out, lse),
            *(arguments.single(grad_lse, lse), delta, dq, dk, dv, *strides),
            *(*call.lists, 1, *sizes_of, *call.mask_data),
            (*call.shared, grad_lse is not None),
        )
        if not call.spec.adds_by_query:
            _by_key_backward(call, grad_out, (lse, delta), (dk, dv), sizes_of)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _by_key_backward(
    call: _Call,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    sizes: tuple[Any, ...],
) -> None:
    """Add the gradients of keys and values, a unit of keys at a time."""
    work, order = call.work(_STRETCH[1])
    tile = call.kernels.tiles.backward_key_value
    subtiles = call.spec.selected.unit_kv // tile.n
    call.launch(
        "backward_key_value",
        *(tile, (work.shape[2] * subtiles, call.groups, call.q.shape[0])),
        *(call.q, call.k, call.v, work, order, grad_out, *statistics, *grads),
        *arguments.strides(call.q, call.k, call.v, grad_out),
        *(*call.lists, work.shape[2], 0, *sizes, *call.mask_data),
        call.shared,
    )
