"""Prepared: a pattern's scores of q and k, and room for what it selects by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.patterns.scored import Scored
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

    def chunks(self, by_kernel: bool) -> Iterator[tuple[int, int]]:
        """The first and the end of the units that are scored at a time."""
        task, scores = self.task, self.scores
        width, most = scores.lists * task.blocks, _MOST_BY_KERNEL
        if not by_kernel or not task.visible.printable:
            width, most = max(width, task.visible.heads * task.blocks), _MOST
        step = max(1, most // max(1, task.q.shape[0] * max(width, scores.width)))
        step = step // 128 * 128 or step  # whole tiles of kernels
        for first in range(0, task.rows, step):
            yield first, min(first + step, task.rows)
