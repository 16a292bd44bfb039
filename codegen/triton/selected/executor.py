"""Launch the kernels for selected keys: forward and backward."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.codegen.runtime import cache
from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, Launcher
from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.blocks.executor import (
    LIMIT,
    positive,
    workers_of,
)
from sparse_compile.codegen.triton.blocks.source import direct_lookups, table_ranks
from sparse_compile.codegen.triton.layout.launch import current
from sparse_compile.codegen.triton.selected import by_union, latent
from sparse_compile.codegen.triton.selected.features import WIDE, features_of
from sparse_compile.codegen.triton.selected.latent import (
    can_be_latent,
    latent_name,
    latent_source,
)
from sparse_compile.codegen.triton.selected.source import SelectedKernelSpec, selected_source
from sparse_compile.codegen.triton.selected.tiles import Tile, Tiles, tiles_for
from sparse_compile.errors import BadShape
from sparse_compile.selection import places, worklist
from sparse_compile.spec.target import arch_of

_NAMES = (
    *("forward", "merge", "backward_query", "forward_by_key", "backward_key_value"),
    "forward_union",
)
#: Entries of a unit of keys that one program handles at most.
_ENTRIES = 512
#: Keys are the outer loop of the forward for units of at least so many keys, selected by so many
#: rows on average, if the parts of a group take no more bytes. Of the first, 64 and 128 were tried
#: on an H200 (with 16 rows, 65536 queries: 128 gains 30 %); the other two are guesses.
_LONG, _OFTEN, _ROOM = 128, 1024, 8 << 30
#: Queries that the kernels by key, forward and backward, go through before the next, so that what
#: they read again of a group's queries may still be in a cache: 2 % faster on an H200.
_STRETCH = (8192, 16384)


@dataclass(frozen=True)
class Kernels:
    """The kernels of one spec, ready to launch.

    Attributes:
        by_query: the tiles of those that may load keys and values by descriptors.
    """

    launchers: dict[str, Launcher]
    tiles: Tiles
    tables: tuple[int, ...]
    direct: tuple[tuple[int, int, str], ...]
    spec: SelectedKernelSpec
    by_query: tuple[Tile, ...]


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: SelectedKernelSpec) -> Kernels:
    """Generate, write and load the kernels of a spec, once."""
    module = cache.load_module(spec.name, selected_source(spec))
    mask = spec.selected.mask
    launchers = {name: Launcher(getattr(module, name)) for name in _NAMES if hasattr(module, name)}
    if can_be_latent(spec):
        module = cache.load_module(latent_name(spec), latent_source(spec))
        launchers["forward_latent"] = Launcher(module.forward_latent)
    direct = tuple(sorted(direct_lookups(mask)))
    tiles = tiles_for(spec)
    by_query = tiles.forward, tiles.backward_query, *by_union.tiles(spec)
    return Kernels(launchers, tiles, tuple(table_ranks(mask)), direct, spec, by_query)


@dataclass(frozen=True)
class _Launch:
    """A call, and what its launches share.

    Attributes:
        call: with operands that the kernels can read, and a positive scale.
        sign: what its q was multiplied with for that.
        kernels: of the call.
        mask_data: what the mask reads, as arguments.
    """

    call: AttentionCall
    sign: float
    kernels: Kernels
    mask_data: list[Any]

    @staticmethod
    def of(call: AttentionCall) -> _Launch:
        """Raises BadShape for more than the kernels can number."""
        _check(call)
        q, k, v = call.q, call.k, call.v
        dtype, arch = DTYPE_NAMES[q.dtype], arch_of(q.device)
        shape = q.shape[3], v.shape[3], dtype, arch, call.members, _is_shared(k, v)
        kernels = kernels_of(SelectedKernelSpec(call.spec, *shape))
        data = arguments.mask_arguments(kernels, call.tables, call.sizes, q.shape[2], k.shape[2])
        sign, scale = positive(call.scale)
        q = arguments.operand(q if sign == 1 else q * sign)
        k, v = (arguments.operand(t, *kernels.by_query) for t in (k, v))
        lists = call.index.contiguous(), call.count.contiguous()
        call = replace(call, q=q, k=k, v=v, lists=lists, scale=scale)
        return _Launch(call, sign, kernels, data)

    @property
    def spec(self) -> SelectedKernelSpec:
        """What the kernels were generated for."""
        return self.kernels.spec

    @property
    def shared(self) -> tuple[int, int]:
        """Groups per list and per key head."""
        groups = self.call.groups
        return groups // self.call.index.shape[1], groups // self.call.k.shape[1]

    @property
    def lists(self) -> tuple[int, int, int]:
        """Lists of a batch entry, units of queries, capacity of a list."""
        _, lists, units, most = self.call.index.shape
        return lists, units, most

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.call.q, self.call.k, self.call.v

    def operands_for(self, tile: Tile) -> tuple[Any, Any, Any]:
        """q, k and v as a kernel by query takes them."""
        if not tile.descriptors:
            return self.operands
        k, v = (arguments.of_tiles(t, tile.n) for t in (self.call.k, self.call.v))
        return self.call.q, k, v

    @property
    def may_yield(self) -> bool:
        """Whether the forward by query is told what unions cost."""
        return "forward_union" in self.kernels.launchers

    @property
    def is_aligned(self) -> bool:
        """Whether q and k can be copied 16 bytes at a time."""
        return latent.is_aligned(self.call.q, self.call.k)

    def start(self, name: str, tile: Tile, grid: tuple[int, ...], *given: Any) -> None:
        """Launch a kernel; ``given`` are its arguments, then a tuple of its constants."""
        *values, constants = given
        self.kernels.launchers[name](grid, values, constants, tile.options)

    def by_query(self, tile: Tile, parts: int) -> tuple[int, int, int]:
        """The grid of a kernel by query."""
        subtiles = -(-self.spec.rows // tile.m)
        return self.lists[1] * subtiles * parts, self.call.groups, self.call.q.shape[0]

    def work(self, stretch: int) -> tuple[Tensor, Tensor]:
        """Who handles which entries, and these by stretch of queries and by unit of keys."""
        spec = self.call.spec
        units = -(-self.call.k.shape[2] // spec.unit_kv)
        rows = max(1, stretch // spec.unit_q)
        start, order = places(self.call.index, self.call.count, units, rows)
        return worklist(start, order.shape[-1], max(1, _ENTRIES // spec.unit_q)), order


def _is_shared(k: Tensor, v: Tensor) -> bool:
    """Whether wide values are the first features of keys: then they are loaded once."""
    same = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and k.stride(3) == 1
    wide, width = k.shape[3] > WIDE, v.shape[3]
    return same and wide and width == features_of(k.shape[3])[0].dim


def _check(call: AttentionCall) -> None:
    """Raise for more than int32 and grids can number."""
    lengths, members = max(call.q.shape[2], call.k.shape[2]), max(call.q.shape[0], call.groups)
    entries = call.index.shape[2] * call.index.shape[3]
    if lengths >= LIMIT or members > 65535 or entries >= 1 << 31:
        raise BadShape(
            f"sparse_compile: q {list(call.q.shape)}, k {list(call.k.shape)} and index "
            f"{list(call.index.shape)}: lengths must be below {LIMIT}, batch and groups of heads "
            "at most 65535, and the entries of a list of all queries fewer than 2 ** 31."
        )


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.selected.forward`."""
    batch, heads, n_q, _ = call.q.shape
    out = call.q.new_empty(batch, n_q, heads, call.v.shape[3]).transpose(1, 2)
    lse = call.q.new_empty(batch, heads, n_q, dtype=torch.float32)
    if call.is_empty:
        return out.zero_(), lse.fill_(-math.inf)
    launch = _Launch.of(call)
    with current(call.q.device):
        parts = parts_of(launch)
        if is_by_key(launch):
            _by_key_forward(launch, out, lse)
        elif "forward_latent" in launch.kernels.launchers and parts == 1 and launch.is_aligned:
            _latent(launch, out, lse)
        elif parts == 1 and by_union.can_serve(launch):
            # The device decides which of the two does it.
            _by_query(launch, out, lse, parts, by_union.forward(launch, out, lse))
        else:
            _by_query(launch, out, lse, parts)
    return out, lse


def is_by_key(launch: _Launch) -> bool:
    """Whether keys are the outer loop of the forward: each unit is read once for all its queries.

    That costs writing and reading a result for every entry, and pays where a unit is long and many
    queries select it: by the capacity of the lists, as their contents are on the device.
    """
    call, (_, units, most) = launch.call, launch.lists
    entries, key_units = units * most, -(-call.k.shape[2] // call.spec.unit_kv)
    room = call.q.shape[0] * entries * launch.spec.rows * call.v.shape[3] * call.v.element_size()
    often = entries * launch.spec.rows >= _OFTEN * key_units
    half = call.q.element_size() == 2 and not launch.spec.adds_by_query
    return call.spec.unit_kv >= _LONG and half and often and room <= _ROOM


def parts_of(launch: _Launch) -> int:
    """Into how many parts the keys of a query are cut, so that few queries keep a GPU busy."""
    call, tile = launch.call, launch.kernels.tiles.forward
    if not call.q.is_cuda:
        return 1
    programs = math.prod(launch.by_query(tile, 1))
    keys = call.index.shape[3] * call.spec.unit_kv
    return max(1, min(2 * workers_of(call.q.device) // programs, keys // (2 * tile.n)))


def _latent(launch: _Launch, out: Tensor, lse: Tensor) -> None:
    call = launch.call
    grid = launch.by_query(latent.TILE, 1)
    launch.start(
        *("forward_latent", latent.TILE, grid, call.q, call.k, call.index, call.count, out, lse),
        *(*arguments.strides(call.q, call.k, out), *launch.lists, call.q.shape[1], call.q.shape[2]),
        *(call.k.shape[2], call.scale, *launch.mask_data),
        launch.shared,
    )


def _by_query(
    launch: _Launch, out: Tensor, lse: Tensor, parts: int, balance: Tensor | None = None
) -> None:
    """The forward by query; it does nothing if ``balance`` is below zero."""
    call, tile = launch.call, launch.kernels.tiles.forward
    batch, heads, n_q, _ = call.q.shape
    to, to_lse = out, lse
    if parts > 1:
        shape = (batch, call.groups, launch.lists[1], parts, launch.spec.rows)
        to, to_lse = lse.new_empty(*shape, out.shape[3]), lse.new_empty(shape)
    launch.start(
        *("forward", tile, launch.by_query(tile, parts), *launch.operands_for(tile)),
        *(call.index, call.count, *([balance] if launch.may_yield else [])),
        *(to, to_lse, *arguments.strides(*launch.operands)),
        *(*out.stride()[:3], *launch.lists, parts, heads, n_q, call.k.shape[2], call.scale),
        *launch.mask_data,
        (*launch.shared, parts > 1),
    )
    if parts > 1:
        _merge(launch, (to, to_lse), (out, lse), (0, call.groups), parts, counted=False)


def _merge(
    launch: _Launch,
    found: tuple[Tensor, Tensor],
    to: tuple[Tensor, Tensor],
    groups: tuple[int, int],
    parts: int,
    counted: bool,
) -> None:
    """Merge the parts of some groups, from the first of ``groups`` up to the second."""
    tile, (batch, heads, n_q, _) = launch.kernels.tiles.forward, launch.call.q.shape
    lists, units, _ = launch.lists
    subtiles = -(-launch.spec.rows // tile.m)
    launch.start(
        *("merge", Tile(tile.m, 1, 4, 1), (units * subtiles, groups[1] - groups[0], batch)),
        *(*found, launch.call.count, *to, *to[0].stride()[:3]),
        *(lists, units, parts, groups[0], heads, n_q),
        (launch.shared[0], counted),
    )


def _by_key_forward(launch: _Launch, out: Tensor, lse: Tensor) -> None:
    """The forward with keys outermost; group after group, so that the parts take less room."""
    call, (lists, units, most) = launch.call, launch.lists
    tile, batch = launch.kernels.tiles.forward_by_key, call.q.shape[0]
    work, order = launch.work(_STRETCH[0])
    for first in range(call.groups):
        shape = (batch, 1, units * most, launch.spec.rows)
        part = call.q.new_empty(*shape, call.v.shape[3]), lse.new_empty(shape)
        launch.start(
            *("forward_by_key", tile, (work.shape[2], 1, batch)),
            *(*launch.operands, work, order, *part, *arguments.strides(*launch.operands)),
            *(lists, units, most, work.shape[2], first, 1),
            *(call.q.shape[2], call.k.shape[2], call.scale, *launch.mask_data),
            launch.shared,
        )
        _merge(launch, part, (out, lse), (first, first + 1), most, counted=True)


def backward(call: AttentionCall, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparse_compile.codegen.cpu.selected.backward`."""
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (call.k, call.v))
    if call.is_empty:
        return dq.zero_(), dk.to(call.k.dtype), dv.to(call.v.dtype)
    launch = _Launch.of(call)
    grad_out = arguments.operand(result.grad_out.to(call.q.dtype))
    lse = result.lse.contiguous()
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    with current(call.q.device):
        _by_query_backward(launch, result, grad_out, (lse, delta), (dq, dk, dv))
        if not launch.spec.adds_by_query:
            _by_key_backward(launch, grad_out, (lse, delta), (dk, dv))
    dq = dq if launch.sign == 1 else dq.mul_(launch.sign)
    return dq, dk.to(call.k.dtype), dv.to(call.v.dtype)


def _sizes(call: AttentionCall) -> tuple[Any, ...]:
    return call.q.shape[1], call.k.shape[1], call.q.shape[2], call.k.shape[2], call.scale


def _by_query_backward(
    launch: _Launch,
    result: AttentionResult,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The gradient of queries and the second of the statistics; for short units, all gradients."""
    call, tile, out = (
        launch.call,
        launch.kernels.tiles.backward_query,
        arguments.operand(result.out),
    )
    lse, delta = statistics
    launch.start(
        *("backward_query", tile, launch.by_query(tile, 1), *launch.operands_for(tile)),
        *(call.index, call.count, out, grad_out, lse, arguments.single(result.grad_lse, lse)),
        *(delta, *grads, *arguments.strides(*launch.operands, out, grad_out)),
        *(*launch.lists, 1, *_sizes(call), *launch.mask_data),
        (*launch.shared, result.grad_lse is not None),
    )


def _by_key_backward(
    launch: _Launch,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
) -> None:
    """Add the gradients of keys and values, a unit of keys at a time."""
    call, tile = launch.call, launch.kernels.tiles.backward_key_value
    work, order = launch.work(_STRETCH[1])
    subtiles = call.spec.unit_kv // tile.n
    launch.start(
        "backward_key_value",
        *(tile, (work.shape[2] * subtiles, call.groups, call.q.shape[0]), *launch.operands),
        *(work, order, grad_out, *statistics, *grads),
        *arguments.strides(*launch.operands, grad_out),
        *(*launch.lists, work.shape[2], 0, *_sizes(call), *launch.mask_data),
        launch.shared,
    )
