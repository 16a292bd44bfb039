"""Tile shapes of the kernels for blocks, by architecture and width."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sympy

from sparse_compile.codegen.triton.score import of_distance
from sparse_compile.codegen.triton.tile import Tile, padded
from sparse_compile.expr import KV
from sparse_compile.spec import AttentionSpec, KernelSpec


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels."""

    forward: Tile
    backward_query: Tile
    backward_key_value: Tile


def _by_tma(m: int, n: int, warps: int, stages: int) -> Tile:
    return Tile(m, n, warps, stages, descriptors=True)


# Keyed by feature dimension, rounded up. sm_90: swept on an H200; at 64 and 128 two programs of
# four warps share a multiprocessor and hide each other's latencies. The other tables are chosen by
# registers, spills and shared memory.
_HALF_SM90 = {
    64: Tiles(_by_tma(64, 128, 4, 2), _by_tma(64, 64, 4, 3), _by_tma(64, 64, 4, 3)),
    128: Tiles(_by_tma(64, 64, 4, 3), _by_tma(64, 64, 4, 2), _by_tma(64, 64, 4, 2)),
    256: Tiles(_by_tma(128, 32, 8, 2), _by_tma(64, 64, 4, 2), _by_tma(64, 64, 8, 2)),
}
# Random blocks that are listed: what is read of K and V has to serve more queries. Swept likewise.
_LISTED_SM90 = {
    128: Tiles(_by_tma(128, 128, 8, 2), _by_tma(128, 64, 8, 3), _by_tma(64, 128, 8, 3)),
}
# 228 KB of shared memory, but rows that descriptors cannot describe; and sm_100.
_HALF_LARGE = {
    64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}
# At most 99 KB of shared memory, as sm_86, sm_89 and sm_120 have.
_HALF_SMALL = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 4, 2)),
    128: Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
}
_SINGLE = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(Tile(32, 16, 4, 2), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
_INTERPRETER = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def tiles_for(spec: KernelSpec) -> Tiles:
    """The tiles of a spec's kernels; each divides the layout's block.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> from sparse_compile.spec import AttentionSpec
    >>> spec = KernelSpec(AttentionSpec(MaskExpr(KV <= Q), block_q=32), 64, 64, "float16", "sm_90")
    >>> tiles_for(spec).forward.m
    32
    """
    block_q, block_kv = spec.attention.block_q, spec.attention.block_kv
    tiles = _chosen(spec)
    if any(lookup.has(KV) for lookup in _of_pairs(spec.attention)):
        # Addresses and entries of a table take registers, for every key of a tile.
        tiles = replace(tiles, forward=replace(tiles.forward, n=min(tiles.forward.n, 64)))
    return Tiles(
        *(
            _within(tile, block_q, block_kv)
            for tile in (tiles.forward, tiles.backward_query, tiles.backward_key_value)
        )
    )


def tile_of_learned(spec: KernelSpec, tiles: Tiles) -> Tile:
    """As that of queries, and square: sums are made along its diagonals.

    What it holds beside that has no room in the registers of four warps where rows are wide.
    """
    tile = tiles.backward_query
    extent, wide = min(tile.m, tile.n), max(spec.head_dim, spec.value_dim) > 64
    warps = max(tile.warps, 8) if wide and extent >= 64 else tile.warps
    return replace(tile, m=extent, n=extent, warps=warps)


def _of_pairs(attention: AttentionSpec) -> tuple[sympy.Basic, ...]:
    """The lookups that are made for each pair of a tile, rather than for each distance."""
    of_score = attention.score.lookups if attention.score else ()
    tiled = all(view.is_natural for view in attention.parts)
    return *attention.mask.lookups, *(n for n in of_score if not (tiled and of_distance(n)))


def _chosen(spec: KernelSpec) -> Tiles:
    if spec.arch == "interpreter":
        return _INTERPRETER
    width = max(64, padded(max(spec.head_dim, spec.value_dim)))
    if spec.dtype == "float32":
        return _SINGLE[width]
    if spec.arch not in ("sm_90", "sm_100"):
        return _HALF_SMALL[width]
    # A descriptor's strides are multiples of 16 bytes.
    describable = all(dim % 8 == 0 and dim >= 32 for dim in (spec.head_dim, spec.value_dim))
    if spec.arch != "sm_90" or not describable:
        return _HALF_LARGE[width]
    listed = any(part.listed for part in spec.attention.parts)
    return _LISTED_SM90.get(width, _HALF_SM90[width]) if listed else _HALF_SM90[width]


def _within(tile: Tile, block_q: int, block_kv: int) -> Tile:
    m, n = math.gcd(tile.m, block_q), math.gcd(tile.n, block_kv)
    warps = tile.warps
    while warps > 1 and m * n < warps * 512 and (m, n) != (tile.m, tile.n):
        warps //= 2
    # Buffers of fewer than 32 rows or statistics would not be aligned as descriptors need.
    return replace(tile, m=m, n=n, warps=warps, descriptors=tile.descriptors and min(m, n) >= 32)
