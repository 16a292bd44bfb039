"""choose_cheapest: whether what was planned for an attention is faster than the program as it is.

Where that depends on a length that changes, the captured graph is made to hold for the lengths on
one side of the point where the answer changes: Dynamo captures another for the other side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_compile.codegen.generators import block_shapes
from sparse_compile.expr import B, H
from sparse_compile.layout.cost import (
    Candidate,
    Coverage,
    Workload,
    blocks,
    cheapest,
    dense,
    lists,
)
from sparse_compile.layout.views.choose import choose_views
from sparse_compile.passes.graph_edit import device_of, example_value
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import Operand, Rejection
from sparse_compile.spec.target import Target

#: Stands for a size that is only known when the graph runs.
_UNKNOWN = 4096
#: Keys of which one is visited, where what a mask reads has no values yet.
_VISITED = 1 / 4
#: Lengths between which an answer may change.
_SHORTEST, _LONGEST = 1 << 4, 1 << 20


def choose_cheapest(
    decisions: Sequence[Plan | Rejection], example_inputs: Sequence[Any]
) -> list[Plan | Rejection]:
    """The decisions, but attentions that are predicted to be faster as they are are left alone.

    What an annotation restricts is never left alone, since the program does something else.

    Args:
        decisions: on all attentions of a captured graph.
        example_inputs: as Dynamo passes them to a backend.
    """
    plans = [decision for decision in decisions if isinstance(decision, Plan)]
    sharing = Counter(plan.site.masks for plan in plans)
    guards = not _declares_range(example_inputs)
    chosen: list[Plan | Rejection] = []
    for decision in decisions:
        if isinstance(decision, Plan) and _may_be_left(decision):
            target = Target.of(device_of(decision.site.q.node))
            price = _Price(decision, target, sharing[decision.site.masks])
            chosen.append(_cheapest(price, guards))
        else:
            chosen.append(decision)
    return chosen


def _declares_range(example_inputs: Sequence[Any]) -> bool:
    """Whether the user promised a graph that holds for a range of sizes, which no guard may cut.

    As ``torch._dynamo.mark_dynamic(x, 0, min=2, max=4096)`` does.
    """
    ranges = (getattr(given, "_dynamo_dynamic_range", ()) for given in example_inputs)
    return any((one.min, one.max) != (None, None) for several in ranges for one in several)


def _may_be_left(plan: Plan) -> bool:
    note = plan.site.annotation
    return plan.executor != "sdpa" and (note is None or note.promise)


def _cheapest(price: _Price, guards: bool) -> Plan | Rejection:
    site, candidates = price.plan.site, price.at(price.n_kv)
    hint = 'options={"decide": "sparse"} rewrites it all the same'
    length = _dimension(site.k, "n")
    if guards and isinstance(length, torch.SymInt) and length.node.hint is not None:
        limit = _limit(price)
        # Asking is what guards: the graph will serve lengths on this side of the limit.
        if limit is not None and bool(length <= limit):
            hint += f"; another graph is made from {limit + 1} keys on"
    if cheapest(candidates).name != "dense":
        return price.plan
    compared = " and ".join(candidate.shown for candidate in candidates)
    reason = f"as it is it is predicted to be faster on {price.target.kind}: {compared}"
    return Rejection(reason, hint, site.where, site.output.node)


@dataclass(frozen=True)
class _Price:
    """What the candidates of a plan cost at a number of keys."""

    plan: Plan
    target: Target
    sharing: int  # attentions of the graph with this mask, which share its layout

    @property
    def n_kv(self) -> int:
        return _hint(self.plan.site.k, "n")

    def at(self, n_kv: int) -> tuple[Candidate, Candidate]:
        """The program as it is, and what is planned."""
        plan, target = self.plan, self.target
        if self._grows:
            n_kv = _rounded(n_kv)
        work = self._work(n_kv)
        selection = plan.lifted.selection
        if selection is None:
            return dense(target, work), blocks(target, work, self._coverage(work))
        kept = int(selection.most) * selection.unit_kv if selection.most.isdecimal() else 0
        return dense(target, work), lists(target, work, kept)

    @property
    def _grows(self) -> bool:
        return isinstance(_dimension(self.plan.site.k, "n"), torch.SymInt)

    def _work(self, n_kv: int) -> Workload:
        site = self.plan.site
        n_q = _hint(site.q, "n")
        if isinstance(_dimension(site.q, "n"), torch.SymInt) and n_q == self.n_kv:
            n_q = n_kv
        features = _hint(site.q, "d") + _hint(site.v, "d")
        operands = (example_value(x.node) for x in (site.q, site.k, site.v))
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
        sizes = _hint(site.q, "b"), _hint(site.q, "h"), n_q, n_kv
        return Workload(*sizes, features, trained, site.kind == "eager")

    def _coverage(self, work: Workload) -> Coverage:
        lifted = self.plan.lifted
        pairs = self._pairs(work)
        if lifted.program is not None:
            # The example says how much is left of what the predicate leaves possible.
            here = self._pairs(self._work(self.n_kv))
            seen = _VISITED * here if lifted.visited is None else lifted.visited
            pairs = seen * pairs / here if here else seen
        sizes = {B: work.batch, H: work.heads}
        free = lifted.mask.predicate.free_symbols
        classes = 1
        for symbol, size in sizes.items():
            classes *= size if symbol in free else 1
        read = sum(_elements(axes.axes, work) for axes in lifted.dense)
        changes = bool(lifted.mask.tables) or lifted.mask.n_sizes > 0 or self._grows
        made = 1 / self.sharing if changes else 0.0
        return Coverage(pairs, classes, made, read)

    def _pairs(self, work: Workload) -> float:
        """Pairs in blocks that the predicate leaves possible, for each query."""
        plan = self.plan
        if plan.split is not None and _rounded(work.n_kv) == _rounded(self.n_kv):
            return plan.split.cost.total  # the choice of views has asked already
        _, split = choose_views(
            plan.lifted.mask,
            n_q=work.n_q,
            n_kv=work.n_kv,
            batch=work.batch,
            heads=work.heads,
            sizes=(0,) * plan.lifted.mask.n_sizes,
            block=(plan.spec.block_q, plan.spec.block_kv),
            shapes=block_shapes(self.target.kind),
        )
        return split.cost.total


def _limit(price: _Price) -> int | None:
    """The number of keys, near the example's, up to which one answer is best and beyond it another.

    One is enough: what is saved grows with the length, and what is spent does not.
    """

    def sparse(n_kv: int) -> bool:
        return cheapest(price.at(n_kv)).name != "dense"

    here = _rounded(price.n_kv)
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


def _rounded(n: int) -> int:
    """The next power of two: lengths between two of them are decided alike."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def _elements(axes: tuple[str, ...], work: Workload) -> int:
    sizes = {"b": work.batch, "h": work.heads, "q": work.n_q, "kv": work.n_kv, "": 1}
    count = 1
    for axis in axes:
        count *= sizes[axis]
    return count


def _dimension(operand: Operand, axis: str) -> int | torch.SymInt:
    if axis not in operand.axes:
        return 1
    size: int | torch.SymInt = example_value(operand.node).shape[operand.axes.index(axis)]
    return size


def _hint(operand: Operand, axis: str) -> int:
    size = _dimension(operand, axis)
    if isinstance(size, torch.SymInt):
        return _UNKNOWN if size.node.hint is None else int(size.node.hint)
    return int(size)
