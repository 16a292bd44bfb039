"""Layout: the blocks that every view of a mask visits, and how many pairs it allows."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr, evaluate
from sparse_compile.layout import superset
from sparse_compile.layout.block_layout import PARTIAL, BlockLayout, Load
from sparse_compile.layout.build import build_layout, candidates, device_layout, quick_layout
from sparse_compile.layout.builders import BUILDERS
from sparse_compile.layout.listed import listed_load
from sparse_compile.layout.schedule import Schedule, make_schedule
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec import AttentionSpec

#: Entries of the score matrix evaluated at once.
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of each view of a mask; views are disjoint and together are the mask.

    Attributes:
        spec: the mask and its views.
        views: for each view, its blocks.
        batch, heads: of the problem.
        tables: the tensors that the mask reads.
        sizes: the integers that it reads.
        worklists: the schedules of the sections over queries and then of those over keys, of each
            the two tensors of :attr:`Schedule.packed`; empty where they are made when asked for.
    """

    spec: AttentionSpec
    views: tuple[BlockLayout, ...]
    batch: int
    heads: int
    tables: tuple[Tensor, ...] = field(default=(), repr=False)
    sizes: tuple[int, ...] = ()
    worklists: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def n_q(self) -> int:
        """Number of queries."""
        return self.views[0].n_q

    @property
    def n_kv(self) -> int:
        """Number of keys."""
        return self.views[0].n_kv

    @property
    def nnz_blocks(self) -> int:
        """Visited blocks, summed over views and classes (synchronises with the device)."""
        return sum(view.nnz_blocks for view in self.views)

    @property
    def visited_pairs(self) -> int:
        """(b, h, q, kv) inside visited blocks, counting only those that exist."""
        return sum(
            view.visited_pairs * (self.batch // view.batches) * (self.heads // view.heads)
            for view in self.views
        )

    @property
    def allowed_pairs(self) -> int:
        """(b, h, q, kv) that the mask allows, counted exactly; follows the visited blocks."""
        return sum(
            mask_pairs(
                self.spec.part_mask(part), view, self.batch, self.heads, self.tables, self.sizes
            )
            for part, view in zip(self.spec.parts, self.views, strict=True)
        )

    @property
    def density(self) -> float:
        """Allowed pairs over all pairs."""
        return self.allowed_pairs / max(self.batch * self.heads * self.n_q * self.n_kv, 1)

    @property
    def block_density(self) -> float:
        """Visited blocks over all blocks of [n_q, n_kv], averaged over batch and heads."""
        rows, cols = -(-self.n_q // self.spec.block_q), -(-self.n_kv // self.spec.block_kv)
        return sum(view.nnz_blocks / max(view.classes, 1) for view in self.views) / (rows * cols)

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors."""
        return sum(view.nbytes for view in self.views)

    @functools.cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What those who run it make of it, once."""
        return {}

    def schedules(
        self, axis: str, members: int, workers: int, device: torch.device
    ) -> tuple[Schedule, ...]:
        """The worklists of the sections of a kernel whose lines are blocks of ``axis``.

        Those that the layout was given, else made once.

        Args:
            axis: ``"q"`` or ``"kv"``.
            members: heads times batch entries that the kernel runs for.
            workers: programs that run at a time.
            device: where the kernel runs.
        """
        key = axis, members, workers
        if key not in self.derived:
            made = self._unpacked(axis) if self.worklists else None
            self.derived[key] = made or _schedules(self, axis, members, workers, device)
        found: tuple[Schedule, ...] = self.derived[key]
        return found

    def _unpacked(self, axis: str) -> tuple[Schedule, ...]:
        over_queries = 2 * len(self.spec.sections("q"))
        given = self.worklists[slice(over_queries) if axis == "q" else slice(over_queries, None)]
        return tuple(map(Schedule.unpack, given[::2], given[1::2]))

    def utilisation(self, members: int, workers: int) -> float:
        """Modelled share of the workers' time that is busy in the forward, until the last is done.

        Args:
            members: heads times batch entries.
            workers: programs that run at a time: twice the multiprocessors of a GPU.
        """
        works = self.schedules("q", members, workers, self.views[0].rows.start.device)
        times = [int(work.costs.sum()) * members for work in works]
        used = [work.utilisation(members, workers) for work in works]
        total = sum(time / max(share, 1e-9) for time, share in zip(times, used, strict=True))
        return sum(times) / total if total else 1.0

    def problems(self) -> tuple[Problem, ...]:
        """What each view's blocks follow from."""
        shape = ProblemShape(self.batch, self.heads, self.n_q, self.n_kv)
        return problems_of(self.spec, shape, self.sizes)


def problems_of(
    spec: AttentionSpec, shape: ProblemShape, sizes: Sequence[int]
) -> tuple[Problem, ...]:
    """What the blocks of each view of a spec follow from, for a problem of this shape."""
    return tuple(
        Problem.of(spec.part_mask(part), shape, (part.q, part.kv), sizes, part.listed)
        for part in spec.parts
    )


def _schedules(
    layout: Layout, axis: str, members: int, workers: int, device: torch.device
) -> tuple[Schedule, ...]:
    sections, problems = layout.spec.sections(axis), layout.problems()
    loads = [_known_load(view, axis) for view in layout.views]
    if all(
        load is None and _is_bounded(problem) for load, problem in zip(loads, problems, strict=True)
    ):
        return _schedules_of_problems(problems, axis, sections, members, workers, device)
    found = [
        load or (_load(problem, axis) if _is_bounded(problem) else _counted(view, axis))
        for view, problem, load in zip(layout.views, problems, loads, strict=True)
    ]
    summed = [Load.sum([found[v] for v in views]) for views in sections]
    return tuple(make_schedule(load, members, workers, device) for load in summed)


def _known_load(view: BlockLayout, axis: str) -> Load | None:
    return listed_load(view, axis) if view.listed else view.lines(axis).load


def _is_bounded(problem: Problem) -> bool:
    """Whether the host knows how many blocks lines may visit, whatever the tables hold."""
    return problem.is_static or superset.is_narrow(problem)


def _counted(view: BlockLayout, axis: str) -> Load:
    """The room of each line; waits for the device."""
    return Load.of(view.lines(axis).start.cpu().long().diff())


@functools.lru_cache(maxsize=256)
def _schedules_of_problems(
    problems: tuple[Problem, ...],
    axis: str,
    sections: tuple[tuple[int, ...], ...],
    members: int,
    workers: int,
    device: torch.device,
) -> tuple[Schedule, ...]:
    loads = [Load.sum([_load(problems[v], axis) for v in views]) for views in sections]
    return tuple(make_schedule(load, members, workers, device) for load in loads)


@functools.lru_cache(maxsize=256)
def _load(problem: Problem, axis: str) -> Load:
    """How many blocks each line visits at most, known on the host."""
    found = candidates(problem, torch.device("cpu"))
    return Load.of((found.row_start if axis == "q" else found.col_start).long().diff())


def build_views(
    spec: AttentionSpec,
    shape: ProblemShape,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    device: torch.device | str = "cpu",
    counted: bool = True,
) -> Layout:
    """The layout of a spec's mask, view by view.

    Args:
        spec: the mask and its views.
        shape: of the problem.
        tables, sizes: what the mask reads, as for :func:`sparse_compile.layout.build_layout`.
        device: where the lists are made.
        counted: on a GPU, whether the host may wait for the number of blocks, which takes least
            time and space. Otherwise it waits only where the blocks that the predicate leaves
            possible are too many to list.
    """
    device, numbers = torch.device(device), tuple(map(int, sizes))
    views = []
    for problem in problems_of(spec, shape, numbers):
        views.append(_view(problem, tables, device, counted))
    return Layout(spec, tuple(views), shape.batch, shape.heads, tuple(tables), numbers)


def _view(
    problem: Problem, tables: Sequence[Tensor], device: torch.device, counted: bool
) -> BlockLayout:
    # Narrow ones have room for every possible block, so that nothing waits for counts.
    listed = not problem.is_static and superset.is_narrow(problem)
    if BUILDERS.get(device) is None:
        return build_layout(problem, tables, device)
    if counted or not listed:
        return device_layout(problem, tables, device)
    quick = quick_layout(problem, tables, device)
    return build_layout(problem, tables, device) if quick is None else quick


def mask_pairs(
    mask: MaskExpr,
    layout: BlockLayout,
    batch: int,
    heads: int,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> int:
    """The number of (b, h, q, kv) that ``mask`` allows.

    FULL blocks count by their area, PARTIAL ones by evaluating the predicate in them, so the cost
    follows the layout. Synchronises with the device of ``layout``, where ``tables`` must be.

    >>> from sparse_compile.expr import KV, Q
    >>> from sparse_compile.layout import Problem, ProblemShape, build_layout
    >>> causal = MaskExpr(KV <= Q)
    >>> layout = build_layout(Problem.of(causal, ProblemShape(1, 2, 100, 100), (16, 16)))
    >>> mask_pairs(causal, layout, batch=1, heads=2) == 2 * (100 * 101 // 2)
    True
    """
    area = layout.block_q * layout.block_kv
    total = int(layout.rows.counts[..., 1].sum(dtype=torch.int64)) * area
    for c in range(layout.classes):
        total += _partial_pairs(mask, layout, c, tables, sizes)
    return total * (batch // layout.batches) * (heads // layout.heads)


def _partial_pairs(
    mask: MaskExpr, layout: BlockLayout, c: int, tables: Sequence[Tensor], sizes: Sequence[int]
) -> int:
    r, k, kind = layout.rows.entries(c)
    r, k = r[kind == PARTIAL], k[kind == PARTIAL]
    b, h = (torch.tensor(value, device=r.device) for value in divmod(c, layout.heads))
    within_q = torch.tensor(layout.q.offsets(), device=r.device)[:, None]
    within_kv = torch.tensor(layout.kv.offsets(), device=r.device)
    at_once = max(1, _PAIRS_AT_ONCE // (layout.block_q * layout.block_kv))
    total = 0
    for rows, cols in zip(torch.split(r, at_once), torch.split(k, at_once), strict=True):
        q = layout.q.base(rows, layout.n_q)[:, None, None] + within_q
        kv = layout.kv.base(cols, layout.n_kv)[:, None, None] + within_kv
        where = {"b": b, "h": h, "q": q, "kv": kv}
        allowed = evaluate(mask, where, layout.n_q, layout.n_kv, tables, sizes)
        total += int(((q < layout.n_q) & (kv < layout.n_kv) & allowed).sum())
    return total
