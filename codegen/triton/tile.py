"""Tile: which piece of the score matrix a program holds at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """How one kernel is compiled.

    Attributes:
        m: queries per tile; for selected keys, rows.
        n: keys per tile.
        warps: warps per program.
        stages: depth of the software pipeline.
        descriptors: load the tiles of the loop by tensor descriptors (TMA) instead of pointers.
        together: neighbours along a line that one program works on.
        resident: whether a program takes one piece of work after another: there is one for each
            multiprocessor then.
    """

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False
    together: int = 1
    resident: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def programs(self, tiles: int, workers: int) -> int:
        """How many are started for so many tiles, on so many multiprocessors.

        >>> alone, three = Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, True, 3, True)
        >>> alone.programs(900, 132), three.programs(900, 132), three.programs(90, 132)
        (900, 132, 30)
        """
        pieces = tiles // self.together
        return min(pieces, workers) if self.resident else pieces

    def extent(self, axis: str) -> int:
        """Tokens of the side ``"q"`` or ``"kv"``."""
        return self.m if axis == "q" else self.n


def power_of_two(n: int) -> int:
    """The least power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds ``dim`` features."""
    return max(16, power_of_two(dim))
