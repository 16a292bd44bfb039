"""Scores of modules and of indexers, and what those of all scorers are made by."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.patterns.scorers import Gate, Indexer, Scorer
from sparse_compile.selection.builders import BUILDERS, IndexScores
from sparse_compile.selection.indexing import Indexing
from sparse_compile.selection.task import Scoring, Task


def summed(scores: Tensor, lists: int) -> Tensor:
    """Scores by head [B, H, ...], summed over the heads of each of ``lists`` lists."""
    if scores.shape[1] <= lists:
        return scores
    batch, heads, *rest = scores.shape
    return scores.view(batch, lists, heads // lists, *rest).sum(2)


def mean_of_units(rows: Tensor, unit: int) -> Tensor:
    """[..., n, X] as [..., ceil(n / unit), X]: the mean of each run of ``unit``, also a short one.

    >>> mean_of_units(torch.tensor([[1.0], [3.0], [5.0]]), 2).tolist()
    [[2.0], [5.0]]
    """
    if unit == 1:
        return rows
    n = rows.shape[-2]
    return unit_sums(rows, unit) / sizes_of_units(n, unit, rows.device)


def parted(t: Tensor, dim: int, each: int) -> Tensor:
    """The runs of ``each`` along ``dim``, counted from the end, as a dimension after it."""
    shape = list(t.shape)
    shape[dim : dim + 1 or None] = [shape[dim] // each, each]
    return t.reshape(shape)


def in_units(t: Tensor, dim: int, unit: int, beyond: float = 0.0) -> Tensor:
    """As :func:`parted`, for any length: the last run is filled up."""
    missing = [0, 0] * (-dim - 1) + [0, -t.shape[dim] % unit]
    return parted(torch.nn.functional.pad(t, missing, value=beyond), dim, unit)


def unit_sums(rows: Tensor, unit: int) -> Tensor:
    """[..., n, X] as [..., ceil(n / unit), X]: the sum of each run of ``unit``."""
    return in_units(rows, -2, unit).sum(-2)


def sizes_of_units(n: int, unit: int, device: torch.device) -> Tensor:
    """int64 [units, 1]: how many tokens of ``n`` each unit has."""
    starts = torch.arange(0, n, unit, device=device)
    return (n - starts).clamp(max=unit)[:, None]


@dataclass(frozen=True, eq=False)
class _Given(Scoring):
    """Scores that a module or function has given."""

    scores: Tensor

    @property
    def lists(self) -> int:
        return self.scores.shape[1]

    @property
    def width(self) -> int:
        return self.scores.shape[1] * self.scores.shape[3]

    def __call__(self, first: int, end: int) -> Tensor:
        return self.scores[:, :, first:end].float()


def by_gate(scorer: Gate, task: Task) -> Scoring:
    """What the module returns."""
    found = scorer.module(task.q, task.k)
    _check_given(found, scorer, task)
    return _Given(task, summed(found, task.lists))


def _check_given(found: Any, scorer: Scorer, task: Task) -> None:
    batch, heads, kv_heads = task.q.shape[0], task.q.shape[1], task.k.shape[1]
    wanted = [batch, f"one of {_head_counts(heads, kv_heads)}", task.rows, task.blocks]
    got = f"a {type(found).__name__}"
    if isinstance(found, Tensor):
        got = f"{found.dtype} {list(found.shape)}"
        fits = found.is_floating_point() and found.dim() == 4
        fits = fits and (found.shape[0], *found.shape[2:]) == (batch, task.rows, task.blocks)
        if fits and found.shape[1] in _head_counts(heads, kv_heads):
            return
    raise BadShape(
        f"sparse_compile: {scorer!r} returned {got} for q {list(task.q.shape)}, k "
        f"{list(task.k.shape)}, units of {task.unit_q} queries and blocks of {task.block} keys. "
        f"Return floating scores of [{', '.join(map(str, wanted))}]: batch, heads, "
        "ceil(Nq / unit_q), ceil(Nkv / block)."
    )


def _head_counts(heads: int, kv_heads: int) -> list[int]:
    """How many lists attention over selected keys takes."""
    divisors = (n for n in range(1, heads + 1) if heads % n == 0)
    return [n for n in divisors if max(n, kv_heads) % min(n, kv_heads) == 0]


@dataclass(frozen=True, eq=False)
class _Indexed(Scoring):
    """The scores of an indexer, one list for all heads."""

    indexer: Indexer

    @property
    def lists(self) -> int:
        return 1

    @property
    def width(self) -> int:
        width: int = self.task.unit_q * self.task.k.shape[2]
        return width if self._kernel else width * self.indexer.q_index.shape[1]

    @functools.cached_property
    def _kernel(self) -> IndexScores | None:
        of, builder = self.indexer, BUILDERS.get(self.indexer.q_index.device)
        indexing = Indexing(of.q_index, of.k_index, of.weights, self.task.visible)
        return builder.index_scores(indexing) if builder else None

    def __call__(self, first: int, end: int) -> Tensor:
        task, rows = self.task, self.task.queries(first, end)
        by_token = self._by_token(rows)
        if task.block > 1:
            by_token = in_units(by_token, -1, task.block, beyond=-math.inf).amax(-1)
        return mean_of_units(by_token, task.unit_q)[:, None]

    def _by_token(self, rows: slice) -> Tensor:
        """fp32 [B, queries, Nkv] of some queries; anything where nothing is visible."""
        if self._kernel is not None:
            return self._kernel(rows.start, rows.stop)
        indexer = self.indexer
        queries = indexer.q_index[:, :, rows].float()
        weights = indexer.weights[:, rows].float().transpose(1, 2)
        products = (queries @ indexer.k_index[:, None].float().mT).relu_()
        by_token: Tensor = (products * weights[..., None]).sum(1)
        return by_token


def by_indexer(scorer: Indexer, task: Task) -> Scoring:
    """The sum over the heads of the indexer."""
    return _Indexed(task, scorer)
