"""Scores that are given or products: Gate, Indexer, MeanPool, MinMax; and what all are made by."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.errors import BadShape
from sparse_compile.patterns.scorers import Gate, Indexer, MeanPool, MinMax, Scorer
from sparse_compile.selection.builders import BUILDERS, Indexing, Scoring, Task


def summed(scores: Tensor, lists: int) -> Tensor:
    """Scores by head [B, H, ...], summed over the heads of each of ``lists`` lists."""
    if scores.shape[1] <= lists:
        return scores
    return torch.unflatten(scores, 1, (lists, -1)).sum(2)


def mean_of_units(rows: Tensor, unit: int) -> Tensor:
    """[..., n, X] as [..., ceil(n / unit), X]: the mean of each run of ``unit``, also a short one.

    >>> mean_of_units(torch.tensor([[1.0], [3.0], [5.0]]), 2).tolist()
    [[2.0], [5.0]]
    """
    if unit == 1:
        return rows
    n = rows.shape[-2]
    return unit_sums(rows, unit) / sizes_of_units(n, unit, rows.device)


def in_units(t: Tensor, dim: int, unit: int, beyond: float = 0.0) -> Tensor:
    """The runs of ``unit`` along ``dim`` as a dimension after it; the last one is filled up.

    ``dim`` is counted from the end.
    """
    missing = [0, 0] * (-dim - 1) + [0, -t.shape[dim] % unit]
    return torch.unflatten(pad(t, missing, value=beyond), dim, (-1, unit))


def unit_sums(rows: Tensor, unit: int) -> Tensor:
    """[..., n, X] as [..., ceil(n / unit), X]: the sum of each run of ``unit``."""
    return in_units(rows, -2, unit).sum(-2)


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, R, F] times [B, Hkv, C, F], heads grouped, as [B, Hq, R, C]."""
    grouped = torch.unflatten(queries, -3, (keys.shape[1], -1))
    return (grouped @ keys[:, :, None].mT).flatten(1, 2)


def sizes_of_units(n: int, unit: int, device: torch.device) -> Tensor:
    """int64 [units, 1]: how many tokens of ``n`` each unit has."""
    starts = torch.arange(0, n, unit, device=device)
    return (n - starts).clamp(max=unit)[:, None]


def by_gate(scorer: Gate, task: Task) -> Scoring:
    """What the module returns."""
    found = scorer.module(task.q, task.k)
    _check_given(found, scorer, task)
    given = summed(found, task.lists)

    def score(first: int, end: int) -> Tensor:
        return given[:, :, first:end].float()

    return Scoring(task, given.shape[1], given.shape[1] * task.blocks, score)


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


def by_indexer(scorer: Indexer, task: Task) -> Scoring:
    """The sum over the heads of the indexer, one list for all heads."""
    builder = BUILDERS.get(scorer.q_index.device)
    of = Indexing(scorer.q_index, scorer.k_index, scorer.weights, task.visible)
    kernel = builder.index_scores(of) if builder else None
    by_token = kernel or functools.partial(_index_scores, scorer)

    def score(first: int, end: int) -> Tensor:
        rows = task.queries(first, end)
        scores = by_token(rows.start, rows.stop)
        if task.block > 1:
            scores = in_units(scores, -1, task.block, beyond=-math.inf).amax(-1)
        return mean_of_units(scores, task.unit_q)[:, None]

    heads = 1 if kernel else scorer.q_index.shape[1]
    return Scoring(task, 1, heads * task.unit_q * task.k.shape[2], score)


def _index_scores(scorer: Indexer, first: int, end: int) -> Tensor:
    """fp32 [B, end - first, Nkv] of some queries, where no kernel can."""
    queries = scorer.q_index[:, :, first:end].float()
    weights = scorer.weights[:, first:end].float().transpose(1, 2)
    of_heads = (queries @ scorer.k_index[:, None].float().mT).relu_()
    scores: Tensor = (of_heads * weights[..., None]).sum(1)
    return scores


def _pooled(task: Task, keys: Tensor, by_sign: bool = False) -> Scoring:
    """Scores that are linear in features of queries and blocks, so queries are pooled first.

    Args:
        task: what is scored.
        keys: fp32 [B, Hkv, blocks, F], features of the blocks, times the scale.
        by_sign: whether queries count as their positive and negative parts, else as they are.
    """
    kv_heads = task.k.shape[1]

    def score(first: int, end: int) -> Tensor:
        queries = task.q[:, :, task.queries(first, end)]
        if by_sign:
            queries = queries.float()
            queries = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
        if task.lists <= kv_heads:
            # Scores are linear in queries: those of the heads of a list are summed first.
            by_list = torch.unflatten(queries, 1, (kv_heads, -1)).sum(2, dtype=torch.float32)
            return summed(mean_of_units(by_list, task.unit_q) @ keys.mT, task.lists)
        return products(mean_of_units(queries.float(), task.unit_q), keys)

    return Scoring(task, task.lists, max(task.lists, kv_heads) * keys.shape[2], score)


def by_mean(scorer: MeanPool, task: Task) -> Scoring:
    """The query times the mean of the keys."""
    return _pooled(task, mean_of_units(task.k.float(), task.block) * task.scale)


def by_bounds(scorer: MinMax, task: Task) -> Scoring:
    """The most that the query times a key can be."""
    # max(q * lo, q * hi) is q * hi for a positive q and q * lo for a negative one.
    keys = task.k.float()
    ends = [
        in_units(keys, -2, task.block, beyond=-math.inf).amax(-2),
        in_units(keys, -2, task.block, beyond=math.inf).amin(-2),
    ]
    return _pooled(task, torch.cat(ends, -1) * task.scale, by_sign=True)
