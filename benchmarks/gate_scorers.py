"""What a trained gate is compared with: scorers that learn nothing, and the truth.

A scorer is a function ``(q, k) -> [B, Hkv, Nq, Ukv]``, one list for the query heads of a key head,
for q [B, Hq, N, D] and k [B, Hkv, N, D]. The scores of heads that share a list are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.selection import Selection, canonical, pooled_attention
from sparse_compile.selection.scores import Task
from sparse_compile.selection.scoring import scoring
from sparse_compile.selection.visible import Visible

Scorer = Callable[[Tensor, Tensor], Tensor]
UNIT = 16


def untrained(scorer: P.Scorer) -> Scorer:
    """A scorer of this library, for single queries and a causal mask."""

    def score(q: Tensor, k: Tensor) -> Tensor:
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        visible = Visible(P.Causal().bound().expr, (), (), *lengths, 1, UNIT, q.device)
        task = Task(q, k, 1, UNIT, k.shape[1], visible)
        return scoring(scorer, task)(0, task.rows)

    return score


def random(q: Tensor, k: Tensor) -> Tensor:
    shape = q.shape[0], k.shape[1], q.shape[2], k.shape[2] // UNIT
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def local(q: Tensor, k: Tensor) -> Tensor:
    """The most recent units."""
    shape = q.shape[0], k.shape[1], q.shape[2], k.shape[2] // UNIT
    return torch.arange(shape[-1]).float().expand(shape)


def oracle(q: Tensor, k: Tensor) -> Tensor:
    """The attention itself, averaged over the heads that share a list."""
    causal = P.Causal()
    return pooled_attention(q, k, unit_kv=UNIT, mask=causal, reduce="sum", lists=k.shape[1])


def forced(scorer: Scorer) -> Scorer:
    """With the first unit and the last three first, as NSA and others do."""

    def score(q: Tensor, k: Tensor) -> Tensor:
        scores = scorer(q, k)
        unit, own = torch.arange(scores.shape[-1]), torch.arange(q.shape[2])[:, None] // UNIT
        always = (unit == 0) | ((unit <= own) & (own - unit < 3))
        # More for later units: a list that is too short for all of them has the latest.
        return torch.where(always, 1e6 + unit.float(), scores)

    return score


mean_pool, quest = untrained(P.MeanPool()), untrained(P.MinMax())
#: Windows are half a unit long and overlap by half, as NSA's of 32 keys, 16 apart, in units of 64.
overlapping = untrained(P.OverlapPool(window=UNIT // 2, stride=UNIT // 4))

UNTRAINED: dict[str, Scorer] = {
    "mean pool": mean_pool,
    "Quest bound": quest,
    "overlapping pool": overlapping,
    "mean pool, sink and local": forced(mean_pool),
    "Quest bound, sink and local": forced(quest),
    "overlapping pool, sink and local": forced(overlapping),
    "random": random,
    "local": local,
    "sink and local": forced(local),
}


@dataclass(frozen=True)
class Chosen:
    """The best units of every query: bool [B, Hs, N, Ukv], and as lists."""

    units: Tensor
    lists: Selection


def choose(scores: Tensor, ratio: float) -> Chosen:
    """The best of the units that a query sees, ``ratio`` of them, rounded, at least one.

    The query's own unit comes first, whatever its score, and counts.
    """
    n, most = scores.shape[2], scores.shape[3]
    own, unit = torch.arange(n)[:, None] // UNIT, torch.arange(most)
    scores = scores.masked_fill(unit == own, torch.inf).masked_fill(unit > own, -torch.inf)
    wanted = ((own + 1) * ratio).round().long().clamp_min(1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.zeros_like(order).scatter_(-1, order, unit.expand_as(order).contiguous())
    best = order[..., : int(wanted.max())]
    best = torch.where(unit[: best.shape[-1]] < wanted, best, -1)
    index, count = canonical(best, most)
    return Chosen(rank < wanted, Selection(index, count, 1, UNIT))
