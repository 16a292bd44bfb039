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
from sparse_compile.codegen.triton.source import direct_lookups, kernel_source, table_ranks
from sparse_compile.codegen.triton.tiles import Tile, Tiles, padded, tiles_for
from sparse_compile.errors import BadShape, UnsupportedDtype
from sparse_compile.layout import BlockLayout, BlockLists
from sparse_compile.spec import AttentionSpec, KernelSpec

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LIMIT = 1 << COORDINATE_BITS


@dataclass(frozen=True)
class Kernels:
    """The kernels of one spec, ready to launch."""

    module: ModuleType
    tiles: Tiles
    tables: tuple[int, ...]
    direct: tuple[tuple[int, int, str], ...]


@functools.lru_cache(maxsize=1024)
def kernels_of(spec: KernelSpec) -> Kernels:
    """Generate, write and load the kernels of a spec, once."""
    module = cache.load_module(spec.name, kernel_source(spec))
    mask = spec.attention.mask
    direct = tuple(sorted(direct_lookups(mask)))
    return Kernels(module, tiles_for(spec), tuple(table_ranks(mask)), direct)


@functools.lru_cache(maxsize=4096)
def _kernels_for(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Kernels:
    if dtype not in _DTYPES:
        raise UnsupportedDtype(dtype)
    arch = arch_of(device)
    return kernels_of(KernelSpec(spec, head_dim, value_dim, _DTYPES[dtype], arch))


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
    layout: BlockLayout,
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
        layout: the blocks that the mask visits.
        scale: factor on the scores.
        spec: the mask.

    Returns:
        out [B, Hq, Nq, Dv] in q's dtype, stored as [B, Nq, Hq, Dv], 0 on empty rows; and the
        natural log-sum-exp [B, Hq, Nq] in fp32, -inf on empty rows.
    """
    batch, q_heads, n_q, n_kv, group = _checked(q, k, v, layout)
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device)
    tile = kernels.tiles.forward
    out = q.new_empty(batch, n_q, q_heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, q_heads, n_q, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    sign, scale = _positive(scale)
    q, k, v = _operand(q if sign == 1 else q * sign, tile), _operand(k, tile), _operand(v, tile)
    with _current(q.device):
        kernels.module.forward[(-(-n_q // tile.m), q_heads, batch)](
            *(q, k, v, out, lse),
            *_strides(q, k, v, out),
            *_lists(layout, layout.rows, scale),
            *_descriptors(tile, tile.n, k, v),
            *_mask_arguments(kernels, tables, sizes, n_q, n_kv),
            GROUP=group,
            **_options(tile),
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
    layout: BlockLayout,
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
    kernels = _kernels_for(spec, q.shape[-1], v.shape[-1], q.dtype, q.device)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    over_keys, over_queries = kernels.tiles.backward_query, kernels.tiles.backward_key_value
    sign, scale = _positive(scale)
    q, k, v, grad_out = (
        _operand(t, over_keys, over_queries)
        for t in (q if sign == 1 else q * sign, k, v, grad_out.to(q.dtype))
    )
    out, lse = _operand(out), lse.contiguous()
    n_lines = layout.grid[0]
    statistics = lse.new_empty(2, batch, q_heads, n_lines * layout.block_q)
    mask_data = _mask_arguments(kernels, tables, sizes, n_q, n_kv)
    with _current(q.device):
        kernels.module.backward_query[(n_lines * (layout.block_q // over_keys.m), q_heads, batch)](
            *(q, k, v, out, grad_out, lse, _single(grad_lse, lse), statistics, dq),
            *_strides(q, k, v, out, grad_out),
            *_lists(layout, layout.rows, scale),
            *_descriptors(over_keys, over_keys.n, k, v),
            *mask_data,
            HAS_GRAD_LSE=grad_lse is not None,
            GROUP=group,
            **_options(over_keys),
        )
        kernels.module.backward_key_value[(-(-n_kv // over_queries.n), k.shape[1], batch)](
            *(q, k, v, grad_out, statistics, dk, dv),
            *_strides(q, k, v, grad_out),
            *_lists(layout, layout.cols, scale),
            *_descriptors(over_queries, over_queries.m, q, grad_out),
            *_statistics_descriptor(over_queries, statistics),
            *mask_data,
            GROUP=group,
            **_options(over_queries),
        )
    return dq if sign == 1 else dq.mul_(sign), dk, dv


def _checked(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout
) -> tuple[int, int, int, int, int]:
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


def _descriptors(tile: Tile, rows: int, *tensors: Tensor) -> list[Any]:
    """Descriptors of tiles of ``rows`` rows, for kernels that load by them."""
    if not tile.descriptors:
        return []
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, padded(t.shape[-1])])
        for t in tensors
    ]


def _statistics_descriptor(tile: Tile, statistics: Tensor) -> list[Any]:
    if not tile.descriptors:
        return []
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(
            statistics, list(statistics.shape), list(statistics.stride()), [1, 1, 1, tile.m]
        )
    ]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _lists(layout: BlockLayout, lists: BlockLists, scale: float) -> tuple[Any, ...]:
    """Arguments start, counts, index, room, batches, heads, n_q, n_kv, scale."""
    classes = layout.batches, layout.heads
    return *lists.tensors(), lists.index.shape[1], *classes, layout.n_q, layout.n_kv, scale


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
