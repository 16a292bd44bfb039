"""Builders: the kernels that score and choose on a device, as values that are handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparse_compile.layout.by_device import ByDevice
from sparse_compile.patterns.scored import Scored
from sparse_compile.selection.task import Task
from sparse_compile.selection.visible import Visible
from sparse_compile.selection.windows import Windows

#: Writes the lists of the units ``first, ..., end - 1``, from fp32 [B, lists, units, blocks].
Chooser = Callable[[Tensor, int, int], None]


class IndexScores(Protocol):
    """Scores tokens as a lightning indexer does."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        queries: tuple[int, int],
        visible: Visible,
        factor: float = 1.0,
    ) -> Tensor:
        """``sum_i w_i * relu(q_i . k)`` for some queries, fp32 [B, end - first, Nkv].

        Args:
            q: [B, H, Nq, D].
            k: [B, Nkv, D], same dtype.
            w: [B, Nq, H], floating.
            queries: the first, and the end.
            visible: in its runs; those that are not visible need not be written.
            factor: on the scores.
        """
        ...


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
        chooser: for a rule, a task, the number of lists, and the index and count that it writes.
        index_scores: for queries [B, H, Nq, D] and keys [B, Nkv, D].
        window_scores: for windows.
    """

    chooser: Callable[[Scored, Task, int, Tensor, Tensor], Chooser | None]
    index_scores: Callable[[Tensor, Tensor], IndexScores | None]
    window_scores: Callable[[Windows], WindowScores | None]


BUILDERS: ByDevice[DeviceBuilder] = ByDevice("selects")
