"""What is to be scored, and what scores it: also kernels that score and choose, handed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparse_compile.layout.builders import ByDevice
from sparse_compile.patterns.scored import Scored
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.visible import Visible


@dataclass(frozen=True)
class Task:
    """What is to be scored.

    Attributes:
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        unit_q: queries of a unit.
        block: keys that are scored together.
        lists: how many lists the heads want: 1, Hkv or Hq.
        visible: the mask, in units and blocks.
    """

    q: Tensor
    k: Tensor
    unit_q: int
    block: int
    lists: int
    visible: Visible

    @property
    def rows(self) -> int:
        """Units of queries."""
        return -(-self.q.shape[2] // self.unit_q)

    @property
    def blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.k.shape[2] // self.block)

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(max(self.q.shape[3], 1))

    def queries(self, first: int, end: int) -> slice:
        """The queries of units ``first, ..., end - 1``, those that exist."""
        return slice(first * self.unit_q, min(end * self.unit_q, self.q.shape[2]))

    def seen_in(self, run_q: int, run_kv: int) -> Visible:
        """The mask in other runs."""
        return replace(self.visible, run_q=run_q, run_kv=run_kv)


@dataclass(frozen=True, eq=False)
class Scoring:
    """How the scores of a task are computed, some units at a time.

    Attributes:
        task: what is scored.
        lists: how many lists there are; a divisor of the query heads.
        width: numbers that are held for each unit of queries while it is scored.
        score: fp32 [B, lists, end - first, blocks], of units ``first, ..., end - 1``.
    """

    task: Task
    lists: int
    width: int
    score: Callable[[int, int], Tensor]


#: Scores that a chunk of units of queries has at most, if it is more than one unit; in torch, and
#: where a kernel chooses.
_MOST, _MOST_BY_KERNEL = 1 << 24, 1 << 26


@dataclass(frozen=True, eq=False)
class Indexing:
    """Scores ``factor * sum_i w_i * relu(q_i . k)`` of tokens.

    Attributes:
        q: [B, H, Nq, D].
        k: [B, Nkv, D], same dtype.
        w: [B, Nq, H], floating.
        visible: in its runs; the scores of those that are not visible need not be written.
        factor: on the scores.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    visible: Visible
    factor: float = 1.0


@dataclass(frozen=True)
class Windows:
    """Queries, and the keys of windows that they attend to.

    Attributes:
        q: [B, Hq, Nq, D].
        keys: [B, Hc, windows, D], floating; Hc divides Hq.
        scale: factor on their products.
        lists: of heads whose shares are summed; Hc divides it, and it divides Hq.
        unit: consecutive queries whose shares are summed; a power of two.
        span, per: cells of a window, and of a block.
        blocks: how many.
        visible: the mask, in single queries and cells.
        made_of: the dtype of what the keys are means of.
    """

    q: Tensor
    keys: Tensor
    scale: float
    lists: int
    unit: int
    span: int
    per: int
    blocks: int
    visible: Visible
    made_of: torch.dtype

    @property
    def heads(self) -> int:
        """Of a list."""
        return self.q.shape[1] // self.lists


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
