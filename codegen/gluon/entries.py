"""The parameters of the forward in Gluon, and how many queries and keys it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_compile.codegen.entry import (
    Entry,
    Kind,
    Line,
    Parameter,
    constants,
    lists,
    number,
    pointers,
    sizes,
)
from sparse_compile.codegen.triton.entries import view_lists
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.spec import KernelSpec


@dataclass(frozen=True)
class GluonTile(Tile):
    """What a program holds: ``m`` queries in each of some warpgroups.

    Attributes:
        registers: of a thread that multiplies.
    """

    registers: int = 240

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told: the first warpgroup is what Triton calls the program."""
        return {"num_warps": 4, "enable_fp_fusion": True}


#: By feature dimension. Swept on an H200: where rows are narrow a third warpgroup is worth 10 %.
TILES = {
    64: GluonTile(64, 128, 4, 3, True, together=3, resident=True, registers=160),
    128: GluonTile(64, 128, 4, 2, True, together=2, resident=True, registers=240),
}


def shape_of(head_dim: int) -> tuple[int, int] | None:
    """Queries and keys of its blocks for heads so wide; None: it has no kernel for them.

    >>> shape_of(64), shape_of(80)
    ((192, 128), None)
    """
    tile = TILES.get(head_dim)
    return None if tile is None else (tile.together * tile.m, tile.n)


def forward_entry(spec: KernelSpec) -> Entry:
    """The kernel ``forward`` of a spec."""
    tile = TILES[spec.head_dim]
    lines = (
        (
            _described(spec, "Q", tile.m, spec.head_dim),
            _described(spec, "K", tile.n, spec.head_dim),
            _described(spec, "V", tile.n, spec.value_dim),
            _described(spec, "OUT", tile.m, spec.value_dim),
        ),
        pointers("float32", "LSE", "PART_OUT", "PART_LSE"),
        lists("items") + sizes("n_items", "q_heads", "batch", "n_q", "n_kv") + number("scale"),
        view_lists(0),
        sizes(*(f"s{i}" for i in range(spec.attention.mask.n_sizes))),
        *constants(GROUP=1),
    )
    return Entry("forward", _filled(lines), tile.options, tile)


def _described(spec: KernelSpec, name: str, rows: int, width: int) -> Parameter:
    block = (1, 1, rows, width)
    return Parameter(name, Kind.DESCRIPTOR, spec.dtype, block=block, tensor=name, placed=True)


def _filled(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line)
