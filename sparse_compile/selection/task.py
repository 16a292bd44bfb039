"""Task and Scoring: what is to be scored, and what scores it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

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
