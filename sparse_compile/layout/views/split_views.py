"""Split a mask into views: disjoint parts, each in orders in which it is blockwise dense.

Any split is correct, since the parts are disjoint and together are the mask; which one is chosen is
a matter of cost only. Costs are in pairs visited per query row by blocks of 64 or more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sympy

from sparse_compile.expr import MaskExpr
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.layout.views.terms import periods, terms, without
from sparse_compile.layout.views.view_candidates import Blocks, Orders, candidates, neighbours
from sparse_compile.layout.views.visits import Visits, visits
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.block_shape import GPU_SHAPES, BlockShape, given_shape
from sparse_compile.spec.view import Order, View

#: Writing, reading and merging the partial result of a row, in pairs.
MERGE_PAIRS = 256
#: Reading rows in another order than the plain one takes longer.
REORDERED = 1.1
#: Fewer views, plain orders and larger blocks unless the alternative is this much cheaper.
WORTHWHILE = 0.95
#: Orders of each term that are weighed against each other.
_KEPT = 3


@dataclass(frozen=True)
class ViewCost:
    """What a split costs, in pairs per query row.

    Attributes:
        visited: pairs in visited blocks, the estimate of :func:`visits`.
        views: number of views.
        weighed: the same, weighed by the block shape and the order of each view.
        merge: for merging the results of views with different orders of queries.
        plain: total cost of the whole mask as one view in plain order.
        why: the decision in a sentence.
    """

    visited: float
    views: int
    weighed: float
    merge: float
    plain: float
    why: str = ""

    @property
    def total(self) -> float:
        """What splits are compared by."""
        return self.weighed + self.merge


@dataclass(frozen=True)
class Split:
    """The views of a mask.

    Attributes:
        views: disjoint parts that together are the mask, all with the same block shape.
        cost: what they cost.
        texts: what each view is, in words.
    """

    views: tuple[View, ...]
    cost: ViewCost
    texts: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why these views, where the mask has a period that another order might have used."""
        periodic = bool(periods(sympy.Or(*(view.predicate for view in self.views))))
        return self.cost.why if periodic else ""

    @property
    def is_plain(self) -> bool:
        """Whether it is the whole mask in plain order."""
        return len(self.views) == 1 and self.views[0].is_natural


@functools.lru_cache(maxsize=256)
def split_views(
    mask: MaskExpr,
    shape: ProblemShape,
    *,
    block: tuple[int, int] | None,
    sizes: tuple[int, ...] = (),
    shapes: tuple[BlockShape, ...] = GPU_SHAPES,
) -> Split:
    """The cheapest views of ``mask``.

    They hold for any lengths, sizes and tables; only their cost is that of the given ones.

    Args:
        mask: the predicate.
        shape: of the problem.
        block: queries and keys per block; None to choose.
        sizes: the integers that the mask reads.
        shapes: the block shapes to choose from, the default first; larger ones never visit fewer
            pairs.

    >>> from sparse_compile.expr import KV, FloorMod, Q
    >>> strided = (KV <= Q) & ((Q - KV < 128) | sympy.Eq(FloorMod(Q - KV, 128), 0))
    >>> shape = ProblemShape(1, 1, 16384, 16384)
    >>> split = split_views(MaskExpr(strided), shape, block=(64, 64))
    >>> split.texts
    ('plain', 'q and kv by residue mod 128')
    >>> split.views[1].predicate
    (kv <= q) & (-kv + q >= 128) & Eq(FloorMod(-kv + q, 128), 0)
    """
    best: Split | None = None
    for tile in [given_shape(block, shapes)] if block else shapes:
        search = Search(mask, shape, (tile.q, tile.kv), sizes, tile.cost)
        if best is None:
            best, full = search.best()
        elif tile.cost * full + best.cost.merge < WORTHWHILE * best.cost.total:
            # Smaller blocks visit at least what is FULL now.
            other, _ = search.best()
            if other.cost.total < WORTHWHILE * best.cost.total:
                best = other
    assert best is not None
    return best


@dataclass(frozen=True)
class Search:
    """The search with one block shape.

    Attributes:
        mask, shape, sizes: as for :func:`split_views`.
        block: queries and keys per block.
        pair_cost: what a pair costs in such blocks.
    """

    mask: MaskExpr
    shape: ProblemShape
    block: tuple[int, int]
    sizes: tuple[int, ...] = ()
    pair_cost: float = 1
    _priced: dict[tuple[sympy.Basic, Orders, int], Visits] = field(default_factory=dict)

    @property
    def blocks(self) -> Blocks:
        """What blocks are made of."""
        return Blocks(*self.block, self.shape.n_q, self.shape.n_kv)

    def best(self) -> tuple[Split, float]:
        """The cheapest split, and how many pairs per row are FULL in it."""
        whole = self.mask.predicate
        plain = View(whole, *self.blocks.plain)
        options: list[tuple[View, ...]] = [(plain,)]
        if periods(whole) and self.shape.n_q and self.shape.n_kv:
            options += self.splits()
        priced = [self._cost(views) for views in options]
        best = 0
        for number, (cost, _) in enumerate(priced):
            if cost.total < WORTHWHILE * priced[best][0].total:
                best = number
        (cost, full), views = priced[best], options[best]
        cost = _explained(cost, priced[0][0].total)
        return Split(views, cost, tuple(map(view_text, views))), full

    def visits(self, predicate: sympy.Basic, orders: Orders, accuracy: int = 1) -> Visits:
        """Per query row."""
        key = predicate, orders, accuracy
        if key not in self._priced:
            part = MaskExpr(predicate, self.mask.tables, self.mask.n_sizes)
            problem = Problem.of(part, self.shape, orders, self.sizes)
            # A block of fewer queries costs as much as a whole one.
            rows = max(-(-self.shape.n_q // self.block[0]) * self.block[0], 1)
            self._priced[key] = visits(problem, accuracy) * (1 / rows)
        return self._priced[key]

    def weighed(self, predicate: sympy.Basic, orders: Orders, accuracy: int = 1) -> float:
        """The cost per query row of a part in these orders."""
        penalty = 1 if all(order.is_natural for order in orders) else REORDERED
        return self.visits(predicate, orders, accuracy).pairs * penalty * self.pair_cost

    def _cost(self, views: Sequence[View]) -> tuple[ViewCost, float]:
        parts = [(view.predicate, (view.q, view.kv)) for view in views]
        total = sum((self.visits(*part, accuracy=4) for part in parts), Visits(0, 0))
        weighed = sum(self.weighed(*part, accuracy=4) for part in parts)
        merge = _merge({view.q for view in views})
        return ViewCost(total.pairs, len(views), weighed, merge, 0), total.full

    def splits(self) -> list[tuple[View, ...]]:
        """The cheapest split of each number of views."""
        parts = terms(self.mask.predicate)
        found = [self._orders(part) for part in parts]
        common = dict.fromkeys(
            orders for kept in found for orders in kept[:1] if all(o.is_complete for o in orders)
        )
        common.setdefault(self.blocks.plain)
        costs = [
            {orders: self.weighed(part, orders) for orders in dict.fromkeys([*kept, *common])}
            for part, kept in zip(parts, found, strict=True)
        ]
        chosen = _assignments(costs)
        splits = [self.views(parts, assignment) for assignment in chosen]
        return list(dict.fromkeys(splits))

    def _orders(self, part: sympy.Basic) -> list[Orders]:
        """The cheapest orders of a term, cheapest first."""
        costs: dict[Orders, float] = {}
        if not periods(part):
            return [self.blocks.plain]
        for orders in candidates(part, self.blocks):
            costs.setdefault(orders, self.weighed(part, orders))
        best = min(costs, key=costs.__getitem__)
        while True:
            near = {other: self.weighed(part, other) for other in neighbours(best, self.blocks)}
            costs.update(near)
            closest = min(near, key=near.__getitem__, default=best)
            # Less is within the error of the estimate.
            if costs[closest] >= 0.97 * costs[best]:
                break
            best = closest
        return sorted(costs, key=costs.__getitem__)[:_KEPT]

    def views(
        self, parts: Sequence[sympy.Basic], assignment: tuple[Orders, ...]
    ) -> tuple[View, ...]:
        """The terms as disjoint views, each in its orders; terms in the same ones share a view."""
        groups: dict[Orders, list[sympy.Basic]] = {}
        for part, orders in zip(parts, assignment, strict=True):
            groups.setdefault(orders, []).append(part)
        if len(groups) == 1:
            return (View(self.mask.predicate, *next(iter(groups))),)
        views: list[View] = []
        earlier: list[sympy.Basic] = []
        # A plain part stays FULL where it is; and what reaches every token comes first.
        for orders in sorted(groups, key=_precedence):
            own = [without(part, earlier) for part in groups[orders]]
            views.append(View(sympy.Or(*own), *orders))
            earlier += groups[orders]
        return tuple(view for view in views if view.predicate != sympy.false)


def _precedence(orders: Orders) -> tuple[bool, bool, bool]:
    q, kv = orders
    return not q.is_complete, not (q.is_natural and kv.is_natural), not kv.is_complete


def _merge(q_orders: Iterable[object]) -> float:
    return MERGE_PAIRS * (len(set(q_orders)) - 1)


def _assignments(costs: Sequence[dict[Orders, float]]) -> list[tuple[Orders, ...]]:
    """For each number of views, which orders each term takes in the cheapest split.

    Args:
        costs: for each term, its cost in each order that is possible for it.
    """
    pool = list(dict.fromkeys(orders for cost in costs for orders in cost))
    result = []
    for size in range(1, min(len(costs), 3) + 1):
        taken = [_taken(costs, chosen) for chosen in itertools.combinations(pool, size)]
        possible = [entry for entry in taken if entry]
        if possible:
            result.append(min(possible, key=lambda entry: entry[0])[1])
    if len(costs) > 3:
        result.append(tuple(min(cost, key=cost.__getitem__) for cost in costs))
    return result


def _taken(
    costs: Sequence[dict[Orders, float]], chosen: Sequence[Orders]
) -> tuple[float, tuple[Orders, ...]] | None:
    """The total cost with only these orders, and which one each term takes; None: impossible."""
    takes, total = [], 0.0
    for cost in costs:
        possible = [orders for orders in chosen if orders in cost]
        if not possible:
            return None
        takes.append(min(possible, key=cost.__getitem__))
        total += cost[takes[-1]]
    return total + _merge(q for q, _ in takes), tuple(takes)


def _explained(cost: ViewCost, plain: float) -> ViewCost:
    if cost.total == plain:
        why = f"no other order visits enough fewer than {cost.visited:.0f} pairs per query"
    else:
        views = "1 view" if cost.views == 1 else f"{cost.views} views"
        why = (
            f"{views}: {cost.visited:.0f} pairs per query, which cost as much as "
            f"{cost.total:.0f} in plain order, instead of {plain:.0f}"
        )
    return replace(cost, plain=plain, why=why)


def choose_views(
    mask: MaskExpr,
    shape: ProblemShape,
    block: tuple[int, int] | None = None,
    shapes: tuple[BlockShape, ...] = GPU_SHAPES,
) -> tuple[AttentionSpec, Split]:
    """The spec of a mask, in the views that cost least, and why.

    The choice is one of cost: the spec is right for any lengths and sizes. So they are rounded up
    to powers of two here, and a new length seldom means a new choice.

    Args:
        mask: the predicate.
        shape: the problem to choose for.
        block: queries and keys per block; None to choose.
        shapes: the block shapes to choose from, as a generator has kernels for them; the default
            is that of GPUs.

    >>> from sparse_compile.expr import KV, Q
    >>> spec, split = choose_views(MaskExpr(KV <= Q), ProblemShape(1, 1, 1000, 1000))
    >>> (spec.block_q, spec.block_kv), spec.views, split.texts
    ((64, 64), (), ('plain',))
    """
    shape = shape._replace(n_q=rounded(shape.n_q), n_kv=rounded(shape.n_kv))
    # Run-time integers are offsets and windows; which, only their values would tell.
    split = split_views(mask, shape, block=block, sizes=(0,) * mask.n_sizes, shapes=shapes)
    first = split.views[0]
    views = () if split.is_plain else split.views
    found = AttentionSpec(mask, block_q=first.q.block, block_kv=first.kv.block, coverage=views)
    return found, split


def rounded(n: int) -> int:
    """The next power of two: lengths between two of them are decided alike.

    >>> rounded(1000), rounded(1024), rounded(0)
    (1024, 1024, 0)
    """
    return 1 << (n - 1).bit_length() if n > 0 else 0


def view_text(view: View) -> str:
    """The orders of a view, for people.

    >>> from sparse_compile.expr import KV, Q
    >>> from sparse_compile.spec.view import natural
    >>> view_text(View(KV <= Q, natural(64), Order((8, 8), (128,), (0, 1), ((120, 128),))))
    'keys 120..127 of every 128'
    >>> view_text(View(KV <= Q, *[Order((8, 8), (256,), (0, 1))] * 2))
    'tiles of 8 x 8 on a grid of width 256'
    """
    q, kv = _words(view.q), _words(view.kv)
    if q == kv:
        together = q if q.startswith("tiles ") else f"q and kv {q}"
        return together if q else "plain"
    return " and ".join(side for side in (_side("queries", q), _side("keys", kv)) if side)


def _side(name: str, words: str) -> str:
    if not words:
        return ""
    return f"{name} in {words}" if words.startswith("tiles ") else f"{name} {words}"


def _words(order: Order) -> str:
    """How one side is put into blocks; empty for the plain order."""
    if order.is_natural:
        return ""
    box = " x ".join(map(str, order.box))
    if len(order.radices) > 1:
        return f"tiles of {box} on a grid of planes of {' x '.join(map(str, order.radices))}"
    (radix,), ((lo, hi),) = order.radices, order.windows
    if not order.is_complete:
        return f"{lo}..{hi - 1} of every {radix}"
    if order.box[1] == 1:
        return f"by residue mod {radix}"
    return f"tiles of {box} on a grid of width {radix}"
