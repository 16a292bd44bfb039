"""Scores that are a product of pooled queries and pooled keys: MeanPool and MinMax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.patterns.scorers import MeanPool, MinMax
from sparse_compile.selection.scores import in_units, mean_of_units, parted, summed
from sparse_compile.selection.task import Scoring, Task


@dataclass(frozen=True, eq=False)
class _Pooled(Scoring):
    """Scores that are linear in features of queries and blocks, so queries are pooled first.

    Attributes:
        keys: fp32 [B, Hkv, blocks, F], features of the blocks, times the scale.
        by_sign: whether queries count as their positive and negative parts, else as they are.
    """

    keys: Tensor
    by_sign: bool = False

    @property
    def width(self) -> int:
        return max(self.lists, self.task.k.shape[1]) * self.keys.shape[2]

    def __call__(self, first: int, end: int) -> Tensor:
        task, kv_heads = self.task, self.task.k.shape[1]
        queries = task.q[:, :, task.queries(first, end)]
        if self.by_sign:
            queries = queries.float()
            queries = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
        if self.lists <= kv_heads:
            # Scores are linear in queries: those of the heads of a list are summed first.
            queries = mean_of_units(_summed_in_fp32(queries, kv_heads), task.unit_q)
            return summed(queries @ self.keys.mT, self.lists)
        queries = mean_of_units(queries.float(), task.unit_q)
        grouped = parted(queries, -3, queries.shape[1] // kv_heads)
        return (grouped @ self.keys[:, :, None].mT).flatten(1, 2)


def _summed_in_fp32(queries: Tensor, lists: int) -> Tensor:
    """fp32 [B, lists, ...]: the sum over the heads of each list; reads q once, as it is."""
    by_list = queries.reshape(queries.shape[0], lists, -1, *queries.shape[2:])
    return by_list.sum(2, dtype=torch.float32)


def by_mean(scorer: MeanPool, task: Task) -> Scoring:
    """The query times the mean of the keys."""
    return _Pooled(task, mean_of_units(task.k.float(), task.block) * task.scale)


def by_bounds(scorer: MinMax, task: Task) -> Scoring:
    """The most that the query times a key can be."""
    # max(q * lo, q * hi) is q * hi for a positive q and q * lo for a negative one.
    keys = task.k.float()
    ends = [
        in_units(keys, -2, task.block, beyond=-math.inf).amax(-2),
        in_units(keys, -2, task.block, beyond=math.inf).amin(-2),
    ]
    return _Pooled(task, torch.cat(ends, -1) * task.scale, by_sign=True)
