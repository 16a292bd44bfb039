"""Builders: the kernels that score and choose on a device, as values that are handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparse_compile.layout.builders import ByDevice
from sparse_compile.selection.indexing import Indexing
from sparse_compile.selection.prepared import Prepared
from sparse_compile.selection.windows import Windows

#: Writes the lists of the units ``first, ..., end - 1``, from fp32 [B, lists, units, blocks].
Chooser = Callable[[Tensor, int, int], None]
#: Scores the queries ``first, ..., end - 1``: fp32 [B, end - first, Nkv].
IndexScores = Callable[[int, int], Tensor]


class WindowScores(Protocol):
    """Scores blocks by the attention to keys of windows."""

    @property
    def summed(self) -> int:
        """Queries of each row of scores: those of a unit, or fewer."""
        ...

    def __call__(self, units: tuple[int, int], logarithm: bool) -> Tensor:
        """fp32 [B, lists, rows, blocks] of some units: the shares, or their logarithms."""
        ...


@dataclass(frozen=True)
class DeviceBuilder:
    """How one kind of device makes selections; each None where no kernel can.

    Attributes:
        chooser: for what is selected from; writes its index and count.
        index_scores: for the tokens of an indexer.
        window_scores: for windows.
    """

    chooser: Callable[[Prepared], Chooser | None]
    index_scores: Callable[[Indexing], IndexScores | None]
    window_scores: Callable[[Windows], WindowScores | None]


BUILDERS: ByDevice[DeviceBuilder] = ByDevice("selects")
