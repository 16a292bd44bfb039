"""Tile shapes of the kernels for selected keys, by architecture, rows and units."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_compile.codegen.triton.selected.spec import WIDE, SelectedKernelSpec
from sparse_compile.codegen.triton.tile import Tile, padded


@dataclass(frozen=True)
class Tiles:
    """The tiles of the four kernels."""

    forward: Tile
    backward_query: Tile
    forward_by_key: Tile
    backward_key_value: Tile


def tiles_for(spec: SelectedKernelSpec) -> Tiles:
    """The tiles of a spec's kernels.

    Tiles by query hold no more rows than an entry has, and 16 at least; those by key hold keys of
    one unit, in the forward all of them, and rows of as many entries as it takes.
    """
    width = padded(max(spec.head_dim, spec.value_dim, 64))
    unit = spec.attention.unit_kv
    rows = padded(spec.rows)
    if width > WIDE and spec.arch != "interpreter":
        return _wide(spec, rows)
    if spec.arch == "interpreter":
        small = Tile(min(rows, 32), 32, 4, 1)
        return Tiles(small, small, Tile(32, unit, 4, 1), Tile(32, min(unit, 32), 4, 1))
    if spec.dtype == "float32":
        return _single(width, rows, unit)
    if spec.arch not in ("sm_90", "sm_100"):
        return _half_small(width, rows, unit)
    # Rows of a descriptor start at multiples of 16 bytes.
    return _half(width, rows, unit, spec.head_dim % 8 == spec.value_dim % 8 == 0)


def _wide(spec: SelectedKernelSpec, rows: int) -> Tiles:
    """Heads over 256: a row of keys fills a kilobyte or more. Kernels by key do not exist."""
    single, large = spec.dtype == "float32", spec.arch in ("sm_90", "sm_100")
    small = Tile(16, 16, 4, 1)
    if single or not large:
        return Tiles(small, small, small, small)
    forward = Tile(min(rows, 64), 64 if spec.shared else 32, 8 if rows >= 64 else 4, 2)
    return Tiles(forward, Tile(min(rows, 32), 16, 8, 1), small, small)


def _single(width: int, rows: int, unit: int) -> Tiles:
    m, n = (32, 32) if width <= 128 else (16, 16)
    by_query, by_key = Tile(min(rows, m), n, 4, 1), Tile(m, min(unit, n), 4, 1)
    return Tiles(by_query, by_query, replace(by_key, m=16, n=unit), by_key)


def _half(width: int, rows: int, unit: int, aligned: bool) -> Tiles:
    """sm_90 and above; swept on an H200 at a width of 128, 16 rows and units of 64 and 128.

    With 16 rows, programs of two warps were the fastest that spill no registers.
    """
    narrow = width <= 128
    m, n = (64, 64) if narrow else (32, 32)
    whole = aligned and n <= unit
    few = Tile(16, n, 2, 2, descriptors=whole)
    return Tiles(
        few if rows == 16 else Tile(min(rows, m), n, 4, 3 if narrow else 2),
        replace(few, stages=3 if narrow else 2) if rows == 16 else Tile(min(rows, m), n, 4, 2),
        Tile(m, unit, 4 if narrow else 8, 3 if unit <= 64 and narrow else 2),
        Tile(m, min(unit, n), 4, 2),
    )


def _half_small(width: int, rows: int, unit: int) -> Tiles:
    """99 KB of shared memory, as sm_86 and sm_89 have."""
    narrow = width <= 128
    m, n = (64, 32) if narrow else (32, 32)
    by_query = Tile(min(rows, m), n, 4, 2 if narrow else 1)
    return Tiles(
        by_query,
        by_query,
        Tile(32, unit, 8 if unit > 64 or not narrow else 4, 1),
        Tile(m, min(unit, n), 4, 1),
    )
