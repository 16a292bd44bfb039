"""decide: what the ways to run an attention cost at any number of keys, and the cheapest of them.

Where that depends on a length that changes, the captured graph is made to hold for the lengths on
one side of the point where the answer changes: Dynamo captures another for the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.codegen.generators import ShapeNeed, generators
from sparse_compile.expr import KV, B, H, MaskExpr, Q
from sparse_compile.layout.cost import Candidate, Coverage, Workload, blocks, cheapest, dense, lists
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import Split, choose_views, rounded
from sparse_compile.passes.graph_edit import dimension, example_value, expected
from sparse_compile.sites.plan import Decision, Plan, Trace
from sparse_compile.sites.site import AttentionSite, LiftedMask, Visited
from sparse_compile.spec import AttentionSpec, EmptyRows
from sparse_compile.spec.target import Target

#: Keys of which one is visited, where what a mask reads has no values yet.
_VISITED = 1 / 4


@dataclass(frozen=True)
class Price:
    """What plans cost on a target.

    Attributes:
        target: where they run.
        sharing: attentions of the graph with the same mask, which share its layout.
    """

    target: Target
    sharing: int

    @staticmethod
    def work_of(site: AttentionSite, n_kv: int | None = None) -> Workload:
        """What there is to do for a site, at its own number of keys or another."""
        n_q, here = expected(site.q, "n"), expected(site.k, "n")
        if n_kv is None:
            n_kv = rounded(here) if grows(site) else here
        if isinstance(dimension(site.q, "n"), torch.SymInt) and n_q == here:
            n_q = n_kv
        features = expected(site.q, "d") + expected(site.v, "d")
        operands = (example_value(x.node) for x in (site.q, site.k, site.v))
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
        sizes = expected(site.q, "b"), expected(site.q, "h"), n_q, n_kv
        added = _added(site)
        learned = sum(math.prod(sizes) for node in added if example_value(node).requires_grad)
        return Workload(
            *(*sizes, features, trained, site.kind == "eager"),
            added=len(added) * math.prod(sizes),
            added_trained=learned if trained else 0.0,
        )

    def of(self, plan: Plan, n_kv: int | None = None) -> Candidate:
        """What a plan costs; what a pattern selects besides is known in a call only."""
        work = self.work_of(plan.site, n_kv)
        selection = plan.lifted.selection
        if plan.selected is not None and plan.selected.alone:
            return lists(self.target, work, 0)
        if selection is None:
            return blocks(self.target, work, self._coverage(plan, work))
        kept = int(selection.most) * selection.unit_kv if selection.most.isdecimal() else 0
        return lists(self.target, work, kept)

    def _coverage(self, plan: Plan, work: Workload) -> Coverage:
        lifted, here = plan.lifted, self.work_of(plan.site, expected(plan.site.k, "n"))
        pairs, partial = self._pairs(plan, work), 0.0
        if lifted.program is not None:
            # The example says how much is left of what the predicate leaves possible.
            possible = self._pairs(plan, here)
            seen = lifted.visited or Visited(_VISITED * possible, 0.0)
            longer = pairs / possible if possible else 1.0
            pairs, partial = seen.pairs * longer, seen.partial * longer
        by_pair = any({"q", "kv"} <= set(axes.axes) for axes in lifted.dense)
        sizes = {"b": work.batch, "h": work.heads, "q": work.n_q, "kv": work.n_kv, "": 1}
        read = sum(math.prod(sizes[axis] for axis in table.axes) for table in lifted.dense)
        changes = lifted.reads_tensors or lifted.mask.n_sizes or grows(plan.site)
        made = 1 / self.sharing if changes else 0.0
        looked_up = partial if by_pair else 0.0
        scored = plan.spec.score is not None or plan.spec.dropout is not None
        distances, tensors = _learns(plan) if work.trained else (False, 0)
        learned = tensors * work.batch * work.heads * work.n_q * pairs
        own = pairs, _classes(lifted, work), made, read, looked_up, _does_more(plan.spec)
        return Coverage(*own, scored, distances, learned)

    def _pairs(self, plan: Plan, work: Workload) -> float:
        """Pairs in blocks that the predicate leaves possible, for each query."""
        if plan.split is not None and rounded(work.n_kv) == rounded(expected(plan.site.k, "n")):
            return plan.split.cost.total  # the choice of views has asked already
        block, whole = (plan.spec.block_q, plan.spec.block_kv), plan.spec.of_blocks
        attention = replace(whole, mask=plan.lifted.mask)
        need = self.need(plan.site, attention, work)
        _, split = views_for(plan.lifted.mask, need, shape_of(work), block)
        return split.cost.total

    def need(self, site: AttentionSite, attention: AttentionSpec, work: Workload) -> ShapeNeed:
        """What block shapes are asked for.

        Args:
            site: the attention.
            attention: what it means, in blocks of any shape.
            work: what there is to do.
        """
        dims = expected(site.q, "d"), expected(site.v, "d")
        dtype = str(example_value(site.q.node).dtype).removeprefix("torch.")
        return ShapeNeed(self.target, *dims, dtype, attention, shape_of(work), work.trained)


def shape_of(work: Workload) -> ProblemShape:
    """What to choose views for."""
    return ProblemShape(work.batch, work.heads, work.n_q, work.n_kv)


def views_for(
    mask: MaskExpr, need: ShapeNeed, shape: ProblemShape, block: tuple[int, int] | None = None
) -> tuple[AttentionSpec, Split]:
    """:func:`choose_views` among the block shapes that there are kernels for."""
    return choose_views(mask, shape, block, generators().block_shapes(need))


def grows(site: AttentionSite) -> bool:
    """Whether the number of keys changes from call to call."""
    return isinstance(dimension(site.k, "n"), torch.SymInt)


def _added(site: AttentionSite) -> list[Node]:
    """What is added to scores by query and key."""
    shapes = [(mask, example_value(mask.node).shape) for mask in site.masks if mask.role == "add"]
    return [mask.node for mask, shape in shapes if len(shape) > 1 and 1 not in shape[-2:]]


def _learns(plan: Plan) -> tuple[bool, int]:
    """Whether a tensor by distance gets gradients, and how many by pair do."""
    score = plan.spec.score
    trained = any(
        example_value(mask.node).requires_grad
        for mask in plan.site.masks
        if mask.role in ("add", "factor")
    )
    if score is None or not trained:
        return False, 0
    both = [lookup for lookup in score.lookups if {Q, KV} <= lookup.free_symbols]
    by_pair = [lookup for lookup in both if Q in lookup.args and KV in lookup.args]
    return len(both) > len(by_pair), len(by_pair)


def _does_more(spec: AttentionSpec) -> bool:
    """Whether a call puts something in order, or mends its empty rows, beside its kernels."""
    plain = all(part.is_natural for part in spec.parts)
    return not plain or spec.empty_rows is not EmptyRows.ZERO


def _classes(lifted: LiftedMask, work: Workload) -> int:
    """Batch entries and heads that have lists of their own."""
    free, classes = lifted.mask.predicate.free_symbols, 1
    for symbol, size in ((B, work.batch), (H, work.heads)):
        classes *= size if symbol in free else 1
    return classes


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
