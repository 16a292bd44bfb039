"""Prepared: a pattern's scores of q and k, and room for what it selects by them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_compile.patterns.scored import Scored
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.task import Scoring, Task

#: Scores that a chunk of units of queries has at most, if it is more than one unit; in torch, and
#: where a kernel chooses.
_MOST, _MOST_BY_KERNEL = 1 << 24, 1 << 26


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is selected from, and room for what is selected.

    Attributes:
        pattern: the rule, and what is forced.
        scores: makes the scores of some units of queries.
        index: int32 [B, lists, units, room], to be written.
        count: int32 [B, lists, units], to be written.
    """

    pattern: Scored
    scores: Scoring
    index: Tensor
    count: Tensor

    @property
    def task(self) -> Task:
        """What is scored."""
        return self.scores.task

    def chunks(self, by_kernel: bool) -> list[tuple[int, int]]:
        """The first and the end of the units that are scored at a time."""
        task, scores = self.task, self.scores
        width, most = scores.lists * task.blocks, _MOST_BY_KERNEL
        if not by_kernel or not task.visible.printable:
            width, most = max(width, task.visible.heads * task.blocks), _MOST
        each = task.q.shape[0] * max(width, scores.width)
        return chunks(task.rows, each, most, tile=128)  # whole tiles of kernels
