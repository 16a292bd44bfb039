"""decide: the cheapest of the ways to run an attention.

Where that depends on a length that changes, the captured graph is made to hold for the lengths on
one side of the point where the answer changes: Dynamo captures another for the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparse_compile.layout.cost import cheapest, dense
from sparse_compile.layout.views.split_views import rounded
from sparse_compile.passes.decide.price import Price
from sparse_compile.passes.graph_edit import dimension, expected
from sparse_compile.sites.plan import Decision, Plan, Trace

#: Lengths between which an answer may change.
_SHORTEST, _LONGEST = 1 << 4, 1 << 20
_HINT = 'options={"decide": "sparse"} rewrites it all the same'


def decide(trace: Trace, sharing: int, guards: bool) -> Trace:
    """Pick what a trace proposes that costs least; where nothing else can be, the program as it is.

    Args:
        trace: of the site, with its proposals.
        sharing: as for :func:`propose`.
        guards: whether a guard may cut the sizes that the graph serves.
    """
    *others, as_it_is = trace.proposals
    able = [way for way in others if not way.cost.refusal]
    if not able:
        return replace(trace, decision=trace.proposals[0].decision)
    best = cheapest([way.cost for way in able])
    plan = next(way.decision for way in able if way.cost is best)
    assert isinstance(plan, Plan)
    if as_it_is.cost.refusal or plan.executor == "sdpa":
        return replace(trace, decision=plan)
    assert trace.target is not None
    return replace(trace, decision=_weighed(trace, plan, Price(trace.target, sharing), guards))


def declares_range(example_inputs: Sequence[Any]) -> bool:
    """Whether the user promised a graph that holds for a range of sizes, which no guard may cut.

    As ``torch._dynamo.mark_dynamic(x, 0, min=2, max=4096)`` does.
    """
    ranges = (getattr(given, "_dynamo_dynamic_range", ()) for given in example_inputs)
    return any((one.min, one.max) != (None, None) for several in ranges for one in several)


def _weighed(trace: Trace, plan: Plan, price: Price, guards: bool) -> Decision:
    """A plan, or where it is predicted to be slower than the program as it is, the rejection."""
    hint, length = _HINT, dimension(plan.site.k, "n")
    if guards and isinstance(length, torch.SymInt) and length.node.hint is not None:
        limit = _limit(plan, price)
        # Asking is what guards: the graph will serve lengths on this side of the limit.
        if limit is not None and bool(length <= limit):
            hint += f"; another graph is made from {limit + 1} keys on"
    able = [way.cost for way in trace.proposals if not way.cost.refusal]
    if cheapest(able).name != "dense":
        return plan
    compared = " and ".join(cost.shown for cost in sorted(able, key=lambda c: c.name != "dense"))
    reason = f"as it is it is predicted to be faster on {price.target.kind}: {compared}"
    return replace(trace.rejected(reason, hint), unmet=False)


def _limit(plan: Plan, price: Price) -> int | None:
    """The number of keys, near the example's, up to which one answer is best and beyond it another.

    One is enough: what is saved grows with the length, and what is spent does not.
    """

    def sparse(n_kv: int) -> bool:
        as_it_is = dense(price.target, price.work_of(plan.site, n_kv))
        return cheapest([as_it_is, price.of(plan, n_kv)]) is not as_it_is

    here = rounded(expected(plan.site.k, "n"))
    if sparse(here):
        return _first(lambda n: not sparse(n), here // 2, lambda n: n // 2)
    found = _first(sparse, here * 2, lambda n: n * 2)
    return None if found is None else found // 2


def _first(holds: Callable[[int], bool], start: int, following: Callable[[int], int]) -> int | None:
    n = start
    while _SHORTEST <= n <= _LONGEST:
        if holds(n):
            return n
        n = following(n)
    return None
