"""What a trained gate is compared with: scorers that learn nothing, and the truth.

A scorer is a function ``(q, k) -> [B, Hkv, Nq, Ukv]``, one list for the query heads of a key head,
for q [B, Hq, N, D] and k [B, Hkv, N, D]. The scores of heads that share a list are summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sparse_compile.ops  # noqa: F401  which hands in the kernels of a GPU
from sparse_compile import patterns as P
from sparse_compile.selection import Selection, canonical, pooled_attention
from sparse_compile.selection.builders import Task
from sparse_compile.selection.select import scoring
from sparse_compile.selection.visible import Visible

Scorer = Callable[[Tensor, Tensor], Tensor]
UNIT = 16


def untrained(scorer: P.Scorer) -> Scorer:
    """A scorer of this library, for single queries and a causal mask."""

    def score(q: Tensor, k: Tensor) -> Tensor:
        lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        visible = Visible(P.Causal().bound().expr, (), (), *lengths, 1, UNIT, q.device)
        task = Task(q, k, 1, UNIT, k.shape[1], visible)
        return scoring(scorer, task).score(0, task.rows)

    return score


def random(q: Tensor, k: Tensor) -> Tensor:
    shape = q.shape[0], k.shape[1], q.shape[2], k.shape[2] // UNIT
    return torch.rand(shape, generator=torch.Generator(q.device).manual_seed(0), device=q.device)


def local(q: Tensor, k: Tensor) -> Tensor:
    """The most recent units."""
    shape = q.shape[0], k.shape[1], q.shape[2], k.shape[2] // UNIT
    return torch.arange(shape[-1], device=q.device).float().expand(shape)


def oracle(q: Tensor, k: Tensor) -> Tensor:
    """The attention itself, averaged over the heads that share a list."""
    causal = P.Causal()
    return pooled_attention(q, k, unit_kv=UNIT, mask=causal, reduce="sum", lists=k.shape[1])


def forced(scorer: Scorer) -> Scorer:
    """With the first unit and the last three first, as NSA and others do."""

    def score(q: Tensor, k: Tensor) -> Tensor:
        scores = scorer(q, k)
        own, unit = own_and_units(scores)
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


def own_and_units(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores [..., N, Ukv]: the unit in which each query stands, [N, 1], and all units."""
    rows, units = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
    return rows[:, None] // UNIT, units


def ranked(scores: Tensor) -> Tensor:
    """The units of each query from the best on: its own first, and those it does not see last."""
    own, unit = own_and_units(scores)
    seen = scores.masked_fill(unit == own, torch.inf).masked_fill(unit > own, -torch.inf)
    return seen.sort(dim=-1, descending=True, stable=True).indices


def choose(scores: Tensor, most: int) -> Selection:
    """The ``most`` best units of every query, its own among them; all that it sees if fewer."""
    own, _ = own_and_units(scores)
    best = ranked(scores)[..., :most]
    index, count = canonical(torch.where(best <= own, best, -1), scores.shape[-1])
    return Selection(index, count, 1, UNIT)


def chosen(scores: Tensor, most: int) -> Tensor:
    """The same as bool [..., N, Ukv]."""
    own, unit = own_and_units(scores)
    best = ranked(scores)[..., :most]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & (unit <= own)


def density(most: int, context: int) -> float:
    """The share of the pairs that a causal mask allows that ``most`` units of each query have.

    >>> density(1000, 64), round(density(1, 64), 3)
    (1.0, 0.262)
    """
    at = torch.arange(context)
    whole = (at // UNIT + 1).clamp_max(most) - 1  # all but its own, which it sees in part
    pairs = (whole * UNIT + at % UNIT + 1).sum()
    return pairs.item() / (context * (context + 1) // 2)


def most_units(ratio: float, context: int) -> int:
    """The most units, at least one, that have no more than this share of the pairs."""
    return max(n for n in range(1, context // UNIT + 1) if n == 1 or density(n, context) <= ratio)
