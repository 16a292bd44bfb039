"""Tile shapes of the kernels for selected keys, by architecture, rows and units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparse_compile.codegen.triton.tiles import padded

if TYPE_CHECKING:
    from sparse_compile.codegen.triton.selected.source import SelectedKernelSpec


@dataclass(frozen=True)
class Tile:
    """How one kernel is compiled: rows and keys of a tile, warps, pipeline stages.

    Attributes:
        registers: per thread at most, so that more programs fit; None to let the compiler choose.
    """

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


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
    unit = spec.selected.unit_kv
    rows = max(16, 1 << (spec.rows - 1).bit_length())
    if spec.arch == "interpreter":
        small = Tile(min(rows, 32), 32, 4, 1)
        return Tiles(small, small, Tile(32, unit, 4, 1), Tile(32, min(unit, 32), 4, 1))
    if spec.dtype == "float32":
        n = 32 if width <= 128 else 16
        by_query = Tile(min(rows, 32 if width <= 128 else 16), n, 4, 1)
        by_key = Tile(32 if width <= 128 else 16, min(unit, n), 4, 1)
        return Tiles(by_query, by_query, replace(by_key, n=unit), by_key)
    large = spec.arch in ("sm_90", "sm_100")
    n = (64 if width <= 128 else 32) if large else 32
    m = 64 if width <= 128 else 32
    keys = min(unit, 64 if width <= 128 else 32)
    return Tiles(
        Tile(min(rows, m), n, 4, 3 if large and width <= 128 else 2),
        Tile(min(rows, m), n, 4, 2),
        Tile(m, unit, 8 if unit > 64 or width > 128 else 4, 2),
        Tile(m, keys, 4, 2 if large else 1),
    )
