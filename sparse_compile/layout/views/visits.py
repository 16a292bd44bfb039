"""How many pairs a view visits, estimated in milliseconds without listing its blocks.

As :func:`superset.rectangles`, but where a mask has too much of an outline, only a sample of the
PARTIAL rectangles is followed, each standing for several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.layout.intervals import point
from sparse_compile.layout.superset import Problem, children, partial_and_full

#: PARTIAL rectangles that are subdivided at each step.
_FOLLOWED = 1024
_FIRST = 4096
_HEADS = 64


@dataclass(frozen=True)
class Visits:
    """Of one view, on average over the heads.

    Attributes:
        pairs: (q, kv) in visited blocks.
        full: those in FULL blocks.
    """

    pairs: float
    full: float

    def __add__(self, other: Visits) -> Visits:
        return Visits(self.pairs + other.pairs, self.full + other.full)

    def __mul__(self, factor: float) -> Visits:
        return Visits(self.pairs * factor, self.full * factor)


def visits(problem: Problem, accuracy: int = 1) -> Visits:
    """The pairs that a problem's view visits; tables can hold anything.

    Args:
        problem: the predicate and the orders.
        accuracy: how many times more rectangles than usual are followed.

    >>> from sparse_compile.expr import KV, MaskExpr, Q
    >>> from sparse_compile.layout.superset import ProblemShape
    >>> shape = ProblemShape(1, 1, 64, 64)
    >>> visits(Problem.of(MaskExpr(KV <= Q), shape, (16, 16))).pairs == 10 * 16 * 16
    True
    """
    random = torch.Generator().manual_seed(0)
    heads = torch.randperm(problem.heads, generator=random)[:_HEADS]
    rows, cols = problem.grid
    size = 1
    while -(-rows // size) * -(-cols // size) * heads.numel() > _FIRST and size < max(rows, cols):
        size *= 2
    corners = torch.arange(0, rows, size), torch.arange(0, cols, size), heads
    at = torch.cartesian_prod(*corners)
    total, weight = Visits(0, 0), problem.q.block * problem.kv.block / max(heads.numel(), 1)
    while True:
        partial, full = _classified(problem, at, size)
        area = float(_existing(problem, at[full], size).sum()) * weight
        total += Visits(area, area)
        at = at[partial]
        if size == 1 or not at.shape[0]:
            return total + Visits(at.shape[0] * weight, 0)
        count = at.shape[0]
        at = _sample(at, _FOLLOWED * accuracy, random)
        weight *= count / at.shape[0]
        size //= 2
        at = torch.stack(children(problem, size, *at.unbind(1)), 1)


def _classified(problem: Problem, at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which squares are PARTIAL, and which FULL, though they may stick out."""
    r, c, h = at.unbind(1)
    verdict = problem.verdict(problem.digits(r, c, size), h=point(h, problem.heads))
    return partial_and_full(torch.ones_like(r, dtype=torch.bool), *verdict)


def _existing(problem: Problem, at: Tensor, size: int) -> Tensor:
    """How many blocks of each square exist."""
    rows, cols = problem.grid
    return (rows - at[:, 0]).clamp(max=size) * (cols - at[:, 1]).clamp(max=size)


def _sample(at: Tensor, most: int, random: torch.Generator) -> Tensor:
    """Not more than ``most`` of the squares, one out of each of equal stretches of the list."""
    count = at.shape[0]
    if count <= most:
        return at
    places = torch.arange(most) + torch.rand(most, generator=random, dtype=torch.float64)
    return at[(places * (count / most)).long().clamp(max=count - 1)]
